"""A training loop for the corners: real optimizers on real digits, a service in the same process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nowcast_client import attach
from nowcast_client.handle import Event, Handle
from nowcast_client.wire.transport import Retry
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ..client.service import FakeService

Arrays = Mapping[str, np.ndarray]


def small(history: Sequence[Arrays], k: int) -> Arrays:
    """A twentieth of the last stride, ``k`` times: a change that helps or does no harm."""
    return {name: 0.05 * k * (history[-1][name] - history[-2][name]) for name in history[-1]}


def backwards(history: Sequence[Arrays], k: int) -> Arrays:
    """Far back the way the weights came: a change that does harm, within what the checks let pass."""
    return {name: -2.0 * k * (history[-1][name] - history[-2][name]) for name in history[-1]}


def digits(count: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches, always the same ones."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels)
    generator = torch.Generator().manual_seed(0)
    while True:
        chosen = torch.randint(0, len(y), (count,), generator=generator)
        yield x[chosen], y[chosen]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))


class Watched:
    """An attached handle and what it told; the service predicts with ``predict``."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        predict: Callable[[Sequence[Arrays], int], Arrays] = small,
        *,
        on_event: Callable[[Event], object] | None = None,
        **settings: Any,
    ) -> None:
        self.service = FakeService(predict)
        self.events: list[Event] = []

        def note(event: Event) -> None:
            self.events.append(event)
            if on_event is not None:
                on_event(event)

        settings = {"period": 20, "wait": 120.0, "trial": False, "strict": False, **settings}
        retry = Retry(attempts=2, base=0.001, cap=0.01)
        self.handle: Handle = attach(
            model, optimizer, transport=self.service.transport, retry=retry, on_event=note, **settings
        )

    def steps(self, kind: str) -> list[int]:
        return [event.step for event in self.events if event.kind == kind]

    def reasons(self, kind: str) -> str:
        return "; ".join(str(event.detail.get("reason", "")) for event in self.events if event.kind == kind)

    def sent(self) -> dict[str, np.ndarray]:
        """The newest snapshot the service holds."""
        held = next(iter(self.service.sessions.values()))[1]
        return dict(held[max(held)][1])


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterator[Any], handle: Handle | None = None
) -> float:
    x, y = next(data)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    if handle is not None:
        handle.observe(loss)
    optimizer.step()
    return float(loss.detach())


def steps(count: int, model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterator[Any]) -> None:
    for _ in range(count):
        step(model, optimizer, data)
