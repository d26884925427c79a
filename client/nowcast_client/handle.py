"""`attach`: what a user writes. A hook on the optimizer that streams snapshots out and patches nowcasts in.

After every real optimizer step the hook counts, and at its times takes a snapshot, asks for a nowcast, writes one that
has arrived, or judges one on trial. Everything slow happens in the uploader's thread. Whatever goes wrong is logged
once per kind, counted and skipped: the training never sees an exception from here unless it asked for them
(``strict``).
"""

from __future__ import annotations

import atexit
import logging
import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from nowcast_proto.errors import (
    InvalidCheckpoint,
    InvalidSpec,
    NowcastError,
    TooLarge,
    UnsupportedArchitecture,
    UnsupportedVersion,
)
from nowcast_proto.messages import NowcastJob, WireDType
from nowcast_proto.rules.verdict import BestLevel, LossTrace, TrialSettings, Verdict, judge
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.table import DeclaredTable
from nowcast_proto.trainings import Report
from torch import Tensor, nn
from torch.optim import Optimizer

from nowcast_client.errors import AttachError
from nowcast_client.loop.cadence import MANY_NOWCASTS, MAX_HORIZON, Cadence, default_period
from nowcast_client.loop.evidence import unproven
from nowcast_client.loop.losses import LossReader
from nowcast_client.loop.reports import About, Reports
from nowcast_client.loop.savings import SMOOTHED, Alone, ahead
from nowcast_client.loop.steps import Rounds, after_backward
from nowcast_client.network import coverage
from nowcast_client.network.adapters import ADAPTER_PREDICTOR, ADAPTERS_WATCHED, adapter_spec
from nowcast_client.network.derive import derive_spec
from nowcast_client.tensors.copies import Copies
from nowcast_client.tensors.layout import WIRE_DTYPES, Layout, fingerprint, innermost, layout_of, stirring
from nowcast_client.tensors.patch import Backup, Patch, apply
from nowcast_client.tensors.snapshot import Ring, Slot
from nowcast_client.tensors.watch import Watch
from nowcast_client.wire.address import given_url
from nowcast_client.wire.http import HttpTransport
from nowcast_client.wire.session import Session, mint
from nowcast_client.wire.transport import Retry, Transport
from nowcast_client.wire.uploader import Arrived, Failed, Uploaded, Uploader, Window

if TYPE_CHECKING:
    from nowcast_client.ranks.distributed import Ranks

log = logging.getLogger("nowcast")

Mode = Literal["on", "shadow", "off"]
Stale = Literal["delta", "overwrite", "reject"]
Acts = Literal["after_step", "when_told"]
STATE_VERSION = 1
HOPELESS = (InvalidSpec, UnsupportedArchitecture, UnsupportedVersion, TooLarge, InvalidCheckpoint)
"""Answers that trying again in the next period will not change."""
SILENT_REPORTS = 1000
"""Losses without an optimizer step after which the attached optimizer is thought to be out of use."""
MIN_WINDOW = 5
"""Shortest recovery window, in steps, that a verdict can be read from."""


@dataclass(frozen=True)
class Event:
    """Something that happened, for ``on_event``; always called on the trainer's thread.

    Attributes:
        kind: ``snapshot``, ``nowcast`` (arrived), ``patched``, ``shadow``, ``kept``, ``rolled_back``, ``rejected``,
            ``skipped``, ``failed`` or ``off``.
        step: Real optimizer step.
        detail: Particulars.
    """

    kind: str
    step: int
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Trial:
    """A patch on trial."""

    patch: Patch
    patched_at: int
    reference_from: int
    trend_from: int


@dataclass(frozen=True)
class _Kept:
    """A patch that was kept: the losses from before it and after it say what it saved."""

    trend_from: int
    patched_at: int
    settled_at: int


