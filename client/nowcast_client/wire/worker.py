"""A background thread that runs jobs one after another."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

log = logging.getLogger("nowcast")


class Worker:
    """Runs jobs in a daemon thread, in the order they came.

    Args:
        name: Of the thread.
        changed: Notified whenever a job has ended.
        after: Called in the thread after every job.
        last: Called in the thread when it ends.

    Attributes:
        closing: Whether jobs are no longer taken.
    """

    def __init__(
        self, name: str, changed: threading.Condition, after: Callable[[], None], last: Callable[[], None]
    ) -> None:
        self.closing = False
        self._changed = changed
        self._after = after
        self._last = last
        self._open = 0
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], AbstractContextManager[None]] | None]
        self._jobs = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None], around: AbstractContextManager[None] | None = None) -> None:
        """Have a job run, inside a context where one is given."""
        if self.closing:
            return
        with self._changed:
            self._open += 1
        self._jobs.put((job, around or nullcontext()))

    def idle(self, timeout: float) -> bool:
        """Wait until no job is left; returns whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self._open == 0, timeout)

    def refuse(self) -> None:
        """Take no more jobs, and begin none that waits."""
        self.closing = True

    def end(self, timeout: float) -> bool:
        """End the thread after the job that runs; returns whether it ended within ``timeout`` seconds."""
        self.refuse()
        self._jobs.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        _step_back()
        while (found := self._jobs.get()) is not None:
            job, around = found
            try:
                if not self.closing:
                    with around:
                        job()
            finally:
                self._after()
                with self._changed:
                    self._open -= 1
                    self._changed.notify_all()
            del found, job, around  # what a job holds must not outlive it here
        self._last()


def _step_back() -> None:
    """Let the trainer go first: on Linux a thread has a niceness of its own."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
    except (AttributeError, OSError) as exc:
        log.debug("the uploader runs at normal priority: %s", exc)
