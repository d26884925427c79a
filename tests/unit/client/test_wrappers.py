"""Wrappers around an optimizer that keep weights of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nowcast_client import attach
from nowcast_client.errors import AttachError
from torch import nn

from .service import FakeService, linear
from .training import QUICK, Training

Keep = Callable[[list[nn.Parameter]], Any]


class Slow:
    """Every five steps the kept weights go half the way to the trained ones, which go on from there."""

    def __init__(self, base: torch.optim.Optimizer, keep: Keep, rebinds: bool = False) -> None:
        self.base_optimizer, self.count, self.rebinds = base, 0, rebinds
        self.parameters = base.param_groups[0]["params"]
        self.anything = keep(self.parameters)

    def slow(self) -> list[torch.Tensor]:
        kept = self.anything
        if isinstance(kept, list):
            return [t for part in kept for t in part] if isinstance(kept[0], list) else kept
        return [kept[p]["copy"] if isinstance(kept[p], dict) else kept[p] for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        self.base_optimizer.step()
        self.count += 1
        if self.count % 5 == 0:
            for p, slow in zip(self.parameters, self.slow(), strict=True):
                slow.add_(p - slow, alpha=0.5)
                p.copy_(slow)
            if self.rebinds:
                self.anything = [t.clone() for t in self.anything]


KEPT: dict[str, Keep] = {
    "a list": lambda ps: [p.detach().clone() for p in ps],
    "groups": lambda ps: [[p.detach().clone() for p in ps]],
    "by parameter": lambda ps: {p: p.detach().clone() for p in ps},
    "state": lambda ps: {p: {"copy": p.detach().clone(), "count": 0} for p in ps},
}


@pytest.mark.parametrize("how", [*KEPT, "rebound"])
@pytest.mark.parametrize("harm", [False, True])
def test_kept_weights_move_with_a_patch_and_back(how: str, harm: bool) -> None:
    training = Training(FakeService(linear), mode="off", lr=1e-3)
    wrapper = Slow(training.optimizer, KEPT["a list" if how == "rebound" else how], rebinds=how == "rebound")
    fast: list[torch.Tensor] = []
    slow: list[torch.Tensor] = []
    shifts: list[float] = []

    def remember(*_: object) -> None:
        fast[:] = [p.detach().clone() for p in wrapper.parameters]
        now = [t.clone() for t in wrapper.slow()]
        if not shifts:
            slow[:] = now

    training.optimizer.register_step_post_hook(remember)  # before the one that patches

    def heard(event: Any) -> None:
        if event.kind == "patched" and not shifts:
            for p, old, now, before in zip(wrapper.parameters, fast, wrapper.slow(), slow, strict=True):
                shifts.append(float(((p - old) - (now - before)).abs().max()))
        if event.kind == "rolled_back":
            shifts.append(max(float((now - old).abs().max()) for now, old in zip(wrapper.slow(), slow, strict=True)))

    handle = attach(
        training.model,
        wrapper,
        transport=training.service.transport,
        period=50,
        trial=harm,
        wait=60,
        retry=QUICK,
        on_event=heard,
    )
    for _ in range(80):
        training.optimizer.zero_grad()
        loss = nn.functional.mse_loss(training.model(training.x), training.y)
        loss.backward()
        handle.observe(float(loss) + 5.0 * (harm and bool(shifts)))
        wrapper.step()
    assert handle.summary()["patched"] == 1
    assert handle.summary()["rolled_back"] == harm
    assert max(shifts[:4]) < 1e-6
    assert shifts[4:] == [0.0] * harm


def test_weights_kept_in_an_order_of_their_own_are_refused() -> None:
    training = Training(FakeService(linear), mode="off")
    wrapper = Slow(training.optimizer, lambda ps: [p.detach().clone() for p in reversed(ps)])
    with pytest.raises(AttachError, match="anything"):
        attach(training.model, wrapper, transport=training.service.transport)


def test_what_is_no_copy_of_the_weights_is_left_alone() -> None:
    training = Training(FakeService(linear), mode="off")
    wrapper = Slow(training.optimizer, lambda ps: [torch.zeros_like(p) for p in ps])
    wrapper.step = training.optimizer.step  # type: ignore[method-assign, assignment]
    handle = attach(training.model, wrapper, transport=training.service.transport, period=50, trial=False, wait=60)
    training.run(50)
    assert handle.summary()["patched"] == 1
    assert not any(bool(t.any()) for t in wrapper.slow())
