"""Hooks on the optimizers: what is done before and after every step.

After every real optimizer step the hook counts, and at its times takes a snapshot, asks for a nowcast, writes one that
has arrived, or judges one on trial. Everything slow happens in the uploader's thread.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from nowcast_client.loop.nowcasting import Nowcasting
from nowcast_client.loop.steps import after_backward
from nowcast_client.loop.summary import tell_people


class Hooks:
    """Hooks on every optimizer of a training.

    Args:
        nowcasting: What is done.
    """

    def __init__(self, nowcasting: Nowcasting) -> None:
        self._nowcasting = nowcasting
        self._hooks: list[Any] = []

    @property
    def are_set(self) -> bool:
        """Whether the optimizers have hooks."""
        return bool(self._hooks)

    def set(self) -> None:
        """Put hooks on the optimizers there are now, and take older ones off."""
        self.remove()
        for optimizer in self._nowcasting.patcher.optimizers:
            self._hooks += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
                optimizer.register_load_state_dict_post_hook(self._state_loaded),
            ]

    def remove(self) -> None:
        """Take them off; what runs at this moment ends without any effect."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def useless(self) -> bool:
        """Whether there is nothing to do at any step: no nowcasts, and no average of the weights to keep."""
        work = self._nowcasting
        return work.steps.foreign or (work.mode == "off" and work.patcher.average is None)

    @property
    def _asleep(self) -> bool:
        """Whether steps are not even looked at."""
        return not self._hooks or self.useless

    @property
    def _idle(self) -> bool:
        return self._asleep or self._nowcasting.mode == "off"

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._asleep:
            return
        work = self._nowcasting
        with work.report.timed("before_step"):
            if self._idle:
                work.steps.begin(optimizer)
                return
            if work.windows.ring is not None:
                work.windows.ring.hold_writes()
            if work.steps.begin(optimizer):
                work.look()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._asleep and self._nowcasting.steps.end(optimizer):
            # A patch in the middle of a backward pass would change weights that pass still needs.
            after_backward(lambda: self._stepped(optimizer))

    def _stepped(self, optimizer: Optimizer) -> None:
        work = self._nowcasting
        with work.report.timed("hook"):
            if work.steps.count(optimizer):
                if work.patcher.average is not None:
                    work.patcher.average.update()
                if self._idle:
                    return
                if work.wirer is not None:
                    work.wirer.settle(work)
                tell_people(work)
                work.steps.due = True
                if work.cadence.acts == "after_step":
                    work.steps.due = False
                    work.agreement.advance()
            work.patcher.watch.mark(work.patcher.layout)

    def _state_loaded(self, optimizer: Optimizer) -> None:
        if not self._idle and self._nowcasting.patcher.watch.marked:
            with self._nowcasting.report.timed("hook"):
                self._nowcasting.jumped("an optimizer's state was loaded")
