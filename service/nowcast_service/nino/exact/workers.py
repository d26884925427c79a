"""Threads that work on tiles side by side.

Each worker computes with one thread of its own. The alternative, one tile at a time with every operation spread over
all threads, meets at a barrier after each operation: as fast on an idle machine, but where a training job wants the
same cores the barriers spin most of the time away (see docs/benchmarks.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

T = TypeVar("T")


class Workers:
    """Runs tasks on a number of threads; the process's own number of torch threads is put back at the end.

    Args:
        number: Threads.
        ahead: Tasks per thread handed out before the oldest of them is done.
        inline: Run tasks in the calling thread and leave torch's threads alone (a GPU has its own parallelism).
    """

    def __init__(self, number: int, *, ahead: int = 4, inline: bool = False) -> None:
        self._number = number
        self._ahead = ahead * number
        self._inline = inline
        self._before = 0
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if not self._inline:
            self._before = torch.get_num_threads()
            torch.set_num_threads(1)
            if self._number > 1:
                self._pool = ThreadPoolExecutor(self._number, "nino", initializer=_alone)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if not self._inline:
            torch.set_num_threads(self._before)

    def run(self, tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
        """Results of the tasks, in their order."""
        if self._pool is None:
            for task in tasks:
                yield task()
            return
        pending: deque[Future[T]] = deque()
        for task in tasks:
            pending.append(self._pool.submit(_without_gradients, task))
            if len(pending) > self._ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _alone() -> None:
    torch.set_num_threads(1)


def _without_gradients(task: Callable[[], T]) -> T:
    with torch.no_grad():  # a setting of the thread, not of the process
        return task()
