"""Optimizers of the arms: torch's own, and SOAP and schedule-free from their libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nowcast_lab.evaluate.arms import Arm
from nowcast_lab.metatrain.vector import learning_rate
from nowcast_lab.metatrain.zoo import hidden_matrices


class KernelMuon(torch.optim.Muon):
    """torch's Muon for convolutions too, each as a matrix with a row per output (Jordan et al., 2024).

    Args:
        parameters: Matrices and kernels; they share memory with the matrices that the optimizer steps.
        options: As torch's.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **options: Any) -> None:
        self._kernels = list(parameters)
        self._matrices = [nn.Parameter(p.detach().view(len(p), -1)) for p in self._kernels]
        super().__init__(self._matrices, **options)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step from the kernels' gradients."""
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.reshape(matrix.shape)
        result: float | None = super().step(closure)  # type: ignore[no-untyped-call]
        return result


class Optimizers:
    """All optimizers of a training, their rates on the arm's schedule.

    Args:
        arm: The arm.
        model: What is trained.
        steps: Of the run.
    """

    def __init__(self, arm: Arm, model: nn.Module, steps: int) -> None:
        self._arm, self._model, self._steps = arm, model, steps
        self.each = _make(arm, model)
        self._trend: list[Tensor] = []
        self._from: list[Tensor] = []
        self._peaks = [[float(group["lr"]) for group in one.param_groups] for one in self.each]

    def fraction(self, step: int) -> float:
        """Of the peak rate, after so many steps."""
        return learning_rate(self._arm.schedule, step, self._steps, round(self._arm.warmup * self._steps))

    def look_ahead(self, step: int) -> None:
        """Go to where the gradient of step number ``step``, from 0, is to be taken.

        EMA-Nesterov (Yau et al., 2026): the optimizer steps from a point ahead, along the exponential average of the
        steps so far; not in warm-up and not in the last fifth of a run, the phases it is left out of there.
        """
        ahead = self._arm.nesterov
        if not ahead:
            return
        with torch.no_grad():
            self._from = [p.detach().clone() for p in self._model.parameters()]
            self._trend = self._trend or [torch.zeros_like(p) for p in self._from]
            if self._arm.warmup * self._steps <= step < 0.8 * self._steps:
                for p, trend in zip(self._model.parameters(), self._trend, strict=True):
                    p.add_(trend, alpha=ahead)

    def step(self, step: int) -> None:
        """Step number ``step``, from 0, with the gradients there are."""
        fraction = self.fraction(step)
        for one, peaks in zip(self.each, self._peaks, strict=True):
            for group, peak in zip(one.param_groups, peaks, strict=True):
                group["lr"] = peak * fraction
        if self._arm.clip is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._arm.clip)
        for one in self.each:
            one.step()
        with torch.no_grad():
            for p, trend, old in zip(self._model.parameters(), self._trend, self._from, strict=False):
                trend.lerp_(p - old, 1 - self._arm.nesterov_decay)

    def mode(self, *, training: bool) -> None:
        """Schedule-free optimizers hold other weights for training than for evaluation."""
        for one in self.each:
            change = getattr(one, "train" if training else "eval", None)
            if change is not None:
                change()

    def forget(self) -> None:
        """Reset the state."""
        for one in self.each:
            one.state.clear()

    def state_dicts(self) -> list[dict[str, Any]]:
        """Of every optimizer."""
        return [one.state_dict() for one in self.each]

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """Back to where they were."""
        for one, state in zip(self.each, states, strict=True):
            one.load_state_dict(state)


def _make(arm: Arm, model: nn.Module) -> list[torch.optim.Optimizer]:
    decay: dict[str, Any] = {"weight_decay": arm.weight_decay}
    options = decay | ({"betas": arm.betas} if arm.betas is not None else {})
    parameters = list(model.parameters())
    if arm.optimizer == "sgd":
        return [torch.optim.SGD(parameters, lr=arm.lr, momentum=0.9, **decay)]
    if arm.optimizer == "muon":
        hidden = hidden_matrices(model)
        named = dict(model.named_parameters())
        rest = [p for name, p in named.items() if name not in hidden]
        return [
            KernelMuon([named[name] for name in named if name in hidden], lr=arm.lr, **decay),
            torch.optim.AdamW(rest, lr=arm.adamw_lr, **options),
        ]
    if arm.optimizer == "soap":
        from pytorch_optimizer import SOAP  # an extra's dependency, needed for this arm alone

        return [SOAP(parameters, lr=arm.lr, **options)]
    if arm.optimizer == "schedulefree":
        from schedulefree import AdamWScheduleFree  # as above

        return [AdamWScheduleFree(parameters, lr=arm.lr, **options)]
    return [torch.optim.AdamW(parameters, lr=arm.lr, **options)]
