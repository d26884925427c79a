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

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from nowcast_client.errors import AttachError
from nowcast_client.loop.nowcasting import Nowcasting
from nowcast_client.ranks.channel import Pending, Ranks, RanksApart
from nowcast_client.ranks.meeting import ASK, PATCH, TAKE, Meeting, reported
from nowcast_client.ranks.regions import is_shard
from nowcast_client.ranks.shards import Shards
from nowcast_client.ranks.times import Times
from nowcast_client.tensors.patch import Patch
from nowcast_client.tensors.snapshot import Slot
from nowcast_client.wire.uploader import Arrived


class Closes(Protocol):
    """What is attached."""

    def close(self) -> None:
        """Detach."""


H = TypeVar("H", bound=Closes)


def on_all(ranks: Ranks, build: Callable[[], tuple[H, Together]]) -> H:
    """Attach on all ranks or on none; collective.

    Raises:
        AttachError: Another rank could not, or is set up otherwise.
        Exception: What ``build`` raised here.
    """
    built: list[tuple[H, Together]] = []
    error = None
    try:
        built.append(build())
    except Exception as exc:  # whatever it was, the others must not wait for this rank
        error = exc
    mark = built[0][1].mark() if built else 0
    try:
        failed, most, least = ranks.largest([error is not None, mark, -mark])
        if error is not None:
            raise error
        if failed:
            raise AttachError("another rank could not attach", remedy="its own error says why")
        if most != -least:
            raise AttachError(
                "the ranks are set up differently",
                expected="the same model, period, total_steps, mode and trial on every rank",
            )
        built[0][1].join()
    except Exception as exc:
        for handle, _ in built:
            handle.close()
        raise (ranks.not_all(exc) if isinstance(exc, RanksApart) else exc) from exc.__cause__
    return built[0][0]


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


