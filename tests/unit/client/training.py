"""A tiny training against a fake service."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nowcast_client import attach
from nowcast_client.handle import Event, Handle
from nowcast_client.wire.transport import Retry
from torch import nn

from .service import FakeService

QUICK = Retry(attempts=3, base=0.001, cap=0.01)


class Training:
    """A tiny regression on fixed data; ``loss_of`` may replace the reported loss."""

    def __init__(self, service: FakeService, *, lr: float = 1e-2, seed: int = 0, **kwargs: Any) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        self.x = torch.randn(64, 4)
        self.y = self.x.sum(1, keepdim=True).sin()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.events: list[Event] = []
        self.service = service
        kwargs.setdefault("transport", service.transport)
        kwargs.setdefault("wait", 60.0)
        kwargs.setdefault("period", 50)
        kwargs.setdefault("retry", QUICK)
        self.handle: Handle = attach(self.model, self.optimizer, on_event=self.events.append, **kwargs)

    def run(self, steps: int, *, loss_of: Callable[[int, float], float] | None = None, report: bool = True) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.model(self.x), self.y)
            loss.backward()
            if report:
                self.handle.observe(loss if loss_of is None else loss_of(self.handle.step, loss.item()))
            self.optimizer.step()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events if event.kind != "snapshot"]

    def first(self, kind: str) -> Event:
        return next(event for event in self.events if event.kind == kind)


class Drift:
    """A loss of 1 that every nowcast raises by a little, and that falls below 1 once `recovers` is set."""

    def __init__(self, training: Training, by: float) -> None:
        self._training, self._by = training, by
        self.recovers = False

    def __call__(self, step: int, loss: float) -> float:
        patched = self._training.kinds().count("patched")
        return 1.0 + 0.02 * (step % 2) + (-0.05 if self.recovers else self._by * patched)


def harmful(history: Sequence[Mapping[str, np.ndarray]], k: int) -> Mapping[str, np.ndarray]:
    rng = np.random.default_rng(0)
    norms = {n: np.linalg.norm(history[-1][n] - history[-2][n]) for n in history[-1]}
    noises = {n: rng.normal(size=v.shape) for n, v in history[-1].items()}
    return {n: noises[n] / np.linalg.norm(noises[n]) * norms[n] * k for n in noises}
