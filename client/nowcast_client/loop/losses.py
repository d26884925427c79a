"""Reported losses without a device sync: a CUDA scalar is copied aside and read when it has arrived."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from nowcast_proto.rules.verdict import LossTrace
from torch import Tensor

_BACKLOG = 4096


class LossReader:
    """Takes losses as they come and fills a `LossTrace` as they become readable.

    Args:
        trace: Where they go.
    """

    def __init__(self, trace: LossTrace) -> None:
        self.trace = trace
        self._waiting: deque[tuple[int, Any, torch.cuda.Event | None]] = deque(maxlen=_BACKLOG)

    def report(self, step: int, loss: float | Tensor) -> None:
        """Take the loss of the weights after ``step`` optimizer steps; nothing waits for the device."""
        if not isinstance(loss, Tensor) or loss.is_cpu:
            self._drain(block=False)
            self.trace.add(step, loss.item() if isinstance(loss, Tensor) else float(loss))
        elif loss.is_cuda:
            loss = loss.detach()
            host = torch.empty((), dtype=loss.dtype, pin_memory=True)
            host.copy_(loss.reshape(()), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._waiting.append((step, host, event))
        else:
            self._waiting.append((step, loss.detach().clone(), None))

    def read(self, *, block: bool = False) -> None:
        """Move what has arrived into the trace; with ``block`` also what has not (one sync, at a verdict)."""
        self._drain(block=block)

    def _drain(self, *, block: bool) -> None:
        while self._waiting:
            step, value, event = self._waiting[0]
            if not block and (event is None or not event.query()):
                return
            if event is not None:
                event.synchronize()
            self.trace.add(step, float(value))
            self._waiting.popleft()