class Together:
    """See `nowcast_client.loop.agreement.Agreement`.

    Args:
        ranks: All of them.
        nowcasting: What is done here; only rank 0 has a session with the service.
        shards: Moves tensors between them.
        told: The settings every rank must have alike.
    """

    def __init__(self, ranks: Ranks, nowcasting: Nowcasting, shards: Shards, told: str) -> None:
        self._ranks = ranks
        self._work = nowcasting
        self._shards = shards
        self._told = told
        self._times = Times(nowcasting)
        self._meeting: Meeting | None = None
        self._spreading: Spreading | None = None
        self._said = (0, 0, 0)  # of a patch that rank 0 wants written: its step, horizon and first reference step
        self._ill = ""  # why this rank must turn off; told at the next meeting
        self._apart = ""  # why this rank's parameters could not be read or written; told at the next meeting
        self._agreed = False  # whether turning off has been agreed on
        self.speaks = ranks.speaks

    @property
    def waited(self) -> float:
        """Seconds spent waiting for the other ranks so far."""
        return self._ranks.waited

    def mark(self) -> int:
        """A number that is the same where network and settings are the same."""
        patcher = self._work.patcher
        told = f"{patcher.spec.digest()} {self._work.timetable} {self._told} {sorted(patcher.layout.movable)}"
        return int.from_bytes(hashlib.blake2b(told.encode(), digest_size=7).digest(), "little")

    def join(self) -> None:
        """Learn which rank holds what; collective, once all ranks have attached."""
        self._shards.learn(self._work.patcher.layout)
        windows = self._work.windows
        windows.in_one_piece = not self._shards.regions
        if windows.uploader is not None:
            windows.uploader.in_one_piece = windows.in_one_piece

    # ------------------------------------------------------- what it is asked

    def advance(self) -> None:
        """Carry out what was agreed on for this step; call the meeting for the next."""
        self._work.collect()
        try:
            self._meet()
            if self._work.is_on and self._times.due(self._step + 1):
                self._meeting = self._call(self._step + 1)
        except RanksApart as exc:
            self._work.report.counts[f"failed: ranks: {exc.code}"] += 1
            self._part(str(exc))

    def forget(self) -> None:
        """Forget what was planned; the exchanges end by themselves, on every rank alike."""
        spreading, self._meeting, self._spreading, self._times.asked_at = self._spreading, None, None, None
        for pending in spreading.pending if spreading is not None else ():
            pending.wait()

    def fill(self) -> Callable[[Slot], None] | None:
        """Gathers the others' shards."""
        layout, sound = self._work.patcher.layout, not self._apart
        return (lambda slot: self._shards.gather(layout, slot, sound=sound)) if self._shards.regions else None

    def asked(self) -> None:
        """Wait; whether it is written is agreed on afterwards."""
        self._work.wait()

    def may_restart(self, reason: str) -> bool:
        """All ranks start again, at their next meeting."""
        self._apart = self._apart or reason
        return False

    def may_end(self, reason: str) -> bool:
        """Only once all know it."""
        if not self._agreed:
            self._ill = self._ill or reason
        return self._agreed

    # ------------------------------------------------------------- agreement

    @property
    def _step(self) -> int:
        return self._work.steps.step

    def _part(self, reason: str) -> None:
        """Turn off for good; all ranks do, or cannot be asked any more."""
        self._agreed = True
        self._work.trials.open = None
        self._work.turn_off(reason)

    def _meet(self) -> None:
        """Carry out what the ranks agreed on for this step; all of them come to the same answer."""
        if self._spreading is not None:
            self._patch_together()
        meeting, self._meeting = self._meeting, None
        if meeting is None or meeting.step != self._step:
            # Nobody looked ahead: the first step after attach or resume, or steps at which nobody acted.
            meeting = self._call(self._step) if self._work.is_on and self._times.due(self._step) else None
        wish = self._agree(meeting) if meeting is not None else 0
        if wish & PATCH and self._work.trials.open is None:
            self._spreading = self._spread()
            if self._times.waits or wish & TAKE:
                self._patch_together()
        if wish & TAKE:
            self._snapshot_together(wish)

    def _call(self, step: int) -> Meeting:
        """Call a meeting for a step."""
        self._apart = self._apart or self._lost()
        wish, *said = self._wish(step)
        trials = self._work.trials
        over = trials.over(step)
        trials.losses.read(block=over)
        undone = self._work.report.counts["rolled_back"]
        ours = [bool(self._ill), bool(self._apart), trials.lost(), self._step, -self._step, undone, -undone, wish]
        told = torch.tensor([*ours, *said], dtype=torch.int64)
        pending = [self._ranks.reduce(told, dist.ReduceOp.MAX)]
        first, losses = 0, None
        if over and trials.open is not None:
            first = trials.open.reference_from
            losses = reported(trials.losses.trace, first, step)
            pending.append(self._ranks.reduce(losses, dist.ReduceOp.SUM))
        return Meeting(step, told, first, losses, tuple(pending))

    def _agree(self, meeting: Meeting) -> int:
        """What rank 0 wants done now; 0 where nobody does anything."""
        ill, apart, gone, most, least, undone, as_many, wish, *said = meeting.answer()
        self._said = (said[0], said[1], said[2])
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
            self._times.asked_at = None
            self._work.restart()
            self._work.report.skip(reason or "the parameters of another rank are not the ones that were attached to")
            return 0
        self._judge(meeting, bool(gone))
        return wish

    def _wish(self, step: int) -> tuple[int, int, int, int]:
        """Of rank 0: what it wants done at a step, and of a patch its step, horizon and first reference step."""
        work, windows = self._work, self._work.windows
        if not self.speaks or self._ill:
            return 0, 0, 0, 0
        wish, said = 0, (0, 0, 0)
        arrived = windows.arrived
        free = arrived is not None and work.trials.open is None
        if arrived is not None and free and not work.turned_away(arrived, step + self._times.on_the_way):
            wish |= PATCH
            said = (arrived.patch.step, arrived.patch.horizon, work.trials.reference_from(self._step))
        if work.snapshot_due(step) and windows.ring is not None:
            if windows.ring.free:
                full = windows.full_with_next() and not wish & PATCH
                wish |= TAKE | (ASK if full else 0)
            else:
                work.ring_full()
        return (wish, *said)

    def _lost(self) -> str:
        """Why this rank's parameters cannot be read or written now; empty where they can."""
        patcher, windows = self._work.patcher, self._work.windows
        try:
            live = patcher.live()
        except AttachError as exc:
            # FSDP shows whole tensors, which no optimizer holds, while its parameters are gathered.
            if self._shards.regions:
                return "the parameters are not sharded at the moment"
            self._ill = self._ill or f"the model is no longer the one it was attached to: {exc}"
            return self._ill
        try:
            patcher.copies.check(live)
        except AttachError as exc:
            self._ill = self._ill or str(exc)
            return self._ill
        if live is patcher.layout:
            return ""
        if any(is_shard(live.parameters[n]) != is_shard(p) for n, p in patcher.layout.parameters.items()):
            return "the parameters are not sharded at the moment"
        changed, patcher.layout = patcher.layout.change_to(live), live
        if windows.uploader is not None:
            windows.uploader.layout = live
        return f"{changed}; the window starts again"

    # ------------------------------------------------- snapshots and patches

    def _snapshot_together(self, wish: int) -> None:
        work, windows, layout = self._work, self._work.windows, self._work.patcher.layout
        self._apart = self._apart or self._lost()
        if wish & ASK:
            self._times.asked_at = self._step
        if not self.speaks:
            work.gate.note(work.patcher.rate)
            if self._shards.regions:
                self._shards.contribute(layout, self._step, sound=not self._apart)
        elif not self._apart:
            work.snapshot()
        else:
            # What the others send has to go somewhere.
            fill = self.fill()
            slot = windows.ring.take(layout, self._step, fill) if fill is not None and windows.ring else None
            if slot is not None:
                windows.current.slots.append(slot)
            windows.drop()
        work.last_snapshot = self._step
        if (
            wish & ASK
            and self._times.waits
            and self._agree(self._call(self._step)) & PATCH
            and work.trials.open is None
        ):
            self._spreading = self._spread()
            self._patch_together()

    def _spread(self) -> Spreading:
        """Begin to give a nowcast to all ranks."""
        windows = self._work.windows
        step, horizon, first = self._said
        self._times.asked_at = None
        arrived, windows.arrived, windows.asked = windows.arrived, None, None
        patch = arrived.patch if arrived is not None else None
        deltas, pending = self._shards.spread(self._work.patcher.layout, patch, step)
        nowcast_id = patch.nowcast_id if patch is not None else ""
        return Spreading(arrived, Patch(nowcast_id, step, horizon, deltas), first, pending)

    def _patch_together(self) -> None:
        """Check and write on every rank, then vote; undo where any vote is a no."""
        spreading, self._spreading = self._spreading, None
        if spreading is None:
            return
        work, patcher = self._work, self._work.patcher
        for pending in spreading.pending:
            pending.wait()
        self._apart = self._apart or self._lost()
        trouble = self._apart or self._shards.unsound(spreading.patch, patcher.layout)
        saved = False
        try:
            if not trouble:
                patcher.save(state=work.trials.settings is not None)
                saved = True
                patcher.write(spreading.patch)
        except Exception as exc:  # told to the others, whatever it was
            trouble = str(exc) if saved else f"what the patch overwrites could not be saved: {exc}"
        refused = True
        try:
            refused = self._vote(trouble)
        finally:
            if refused and not trouble:
                patcher.undo(state=False)
        arrived = spreading.arrived
        if arrived is not None:
            work.windows.used(arrived)
        if refused:
            work.reject(spreading.patch, trouble or "another rank could not take it")
        else:
            work.patched(spreading.patch, spreading.first, arrived.found.stretch if arrived is not None else 0.0)

    def _vote(self, trouble: str) -> bool:
        """Whether any rank is in trouble."""
        return bool(self._ranks.largest([bool(trouble)])[0])

    # --------------------------------------------------------------- verdicts

    def _judge(self, meeting: Meeting, gone: bool) -> None:
        """Come to the same verdict on every rank, from the same numbers."""
        trials, trial = self._work.trials, self._work.trials.open
        if trial is None or trials.settings is None or (meeting.losses is None and not gone):
            return
        verdict = meeting.verdict(trial.patched_at, trials.settings, gone=gone)
        if not verdict.keep:
            self._apart = self._apart or self._lost()
            if self._vote(self._apart):  # nothing can be put back while a rank's parameters are not there
                self._work.unjudged()
                return
        self._work.conclude(verdict)
