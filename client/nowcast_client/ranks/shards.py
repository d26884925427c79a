"""Snapshots and patches of several ranks: one broadcast of replicated parameters, shard by shard of sharded ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from nowcast_proto.errors import NowcastError
from torch import Tensor

from nowcast_client.ranks.channel import Pending, Ranks, RanksApart
from nowcast_client.ranks.regions import Region, exchanged
from nowcast_client.tensors.layout import Layout, local, views
from nowcast_client.tensors.patch import Patch
from nowcast_client.tensors.snapshot import Slot


@dataclass
class Gathering:
    """A snapshot whose shards are still arriving at rank 0.

    Attributes:
        pending: The exchanges.
        aside: Parts that do not lie in one stretch of their tensor: where they belong, where they arrive.
        sound: What each rank says of its parts.
    """

    pending: list[Pending] = field(default_factory=list)
    aside: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    sound: list[Tensor] = field(default_factory=list)
    failed: str = ""

    def synchronize(self) -> None:
        """Return once the snapshot is whole. For the uploader's thread.

        Raises:
            NowcastError: A rank did not send its parts, or could not read them; so every time.
        """
        try:
            while self.pending and not self.failed:
                self.pending[0].wait(beside=True)
                self.pending.pop(0)
        except RanksApart as exc:
            self.failed = str(exc)
        if not self.failed and not all(map(bool, self.sound)):
            self.failed = "the parameters of a rank were not sharded at this step"
        if self.failed:
            raise NowcastError(self.failed)
        for place, part in self.aside:
            place.copy_(part)


class Shards:
    """Moves tensors between the ranks that hold parts of them.

    Args:
        ranks: All of them.
        wire_dtype: Dtype of snapshots; None for each parameter's own.
        reply_dtype: Dtype of patches.

    Attributes:
        regions: Of every sharded tensor, each rank's part; empty where the parameters are replicated.
    """

    def __init__(self, ranks: Ranks, wire_dtype: torch.dtype | None, reply_dtype: torch.dtype) -> None:
        self.regions: dict[str, list[Region]] = {}
        self._ranks = ranks
        self._wire_dtype = wire_dtype
        self._reply_dtype = reply_dtype
        self._outbox: dict[str, Tensor] = {}
        self._sent: list[Pending] = []

    def learn(self, layout: Layout) -> None:
        """Learn which rank holds what; collective.

        Raises:
            RanksApart: Not all ranks came in time.
        """
        self.regions = exchanged(layout.parameters, self._ranks)

    def gather(self, layout: Layout, slot: Slot, *, sound: bool) -> None:
        """Rank 0: every tensor whole, into the slot; the others' parts arrive beside the next steps."""
        gathering = Gathering(sound=[torch.tensor([sound], dtype=torch.int64)])
        contributors: set[int] = set()
        with torch.no_grad():
            for name, parameter in layout.parameters.items():
                buffer = slot.buffers[name]
                if name not in self.regions:
                    buffer.copy_(parameter.detach())
                    continue
                for rank, region in self._senders(name):
                    place = buffer[region.where]
                    if rank:
                        part = place if place.is_contiguous() else torch.empty(region.size, dtype=buffer.dtype)
                        gathering.pending.append(self._ranks.receive(part, rank, slot.step))
                        gathering.aside += [(place, part)] if part is not place else []
                        contributors.add(rank)
                    elif sound:
                        place.copy_(local(parameter.detach()))
        for rank in sorted(contributors):
            gathering.sound.append(torch.zeros(1, dtype=torch.int64))
            gathering.pending.append(self._ranks.receive(gathering.sound[-1], rank, slot.step))
        slot.copied.append(gathering)

    def contribute(self, layout: Layout, step: int, *, sound: bool) -> None:
        """Another rank: its parts of a snapshot, to rank 0, and whether they are sound."""
        for pending in self._sent:  # long since gone; their memory is needed again
            pending.wait()
        self._sent = []
        with torch.no_grad():
            for name, parameter in layout.parameters.items():
                if name in self.regions and any(rank == self._ranks.rank for rank, _ in self._senders(name)):
                    size = self.regions[name][self._ranks.rank].size
                    part = self._outbox.setdefault(name, torch.empty(size, dtype=self._wire_dtype or parameter.dtype))
                    if sound:
                        part.copy_(local(parameter.detach()))
                    self._sent.append(self._ranks.send(part, 0, step))
        if self._sent:
            self._outbox[""] = torch.tensor([sound], dtype=torch.int64)
            self._sent.append(self._ranks.send(self._outbox[""], 0, step))

    def spread(self, layout: Layout, patch: Patch | None, tag: int) -> tuple[Mapping[str, Tensor], list[Pending]]:
        """Begin to give a nowcast to all ranks.

        Args:
            layout: The live parameters.
            patch: The whole of it, on rank 0.
            tag: Tells these exchanges from others.

        Returns:
            This rank's part, complete once the exchanges are; and those.
        """
        if not self.regions:
            if patch is None:
                flat = torch.empty(layout.numel, dtype=self._reply_dtype)
            elif patch.flat is None:
                raise RuntimeError("the nowcast of replicated parameters does not lie in one piece")
            else:
                flat = patch.flat
            return views(flat, layout), [self._ranks.broadcast(flat)]
        deltas: dict[str, Tensor] = {}
        pending: list[Pending] = []
        for name, exchanges, part in self._scattered(layout, patch.deltas if patch is not None else None, tag):
            deltas[name] = part
            pending += exchanges
        return deltas, pending

    def unsound(self, patch: Patch, layout: Layout) -> str:
        """What is wrong with this rank's part of a patch; empty where nothing is."""
        for name, part in patch.deltas.items():
            if name in layout.movable and not bool(torch.isfinite(part).all()):
                return f"the nowcast of {name!r} has NaN or infinity on rank {self._ranks.rank}"
            if part.shape != local(layout.parameters[name].detach()).shape:
                return f"this rank holds another part of {name!r} than it did"
        return ""

    def _scattered(
        self, layout: Layout, whole: Mapping[str, Tensor] | None, tag: int
    ) -> Iterator[tuple[str, list[Pending], Tensor]]:
        """Of every tensor: its name, the exchanges that bring this rank's part, and where the part arrives."""
        for name, parameter in layout.parameters.items():
            if name not in self.regions:
                part = whole[name].contiguous() if whole else torch.empty(parameter.shape, dtype=self._reply_dtype)
                yield name, [self._ranks.broadcast(part)], part
                continue
            own, *others = self.regions[name]
            if whole is None:
                own = self.regions[name][self._ranks.rank]
                part = torch.empty(own.size, dtype=self._reply_dtype)
                yield name, [self._ranks.receive(part, 0, tag)], part
            else:
                parts = [whole[name][region.where].contiguous() for region in others]
                exchanges = [self._ranks.send(part, rank, tag) for rank, part in enumerate(parts, 1)]
                yield name, exchanges, whole[name][own.where].contiguous()

    def _senders(self, name: str) -> list[tuple[int, Region]]:
        """Which rank gives which part; parts that several hold come from the first."""
        given: dict[Region, int] = {}
        for rank, region in enumerate(self.regions[name]):
            if not region.empty:
                given.setdefault(region, rank)
        return [(rank, region) for region, rank in given.items()]
