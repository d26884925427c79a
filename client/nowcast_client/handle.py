"""What `nowcast_client.attach` returns: what a training says to its nowcasting.

What is done after every optimizer step is in `nowcast_client.loop.hooks`. Whatever goes wrong is logged once per kind,
counted and skipped: the training never sees an exception from here unless it asked for them (``strict``).
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, get_args
from weakref import WeakKeyDictionary

from nowcast_proto.spec import ArchitectureSpec
from torch import Tensor
from torch.optim import Optimizer

from nowcast_client.errors import AttachError
from nowcast_client.loop.hooks import Hooks
from nowcast_client.loop.nowcasting import Nowcasting
from nowcast_client.loop.report import Event
from nowcast_client.loop.state import load_state_dict, state_dict
from nowcast_client.loop.steps import SILENT_REPORTS
from nowcast_client.loop.summary import last_report, summary
from nowcast_client.settings import Mode, Split
from nowcast_client.tensors.layout import innermost
from nowcast_client.wire.transport import Transport

__all__ = ["Event", "Handle"]

log = logging.getLogger("nowcast")
_attached: WeakKeyDictionary[Optimizer, Handle] = WeakKeyDictionary()
"""The newest handle of every optimizer."""


class Handle:
    """A training that is nowcast; a context manager that detaches at its end.

    Args:
        nowcasting: What is done.
        transport: The way to the service, closed with the handle; None where this rank does not talk to it.
    """

    def __init__(self, nowcasting: Nowcasting, transport: Transport | None) -> None:
        self._nowcasting = nowcasting
        self._transport = transport
        self._closed = False
        self._hooks = Hooks(nowcasting)
        if not self._hooks.useless:
            self._replace()
            self._hooks.set()
            atexit.register(self.close)

    @property
    def step(self) -> int:
        """Real optimizer steps seen."""
        return self._nowcasting.steps.step

    @property
    def mode(self) -> Mode:
        """``on``, ``shadow`` or ``off``; becomes ``off`` after two rollbacks in a row."""
        return self._nowcasting.mode

    @property
    def spec(self) -> ArchitectureSpec:
        """What the service is told about the network."""
        return self._nowcasting.patcher.spec

    # ------------------------------------------------------------ for users

    def observe(self, loss: float | Tensor, *, step: int | None = None, split: Split = "train") -> None:
        """Report the training loss of the current step; call it anywhere between two optimizer steps.

        With ``split="validation"`` it is the loss on held-out data, as often as it is computed: while that lies above
        the best it has been, no nowcast is asked for. Of several ranks, the first one's counts.

        Args:
            loss: A number or a scalar tensor on any device. Nothing waits for the device. With gradient accumulation,
                report each micro-batch; reports for one optimizer step are averaged.
            step: Optimizer steps the weights had seen that gave this loss; now's by default. For frameworks that tell
                the loss only after the step.
            split: ``train`` or ``validation``.

        Raises:
            AttachError: There is no such split.
        """
        if split not in get_args(Split):
            raise AttachError(f"observe(split={split!r})", expected="'train' or 'validation'")
        if self.mode == "off" or self._nowcasting.steps.foreign:
            return
        work = self._nowcasting
        if split == "validation":
            with work.report.timed("observe"):
                at, recovering = self.step if step is None else step, work.trials.open is not None
                value = loss.item() if isinstance(loss, Tensor) else float(loss)
                work.gate.held_out.add(at, value, recovering=recovering)
            return
        with work.report.timed("observe"):
            work.trials.losses.report(self.step if step is None else step, loss)
            if work.steps.reported():
                work.report.skip(
                    f"{SILENT_REPORTS} losses were reported and the attached optimizer made no step: if another one "
                    "has taken its place, tell the handle with follow(optimizer)"
                )

    def act(self) -> None:
        """Do what is due after the optimizer steps since the last call; only with ``acts="when_told"``.

        For frameworks that have a place of their own for changing weights. Call it after an optimizer step and before
        the next forward pass, never between a forward pass and its backward pass.
        """
        work = self._nowcasting
        if not work.steps.due or self._closed or work.steps.foreign or self.mode == "off":
            return
        work.steps.due = False
        with work.report.timed("hook"):
            work.look()
            work.agreement.advance()
            work.patcher.watch.mark(work.patcher.layout)

    def follow(self, *optimizers: object) -> None:
        """Go on with other optimizers, created since `attach`, of the same parameters; on all ranks, at the same place.

        Args:
            optimizers: What replaces the attached ones, in the order they step.

        Raises:
            AttachError: They do not hold the model's parameters, or keep copies of them that cannot be followed.
        """
        work, fresh = self._nowcasting, [innermost(one) for one in optimizers]
        work.agreement.forget()
        work.patcher.follow(fresh, optimizers)
        work.steps.follow(fresh)
        work.unjudged()  # what the old optimizer's state was cannot be put back into a new one
        work.windows.follow(work.patcher.spec, work.patcher.layout)
        if self._hooks.are_set:
            self._hooks.set()

    def averaged(self) -> AbstractContextManager[None]:
        """The model holds its averaged weights inside, for evaluating or saving it, and the live ones afterwards, bit
        for bit and after exceptions too; ``attach(..., average=STEPS)`` keeps the average.

        Floating-point buffers (batch-norm statistics) are averaged alike. Before the first step it is the live weights,
        and it begins anew after a rollback and on resume. Ranks need not agree on it, but those that evaluate together
        enter it together: replicas hold equal averages, and of sharded parameters each rank averages its own part.

        Raises:
            AttachError: No average is kept.
        """
        return self._nowcasting.patcher.averaged()

    def wait(self, timeout: float = 60.0) -> bool:
        """Wait until everything handed to the service so far is done; for examples and tests.

        Returns:
            Whether it is.
        """
        uploader = self._nowcasting.windows.uploader
        return uploader is None or uploader.idle(timeout)

    def summary(self, baseline: Sequence[float] | str | Path | None = None) -> dict[str, Any]:
        """What happened so far, as plain numbers.

        Args:
            baseline: Losses of an earlier run without nowcasts, one per optimizer step from the first on, or the path
                of a JSON or CSV file of them, to measure ``steps_saved`` against.

        Returns:
            Counts of snapshots, nowcasts and verdicts; ``harm_steps``, steps lost to patches that were undone;
            ``steps_saved``, measured against ``baseline`` (None without one, or where it never got to this
            run's loss); ``seconds_per_step``, pauses included;
            ``skipped`` and ``failed`` by reason; bytes and seconds; ``hook_seconds``, time taken from the trainer, of
            which ``wait_seconds`` were spent waiting, for a nowcast (``wait``) or for other ranks;
            ``coverage``, what the service does with each parameter (None before it has answered for the first time,
            after the first step of a traced network, and where no graph is needed).

        Raises:
            AttachError: The baseline cannot be read.
        """
        return summary(self._nowcasting, self._transport, baseline)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on where this one is; plain numbers, strings, lists and dicts.

        A patch that is on trial when the state is saved counts as kept after a resume: what it replaced is not saved.
        """
        return state_dict(self._nowcasting)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved training was; on all ranks, at the same place.

        The window of snapshots goes on too if the service still holds it; otherwise it starts again.

        Raises:
            AttachError: The state is of another version or another network.
        """
        load_state_dict(self._nowcasting, state)

    def close(self, timeout: float = 2.0) -> None:
        """Detach, within ``timeout`` seconds; what is under way is given up. Calling it twice is harmless."""
        work = self._nowcasting
        if self._closed or work.steps.foreign:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._hooks.remove()
        if work.wirer is not None:
            work.wirer.close()
        for optimizer in work.patcher.optimizers:
            if _attached.get(optimizer) is self:
                del _attached[optimizer]
        with work.report.guarded("close"):
            work.unjudged()
            if work.windows.uploader is not None:
                work.windows.uploader.close(timeout, last_report(work))
                if self._transport is not None:
                    self._transport.close()  # whatever still waits for an answer gives up with it

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _replace(self) -> None:
        """Close what is attached to the same optimizers: a cell run twice, a training begun again."""
        optimizers = self._nowcasting.patcher.optimizers
        older = {handle for optimizer in optimizers if (handle := _attached.get(optimizer)) is not None}
        for handle in older:
            if not handle._closed:
                log.warning("this optimizer was attached to before: the earlier handle is closed, this one goes on")
                if handle._transport is self._transport:
                    handle._transport = None  # ours now
                handle.close()
        _attached.update(dict.fromkeys(optimizers, self))
