"""Several ranks that train one model: all of them patch in the same step, or none does.

Rank 0 speaks to the service. The ranks agree over a process group of their own (gloo, in host memory), at steps all of
them know: where a snapshot is due, at a few steps after a nowcast was asked for, and where a patch on trial is judged.
A meeting is called one step ahead and runs beside that step's forward and backward pass, so that nobody waits for it;
so do the transfers of snapshots and patches. Only the vote on a patch that was just written holds the ranks up.
Every exchange ends within a stated time; a rank that does not come stops the nowcasting on the others, never their
training.

With replicated parameters (DDP) a patch is one broadcast. With sharded ones (FSDP2, ``fully_shard``: DTensor) rank 0
collects a snapshot shard by shard and gives out a patch shard by shard; no other rank ever holds a whole tensor.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from nowcast_proto.errors import NowcastError
from nowcast_proto.rules.verdict import Verdict, judge
from torch import Tensor
from torch.optim import Optimizer

from nowcast_client.errors import AttachError
from nowcast_client.handle import Handle, _Trial
from nowcast_client.tensors.layout import Layout, local, stirring, views
from nowcast_client.tensors.patch import Patch, apply
from nowcast_client.tensors.snapshot import Slot
from nowcast_client.wire.uploader import Arrived, Window

log = logging.getLogger("nowcast")

PATIENCE = 30.0
"""Seconds a meeting of the ranks may take."""
LOOKS = 2
"""Times the ranks look at a patch on trial before its window is over."""
TAKE, ASK, PATCH = 1, 2, 4
_GROUPS: dict[tuple[tuple[int, ...], float], tuple[Any, Any]] = {}
"""The channels there are, by members and patience, with the world they belong to. They are kept and used again: torch
names a group by how many there are, and one made after another was destroyed would find the addresses of that one."""
PIECE = 1 << 28
"""Bytes that one exchange moves at most: each piece of a large patch has `PATIENCE` of its own."""


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
            raise self._not_all(exc) from exc

    @property
    def speaks(self) -> bool:
        """Whether this rank is the one that talks to the service."""
        return self.rank == 0

    def together(self, build: Callable[[], Handle]) -> Handle:
        """Attach on all ranks or on none.

        Raises:
            AttachError: Another rank could not, or is set up otherwise.
            Exception: What ``build`` raised here.
        """
        handle, error = None, None
        try:
            handle = build()
        except Exception as exc:  # whatever it was, the others must not wait for this rank
            error = exc
        mark = handle.mark() if isinstance(handle, DistributedHandle) else 0
        try:
            failed, most, least = self.largest([error is not None, mark, -mark])
            if error is not None:
                raise error
            if failed:
                raise AttachError("another rank could not attach", remedy="its own error says why")
            if most != -least:
                raise AttachError(
                    "the ranks are set up differently",
                    expected="the same model, period, total_steps, mode and trial on every rank",
                )
            if isinstance(handle, DistributedHandle):
                handle.join()
        except Exception as exc:
            if handle is not None:
                handle.close()
            raise (self._not_all(exc) if isinstance(exc, RanksApart) else exc) from exc.__cause__
        if handle is None:
            raise AttachError("nothing was attached")
        return handle

    def _not_all(self, exc: Exception) -> AttachError:
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


@dataclass(frozen=True)
class Meeting:
    """What the ranks are asked, one step ahead.

    Attributes:
        step: The step after which the answer is carried out.
        flags: What each rank says; the largest of each once they have met.
        first: First step of ``losses``.
        losses: (2, steps) sums and counts of reported losses where a patch is judged; None elsewhere.
        pending: The exchanges.
    """

    step: int
    flags: Tensor
    first: int
    losses: Tensor | None
    pending: tuple[Pending, ...]

    def answer(self) -> list[int]:
        """The flags, once all ranks have met."""
        for pending in self.pending:
            pending.wait()
        return [int(flag) for flag in self.flags.tolist()]

    def mean_losses(self) -> tuple[Any, Any]:
        """Steps and mean losses over the ranks that reported any."""
        total, count = self.losses.numpy() if self.losses is not None else np.zeros((2, 0))
        known = count > 0
        return (self.first + np.flatnonzero(known)).astype(np.float64), total[known] / count[known]


@dataclass(frozen=True)
class Spreading:
    """A patch on its way to all ranks.

    Attributes:
        arrived: The nowcast, on rank 0.
        patch: This rank's part of it; complete once ``pending`` is.
        first: First step whose loss says what was normal before.
        pending: The exchanges.
    """

    arrived: Arrived | None
    patch: Patch
    first: int
    pending: list[Pending]


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


class DistributedHandle(Handle):
    """What `nowcast_client.attach` returns on each of several ranks.

    Args:
        ranks: All of them.
        arguments: As for `Handle`; only rank 0 has a transport.
        settings: As for `Handle`.
    """

    _sharded = True

    def __init__(self, *arguments: Any, ranks: Ranks, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._ranks = ranks
        self._settings = repr(sorted((k, str(v)) for k, v in settings.items() if k in _SHARED))
        self._asked_at: int | None = None
        self._meeting: Meeting | None = None
        self._spreading: Spreading | None = None
        self._ill = ""  # why this rank must turn off; told at the next meeting
        self._apart = ""  # why this rank's parameters could not be read or written; told at the next meeting
        self._agreed = False  # whether turning off has been agreed on
        self._regions: dict[str, list[Region]] = {}
        self._outbox: dict[str, Tensor] = {}
        self._sent: list[Pending] = []
        if not ranks.speaks:
            self._metrics = None  # one rank logs
            self._hook()
            atexit.register(self.close)

    def mark(self) -> int:
        """A number that is the same where network and settings are the same."""
        told = f"{self.spec.digest()} {self._cadence} {self._settings} {sorted(self._layout.movable)}"
        return int.from_bytes(hashlib.blake2b(told.encode(), digest_size=7).digest(), "little")

    def join(self) -> None:
        """Learn which rank holds what; collective, once all ranks have attached."""
        self._regions = self._exchanged_regions()
        if self._uploader is not None:
            self._uploader.in_one_piece = not self._regions

    def summary(self) -> dict[str, Any]:
        """See `Handle.summary`."""
        return {**super().summary(), "wait_seconds": self._wait_seconds + self._ranks.waited}

    def follow(self, *optimizers: object) -> None:
        """See `Handle.follow`; on all ranks, at the same place."""
        self._cancel()
        super().follow(*optimizers)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Handle.load_state_dict`; on all ranks, at the same place."""
        self._cancel()
        super().load_state_dict(state)

    # ------------------------------------------------------------- agreement

    def _count(self, optimizer: Optimizer) -> bool:
        found = getattr(optimizer, "found_inf", None)
        if isinstance(found, Tensor) and found.is_cuda:
            # All ranks must count alike at once; a late correction would send them to different meetings.
            if bool(local(found).item()):
                return False
            self.step += 1
            return True
        return super()._count(optimizer)

    def _turn_off(self, reason: str) -> None:
        if self._agreed:
            super()._turn_off(reason)
        else:
            self._ill = self._ill or reason

    def _jumped(self, what: str) -> None:
        # All ranks start again, at their next meeting.
        self._apart = self._apart or f"{what}: the window starts again"

    def _part(self, reason: str) -> None:
        """Turn off for good; all ranks do, or cannot be asked any more."""
        self._agreed = True
        self._trial = None
        super()._turn_off(reason)

    def _cancel(self) -> None:
        """Forget what was planned; the exchanges end by themselves, on every rank alike."""
        spreading, self._meeting, self._spreading, self._asked_at = self._spreading, None, None, None
        for pending in spreading.pending if spreading is not None else ():
            pending.wait()

    def _advance(self) -> None:
        self._collect()
        try:
            self._meet()
            if self._is_on() and self._due_at(self.step + 1):
                self._meeting = self._call(self.step + 1)
        except RanksApart as exc:
            self._counts[f"failed: ranks: {exc.code}"] += 1
            self._part(str(exc))

    def _meet(self) -> None:
        """Carry out what the ranks agreed on for this step; all of them come to the same answer."""
        if self._spreading is not None:
            self._patch_together()
        meeting, self._meeting = self._meeting, None
        if meeting is None or meeting.step != self.step:
            # Nobody looked ahead: the first step after attach or resume, or steps at which nobody acted.
            meeting = self._call(self.step) if self._is_on() and self._due_at(self.step) else None
        wish = self._agree(meeting) if meeting is not None else 0
        if wish & PATCH and self._trial is None:
            self._spreading = self._spread()
            if self._wait > 0 or wish & TAKE:
                self._patch_together()
        if wish & TAKE:
            self._snapshot_together(wish)

    def _due_at(self, step: int) -> bool:
        """Whether the ranks meet at a step."""
        return self._takes_at(step) or self._polls_at(step) or self._looks_at(step)

    def _takes_at(self, step: int) -> bool:
        return self._cadence.snapshot_due(step) and step > self._last_snapshot

    def _polls_at(self, step: int) -> bool:
        """Whether the ranks ask for the nowcast at a step: 1, 2, 4, … steps after it was asked for."""
        if self._asked_at is None:
            return False
        late, last = step - self._asked_at, self._stale_steps - self._on_the_way
        return 0 < late <= last and (late & (late - 1) == 0 or late == last)

    def _looks_at(self, step: int) -> bool:
        """Whether the ranks look at the patch on trial at a step."""
        if self._trial is None:
            return False
        window = self._trial_settings.window if self._trial_settings else 1
        age = step - self._trial.patched_at
        return age >= window or age % max(1, window // LOOKS) == 0

    @property
    def _on_the_way(self) -> int:
        """Steps between the agreement on a patch and its writing."""
        return 0 if self._wait > 0 else 1

    def _call(self, step: int) -> Meeting:
        """Call a meeting for a step."""
        self._apart = self._apart or self._lost()
        wish, *said = self._wish(step)
        trial, window = self._trial, self._trial_settings.window if self._trial_settings else 1
        over = trial is not None and step >= trial.patched_at + window
        self._losses.read(block=over)
        gone = trial is not None and self._losses.trace.lost(trial.patched_at)
        undone = self._counts["rolled_back"]
        flags = [bool(self._ill), bool(self._apart), gone, self.step, -self.step, undone, -undone, wish, *said]
        told = torch.tensor(flags, dtype=torch.int64)
        pending = [self._ranks.reduce(told, dist.ReduceOp.MAX)]
        first, losses = 0, None
        if over and trial is not None:
            first = trial.reference_from
            losses = self._reported(first, step)
            pending.append(self._ranks.reduce(losses, dist.ReduceOp.SUM))
        return Meeting(step, told, first, losses, tuple(pending))

    def _agree(self, meeting: Meeting) -> int:
        """What rank 0 wants done now; 0 where nobody does anything."""
        ill, apart, gone, most, least, undone, as_many, wish, *self._said = meeting.answer()
        if most != -least:
            self._part(f"the ranks have made different numbers of steps, {-least} to {most}")
            return 0
        if undone != -as_many:
            self._part("the ranks did not come to the same verdicts")
            return 0
        if ill:
            self._part(self._ill or "another rank gave it up")
            return 0
        if apart:
            reason, self._apart = self._apart, ""
            self._asked_at = None
            self._abandon()
            self._drop_window()
            self._unjudged()
            self._skip(reason or "the parameters of another rank are not the ones that were attached to")
            return 0
        if self._trial is not None:
            self._judge(self._trial, meeting, bool(gone))
        return wish

    def _wish(self, step: int) -> tuple[int, int, int, int]:
        """Of rank 0: what it wants done at a step, and of a patch its step, horizon and first reference step."""
        if not self._ranks.speaks or self._ill:
            return 0, 0, 0, 0
        wish, said = 0, (0, 0, 0)
        written = step + self._on_the_way
        if self._arrived is not None and self._trial is None and not self._turned_away(self._arrived, written):
            wish |= PATCH
            said = (self._arrived.patch.step, self._arrived.patch.horizon, self._reference_from())
        if self._takes_at(step) and self._ring is not None:
            if self._ring.free:
                full = len(self._window.steps) + 1 >= self._cadence.context and not wish & PATCH
                wish |= TAKE | (ASK if full else 0)
            else:
                self._drop_window()
                self._skip("every snapshot buffer is still in use: the service is slower than the period")
        return (wish, *said)

    def _lost(self) -> str:
        """Why this rank's parameters cannot be read or written now; empty where they can."""
        try:
            live = self._live()
        except AttachError as exc:
            # FSDP shows whole tensors, which no optimizer holds, while its parameters are gathered.
            if self._regions:
                return "the parameters are not sharded at the moment"
            self._ill = self._ill or f"the model is no longer the one it was attached to: {exc}"
            return self._ill
        try:
            self._copies.check(live)
        except AttachError as exc:
            self._ill = self._ill or str(exc)
            return self._ill
        if live is self._layout:
            return ""
        if any(_is_shard(live.parameters[n]) != _is_shard(p) for n, p in self._layout.parameters.items()):
            return "the parameters are not sharded at the moment"
        changed, self._layout = self._layout.change_to(live), live
        if self._uploader is not None:
            self._uploader.layout = live
        return f"{changed}; the window starts again"

    # ------------------------------------------------------------- snapshots

    def _exchanged_regions(self) -> dict[str, list[Region]]:
        """Of every sharded tensor, each rank's part."""
        sharded = {name: region_of(p) for name, p in self._layout.parameters.items() if _is_shard(p)}
        own = [number for region in sharded.values() for number in (*region.start, *region.size)]
        table = torch.zeros((self._ranks.size, len(own)), dtype=torch.int64)
        table[self._ranks.rank] = torch.tensor(own, dtype=torch.int64)
        rows = torch.tensor(self._ranks.largest(table.view(-1).tolist())).view(table.shape).tolist()
        found: dict[str, list[Region]] = {}
        place = 0
        for name, region in sharded.items():
            half = len(region.start)
            parts = [row[place : place + 2 * half] for row in rows]
            found[name] = [Region(tuple(part[:half]), tuple(part[half:])) for part in parts]
            place += 2 * half
        return found

    def _snapshot_together(self, wish: int) -> None:
        self._apart = self._apart or self._lost()
        if wish & ASK:
            self._asked_at = self.step
        self._last_snapshot = self.step - 1
        if not self._ranks.speaks:
            self._note_rate()
            if self._regions:
                self._contribute()
        elif not self._apart:
            self._snapshot()
        else:
            slot = self._take() if self._regions else None  # what the others send has to go somewhere
            if slot is not None:
                self._window.slots.append(slot)
            self._drop_window()
        self._last_snapshot = self.step
        if wish & ASK and self._wait > 0 and self._agree(self._call(self.step)) & PATCH and self._trial is None:
            self._spreading = self._spread()
            self._patch_together()

    def _rebind(self) -> bool:
        return True  # looked after in _lost, before anything was agreed on

    def _take(self) -> Slot | None:
        if self._ring is None:
            return None
        return self._ring.take(self._layout, self.step, self._gather if self._regions else None)

    def _gather(self, slot: Slot) -> None:
        """Rank 0: every tensor whole, into the slot; the others' parts arrive beside the next steps."""
        gathering = Gathering(sound=[torch.tensor([not self._apart], dtype=torch.int64)])
        contributors: set[int] = set()
        with torch.no_grad():
            for name, parameter in self._layout.parameters.items():
                buffer = slot.buffers[name]
                if name not in self._regions:
                    buffer.copy_(parameter.detach())
                    continue
                for rank, region in self._senders(name):
                    place = buffer[region.where]
                    if rank:
                        part = place if place.is_contiguous() else torch.empty(region.size, dtype=buffer.dtype)
                        gathering.pending.append(self._ranks.receive(part, rank, self.step))
                        gathering.aside += [(place, part)] if part is not place else []
                        contributors.add(rank)
                    elif not self._apart:
                        place.copy_(local(parameter.detach()))
        for rank in sorted(contributors):
            gathering.sound.append(torch.zeros(1, dtype=torch.int64))
            gathering.pending.append(self._ranks.receive(gathering.sound[-1], rank, self.step))
        slot.copied.append(gathering)

    def _contribute(self) -> None:
        """Another rank: its parts of a snapshot, to rank 0, and whether they are sound."""
        for pending in self._sent:  # long since gone; their memory is needed again
            pending.wait()
        self._sent = []
        with torch.no_grad():
            for name, parameter in self._layout.parameters.items():
                if name in self._regions and any(rank == self._ranks.rank for rank, _ in self._senders(name)):
                    size = self._regions[name][self._ranks.rank].size
                    part = self._outbox.setdefault(name, torch.empty(size, dtype=self._wire_dtype or parameter.dtype))
                    if not self._apart:
                        part.copy_(local(parameter.detach()))
                    self._sent.append(self._ranks.send(part, 0, self.step))
        if self._sent:
            self._outbox[""] = torch.tensor([not self._apart], dtype=torch.int64)
            self._sent.append(self._ranks.send(self._outbox[""], 0, self.step))

    def _senders(self, name: str) -> list[tuple[int, Region]]:
        """Which rank gives which part; parts that several hold come from the first."""
        given: dict[Region, int] = {}
        for rank, region in enumerate(self._regions[name]):
            if not region.empty:
                given.setdefault(region, rank)
        return [(rank, region) for region, rank in given.items()]

    def _await(self, window: Window) -> None:
        self._wait_for(window)

    # ---------------------------------------------------------------- patches

    def _spread(self) -> Spreading:
        """Begin to give a nowcast to all ranks."""
        step, horizon, first = self._said
        self._asked_at = None
        arrived, self._arrived, self._asked = self._arrived, None, None
        whole = arrived.patch.deltas if arrived is not None else None
        if not self._regions:
            size = self._layout.numel
            flat = arrived.patch.flat if arrived is not None else torch.empty(size, dtype=self._reply_dtype)
            if flat is None:
                raise RuntimeError("the nowcast of replicated parameters does not lie in one piece")
            deltas, pending = views(flat, self._layout), [self._ranks.broadcast(flat)]
        else:
            deltas, pending = {}, []
            for name, exchanges, part in self._scattered(whole, step):
                deltas[name] = part
                pending += exchanges
        nowcast_id = arrived.patch.nowcast_id if arrived is not None else ""
        return Spreading(arrived, Patch(nowcast_id, step, horizon, deltas), first, pending)

    def _scattered(self, whole: Any, tag: int) -> Iterator[tuple[str, list[Pending], Tensor]]:
        """Of every tensor: its name, the exchanges that bring this rank's part, and where the part arrives."""
        for name, parameter in self._layout.parameters.items():
            if name not in self._regions:
                part = whole[name].contiguous() if whole else torch.empty(parameter.shape, dtype=self._reply_dtype)
                yield name, [self._ranks.broadcast(part)], part
                continue
            own, *others = self._regions[name]
            if whole is None:
                own = self._regions[name][self._ranks.rank]
                part = torch.empty(own.size, dtype=self._reply_dtype)
                yield name, [self._ranks.receive(part, 0, tag)], part
            else:
                parts = [whole[name][region.where].contiguous() for region in others]
                exchanges = [self._ranks.send(part, rank, tag) for rank, part in enumerate(parts, 1)]
                yield name, exchanges, whole[name][own.where].contiguous()

    def _patch_together(self) -> None:
        """Check and write on every rank, then vote; undo where any vote is a no."""
        spreading, self._spreading = self._spreading, None
        if spreading is None:
            return
        for pending in spreading.pending:
            pending.wait()
        self._apart = self._apart or self._lost()
        trouble = self._apart or self._unsound(spreading.patch)
        saved = False
        try:
            if not trouble:
                self._save()
                saved = True
                apply(spreading.patch, stirring(self._layout, self._optimizers), self._backup, self._copies)
        except Exception as exc:  # told to the others, whatever it was
            trouble = str(exc) if saved else f"what the patch overwrites could not be saved: {exc}"
        refused = True
        try:
            refused = self._vote(trouble)
        finally:
            if refused and not trouble:
                self._backup.restore_parameters(self._layout)
                self._copies.restore()
        arrived = spreading.arrived
        if arrived is not None:
            self._release(arrived.window)
        if refused:
            self._reject(spreading.patch, trouble or "another rank could not take it")
        else:
            self._patched(spreading.patch, spreading.first, arrived.found.stretch if arrived is not None else 0.0)

    def _vote(self, trouble: str) -> bool:
        """Whether any rank is in trouble."""
        return bool(self._ranks.largest([bool(trouble)])[0])

    def _unsound(self, patch: Patch) -> str:
        """What is wrong with this rank's part of a patch; empty where nothing is."""
        for name, part in patch.deltas.items():
            if name in self._layout.movable and not bool(torch.isfinite(part).all()):
                return f"the nowcast of {name!r} has NaN or infinity on rank {self._ranks.rank}"
            if part.shape != local(self._layout.parameters[name].detach()).shape:
                return f"this rank holds another part of {name!r} than it did"
        return ""

    # --------------------------------------------------------------- verdicts

    def _judge(self, trial: _Trial, meeting: Meeting, gone: bool) -> None:
        """Come to the same verdict on every rank, from the same numbers."""
        settings = self._trial_settings
        if settings is None or (meeting.losses is None and not gone):
            return
        if gone:
            verdict = Verdict(False, "the loss of a rank is not finite", *[math.nan] * 3)
        else:
            steps, losses = meeting.mean_losses()
            old = steps < trial.patched_at
            verdict = judge(
                steps[old], losses[old], steps[~old], losses[~old], patched_at=trial.patched_at, settings=settings
            )
        self._conclude(trial, verdict)

    def _conclude(self, trial: _Trial, verdict: Verdict) -> None:
        if not verdict.keep:
            self._apart = self._apart or self._lost()
            if self._vote(self._apart):  # nothing can be put back while a rank's parameters are not there
                self._unjudged()
                return
        super()._conclude(trial, verdict)

    def _unjudged(self) -> None:
        self._counts["unjudged"] += self._trial is not None
        self._trial = None

    def _reported(self, first: int, last: int) -> Tensor:
        """(2, steps) this rank's losses of steps first … last, zero where there is none, and whether there is."""
        rows = torch.zeros((2, last - first + 1), dtype=torch.float64)
        steps, losses = self._losses.trace.between(first, last)
        places = torch.from_numpy(steps).long() - first
        rows[0, places] = torch.from_numpy(losses)
        rows[1, places] = 1.0
        return rows


_SHARED = ("mode", "trial", "stale", "stale_steps", "wait", "wire_dtype", "acts", "strict")
"""Settings every rank must have alike."""


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


__all__ = ["DistributedHandle", "Layout", "Ranks", "RanksApart", "Region", "region_of"]
