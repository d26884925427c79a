"""The ranks that train one model, and a channel of their own beside the training's (gloo, in host memory)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from nowcast_proto.errors import NowcastError
from torch import Tensor

from nowcast_client.errors import AttachError

PATIENCE = 30.0
"""Seconds a meeting of the ranks may take."""
PIECE = 1 << 28
"""Bytes that one exchange moves at most: each piece of a large patch has `PATIENCE` of its own."""
_GROUPS: dict[tuple[tuple[int, ...], float], tuple[Any, Any]] = {}
"""The channels there are, by members and patience, with the world they belong to. They are kept and used again: torch
names a group by how many there are, and one made after another was destroyed would find the addresses of that one."""


class RanksApart(NowcastError):
    """The ranks did not meet in time; none of them patches any more."""

    code = "ranks_apart"


class Pending:
    """Exchanges under way. What they read and write must stay as it is until `wait` has returned."""

    def __init__(self, works: Sequence[Any], ranks: Ranks) -> None:
        self._works = list(works)
        self._ranks = ranks

    def wait(self, *, beside: bool = False) -> None:
        """Return once all of it is done.

        Args:
            beside: Another thread than the trainer's waits.

        Raises:
            RanksApart: A rank did not come in time, or is gone.
        """
        begun = time.perf_counter()
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as exc:  # gloo's timeouts and lost peers
            self._ranks.lost()
            raise RanksApart(f"the ranks did not meet: {exc}", expected="all of them at the same step") from exc
        finally:
            self._ranks.waited += 0.0 if beside else time.perf_counter() - begun
        self._works = []


class Ranks:
    """The ranks that train together, and a channel of their own. Making one is collective.

    Args:
        group: Their process group; None for the default one.
        wait: Seconds rank 0 may wait for a nowcast while the others wait for it.

    Attributes:
        rank: This one's number among them.
        size: How many they are.
        waited: Seconds spent waiting for the others so far.

    Raises:
        AttachError: Not all of them came.
    """

    def __init__(self, group: Any, wait: float = 0.0) -> None:
        self.members: list[int] = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        self.size = len(self.members)
        self.rank = self.members.index(dist.get_rank())
        self.waited = 0.0
        self._key = (tuple(self.members), max(PATIENCE, 2.0 * wait))
        world, self.group = _GROUPS.get(self._key, (None, None))
        if world is dist.group.WORLD:
            return
        try:
            self.group = dist.new_group(
                self.members, timeout=timedelta(seconds=self._key[1]), backend="gloo", use_local_synchronization=True
            )
            _GROUPS[self._key] = (dist.group.WORLD, self.group)
        except RuntimeError as exc:
            raise self.not_all(exc) from exc

    @property
    def speaks(self) -> bool:
        """Whether this rank is the one that talks to the service."""
        return self.rank == 0

    def not_all(self, exc: Exception) -> AttachError:
        """What it means for an attach that not all ranks came."""
        return AttachError(
            f"not all {self.size} ranks came to attach: {exc}",
            expected="attach on every rank",
            remedy="call attach on all ranks, at the same place; group= names those that train one model",
        )

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over all ranks.

        Raises:
            RanksApart: Not all ranks came in time.
        """
        tensor = torch.tensor([int(value) for value in values], dtype=torch.int64)
        self.reduce(tensor, dist.ReduceOp.MAX).wait()
        return [int(value) for value in tensor.tolist()]

    def reduce(self, tensor: Tensor, how: Any) -> Pending:
        """Begin to reduce a host tensor over all ranks, in place."""
        return self._begin(partial(dist.all_reduce, tensor, how, group=self.group, async_op=True))

    def broadcast(self, tensor: Tensor) -> Pending:
        """Begin to give rank 0's contiguous host tensor to everyone, in place."""
        source, group = self.members[0], self.group
        pieces = _pieces(tensor)
        return self._begin(*(partial(dist.broadcast, piece, source, group=group, async_op=True) for piece in pieces))

    def send(self, tensor: Tensor, rank: int, tag: int) -> Pending:
        """Begin to send a contiguous host tensor to another rank."""
        to, group = self.members[rank], self.group
        return self._begin(*(partial(dist.isend, piece, to, group=group, tag=tag) for piece in _pieces(tensor)))

    def receive(self, tensor: Tensor, rank: int, tag: int) -> Pending:
        """Begin to fill a contiguous host tensor with what another rank sends."""
        source, group = self.members[rank], self.group
        return self._begin(*(partial(dist.irecv, piece, source, group=group, tag=tag) for piece in _pieces(tensor)))

    def lost(self) -> None:
        """The ranks have lost each other on this channel: no later attach is to find it."""
        if _GROUPS.get(self._key, (None, None))[1] is self.group:
            del _GROUPS[self._key]

    def _begin(self, *exchanges: Callable[[], Any]) -> Pending:
        try:
            return Pending([begin() for begin in exchanges], self)
        except RuntimeError as exc:
            self.lost()
            raise RanksApart(f"the ranks cannot be reached: {exc}", expected="all of them at the same step") from exc


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor.view(-1).view(torch.uint8), PIECE) if tensor.numel() else ()
