"""Optimizers and schedules for many trainings at once, as rows of one (models, elements) tensor.

Every row has its own learning rate and weight decay. The formulas are those of ``torch.optim`` (tested equal); a step
of all models is a few tensor operations, on a CPU core as on an accelerator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["constant", "cosine", "linear", "wsd"]
"""How the learning rate goes after its warm-up."""
OptimizerName = Literal["adamw", "sgd", "muon"]

REST = 0.1
"""Muon's learning rate times this is AdamW's, for the tensors that Muon leaves to it."""
COOLDOWN = 0.2
"""Share of a run in which WSD (warm-up, stable, decay; Hu et al., 2024) takes the rate down to zero, linearly."""
MOMENTUM = 0.95
"""Muon's, as in ``torch.optim.Muon``."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon's iteration (Jordan et al., 2024)."""


def learning_rate(schedule: str, step: int, steps: int, warmup: int = 0) -> float:
    """Fraction of the peak learning rate at a step.

    Args:
        schedule: See `Schedule`.
        step: Steps taken before.
        steps: Of the run.
        warmup: Steps of linear warm-up.
    """
    if step < warmup:
        return (step + 1) / warmup
    left = (steps - step) / max(1, steps - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (1 - left)))
    if schedule == "linear":
        return left
    if schedule == "wsd":
        return min(1.0, (steps - step) / max(1.0, COOLDOWN * steps))
    return 1.0


@dataclass(frozen=True)
class Matrix:
    """A weight matrix in a row of parameters, which Muon makes orthogonal steps of.

    Attributes:
        start: Its first element.
        rows: Outputs.
        columns: Inputs, times the positions of a kernel.
    """

    start: int
    rows: int
    columns: int

    def of(self, flat: Tensor) -> Tensor:
        """(models, elements) to a (models, rows, columns) view."""
        view: Tensor = flat[:, self.start : self.start + self.rows * self.columns].unflatten(
            1, (self.rows, self.columns)
        )
        return view


@dataclass
class VectorOptimizer:
    """AdamW, SGD with momentum or Muon on (models, elements), every model with its own rate and decay.

    Attributes:
        kind: ``adamw`` (Loshchilov and Hutter, 2019), ``sgd`` (momentum 0.9) or ``muon`` (Jordan et al., 2024): its
            rule for `matrices`, AdamW at `REST` of its rate for everything else.
        weight_decay: (models, 1), decoupled for AdamW and Muon, added to the gradient for SGD, as in ``torch.optim``.
        first: First moment or momentum, (models, elements).
        second: Second moment, (models, elements); unused by SGD and for Muon's matrices.
        matrices: What Muon's rule is for.
        betas: AdamW's.
        steps: Steps taken.
    """

    kind: OptimizerName
    weight_decay: Tensor
    first: Tensor
    second: Tensor
    matrices: tuple[Matrix, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    steps: int = 0

    @classmethod
    def of(
        cls,
        kind: OptimizerName,
        parameters: Tensor,
        weight_decay: Tensor,
        *,
        matrices: Sequence[Matrix] = (),
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> VectorOptimizer:
        """A fresh optimizer for (models, elements) parameters."""
        first, second = torch.zeros_like(parameters), torch.zeros_like(parameters)
        return cls(kind, weight_decay, first, second, tuple(matrices) if kind == "muon" else (), betas)

    def step(self, parameters: Tensor, gradient: Tensor, lr: Tensor) -> None:
        """One step in place.

        Args:
            parameters: (models, elements), changed in place.
            gradient: (models, elements).
            lr: (models, 1) learning rates of this step.
        """
        self.steps += 1
        if self.kind == "sgd":
            gradient = gradient + self.weight_decay * parameters
            self.first = gradient.clone() if self.steps == 1 else self.first.mul_(0.9).add_(gradient)
            parameters.sub_(lr * self.first)
            return
        moved = [self._orthogonal_step(matrix, parameters, gradient, lr) for matrix in self.matrices]
        self._adamw_step(parameters, gradient, lr * REST if self.kind == "muon" else lr)
        # AdamW's step went over everything, which is quicker than around the matrices; these are put right here.
        for matrix, (weight, momentum) in zip(self.matrices, moved, strict=True):
            matrix.of(parameters).copy_(weight)
            matrix.of(self.first).copy_(momentum)

    def _adamw_step(self, parameters: Tensor, gradient: Tensor, lr: Tensor) -> None:
        one, two = self.betas
        parameters.mul_(1 - lr * self.weight_decay)
        self.first.lerp_(gradient, 1 - one)
        self.second.mul_(two).addcmul_(gradient, gradient, value=1 - two)
        root = (self.second / (1 - two**self.steps)).sqrt_().add_(1e-8)
        parameters.sub_(lr / (1 - one**self.steps) * self.first / root)

    def _orthogonal_step(
        self, matrix: Matrix, parameters: Tensor, gradient: Tensor, lr: Tensor
    ) -> tuple[Tensor, Tensor]:
        """New weights and momentum of one matrix, (models, rows, columns) each."""
        grad = matrix.of(gradient)
        momentum = matrix.of(self.first).lerp(grad, 1 - MOMENTUM)
        update = orthogonal(grad.lerp(momentum, MOMENTUM))
        rate = lr[..., None]
        scale = max(1.0, matrix.rows / matrix.columns) ** 0.5
        weight = matrix.of(parameters) * (1 - rate * self.weight_decay[..., None]) - rate * scale * update
        return weight, momentum


def orthogonal(x: Tensor, iterations: int = 5) -> Tensor:
    """Singular values of (models, rows, columns) matrices brought near 1 by Newton and Schulz's iteration."""
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
