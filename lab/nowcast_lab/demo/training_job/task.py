"""What the demo can train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class Task:
    """A network, its data and how it is best trained alone.

    Attributes:
        title: What is trained, for people.
        subject: On what, for people.
        unit: Of the loss.
        model: Makes the network, from torch's global generator.
        loss: Mean loss of a batch, a scalar.
        draw: The next batch of so many items; its generator is all its randomness.
        held_out: One batch never trained on.
        batch: Items of a step.
        steps: Optimizer steps by default.
        rate: AdamW's peak learning rate: the one at which training alone ends best, see ``docs/results-h32.md``.
        betas: AdamW's.
        weight_decay: AdamW's.
        clip: Bound on the gradient's norm, None for none.
    """

    title: str
    subject: str
    unit: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    draw: Callable[[int, Generator], Any]
    held_out: Any
    batch: int
    steps: int
    rate: float
    betas: tuple[float, float]
    weight_decay: float
    clip: float | None = None
