"""When a training step is over: every optimizer has stepped, and no backward pass runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch.autograd import Variable
from torch.optim import Optimizer

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
