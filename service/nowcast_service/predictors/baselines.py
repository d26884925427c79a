"""Predictors without a trained network: what every nowcast has to beat.

All are a weighted sum of snapshots (or of their differences), formed tensor by tensor around the newest snapshot, so
that a tensor that has not moved stays exactly where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from nowcast_proto.errors import InvalidSnapshot
from torch import Tensor

from nowcast_service.history import History
from nowcast_service.predictors.base import (
    FARTHEST_BASELINE,
    Check,
    State,
    check_count,
    check_horizon,
    unasked,
)
from nowcast_service.predictors.graphs import Needs


class _Weighted:
    """Sum of snapshots with weights that add up to 1."""

    name: ClassVar[str]
    context = 0
    farthest = FARTHEST_BASELINE
    needs: Sequence[Needs] = ()

    def weights(self, n: int, k: int) -> list[float]:
        """Weight of each of n snapshots, oldest first, for horizon k."""
        raise NotImplementedError

    def predict(
        self, history: History, k: int, state: State | None = None, *, check: Check = unasked
    ) -> tuple[dict[str, Tensor], State]:
        """See `Predictor.predict`."""
        check_count(len(history), self.context, self.name)
        check_horizon(k)
        weights = self.weights(len(history), k)
        displacement = {}
        for name in history.spec.shapes():
            check()
            newest = history.newest(name).float()
            moved = torch.zeros_like(newest)
            for snapshot, weight in zip(history.snapshots[:-1], weights[:-1], strict=True):
                # The newest one's weight is implied: 1 minus all others.
                moved.add_(snapshot[name].float() - newest, alpha=weight)
            displacement[name] = moved
        return displacement, {}


class Linear(_Weighted):
    """Least-squares line through the snapshots of every weight, read k strides after the newest one."""

    name = "linear"

    def weights(self, n: int, k: int) -> list[float]:
        centre = (n - 1) / 2
        spread = sum((t - centre) ** 2 for t in range(n))
        return [1 / n + (t - centre) * (n - 1 + k - centre) / spread for t in range(n)]


class Lawa(_Weighted):
    """Average of the snapshots (Kaddour, Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest
    Weight Averaging, 2022). Looks at no horizon."""

    name = "lawa"

    def weights(self, n: int, k: int) -> list[float]:
        return [1 / n] * n


class Identity(_Weighted):
    """The newest snapshot, as it is: what training does without any of this."""

    name = "identity"

    def weights(self, n: int, k: int) -> list[float]:
        return [0.0] * (n - 1) + [1.0]


class Snoo:
    """Nesterov momentum on the displacement since the last nowcast (SNOO: Step-K Nesterov Outer Optimizer, 2025).

    With anchor a (the parameters the last nowcast led to; at first the oldest snapshot), newest snapshot w and momentum
    buffer v: v <- mu v + (w - a), prediction a + lr ((w - a) + mu v). Looks at no horizon.

    Args:
        lr: Outer learning rate.
        momentum: mu, in [0, 1).
    """

    name = "snoo"
    context = 0
    farthest = FARTHEST_BASELINE
    needs: Sequence[Needs] = ()

    def __init__(self, *, lr: float = 0.7, momentum: float = 0.5) -> None:
        if not lr > 0 or not 0 <= momentum < 1:
            raise ValueError(f"lr={lr}, momentum={momentum}: expected lr > 0 and momentum in [0, 1)")
        self.lr, self.momentum = lr, momentum

    def predict(
        self, history: History, k: int, state: State | None = None, *, check: Check = unasked
    ) -> tuple[dict[str, Tensor], State]:
        """See `Predictor.predict`; the state holds an ``anchor`` and a ``velocity``, each a tensor per parameter."""
        check_horizon(k)
        if state:
            self._check(history, state)
        else:
            check_count(len(history), self.context, self.name)
        displacement: dict[str, Tensor] = {}
        anchors: dict[str, Tensor] = {}
        velocities: dict[str, Tensor] = {}
        for name in history.spec.shapes():
            check()
            newest = history.newest(name).float()
            anchor = (state["anchor"][name] if state else history.snapshots[0][name]).to(newest)
            gone = newest - anchor
            velocity = gone + self.momentum * state["velocity"][name].to(newest) if state else gone
            anchors[name] = anchor + self.lr * (gone + self.momentum * velocity)
            displacement[name] = anchors[name] - newest
            velocities[name] = velocity
        return displacement, {"anchor": anchors, "velocity": velocities}

    @staticmethod
    def _check(history: History, state: State) -> None:
        for part in ("anchor", "velocity"):
            tensors = state.get(part)
            for name, shape in history.spec.shapes().items():
                tensor = tensors.get(name) if isinstance(tensors, dict) else None
                if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
                    raise InvalidSnapshot(
                        f"the state of predictor 'snoo' does not fit: {part} of tensor {name!r} is "
                        + ("missing" if tensor is None else f"of shape {list(tensor.shape)}"),
                        expected=f"shape {list(shape)}",
                        remedy="start the session anew",
                    )
