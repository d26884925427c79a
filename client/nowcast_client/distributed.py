"""Several ranks that train one model: all of them patch in the same step, or none does.

Rank 0 speaks to the service. The ranks agree over a process group of their own (gloo, in host memory), at steps all of
them know: where a snapshot is due, at a few steps after a nowcast was asked for, and where a patch on trial is judged.
Every one of these meetings ends within a stated time; a rank that does not come stops the nowcasting on the others,
never their training.

With replicated parameters (DDP) a patch is one broadcast. With sharded ones (FSDP2, ``fully_shard``: DTensor) rank 0
collects a snapshot tensor by tensor and gives out a patch shard by shard; no other rank ever holds a whole tensor.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from nowcast_proto.errors import NowcastError
from torch import Tensor
from torch.optim import Optimizer

from nowcast_client.errors import AttachError, PatchRefused
from nowcast_client.hook import Handle, _Trial
from nowcast_client.layout import Layout, layout_of, local
from nowcast_client.patch import Patch, apply
from nowcast_client.snapshot import Slot
from nowcast_client.trial import Verdict, hopeless, judge
from nowcast_client.uploader import Window

log = logging.getLogger("nowcast")

PATIENCE = 30.0
"""Seconds a meeting of the ranks may take."""
LOOKS = 2
"""Times the ranks look at a patch on trial before its window is over."""
TAKE, ASK, PATCH = 1, 2, 4


class RanksApart(NowcastError):
    """The ranks did not meet in time; none of them patches any more."""

    code = "ranks_apart"


class Ranks:
    """The ranks that train together, and a channel of their own. Making one is collective.

    Args:
        group: Their process group; None for the default one.
        wait: Seconds rank 0 may wait for a nowcast while the others wait for it.

    Raises:
        AttachError: Not all of them came.
    """

    def __init__(self, group: Any, wait: float = 0.0) -> None:
        self.members: list[int] = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        self.size = len(self.members)
        self.rank = self.members.index(dist.get_rank())
        seconds = max(PATIENCE, 2.0 * wait)
        try:
            self.group = dist.new_group(
                self.members, timeout=timedelta(seconds=seconds), backend="gloo", use_local_synchronization=True
            )
        except RuntimeError as exc:
            raise AttachError(
                f"not all {self.size} ranks came to attach: {exc}",
                expected="attach on every rank",
                remedy="call attach on all ranks, at the same place; group= names those that train one model",
            ) from exc

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
        except Exception:
            if handle is not None:
                handle.close()
            raise
        if handle is None:
            raise AttachError("nothing was attached")
        return handle

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over all ranks.

        Raises:
            RanksApart: Not all ranks came in time.
        """
        tensor = torch.tensor([int(value) for value in values], dtype=torch.int64)
        self._bounded(lambda: dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group))
        return [int(value) for value in tensor.tolist()]

    def total(self, values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The sum over all ranks.

        Raises:
            RanksApart: As `largest`.
        """
        tensor = torch.from_numpy(values.copy())
        self._bounded(lambda: dist.all_reduce(tensor, group=self.group))
        summed: np.ndarray[Any, np.dtype[np.float64]] = tensor.numpy()
        return summed

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's host tensor to everyone, in place."""
        data = tensor.view(-1).view(torch.uint8)
        self._bounded(lambda: dist.broadcast(data, self.members[0], group=self.group))

    def send(self, tensor: Tensor, rank: int) -> None:
        """A contiguous host tensor to another rank."""
        data = tensor.view(-1).view(torch.uint8)
        self._bounded(lambda: dist.send(data, self.members[rank], group=self.group))

    def receive(self, tensor: Tensor, rank: int) -> Tensor:
        """Fill a contiguous host tensor with what another rank sends."""
        data = tensor.view(-1).view(torch.uint8)
        self._bounded(lambda: dist.recv(data, self.members[rank], group=self.group))
        return tensor

    def close(self) -> None:
        """Leave."""
        if dist.is_initialized():
            dist.destroy_process_group(self.group)

    def _bounded(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as exc:  # gloo's timeouts and lost peers
            raise RanksApart(f"the ranks did not meet: {exc}", expected="all of them at the same step") from exc


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
        self._ill = ""
        self._agreed = False  # whether turning off has been agreed on
        self._regions: dict[str, list[Region]] = {}
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

    def close(self, timeout: float = 2.0) -> None:
        """Detach this rank; close all ranks at the same place."""
        closed = self._closed
        super().close(timeout)
        if self._closed and not closed:
            with self._guarded("close"):
                self._ranks.close()

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

    def _part(self, reason: str) -> None:
        """Turn off for good; all ranks do, or cannot be asked any more."""
        self._agreed = True
        self._trial = None
        super()._turn_off(reason)

    def _advance(self) -> None:
        self._collect()
        try:
            self._meet()
        except RanksApart as exc:
            self._counts[f"failed: ranks: {exc.code}"] += 1
            self._part(str(exc))

    def _meet(self) -> None:
        """Whatever is due at this step, if anything is; all ranks come to the same answer."""
        snapshot = self._cadence.snapshot_due(self.step) and self.step > self._last_snapshot
        trial = self._trial
        judged = trial is not None and self._looked_at(trial)
        if not (snapshot or judged or self._polled()):
            return
        wish = self._agree(snapshot)
        if wish is None:
            return
        if judged and trial is not None:
            self._watch(trial)
        if wish & PATCH and self._trial is None:
            self._patch_together()
        if wish & TAKE:
            self._snapshot_together(wish)

    def _looked_at(self, trial: _Trial) -> bool:
        window = self._trial_settings.window if self._trial_settings else 1
        age = self.step - trial.patched_at
        return age >= window or age % max(1, window // LOOKS) == 0

    def _polled(self) -> bool:
        """Whether the ranks look at this step for a nowcast: 1, 2, 4, … steps after it was asked for."""
        if self._asked_at is None:
            return False
        late = self.step - self._asked_at
        return 0 < late <= self._stale_steps and (late & (late - 1) == 0 or late == self._stale_steps)

    def _agree(self, snapshot: bool) -> int | None:
        """What rank 0 wants done now; None where nobody does anything."""
        lost = self._lost()
        wish, step, horizon, first = self._wish(snapshot)
        ill, lost_any, most, least, wish, *self._said = self._ranks.largest(
            [bool(self._ill), bool(lost), self.step, -self.step, wish, step, horizon, first]
        )
        if most != -least:
            self._part(f"the ranks have made different numbers of steps, {-least} to {most}")
            return None
        if ill:
            self._part(self._ill or "another rank gave it up")
            return None
        if lost_any:
            self._asked_at = None
            self._abandon()
            self._drop_window()
            if self._trial is not None:
                self._trial = None
                self._counts["unjudged"] += 1
            self._skip(lost or "the parameters of another rank are not the ones that were attached to")
            return None
        return wish

    def _wish(self, snapshot: bool) -> tuple[int, int, int, int]:
        """Of rank 0: what it wants done, and of a patch its step, horizon and first reference step."""
        if not self._ranks.speaks or self._ill:
            return 0, 0, 0, 0
        wish, said = 0, (0, 0, 0)
        if self._arrived is not None and self._trial is None and not self._turned_away(self._arrived):
            wish |= PATCH
            said = (self._arrived.patch.step, self._arrived.patch.horizon, self._reference_from())
        if snapshot and self._ring is not None:
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
            live = layout_of(self._model, self._optimizers, self.spec, sharded=True)
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
        if live.same_tensors(self._layout) and live.movable == self._layout.movable:
            return ""
        if any(_is_shard(live.parameters[n]) != _is_shard(p) for n, p in self._layout.parameters.items()):
            return "the parameters are not sharded at the moment"
        self._layout = live
        return "the model's parameters were replaced; the window starts again"

    # ------------------------------------------------------------- snapshots

    def _exchanged_regions(self) -> dict[str, list[Region]]:
        """Of every sharded tensor, each rank's part."""
        found = {}
        for name, parameter in self._layout.parameters.items():
            if _is_shard(parameter):
                own = region_of(parameter)
                row = torch.zeros((self._ranks.size, 2 * parameter.dim()), dtype=torch.int64)
                row[self._ranks.rank] = torch.tensor([*own.start, *own.size])
                flat = self._ranks.largest(row.view(-1).tolist())
                rows = torch.tensor(flat).view(row.shape).tolist()
                half = parameter.dim()
                found[name] = [Region(tuple(r[:half]), tuple(r[half:])) for r in rows]
        return found

    def _snapshot_together(self, wish: int) -> None:
        if wish & ASK:
            self._asked_at = self.step
        self._last_snapshot = self.step - 1
        if self._ranks.speaks:
            self._snapshot()
        else:
            self._note_rate()
            if self._regions:
                self._contribute()
        self._last_snapshot = self.step
        if wish & ASK and self._wait > 0:
            again = self._agree(snapshot=False)
            if again is not None and again & PATCH and self._trial is None:
                self._patch_together()

    def _rebind(self) -> bool:
        return True  # looked after in _lost, before anything was agreed on

    def _take(self) -> Slot | None:
        if self._ring is None:
            return None
        return self._ring.take(self._layout, self.step, self._gather if self._regions else None)

    def _gather(self, slot: Slot) -> None:
        """Rank 0: every tensor whole, into the slot; one at a time."""
        with torch.no_grad():
            for name, parameter in self._layout.parameters.items():
                buffer = slot.buffers[name]
                if name not in self._regions:
                    buffer.copy_(parameter.detach())
                    continue
                for rank, region in self._senders(name):
                    if rank == 0:
                        buffer[region.where].copy_(local(parameter.detach()))
                    else:
                        part = torch.empty(region.size, dtype=buffer.dtype)
                        buffer[region.where].copy_(self._ranks.receive(part, rank))

    def _contribute(self) -> None:
        """Another rank: its parts of a snapshot, to rank 0."""
        with torch.no_grad():
            for name, parameter in self._layout.parameters.items():
                if name in self._regions and any(rank == self._ranks.rank for rank, _ in self._senders(name)):
                    part = local(parameter.detach()).to("cpu", self._wire_dtype or parameter.dtype)
                    self._ranks.send(part.contiguous(), 0)

    def _senders(self, name: str) -> list[tuple[int, Region]]:
        """Which rank gives which part; parts that several hold come from the first."""
        given: dict[Region, int] = {}
        for rank, region in enumerate(self._regions[name]):
            if not region.empty:
                given.setdefault(region, rank)
        return [(rank, region) for region, rank in given.items()]

    def _await(self, window: Window) -> None:
        uploader = self._uploader
        if uploader is None:
            return
        with uploader.arrived:
            uploader.arrived.wait_for(lambda: uploader.answered(window), self._wait)
        self._collect()

    # ---------------------------------------------------------------- patches

    def _patch_together(self) -> None:
        """Stage on every rank, vote, write, vote again; undo where any vote was a no."""
        step, horizon, first = self._said
        self._asked_at = None
        arrived, self._arrived, self._asked = self._arrived, None, None
        whole = arrived.patch.deltas if arrived is not None else None
        deltas, trouble = self._stage(whole)
        nowcast_id = arrived.patch.nowcast_id if arrived is not None else ""
        patch = Patch(nowcast_id, step, horizon, deltas)
        try:
            if not trouble:
                self._save()
        except Exception as exc:  # told to the others below
            trouble = f"what the patch overwrites could not be saved: {exc}"
        refused = self._vote(trouble)
        if not refused:
            try:
                apply(patch, self._layout, self._backup, self._copies)
            except PatchRefused as exc:
                trouble = str(exc)
            try:
                refused = self._vote(trouble)
            except RanksApart:
                self._undo()
                raise
            if refused:
                self._undo()
        if arrived is not None:
            self._release(arrived.window)
        if refused:
            self._reject(patch, trouble or "another rank could not take it")
        else:
            self._patched(patch, first, arrived.stretch if arrived is not None else 0.0)

    def _undo(self) -> None:
        self._backup.restore_parameters(self._layout)
        self._copies.restore()

    def _vote(self, trouble: str) -> bool:
        """Whether any rank is in trouble."""
        return bool(self._ranks.largest([bool(trouble)])[0])

    def _stage(self, whole: Any) -> tuple[dict[str, Tensor], str]:
        """This rank's part of every tensor's change, in host memory, and what is wrong with it."""
        deltas: dict[str, Tensor] = {}
        trouble = ""
        for name, parameter in self._layout.parameters.items():
            if name not in self._regions:
                part = whole[name] if whole is not None else torch.empty(parameter.shape, dtype=self._reply_dtype)
                part = part.contiguous()
                self._ranks.broadcast(part)
            else:
                part = self._scattered(name, whole)
            deltas[name] = part
            if not trouble and not bool(torch.isfinite(part).all()):
                trouble = f"the nowcast of {name!r} has NaN or infinity on rank {self._ranks.rank}"
            if not trouble and part.shape != local(parameter.detach()).shape:
                trouble = f"this rank holds another part of {name!r} than it did"
        return deltas, trouble

    def _scattered(self, name: str, whole: Any) -> Tensor:
        regions = self._regions[name]
        if whole is None:
            part = torch.empty(regions[self._ranks.rank].size, dtype=self._reply_dtype)
            return part if regions[self._ranks.rank].empty else self._ranks.receive(part, 0)
        for rank, region in enumerate(regions):
            if rank and not region.empty:
                self._ranks.send(whole[name][region.where].contiguous(), rank)
        mine: Tensor = whole[name][regions[0].where].contiguous()
        return mine

    # --------------------------------------------------------------- verdicts

    def _watch(self, trial: _Trial) -> None:
        settings = self._trial_settings
        if settings is None:
            self._trial = None
            return
        over = self.step >= trial.patched_at + settings.window
        self._losses.read(block=over)
        _, after = self._losses.trace.between(trial.patched_at, self.step)
        lost = bool(self._ranks.largest([hopeless(after)])[0])
        if not (over or lost):
            return
        steps, losses = self._pooled(trial.reference_from, self.step)
        before = steps < trial.patched_at
        verdict = judge(
            steps[before],
            losses[before],
            steps[~before],
            losses[~before],
            patched_at=trial.patched_at,
            settings=settings,
        )
        if lost:
            verdict = Verdict(False, "the loss of a rank is not finite", *[float("nan")] * 3)
        # The same numbers gave the same verdict everywhere; one that would undo the patch settles it all the same.
        if self._vote("" if verdict.keep else verdict.reason) and verdict.keep:
            verdict = Verdict(False, "another rank would undo it", verdict.expected, verdict.level, verdict.tolerance)
        self._conclude(trial, verdict)

    def _pooled(self, first: int, last: int) -> tuple[Any, Any]:
        """Mean losses over the ranks that reported any, by step."""
        rows = np.zeros((2, last - first + 1))
        steps, losses = self._losses.trace.between(first, last)
        places = steps.astype(int) - first
        rows[0, places] = losses
        rows[1, places] = 1.0
        total, count = self._ranks.total(rows)
        known = count > 0
        return (np.arange(first, last + 1)[known]).astype(np.float64), total[known] / count[known]


_SHARED = ("mode", "trial", "stale", "stale_steps", "wait", "wire_dtype", "acts", "strict")
"""Settings every rank must have alike."""


def _is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


__all__ = ["DistributedHandle", "Layout", "Ranks", "RanksApart", "Region", "region_of"]
