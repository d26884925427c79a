"""Giving memory back to the system, and measuring what is taken."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_QUIET = 1.0
"""Seconds after the last release before the heap is gone through: whoever asks again at once finds it as it was."""


class Trimmer:
    """Hands the C heap's free pages back to the system after large blocks were freed.

    Answers of a few MiB come from the heap, which keeps what is freed; a service that has once been busy would stay
    large for ever. Does nothing where the C library has no ``malloc_trim``.
    """

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        self._freed: float | None = None

    def freed(self) -> None:
        """Note that something large was freed, or is about to be. From any thread."""
        self._freed = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether there is something to hand back, and it has been quiet for long enough."""
        return self._trim is not None and self._freed is not None and time.monotonic() - self._freed >= _QUIET

    def run(self) -> None:
        """Hand the free pages back; takes milliseconds, without the interpreter lock."""
        self._freed = None
        if self._trim is not None:
            self._trim(0)


class Peak:
    """Most memory taken at once beyond what was in use before, over all stretches that were measured.

    On CUDA that of the device, else that of this process, other threads' included; where the system does not tell
    (anything but Linux, or a container that hides it), nothing is measured.

    Args:
        device: ``cpu`` or ``cuda``.

    Attributes:
        nbytes: None before the first stretch, and where nothing can be measured.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.nbytes: int | None = None
        self._cuda = torch.device(device).type == "cuda"

    @contextmanager
    def measured(self) -> Iterator[None]:
        """A stretch that counts."""
        before = self._begin()
        yield
        after = self._most()
        if before is not None and after is not None:
            self.nbytes = max(self.nbytes or 0, after - before)

    def _begin(self) -> int | None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        except OSError:
            return None
        return resident()

    def _most(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self._cuda else resident("VmHWM")


def resident(field: str = "VmRSS") -> int | None:
    """A size of this process in bytes, as the kernel names it; None where it does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
