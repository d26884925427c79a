"""When a training step is over: every optimizer has stepped, and no backward pass runs."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.optim import Optimizer

SILENT_REPORTS = 1000
"""Losses without an optimizer step after which the attached optimizer is thought to be out of use."""
MISSED = 3
"""Steps in a row an optimizer may sit out before nobody waits for it any more, until it steps again."""


def in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def after_backward(work: Callable[[], None]) -> None:
    """Run something now, or at the end of the backward pass that runs."""
    if in_backward():
        Variable._execution_engine.queue_callback(work)
    else:
        work()


class Rounds:
    """Steps of several optimizers, put together to steps of the training.

    Optimizers may step one after another, each inside the backward pass as soon as its gradient is there, some of them
    less often, or not at all (their parameters are not used).

    Args:
        optimizers: All of them.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._all = {id(optimizer) for optimizer in optimizers}
        self._stepped: list[int] = []
        self._order: dict[int, int] = {}
        self._missed: Counter[int] = Counter()
        self._over = True
        self._pass = -1  # which backward pass the round lies in

    def begin(self, optimizer: Optimizer) -> tuple[bool, bool]:
        """An optimizer is about to step.

        Returns:
            Whether it is the first of a new step of the training, and whether the step before ended without all of
            the optimizers it was waiting for.
        """
        key, now = id(optimizer), torch._C._current_graph_task_id()
        back = now == -1 and self._stepped and self._order.get(key, 0) < self._order.get(self._stepped[-1], 0)
        fresh = not self._stepped or key in self._stepped or now != self._pass or bool(back)
        unfinished = fresh and not self._over
        if unfinished:
            self._missed.update(self._all.difference(self._stepped))
        if fresh:
            self._stepped, self._over, self._pass = [], False, now
        self._stepped.append(key)
        self._missed[key] = 0
        return fresh, unfinished

    def end(self, optimizer: Optimizer) -> bool:
        """An optimizer has stepped.

        Returns:
            Whether that was the last one this step of the training has waited for.
        """
        awaited = {key for key in self._all if self._missed[key] < MISSED}
        if self._over or not awaited.issubset(self._stepped):
            return False
        self._over = True
        self._order = {key: place for place, key in enumerate(self._stepped)}
        return True


class Steps:
    """The training's real optimizer steps, counted and timed in the process that attached.

    Args:
        optimizers: The innermost optimizers.
        at_once: Know at once whether gradient scaling has skipped a step, at the cost of waiting for the device.

    Attributes:
        step: Steps so far.
        due: Whether a counted step has not been acted on yet.
    """

    def __init__(self, optimizers: Sequence[Optimizer], *, at_once: bool) -> None:
        self.step = 0
        self.due = False
        self._at_once = at_once
        self._rounds = Rounds(optimizers)
        self._reports = 0
        self._skips: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._clock: tuple[int, float, float] | None = None  # first step seen here, when, and when the newest was
        self._pid = os.getpid()

    @property
    def foreign(self) -> bool:
        """Whether this is a forked child, which has the hooks but not the thread."""
        return os.getpid() != self._pid

    @property
    def seconds_per_step(self) -> float | None:
        """Pauses included; None before the second step."""
        first, began, newest = self._clock or (self.step, 0.0, 0.0)
        return (newest - began) / (self.step - first) if self.step > first else None

    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        """Count the steps of these from now on."""
        self._rounds, self._reports = Rounds(optimizers), 0

    def resume(self, step: int) -> None:
        """Go on from a step of an earlier run."""
        self.step, self._clock = step, None

    def reported(self) -> bool:
        """A loss was reported; returns whether that makes `SILENT_REPORTS` without a step."""
        self._reports += 1
        return self._reports == SILENT_REPORTS

    def begin(self, optimizer: Optimizer) -> bool:
        """An optimizer is about to step; returns whether it is the first of a step of the training."""
        first, unfinished = self._rounds.begin(optimizer)
        self.step += unfinished
        return first

    def end(self, optimizer: Optimizer) -> bool:
        """An optimizer has stepped; returns whether a step of the training is over with it."""
        return self._rounds.end(optimizer)

    def count(self, optimizer: Optimizer) -> bool:
        """Count a step that is over, unless gradient scaling skipped it; returns whether it was counted."""
        while self._skips and self._skips[0][1].query():
            self.step -= int(bool(self._skips.popleft()[0].item()))
        found = getattr(optimizer, "found_inf", None)  # set around step() by GradScaler for optimizers that fuse it
        if isinstance(found, Tensor):
            shard = getattr(found, "to_local", None)
            found = shard() if shard is not None else found
            if found.is_cpu or self._at_once:
                if bool(found.item()):
                    return False
            else:
                # Read a step or two later, when it has arrived: the count is late by that much, the device never waits.
                host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
                host.copy_(found.detach(), non_blocking=True)
                copied = torch.cuda.Event()
                copied.record()
                self._skips.append((host, copied))
        self.step += 1
        self._reports = 0
        now = time.perf_counter()
        self._clock = (self.step, now, now) if self._clock is None else (*self._clock[:2], now)
        return True
