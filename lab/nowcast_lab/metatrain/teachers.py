"""Processes that give lessons beside each other."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from nowcast_proto.errors import Unavailable

from nowcast_lab.metatrain.lessons import Job, Lesson, Teacher

Teach = Callable[[Sequence[Job]], Iterator[Lesson]]


@contextlib.contextmanager
def teachers(workers: int, *setup: Any) -> Iterator[Teach]:
    """What gives the lessons of many jobs, in their order: in this process, or in `workers` others."""
    if workers <= 1:
        teacher = Teacher(*setup)
        yield lambda jobs: map(teacher.teach, jobs)
        return
    # Processes that were forked would inherit this one's thread pools in an undefined state.
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, context, _begin, (threads, *setup)) as pool:
        try:
            yield lambda jobs: (Lesson(*_unpacked(each)) for each in pool.map(_teach, [_packed(job) for job in jobs]))
        except BrokenProcessPool as exc:
            raise Unavailable(
                "a process that trains has died",
                expected=f"memory for {workers} of them",
                remedy="start again with fewer workers; it goes on from the last save",
            ) from exc


_teacher: Teacher
"""Of a worker process."""


def _begin(threads: int, *setup: Any) -> None:
    global _teacher
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _teacher = Teacher(*setup)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its processes: they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _teach(job: bytes) -> bytes:
    return _packed(_teacher.teach(Job(*_unpacked(job))))


def _packed(values: tuple[Any, ...]) -> bytes:
    """As bytes: tensors handed to another process as they are would each hold a shared memory file open."""
    buffer = io.BytesIO()
    torch.save(tuple(values), buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> tuple[Any, ...]:
    values: tuple[Any, ...] = torch.load(io.BytesIO(packed), weights_only=True)
    return values
