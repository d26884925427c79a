"""Which part of a sharded tensor which rank holds (FSDP2, ``fully_shard``: DTensor)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nowcast_client.errors import AttachError
from nowcast_client.ranks.channel import Ranks


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is a part of one that no rank holds whole."""
    return hasattr(tensor, "to_local")


@dataclass(frozen=True)
class Region:
    """The part of a tensor one rank holds: first index and size along every dimension."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def empty(self) -> bool:
        return 0 in self.size

    @property
    def where(self) -> tuple[slice, ...]:
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.size, strict=True))


def region_of(tensor: Tensor) -> Region:
    """The part of a tensor this rank holds.

    Raises:
        AttachError: It is laid out in a way that is no rectangle of the whole.
    """
    start, size = [0] * tensor.dim(), list(tensor.shape)
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import Replicate, Shard

        place = mesh.get_coordinate()
        for dimension, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
            if type(placement) is Shard:
                axis, parts = placement.dim, mesh.size(dimension)
                chunk = -(-size[axis] // parts)
                first = min(place[dimension] * chunk, size[axis])
                start[axis] += first
                size[axis] = min(chunk, size[axis] - first)
            elif type(placement) is not Replicate:
                raise AttachError(
                    f"a parameter is placed as {placement}",
                    expected="Shard or Replicate, as fully_shard places parameters",
                    remedy="tensor parallelism on top of FSDP is not supported",
                )
    return Region(tuple(start), tuple(size))


def exchanged(parameters: Mapping[str, Tensor], ranks: Ranks) -> dict[str, list[Region]]:
    """Of every sharded tensor, each rank's part; collective.

    Raises:
        RanksApart: Not all ranks came in time.
    """
    sharded = {name: region_of(p) for name, p in parameters.items() if is_shard(p)}
    own = [number for region in sharded.values() for number in (*region.start, *region.size)]
    table = torch.zeros((ranks.size, len(own)), dtype=torch.int64)
    table[ranks.rank] = torch.tensor(own, dtype=torch.int64)
    rows = torch.tensor(ranks.largest(table.view(-1).tolist())).view(table.shape).tolist()
    found: dict[str, list[Region]] = {}
    place = 0
    for name, region in sharded.items():
        half = len(region.start)
        parts = [row[place : place + 2 * half] for row in rows]
        found[name] = [Region(tuple(part[:half]), tuple(part[half:])) for part in parts]
        place += 2 * half
    return found