class Handle:
    """What `attach` returns; a context manager that detaches at its end.

    Attributes:
        step: Real optimizer steps seen.
        mode: ``on``, ``shadow`` or ``off``; becomes ``off`` after two rollbacks in a row.
        spec: What the service is told about the network.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        spec: ArchitectureSpec,
        layout: Layout,
        cadence: Cadence,
        transport: Transport | None,
        *,
        mode: Mode,
        job: NowcastJob,
        trial: TrialSettings | None,
        stale: Stale,
        stale_steps: int,
        wait: float,
        lr_gate: float,
        patch_bound: float,
        wire_dtype: torch.dtype | None,
        timeout: float,
        nowcast_timeout: float,
        retry: Retry | None,
        strict: bool,
        on_event: Callable[[Event], object] | None,
        metrics: Callable[[Mapping[str, float], int], object] | None,
        acts: Acts,
        copies: Copies,
        refresh: Callable[[], object] | None,
        alone: Alone | None = None,
        about: About | None = None,
    ) -> None:
        self.step = 0
        self.mode: Mode = mode
        self.spec = spec
        self._model = model
        self._optimizers = list(optimizers)
        self._layout = layout
        self._cadence = cadence
        self._transport = transport
        self._job = job
        self._trial_settings = trial
        self._best = BestLevel(trial) if trial is not None and mode == "on" else None
        self._stale = stale
        self._stale_steps = stale_steps
        self._wire_dtype = wire_dtype
        self._reply_dtype = WIRE_DTYPES[job.reply_dtype]
        self._wait = wait
        self._lr_gate = lr_gate
        self._strict = strict
        self._on_event = on_event
        self._metrics = metrics
        self._acts = acts
        self._copies = copies
        self._refresh = refresh
        self._alone = alone
        self._due = False  # a counted step the hook has not acted on yet
        self._reports = 0  # losses since the last counted step
        self._pid = os.getpid()
        self._fingerprint = fingerprint(model, optimizers)
        self._rounds = Rounds(optimizers)
        self._weights = Watch(cadence.stride)
        self._window = Window()
        self._asked: Window | None = None
        self._arrived: Arrived | None = None
        self._trial: _Trial | None = None
        self._backup = Backup()
        self._lr_max = 0.0
        self._rolled_back_in_a_row = 0
        self._last_snapshot = 0
        self._settled_at = 0  # losses before this step belong to a trial and say nothing about the trend
        self._skips_pending: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._counts: Counter[str] = Counter()
        self._told: set[str] = set()
        self._harm_steps = 0
        self._gains: list[float] = []  # steps kept nowcasts are thought to have saved
        self._kept: _Kept | None = None  # the newest of them, whose losses are still coming in
        self._clock: tuple[int, float, float] | None = None  # first step seen here, when, and when the newest was
        self._hook_seconds = 0.0
        self._wait_seconds = 0.0
        self._upload_bytes = 0
        self._closed = False
        reference = trial.reference if trial else 0
        window = trial.window if trial else 0
        self._losses = LossReader(LossTrace(keep=2 * (cadence.period + reference + window) + SMOOTHED))
        self._hooks: list[Any] = []
        self._uploader: Uploader | None = None
        self._told_people: Reports | None = None
        self._ring: Ring | None = None
        if mode != "off" and transport is not None:
            self._ring = Ring(layout, cadence.context + 1, wire_dtype)
            session = Session(
                transport,
                spec,
                keep=cadence.context + 1,
                timeout=timeout,
                retry=retry,
                predictor=job.predictor,
                checkpoint=job.checkpoint,
            )
            self._uploader = Uploader(
                session,
                self._ring,
                layout,
                upload_seconds=nowcast_timeout,
                nowcast_seconds=nowcast_timeout,
                patch_bound=patch_bound,
                keep_base=stale == "overwrite",
            )
            self._uploader.open()
            if about is not None:
                self._told_people = Reports(about, self._uploader.tell)
            self._hook()
            atexit.register(self.close)

    # ------------------------------------------------------------ for users

    def observe(self, loss: float | Tensor, *, step: int | None = None) -> None:
        """Report the training loss of the current step; call it anywhere between two optimizer steps.

        Args:
            loss: A number or a scalar tensor on any device. Nothing waits for the device. With gradient accumulation,
                report each micro-batch; reports for one optimizer step are averaged.
            step: Optimizer steps the weights had seen that gave this loss; now's by default. For frameworks that tell
                the loss only after the step.
        """
        if self.mode == "off" or self._foreign():
            return
        self._timed("observe", self._report, self.step if step is None else step, loss)

    def act(self) -> None:
        """Do what is due after the optimizer steps since the last call; only with ``acts="when_told"``.

        For frameworks that have a place of their own for changing weights. Call it after an optimizer step and before
        the next forward pass, never between a forward pass and its backward pass.
        """
        if not self._due or self.mode == "off" or self._closed or self._foreign():
            return
        self._due = False
        self._timed("hook", self._act)

    def follow(self, *optimizers: object) -> None:
        """Go on with other optimizers, created since `attach`, of the same parameters.

        Args:
            optimizers: What replaces the attached ones, in the order they step.

        Raises:
            AttachError: They do not hold the model's parameters, or keep copies of them that cannot be followed.
        """
        fresh = [innermost(one) for one in optimizers]
        self._layout = layout_of(self._model, fresh, self.spec, sharded=self._sharded)
        self._copies = self._copies.with_optimizers(fresh)
        if self._trial is not None:
            # What the old optimizer's state was cannot be put back into a new one.
            self._trial = None
            self._counts["unjudged"] += 1
        self._optimizers, self._reports = fresh, 0
        self._fingerprint = fingerprint(self._model, fresh)
        self._abandon()
        self._drop_window()
        if self._hooks:
            self._hook()

    def wait(self, timeout: float = 60.0) -> bool:
        """Wait until everything handed to the service so far is done; for examples and tests.

        Returns:
            Whether it is.
        """
        return self._uploader is None or self._uploader.idle(timeout)

    def summary(self) -> dict[str, Any]:
        """What happened so far, as plain numbers.

        Returns:
            Counts of snapshots, nowcasts and verdicts; ``harm_steps``, steps lost to patches that were undone;
            ``steps_saved_estimate``, an estimate of what the kept ones saved less what the undone ones lost (see
            `nowcast_client.loop.savings`; None without a kept nowcast whose loss had a trend), over ``estimated_over``
            nowcasts; ``steps_saved``, measured against ``baseline`` (None without one, or where it never got to this
            run's loss); ``seconds_per_step``, pauses included;
            ``skipped`` and ``failed`` by reason; bytes and seconds; ``hook_seconds``, time taken from the trainer, of
            which ``wait_seconds`` were spent waiting, for a nowcast (``wait``) or for other ranks;
            ``coverage``, what the service does with each parameter (None until it has been reached for the first
            time, a moment after attach, and where no graph is needed).
        """

        def part(prefix: str) -> dict[str, int]:
            return {k.removeprefix(prefix): n for k, n in sorted(self._counts.items()) if k.startswith(prefix)}

        names = ("snapshots", "asked", "arrived", "patched", "kept", "rolled_back", "rejected", "shadow", "unjudged")
        transport = self._transport
        found = self._uploader.coverage if self._uploader else None
        return {
            "mode": self.mode,
            "steps": self.step,
            **{name: self._counts[name] for name in names},
            "harm_steps": self._harm_steps,
            **self._savings(),
            "skipped": part("skipped: "),
            "failed": part("failed: "),
            "bytes_sent": getattr(transport, "bytes_sent", self._upload_bytes),
            "bytes_received": getattr(transport, "bytes_received", 0),
            "resent": self._uploader.session.resent if self._uploader else 0,
            "hook_seconds": self._hook_seconds,
            "wait_seconds": self._wait_seconds,
            "host_bytes": (self._ring.nbytes if self._ring else 0) + self._backup.nbytes,
            "coverage": coverage.numbers(found) if found else None,
        }

    def _gained(self) -> list[float]:
        """Estimates of what each kept nowcast saved, as far as there is one."""
        kept, trace = self._kept, self._losses.trace
        if kept is None:
            return self._gains
        self._losses.read()
        before = trace.between(kept.trend_from, kept.patched_at - 1)
        after = trace.between(kept.settled_at, kept.settled_at + self._cadence.period // 2)
        gain = ahead(*before, *after)
        return self._gains if gain is None else [*self._gains, gain]

    def _savings(self) -> dict[str, Any]:
        known = self._gained()
        measured = None
        if self._alone is not None:
            self._losses.read()
            measured = self._alone.saved(*self._losses.trace.between(self.step - SMOOTHED, self.step))
        first, began, newest = self._clock or (self.step, 0.0, 0.0)
        return {
            "steps_saved_estimate": round(sum(known) - self._harm_steps) if known else None,
            "estimated_over": len(known),
            "steps_saved": measured,
            "seconds_per_step": (newest - began) / (self.step - first) if self.step > first else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on where this one is; plain numbers, strings, lists and dicts.

        A patch that is on trial when the state is saved counts as kept after a resume: what it replaced is not saved.
        """
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "mode": self.mode,
            "session": self._uploader.session.id if self._uploader else None,
            "spec": self.spec.digest(),
            "window": list(self._window.steps),
            "moved": dict(self._window.moved),
            "last_snapshot": self._last_snapshot,
            "lr_max": self._lr_max,
            "rolled_back_in_a_row": self._rolled_back_in_a_row,
            "harm_steps": self._harm_steps,
            "gains": self._gained(),
            "best": self._best.state_dict() if self._best is not None else None,
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved training was.

        The window of snapshots goes on too if the service still holds it; otherwise it starts again.

        Raises:
            AttachError: The state is of another version or another network.
        """
        if state.get("version") != STATE_VERSION:
            raise AttachError(f"state of version {state.get('version')!r}", expected=f"version {STATE_VERSION}")
        if state["spec"] != self.spec.digest():
            raise AttachError("the state was saved for another network", expected=f"spec digest {self.spec.digest()}")
        self._drop_window()
        self._abandon()
        self._weights.forget()
        self._trial = None
        self.step = int(state["step"])
        self._last_snapshot = int(state["last_snapshot"])
        self._lr_max = float(state["lr_max"])
        self._rolled_back_in_a_row = int(state["rolled_back_in_a_row"])
        self._harm_steps = int(state["harm_steps"])
        self._gains, self._kept = list(state.get("gains", ())), None
        if self._best is not None:
            self._best.load_state_dict(state.get("best") or {})
        self._clock = None
        self._counts = Counter(state["counts"])
        if state["mode"] == "off" and self.mode != "off":
            self._turn_off("it was off when the state was saved")
        if self._uploader is not None and state["session"]:
            remote = tuple(state["window"])
            if len(remote) > self._cadence.context - 2:  # what lies still is seen from two snapshots held here
                remote = ()
            self._window = Window(remote=remote, moved=dict(state["moved"]) if remote else {})
            self._uploader.take_up(str(state["session"]), self._window)

    def close(self, timeout: float = 2.0) -> None:
        """Detach, within ``timeout`` seconds; what is under way is given up. Calling it twice is harmless."""
        if self._closed or self._foreign():
            return
        self._closed = True
        atexit.unregister(self.close)
        for hook in self._hooks:
            hook.remove()
        with self._guarded("close"):
            if self._trial is not None:
                self._counts["unjudged"] += 1
                self._trial = None
            if self._uploader is not None:
                if self._uploader.close(timeout, self._last_report()) and self._transport is not None:
                    self._transport.close()
                else:
                    log.debug("the uploader did not end in time and is left to the interpreter's exit")

    def _last_report(self) -> Callable[[], Report] | None:
        if self._told_people is None:
            return None
        self._losses.read(block=True)
        saved = self._savings()["steps_saved_estimate"]
        return self._told_people.last(self.step, self.mode, self._losses.trace, saved)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -------------------------------------------------------------- the hook

    _sharded = False
    """Whether parameters may be shards of a tensor that no rank holds whole."""

    def _hook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._rounds = Rounds(self._optimizers)
        self._hooks = []
        for optimizer in self._optimizers:
            self._hooks += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
                optimizer.register_load_state_dict_post_hook(self._state_loaded),
            ]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not (self.mode == "off" or self._closed or self._foreign()):
            self._timed("before_step", self._stepping, optimizer)

    def _stepping(self, optimizer: Optimizer) -> None:
        if self._ring is not None:
            self._ring.hold_writes()
        first, unfinished = self._rounds.begin(optimizer)
        self.step += unfinished
        if first:
            self._look()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.mode == "off" or self._closed or self._foreign() or not self._rounds.end(optimizer):
            return
        # A patch in the middle of a backward pass would change weights that pass still needs.
        after_backward(lambda: self._timed("hook", self._stepped, optimizer))

    def _state_loaded(self, optimizer: Optimizer) -> None:
        if self._weights.marked and not (self.mode == "off" or self._closed or self._foreign()):
            self._timed("hook", self._jumped, "an optimizer's state was loaded")

    def _look(self) -> None:
        """Start again where the weights are no longer those of the last step."""
        if self._weights.jumped(self._layout, self.step):
            self._jumped("the weights were written between two steps")

    def _jumped(self, what: str) -> None:
        """What the weights were before is no part of their way any more."""
        under_way = bool(self._window.steps or self._asked or self._arrived or self._trial)
        self._counts["unjudged"] += self._trial is not None
        self._trial, self._settled_at = None, self.step
        self._abandon()
        self._drop_window()
        if under_way:
            self._skip(f"{what}: the window starts again")

    def _timed(self, kind: str, work: Callable[..., object], *arguments: Any) -> None:
        """Do something on the trainer's time: it is counted, and nothing it raises gets out."""
        start = time.perf_counter()
        try:
            work(*arguments)
        except Exception as exc:
            self._survive(kind, exc)
        finally:
            self._hook_seconds += time.perf_counter() - start

    def _report(self, step: int, loss: float | Tensor) -> None:
        self._losses.report(step, loss)
        self._reports += 1
        if self._reports == SILENT_REPORTS:
            self._skip(
                f"{SILENT_REPORTS} losses were reported and the attached optimizer made no step: if another one "
                "has taken its place, tell the handle with follow(optimizer)"
            )

    def _stepped(self, optimizer: Optimizer) -> None:
        if not self._count(optimizer):
            return
        self._reports = 0
        now = time.perf_counter()
        self._clock = (self.step, now, now) if self._clock is None else (*self._clock[:2], now)
        if self._told_people is not None and self._told_people.due(now):
            self._losses.read()
            saved = self._savings()["steps_saved_estimate"]
            self._told_people.tell(now, self.step, self.mode, self._losses.trace, saved)
        if self._acts == "when_told":
            self._due = True
        else:
            self._advance()
        self._weights.mark(self._layout)

    def _act(self) -> None:
        self._look()
        self._advance()
        self._weights.mark(self._layout)

    def _advance(self) -> None:
        """Everything that is due after a counted step."""
        self._collect()
        if self._trial is not None:
            self._watch(self._trial)
        if self._arrived is not None and self._trial is None:
            self._consider(self._arrived)
        if self._cadence.snapshot_due(self.step) and self.step > self._last_snapshot and self._is_on():
            self._snapshot()

    def _is_on(self) -> bool:
        return self.mode != "off"

    def _count(self, optimizer: Optimizer) -> bool:
        """Count the step unless gradient scaling skipped it; returns whether it was counted."""
        while self._skips_pending and self._skips_pending[0][1].query():  # type: ignore[no-untyped-call]
            self.step -= int(bool(self._skips_pending.popleft()[0].item()))
        found = getattr(optimizer, "found_inf", None)  # set around step() by GradScaler for optimizers that fuse it
        if isinstance(found, Tensor):
            if found.device.type == "cpu":
                if bool(found.item()):
                    return False
            else:
                # Read a step or two later, when it has arrived: the count is late by that much, the device never waits.
                host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
                host.copy_(found.detach(), non_blocking=True)
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record()
                self._skips_pending.append((host, copied))
        self.step += 1
        return True

    def _collect(self) -> None:
        """Take what the uploader has finished."""
        uploader = self._uploader
        if uploader is None:
            return
        while uploader.results:
            result = uploader.results.popleft()
            if isinstance(result, Uploaded):
                self._upload_bytes += result.nbytes
                self._emit("snapshot", taken=result.step, bytes=result.nbytes, seconds=result.seconds)
            elif isinstance(result, Failed):
                if result.window is not None and result.window is self._asked:
                    self._asked = None
                if result.kind == "resume" and result.window is self._window:
                    self._drop_window()
                self._failed(result.kind, result.error)
            elif result.window is self._asked:
                self._counts["arrived"] += 1
                self._arrived = result
                self._name_left(result.found.left_alone)
                self._emit(
                    "nowcast",
                    of=result.patch.step,
                    k=result.patch.horizon,
                    seconds=result.seconds,
                    stretch=result.found.stretch,
                    predictor=result.predictor,
                )

    def _name_left(self, names: Sequence[str]) -> None:
        if names and "left alone" not in self._told:
            self._told.add("left alone")
            log.info("left alone, as they hardly move against their size: %s", ", ".join(names))

    # -------------------------------------------------------------- snapshots

    def _snapshot(self) -> None:
        if self._uploader is None or self._ring is None:
            return
        self._rebind()
        if not self._is_on():
            return
        self._note_rate()
        slot = self._take()
        if slot is None:
            self._drop_window()
            self._skip("every snapshot buffer is still in use: the service is slower than the period")
            return
        self._last_snapshot = self.step
        self._counts["snapshots"] += 1
        self._window.slots.append(slot)
        self._uploader.snapshot(self._window, slot)
        if len(self._window.steps) >= self._cadence.context:
            self._ask()

    def _take(self) -> Slot | None:
        """The weights as they are now, in a slot of the ring; None where it is full."""
        return self._ring.take(self._layout, self.step) if self._ring is not None else None

    def _live(self) -> Layout:
        """The layout as it is now: the same object while nothing about it has changed.

        Raises:
            AttachError: As `layout_of`.
        """
        mark = fingerprint(self._model, self._optimizers)
        if mark == self._fingerprint:
            return self._layout
        live = layout_of(self._model, self._optimizers, self.spec, sharded=self._sharded)
        self._fingerprint = mark
        same = live.same_tensors(self._layout) and live.movable == self._layout.movable
        return self._layout if same else live

    def _rebind(self) -> bool:
        """Follow parameters that were replaced since attach; give up where they are others altogether.

        Returns:
            Whether they are still the same objects.
        """
        try:
            live = self._live()
            self._copies.check(live)
        except AttachError as exc:
            self._turn_off(f"the model is no longer the one it was attached to: {exc}")
            return False
        if live is self._layout:
            return True
        changed, self._layout = self._layout.change_to(live), live
        if self._uploader is not None:
            self._uploader.layout = live
        self._abandon()
        self._drop_window()
        if self._trial is not None:
            self._trial = None
            self._counts["unjudged"] += 1
        self._skip(f"{changed}; the window starts again")
        return False

    def _ask(self) -> None:
        window, self._window = self._window, Window()
        reason = self._gate()
        if reason or self._uploader is None:
            if self._uploader is not None:
                self._uploader.drop(window)
            self._skip(reason or "not attached")
            return
        self._abandon()
        job = self._job.model_copy(
            update={"nowcast": mint(), "steps": window.steps, "k": self._cadence.horizon(self.step)}
        )
        self._asked = window
        self._counts["asked"] += 1
        self._uploader.ask(window, job)
        if self._wait > 0:
            self._await(window)

    def _await(self, window: Window) -> None:
        """Wait for the nowcast inside the hook, no longer than the caller allowed."""
        self._wait_for(window)
        if self._arrived is not None and self._trial is None:
            self._consider(self._arrived)

    def _wait_for(self, window: Window) -> None:
        uploader, begun = self._uploader, time.perf_counter()
        if uploader is None:
            return
        with uploader.arrived:
            uploader.arrived.wait_for(lambda: uploader.answered(window), self._wait)
        self._wait_seconds += time.perf_counter() - begun
        self._collect()

    def _gate(self) -> str:
        """Why no nowcast should be asked for now; empty where one should."""
        if self._weights.found_late():
            return "the weights were written between two steps: the window starts again"
        rate = self._rate()
        if rate is not None and self._lr_max > 0 and rate < self._lr_gate * self._lr_max:
            return "the learning rate has decayed"
        total, trial = self._cadence.total_steps, self._trial_settings
        if total is not None and self.step + (trial.window if trial else 1) > total:
            return "the training ends before the nowcast could prove itself"
        if self._best is not None:
            self._losses.read(block=True)
            return self._best.objection(self._losses.trace.between(self._trend_from(), self.step - 1)[1])
        return ""

    def _rate(self) -> float | None:
        rates = [group.get("lr") for optimizer in self._optimizers for group in optimizer.param_groups]
        known = [float(rate) for rate in rates if rate is not None and not getattr(rate, "is_cuda", False)]
        return max(known) if known else None

    def _note_rate(self) -> None:
        self._lr_max = max(self._lr_max, self._rate() or 0.0)

    # ---------------------------------------------------------------- patches

    def _consider(self, arrived: Arrived) -> None:
        """Write an arrived nowcast, or say why not."""
        if self._turned_away(arrived, self.step):
            return
        first = self._reference_from()
        self._arrived, self._asked = None, None
        if not self._rebind():
            self._release(arrived.window)
            self._reject(arrived.patch, "the model's parameters were replaced")
            return
        self._save()
        with arrived.window.trace.span("patch", step=self.step, horizon=arrived.patch.horizon):
            apply(arrived.patch, stirring(self._layout, self._optimizers), self._backup, self._copies)
        self._release(arrived.window)
        self._patched(arrived.patch, first, arrived.found.stretch)

    def _turned_away(self, arrived: Arrived, written: int) -> bool:
        """Whether a nowcast that arrived is not to be written, after step ``written``; says why."""
        patch = arrived.patch
        behind = written - patch.step
        limit = 0 if self._stale == "reject" else self._stale_steps
        settings = self._trial_settings
        if behind > limit:
            self._reject(patch, f"it came {behind} steps after its last snapshot, more than {limit}")
        elif self.mode == "shadow":
            self._counts["shadow"] += 1
            self._tell(patch, "shadow", None)
            self._emit("shadow", of=patch.step, k=patch.horizon, stretch=arrived.found.stretch)
        elif settings is not None and self._losses_since(self._reference_from()) < settings.min_reference:
            self._counts["shadow"] += 1
            self._tell(patch, "shadow", "no loss reported")
            self._skip("no loss is reported, so a patch could not be judged: call observe(loss), or trial=False")
        else:
            return False
        self._arrived, self._asked = None, None
        self._release(arrived.window)
        return True

    def _reference_from(self) -> int:
        """First step whose loss says what was normal before a patch made now."""
        settings = self._trial_settings
        return max(self._settled_at, self.step - settings.reference) if settings else 0

    def _trend_from(self) -> int:
        """First step of the newest stretch, half a period, in which nothing but training moved the loss."""
        return max(self._settled_at, self.step - self._cadence.period // 2)

    def _losses_since(self, first: int) -> int:
        self._losses.read(block=True)
        return int(self._losses.trace.between(first, self.step - 1)[0].size)

    def _save(self) -> None:
        self._backup.save(self._layout, self._optimizers if self._trial_settings else ())
        self._copies.save(self._layout)

    def _patched(self, patch: Patch, first: int, stretch: float) -> None:
        """A patch has been written."""
        self._gains, self._kept = self._gained(), None
        self._drop_window()  # snapshots from before the patch and after it make no trajectory
        self._counts["patched"] += 1
        if self._refresh is not None:
            with self._guarded("refresh"):
                self._refresh()
        self._tell(patch, "applied", None)
        self._emit("patched", of=patch.step, k=patch.horizon, behind=self.step - patch.step, stretch=stretch)
        if self._trial_settings is not None:
            self._trial = _Trial(patch, self.step, first, self._trend_from())

    def _watch(self, trial: _Trial) -> None:
        """Look at the patch on trial; decide when its window is over."""
        settings = self._trial_settings
        if settings is None:
            self._trial = None
            return
        over = self.step >= trial.patched_at + settings.window
        self._losses.read(block=over)
        if not (over or self._losses.trace.lost(trial.patched_at)) or not self._rebind():
            return
        after_steps, after = self._losses.trace.between(trial.patched_at, self.step)
        reference_steps, reference = self._losses.trace.between(trial.reference_from, trial.patched_at - 1)
        verdict = judge(reference_steps, reference, after_steps, after, patched_at=trial.patched_at, settings=settings)
        self._conclude(trial, verdict)

    def _conclude(self, trial: _Trial, verdict: Verdict) -> None:
        self._trial = None
        self._settled_at = self.step
        if verdict.keep:
            self._rolled_back_in_a_row = 0
            self._kept = _Kept(trial.trend_from, trial.patched_at, self.step)
            self._counts["kept"] += 1
            if self._best is not None:
                self._best.kept()
            self._tell(trial.patch, "kept", verdict.reason)
            self._emit("kept", of=trial.patch.step, **_told(verdict))
        else:
            self._roll_back(trial, verdict)

    def _roll_back(self, trial: _Trial, verdict: Verdict) -> None:
        self._backup.restore(self._layout)
        self._copies.restore()
        lost = self.step - trial.patched_at
        self._harm_steps += lost
        self._counts["rolled_back"] += 1
        self._rolled_back_in_a_row += 1
        self._abandon()
        self._drop_window()
        self._tell(trial.patch, "rolled_back", verdict.reason)
        self._emit("rolled_back", of=trial.patch.step, lost=lost, **_told(verdict))
        log.warning(
            "the nowcast of step %d was undone at step %d: %s; %d steps are lost",
            trial.patch.step,
            self.step,
            verdict.reason,
            lost,
        )
        if self._rolled_back_in_a_row >= 2:
            self._turn_off("two nowcasts in a row were undone")

    def _reject(self, patch: Patch, reason: str) -> None:
        self._counts["rejected"] += 1
        self._tell(patch, "rejected", reason)
        self._emit("rejected", of=patch.step, reason=reason)
        self._log_once("rejected", f"a nowcast was not used: {reason}")

    # ------------------------------------------------------------------- ends

    def _release(self, window: Window) -> None:
        if self._uploader is not None:
            self._uploader.drop(window)

    def _drop_window(self) -> None:
        window, self._window = self._window, Window()
        if window.steps:
            self._release(window)

    def _abandon(self) -> None:
        """Forget a nowcast that was asked for or has arrived."""
        for window in (self._asked, self._arrived.window if self._arrived else None):
            if window is not None:
                self._release(window)
        self._asked, self._arrived = None, None

    def _turn_off(self, reason: str) -> None:
        self.mode = "off"
        self._abandon()
        self._drop_window()
        self._emit("off", reason=reason)
        log.warning("nowcasting is off: %s", reason)
        warnings.warn(f"nowcasting is off: {reason}", RuntimeWarning, stacklevel=2)

    # -------------------------------------------------------------- reporting

    def _tell(self, patch: Patch, outcome: Any, reason: str | None) -> None:
        if self._uploader is not None:
            self._uploader.verdict(patch.nowcast_id, outcome, reason, self.step)

    def _skip(self, reason: str) -> None:
        self._counts[f"skipped: {reason}"] += 1
        self._emit("skipped", reason=reason)
        self._log_once(f"skipped {reason}", f"a nowcast was skipped: {reason}")

    def _failed(self, kind: str, error: Exception) -> None:
        code = error.code if isinstance(error, NowcastError) else type(error).__name__
        if code == "patch_refused":
            self._counts["rejected"] += 1
        self._counts[f"failed: {kind}: {code}"] += 1
        self._emit("rejected" if code == "patch_refused" else "failed", what=kind, code=code, message=str(error))
        self._log_once(f"{kind} {code}", f"{kind} failed and is skipped: {error}")
        if self._strict:
            raise error
        if isinstance(error, HOPELESS) and self._is_on():
            self._turn_off(f"the service will never accept this: {error}")

    def _log_once(self, key: str, message: str) -> None:
        level = logging.DEBUG if key in self._told else logging.WARNING
        self._told.add(key)
        log.log(level, "step %d: %s", self.step, message)

    def _emit(self, kind: str, **detail: Any) -> None:
        if self._told_people is not None:
            self._told_people.event(kind, self.step, detail)
        event = Event(kind, self.step, detail)
        if self._on_event is not None:
            with self._guarded("on_event"):
                self._on_event(event)
        if self._metrics is not None and kind != "snapshot":
            numbers = {f"nowcast/{k}": float(v) for k, v in detail.items() if isinstance(v, int | float)}
            numbers[f"nowcast/{kind}"] = 1.0
            numbers["nowcast/hook_seconds"] = self._hook_seconds
            numbers["nowcast/harm_steps"] = float(self._harm_steps)
            with self._guarded("metrics"):
                self._metrics(numbers, self.step)

    def _foreign(self) -> bool:
        """Whether this is a forked child, which has the hooks but not the thread."""
        return os.getpid() != self._pid

    @contextmanager
    def _guarded(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as exc:
            self._survive(kind, exc)

    def _survive(self, kind: str, exc: Exception) -> None:
        """Count what went wrong and say so once; with ``strict`` raise it on."""
        if self._strict:
            raise exc
        self._counts[f"failed: {kind}: {type(exc).__name__}"] += 1
        key = f"{kind} {type(exc).__name__}"
        if key not in self._told:
            self._told.add(key)
            log.warning("step %d: %s failed and is skipped: %s", self.step, kind, exc, exc_info=exc)


def _told(verdict: Verdict) -> dict[str, Any]:
    return {
        "reason": verdict.reason,
        "expected": verdict.expected,
        "level": verdict.level,
        "tolerance": verdict.tolerance,
    }


def attach(
    model: nn.Module,
    optimizer: object,
    url: str | None = None,
    *,
    period: int | None = None,
    total_steps: int | None = None,
    context: int = 5,
    mode: Mode | None = None,
    trial: bool | TrialSettings = True,
    predictor: str | None = None,
    checkpoint: str | None = None,
    update_scale: float = 1.0,
    max_horizon: int = MAX_HORIZON,
    lr_gate: float = 0.1,
    stale: Stale = "delta",
    stale_steps: int | None = None,
    wait: float = 0.0,
    patch_bound: float = 4.0,
    wire_dtype: WireDType | None = None,
    reply_dtype: WireDType = "float32",
    include_frozen: bool = False,
    spec: ArchitectureSpec | None = None,
    table: DeclaredTable | str | Path | None = None,
    api_key: str | None = None,
    timeout: float = 10.0,
    nowcast_timeout: float = 300.0,
    retry: Retry | None = None,
    transport: Transport | None = None,
    strict: bool = False,
    on_event: Callable[[Event], object] | None = None,
    metrics: Callable[[Mapping[str, float], int], object] | None = None,
    acts: Acts = "after_step",
    copies: Sequence[nn.Module] = (),
    refresh: Callable[[], object] | None = None,
    baseline: Sequence[float] | str | Path | None = None,
    group: Any = None,
    name: str | None = None,
    report: bool = True,
) -> Handle:
    """Nowcast a training: one line before the loop, and ``handle.observe(loss)`` in it.

    Args:
        model: The network, as it is trained.
        optimizer: Its optimizer, or a sequence of optimizers that step in that order; wrappers that hold the real one
            as ``.optimizer`` are looked through.
        url: The service: ``http(s)://host:port`` or ``unix:///path``; ``embedded`` starts one in a child process that
            ends with this one. Default: ``NOWCAST_URL``, then ``http://127.0.0.1:8500``.
        period: Optimizer steps between nowcasts; ``context`` snapshots are taken in each. Default: a tenth of
            ``total_steps``, at least 100 and at most 1,000; 1,000 where the length is not known.
        total_steps: Steps of the whole training; sets how fast the horizon shrinks. Without it a schedule
            of ten periods is used and stays at one stride afterwards.
        context: Snapshots per nowcast, as the checkpoint wants.
        mode: ``on``, ``shadow`` (predict and log, never patch) or ``off``. Default: ``NOWCAST_MODE``, then ``on``,
            or ``shadow`` where adapters (LoRA and its kin) train beside frozen weights, and on optimizers that no gain
            has been shown on (see `loop.evidence`).
        trial: Judge every patch by the reported loss and undo it where it did harm. ``False`` patches unconditionally;
            a `TrialSettings` sets the judge. The recovery window is at most a third of the period.
        predictor: The service's predictor; None takes what the checkpoint is for.
        checkpoint: Name of a checkpoint the service has; None takes its default.
        update_scale: Factor on the predicted change.
        max_horizon: First and longest horizon, in strides.
        lr_gate: Ask for no nowcast once the learning rate is below this part of the largest seen.
        stale: When training went on since the last snapshot: ``delta`` adds the predicted change to the newer weights,
            ``overwrite`` replaces them, ``reject`` takes a nowcast only if no step has passed.
        stale_steps: Most steps a nowcast may be late. Default: a fifth of the period.
        wait: Seconds the hook may wait for a nowcast at the end of a period; 0 never waits.
        patch_bound: Refuse a nowcast that moves a tensor by more than this times its movement per stride times the
            horizon, or times 20 where that is more.
        wire_dtype: Dtype of snapshots in host memory and on the wire; None keeps each parameter's own.
        reply_dtype: Dtype of the predicted change on the wire.
        include_frozen: Send parameters without gradients as well (never patched); some families cannot be wired
            without them.
        spec: The architecture, where it cannot be derived from the model.
        table: How the network is wired, where no family does: a `DeclaredTable` or the path of its JSON document.
        api_key: Bearer token. Default: ``NOWCAST_API_KEY``.
        timeout: Seconds without progress after which a request is tried again.
        nowcast_timeout: Seconds a nowcast may take in all, lost snapshots sent again included.
        retry: How often requests are tried again.
        transport: Another way to the service than the url's.
        strict: Raise what goes wrong instead of skipping it.
        on_event: Called with every `Event`, on the trainer's thread.
        metrics: Called with numbers and the step, for a logger of your choice (see `nowcast_client.loggers`).
        acts: ``after_step`` acts inside the optimizer's step hook; ``when_told`` only counts there and acts when
            `Handle.act` is called.
        copies: Models whose parameters follow the trained ones by name (an exponential moving average, say): a patch
            shifts them by the same change, a rollback puts them back.
        refresh: Called after every patch, on every rank, to gather anew what depends on the weights, such as batch-norm
            statistics: ``lambda: torch.optim.swa_utils.update_bn(loader, model)``. A rollback puts the old statistics
            back by itself.
        baseline: Losses of an earlier run without nowcasts, one per optimizer step from the first on, or the path of a
            JSON or CSV file of them: ``summary()["steps_saved"]`` is then measured against it.
        name: What people who watch call this training; the model's class and the machine's name by default.
        report: Tell the service losses and events for people who watch (see ``docs/watching.md``).
        group: Process group of the ranks that train this model together; the default group where there is one.

    Returns:
        The handle; close it, or use it as a context manager.

    Raises:
        AttachError: Something here can never work; nothing has been attached.
        UnsupportedArchitecture: No spec can be derived from the model.
        InvalidSpec: The table is malformed.
        UnreadableFile: The table cannot be read.
    """
    chosen = mode or os.environ.get("NOWCAST_MODE", "on")
    if chosen not in ("on", "shadow", "off"):
        raise AttachError(f"mode {chosen!r}", expected="on, shadow or off", remedy="check mode= or NOWCAST_MODE")
    if stale not in ("delta", "overwrite", "reject"):
        raise AttachError(f"stale={stale!r}", expected="delta, overwrite or reject")
    if acts not in ("after_step", "when_told"):
        raise AttachError(f"acts={acts!r}", expected="after_step or when_told")
    if spec is not None and table is not None:
        raise AttachError("both spec and table are given", expected="one of them: a spec holds its table")
    ranks = None if chosen == "off" else _ranks(model, group, wait)
    if ranks is not None and stale == "overwrite":
        raise AttachError(
            "stale='overwrite' with several ranks",
            expected="delta or reject",
            remedy="use stale='delta': it is the same when no step has passed since the last snapshot",
        )

    def build() -> Handle:
        if optimizer is None:
            raise AttachError(
                "there is no optimizer yet",
                expected="the optimizer that steps this model",
                remedy="attach after it has been created; a later one is taken up with handle.follow(optimizer)",
            )
        wrapped = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        if not wrapped:
            raise AttachError("no optimizer was given", expected="at least one")
        optimizers = [innermost(one) for one in wrapped]
        every = default_period(total_steps, context) if period is None else period
        cadence = Cadence(every, context, total_steps, max_horizon)
        if total_steps is not None and total_steps // every > MANY_NOWCASTS and checkpoint is predictor is None:
            log.warning(
                "period=%d makes %d nowcasts in %d steps; the shipped weights gained with up to %d and gained nothing "
                "with 50: a longer period, or a checkpoint that is meant for more, is safer",
                *(every, total_steps // every, total_steps, MANY_NOWCASTS),
            )
        settings = _trial_settings(trial, every)
        found = adapter_spec(model)
        doubt = ADAPTERS_WATCHED if found is not None else unproven(optimizers)
        watch = bool(doubt) and mode is None and not os.environ.get("NOWCAST_MODE")
        if watch:
            log.warning("%s", doubt)
        adapters = None if spec or table or include_frozen else found
        architecture = spec or adapters or derive_spec(model, include_frozen=include_frozen, table=table)
        layout = layout_of(model, optimizers, architecture, sharded=ranks is not None or chosen == "off")
        dtype = WIRE_DTYPES[wire_dtype] if wire_dtype else None
        if stale == "overwrite" and dtype is not None and any(p.dtype != dtype for p in layout.parameters.values()):
            raise AttachError(
                f"stale='overwrite' with wire_dtype={wire_dtype!r} would round the weights",
                expected="snapshots in the parameters' own dtype",
                remedy="use stale='delta', or leave wire_dtype out",
            )
        followed = Copies(model, copies, optimizers, layout)
        way = transport
        if way is None and chosen != "off" and (ranks is None or ranks.speaks):
            way = open_transport(url, api_key)
        job = NowcastJob(
            nowcast="unset",
            steps=(0,),
            k=1,
            predictor=predictor or (ADAPTER_PREDICTOR if adapters is not None else None),
            checkpoint=checkpoint,
            reply="delta",
            reply_dtype=reply_dtype,
            update_scale=update_scale,
        )
        given: dict[str, Any] = {
            "mode": "shadow" if watch else chosen,
            "job": job,
            "trial": settings,
            "stale": stale,
            "stale_steps": every // 5 if stale_steps is None else stale_steps,
            "wait": wait,
            "lr_gate": lr_gate,
            "patch_bound": patch_bound,
            "wire_dtype": dtype,
            "timeout": timeout,
            "nowcast_timeout": nowcast_timeout,
            "retry": retry,
            "strict": strict,
            "on_event": on_event,
            "metrics": metrics,
            "acts": acts,
            "copies": followed,
            "refresh": refresh,
            "alone": Alone(baseline) if baseline is not None else None,
            "about": About.of(model, optimizers[-1], name, every, total_steps) if report else None,
        }
        if ranks is not None:
            from nowcast_client.ranks.distributed import DistributedHandle

            return DistributedHandle(model, optimizers, architecture, layout, cadence, way, ranks=ranks, **given)
        return Handle(model, optimizers, architecture, layout, cadence, way, **given)

    return build() if ranks is None else ranks.together(build)


def open_transport(url: str | None, api_key: str | None) -> Transport:
    """The way to a service; ``embedded`` starts one of this process's own.

    Raises:
        AttachError: The url is none, or no service can be started here.
    """
    if given_url(url) == "embedded":
        from nowcast_client.wire.embedded import EmbeddedTransport

        return EmbeddedTransport()
    return HttpTransport(url, api_key=api_key)


def _ranks(model: nn.Module, group: Any, wait: float) -> Ranks | None:
    """The ranks that train together; None where this process trains alone and holds its parameters whole."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    if distributed.get_world_size(group) == 1 and not any(hasattr(p, "to_local") for p in model.parameters()):
        return None
    from nowcast_client.ranks.distributed import Ranks

    return Ranks(group, wait)


def _trial_settings(trial: bool | TrialSettings, period: int) -> TrialSettings | None:
    if trial is False:
        return None
    settings = trial if isinstance(trial, TrialSettings) else TrialSettings()
    window = min(settings.window, period // 3)
    if period // 3 < MIN_WINDOW:
        raise AttachError(
            f"period={period} leaves {window} steps to judge a patch in",
            expected=f"a period of at least {3 * MIN_WINDOW} steps with trial",
            remedy="use a longer period, or trial=False to patch unconditionally",
        )
    for name, number, most, why in (
        ("min_tail", settings.min_tail, window, f"the recovery window has {window} steps at period={period}"),
        ("min_reference", settings.min_reference, settings.reference, f"reference={settings.reference}"),
        ("min_reference", settings.min_reference, period - window, f"period={period} leaves that many after a trial"),
    ):
        if not 1 <= number <= most:
            raise AttachError(
                f"TrialSettings({name}={number}) can never be met: {why}",
                expected=f"{name} from 1 to {most}",
                remedy=f"lower {name}, or use a longer period",
            )
    if window < MIN_WINDOW or not 0.0 < settings.tail <= 1.0:
        raise AttachError(
            f"TrialSettings(window={settings.window}, tail={settings.tail:g}) leaves no losses to judge a patch by",
            expected=f"a window of at least {MIN_WINDOW} steps, and a tail above 0 and at most 1",
        )
    return replace(settings, window=window)
