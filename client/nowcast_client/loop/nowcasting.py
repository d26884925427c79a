"""What is done with snapshots, nowcasts and patches of one training; when, an `Agreement` decides."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

from nowcast_proto.messages import NowcastJob
from nowcast_proto.rules.verdict import Verdict

from nowcast_client.errors import AttachError
from nowcast_client.loop.agreement import Agreement
from nowcast_client.loop.cadence import Timetable
from nowcast_client.loop.gate import Gate
from nowcast_client.loop.patching import Patcher
from nowcast_client.loop.report import Reporter
from nowcast_client.loop.steps import Steps
from nowcast_client.loop.trial import Trials
from nowcast_client.loop.windows import Windows
from nowcast_client.settings import Cadence, Mode, Patching
from nowcast_client.tensors.patch import Patch
from nowcast_client.wire.session import mint
from nowcast_client.wire.uploader import Arrived, Failed, Uploaded

if TYPE_CHECKING:
    from nowcast_client.loop.wiring import Wirer

log = logging.getLogger("nowcast")
WRITTEN = "the weights were written between two steps"


class Nowcasting:
    """The operations of nowcasting one training.

    Args:
        mode: ``on``, ``shadow`` or ``off``.
        timetable: When snapshots are due, and how far ahead nowcasts look.
        steps: The steps of the training.
        report: Counts and tells.
        windows: Snapshots and nowcasts on their way.
        patcher: The live weights.
        trials: Losses, and the patch on trial.
        gate: What speaks against asking.
        cadence: How long to wait for a nowcast, and how late it may be.
        patching: How a nowcast is taken.
        job: What every nowcast asks for alike.

    Attributes:
        agreement: Decides when; set once it is known.
        wirer: Finds out how the network is wired; None once that is settled.
        last_snapshot: Step of the newest snapshot.
    """

    agreement: Agreement
    wirer: Wirer | None = None

    def __init__(
        self,
        mode: Mode,
        timetable: Timetable,
        steps: Steps,
        report: Reporter,
        windows: Windows,
        patcher: Patcher,
        trials: Trials,
        gate: Gate,
        cadence: Cadence,
        patching: Patching,
        job: NowcastJob,
    ) -> None:
        self.mode: Mode = mode
        self.timetable = timetable
        self.steps = steps
        self.report = report
        self.windows = windows
        self.patcher = patcher
        self.trials = trials
        self.gate = gate
        self.cadence, self.patching, self._job = cadence, patching, job
        self.last_snapshot = 0

    @property
    def is_on(self) -> bool:
        """Whether anything is done at all."""
        return self.mode != "off"

    @property
    def stale_steps(self) -> int:
        """Most steps a nowcast may be late."""
        given = self.cadence.stale_steps
        return self.timetable.period // 5 if given is None else given

    def snapshot_due(self, step: int) -> bool:
        """Whether a snapshot is to be taken after a step."""
        return self.timetable.snapshot_due(step) and step > self.last_snapshot

    # ------------------------------------------------------------------ there

    def snapshot(self) -> None:
        """Take a snapshot; where it fills the window, ask for the nowcast."""
        ring = self.windows.ring
        if ring is None:
            return
        step = self.steps.step
        self.gate.note(self.patcher.rate)
        slot = ring.take(self.patcher.layout, step, self.agreement.fill())
        if slot is None:
            self.ring_full()
            return
        self.last_snapshot = step
        self.report.counts["snapshots"] += 1
        if self.windows.add(slot):
            self._ask(step)

    def ring_full(self) -> None:
        """There is no room for a snapshot."""
        trouble = self.windows.trouble
        self.windows.drop()
        self.report.skip(f"every snapshot buffer is still in use: {trouble or 'the service is slower than the period'}")

    def _ask(self, step: int) -> None:
        reason = f"{WRITTEN}: the window starts again" if self.patcher.watch.found_late() else ""
        reason = reason or self.gate.objection(step, self.patcher.rate, lambda: self.trials.trend(step))
        if reason:
            self.windows.drop()
            self.report.skip(reason)
            return
        self.report.counts["asked"] += 1
        scale = self._job.update_scale * self.gate.scale
        update = {"nowcast": mint(), "k": self.timetable.horizon(step), "update_scale": scale}
        self.windows.ask(self._job.model_copy(update=update))
        if self.cadence.wait > 0:
            self.agreement.asked()

    # --------------------------------------------------------------- and back

    def wait(self) -> None:
        """Wait for the nowcast that was asked for, no longer than the caller allowed."""
        self.report.wait_seconds += self.windows.await_(self.cadence.wait)
        self.collect()

    def collect(self) -> None:
        """Take what the uploader has finished."""
        for result in self.windows.results():
            if isinstance(result, Uploaded):
                self.report.emit("snapshot", taken=result.step, bytes=result.nbytes, seconds=result.seconds)
            elif isinstance(result, Failed) and result.kind == "resume":
                log.info("step %d: the window starts again: %s", self.steps.step, result.error)
            elif isinstance(result, Failed):
                hopeless = self.report.failed(result.kind, result.error)
                if hopeless and self.is_on:
                    self.turn_off(hopeless)
            else:
                patch, found = result.patch, result.found
                self.report.counts["arrived"] += 1
                if found.left_alone:
                    names = ", ".join(found.left_alone)
                    self.report.once(
                        "left", f"left alone, as they hardly move against their size: {names}", logging.INFO
                    )
                self.report.emit(
                    "nowcast",
                    of=patch.step,
                    k=patch.horizon,
                    seconds=result.seconds,
                    stretch=found.stretch,
                    predictor=result.predictor,
                )
        self._give_up_late()

    def _give_up_late(self) -> None:
        """Call off a nowcast that can only be rejected: its buffers are the next window's."""
        windows, late = self.windows, self.steps.step - self.windows.asked_at
        if windows.asked is not None and windows.arrived is None and late > self.stale_steps:
            trouble = windows.trouble or "the service has not answered"
            windows.abandon()
            self.report.skip(f"it did not come within {self.stale_steps} steps of its last snapshot: {trouble}")

    def consider(self) -> None:
        """Write a nowcast that has arrived, or say why not."""
        arrived, step = self.windows.arrived, self.steps.step
        if arrived is None or self.trials.open is not None or self.turned_away(arrived, step):
            return
        first = self.trials.reference_from(step)
        if not self.rebind():
            self.reject(arrived.patch, "the model's parameters were replaced")
            return
        try:
            self.patcher.save(state=self.trials.settings is not None)
            with arrived.window.trace.span("patch", step=step, horizon=arrived.patch.horizon):
                self.patcher.write(arrived.patch)
        finally:
            self.windows.used(arrived)
        self.patched(arrived.patch, first, arrived.found.stretch)

    def turned_away(self, arrived: Arrived, written: int) -> bool:
        """Whether a nowcast that arrived is not to be written, after step ``written``; says why."""
        patch = arrived.patch
        behind = written - patch.step
        if behind > self.stale_steps:
            late = f"it came {behind} steps after its last snapshot, more than {self.stale_steps}"
            hint = "" if self.cadence.wait > 0 else "; wait= lets the training wait that long for it"
            self.reject(patch, late + hint)
        elif self.mode == "shadow":
            self.report.counts["shadow"] += 1
            self.windows.tell(patch, "shadow", None, self.steps.step)
            self.report.emit("shadow", of=patch.step, k=patch.horizon, stretch=arrived.found.stretch)
        elif self.trials.blind(self.steps.step):
            self.report.counts["shadow"] += 1
            self.windows.tell(patch, "shadow", "no loss reported", self.steps.step)
            self.report.skip("no loss is reported, so a patch could not be judged: call observe(loss), or trial=False")
        else:
            return False
        self.windows.used(arrived)
        return True

    def reject(self, patch: Patch, reason: str) -> None:
        """A nowcast is not written."""
        self.report.counts["rejected"] += 1
        self.windows.tell(patch, "rejected", reason, self.steps.step)
        self.report.emit("rejected", of=patch.step, reason=reason)
        self.report.once("rejected", f"a nowcast was not used: {reason}")

    def patched(self, patch: Patch, first: int, stretch: float) -> None:
        """A patch has been written; ``first`` is the first step whose loss says what was normal before."""
        step = self.steps.step
        self.windows.drop()  # snapshots from before the patch and after it make no trajectory
        self.report.counts["patched"] += 1
        if self.patching.refresh is not None:
            with self.report.guarded("refresh"):
                self.patching.refresh()
        self.windows.tell(patch, "applied", None, step)
        self.report.emit("patched", of=patch.step, k=patch.horizon, behind=step - patch.step, stretch=stretch)
        self.trials.begin(patch, step, first)

    # --------------------------------------------------------------- verdicts

    def judge(self) -> None:
        """Look at the patch on trial, and decide when its window is over."""
        verdict = self.trials.verdict(self.steps.step)
        if verdict is not None and self.rebind():
            self.conclude(verdict)

    def conclude(self, verdict: Verdict) -> None:
        """Keep the patch on trial, or undo it."""
        trial, step = self.trials.open, self.steps.step
        if trial is None:
            return
        give_up = self.trials.close(verdict, step)
        self.gate.tried(kept=verdict.keep)
        told = {"of": trial.patch.step, "reason": verdict.reason, "expected": verdict.expected}
        told |= {"level": verdict.level, "tolerance": verdict.tolerance}
        if verdict.keep:
            self.report.counts["kept"] += 1
            self.windows.tell(trial.patch, "kept", verdict.reason, step)
            self.report.emit("kept", **told)
            return
        self.patcher.undo()
        lost = step - trial.patched_at
        self.report.harm_steps += lost
        self.report.counts["rolled_back"] += 1
        self.windows.abandon()
        self.windows.drop()
        self.windows.tell(trial.patch, "rolled_back", verdict.reason, step)
        self.report.emit("rolled_back", lost=lost, **told)
        log.warning(
            "the nowcast of step %d was undone at step %d: %s; %d steps are lost",
            *(trial.patch.step, step, verdict.reason, lost),
        )
        if give_up:
            self.turn_off("two nowcasts in a row were undone")

    def unjudged(self) -> None:
        """The patch on trial can be neither kept nor undone any more."""
        self.report.counts["unjudged"] += self.trials.open is not None
        self.trials.open = None

    # ------------------------------------------------------------- new begins

    def rebind(self) -> bool:
        """Follow parameters that were replaced since attach; give up where they are others altogether.

        Returns:
            Whether they are still the same objects.
        """
        try:
            changed = self.patcher.rebind()
        except AttachError as exc:
            self.turn_off(f"the model is no longer the one it was attached to: {exc}")
            return False
        if changed:
            self.windows.follow(self.patcher.spec, self.patcher.layout)
            self.unjudged()
            self.report.skip(f"{changed}; the window starts again")
        return not changed

    def look(self) -> None:
        """Start again where the weights are no longer those of the last step."""
        if self.patcher.watch.jumped(self.patcher.layout, self.steps.step):
            self.jumped(WRITTEN)

    def jumped(self, what: str) -> None:
        """What the weights were before is no part of their way any more."""
        reason = f"{what}: the window starts again"
        if not self.agreement.may_restart(reason):
            return
        windows = self.windows
        under_way = bool(windows.current.steps or windows.asked or windows.arrived or self.trials.open)
        self.restart()
        if under_way:
            self.report.skip(reason)

    def restart(self) -> None:
        """Begin with nothing: no window, no nowcast, no trial."""
        self.unjudged()
        self.trials.settled_at = self.steps.step
        if self.patcher.average is not None:
            self.patcher.average.restart()
        self.windows.abandon()
        self.windows.drop()

    def turn_off(self, reason: str) -> None:
        """Nothing is done any more."""
        if not self.agreement.may_end(reason):
            return
        self.mode = "off"
        self.windows.abandon()
        self.windows.drop()
        self.report.emit("off", reason=reason)
        log.warning("nowcasting is off: %s", reason)
        warnings.warn(f"nowcasting is off: {reason}", RuntimeWarning, stacklevel=2)
