"""An exponential average of the weights, kept beside a training for evaluation and saving; training never sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nowcast_client.tensors.layout import local


class Average:
    """The average of a model's parameters and floating-point buffers over its newest steps.

    Of a sharded parameter every rank averages its own part, so nothing is exchanged.

    Args:
        model: The network, as it is trained.
        span: Steps that the average reaches back.
    """

    def __init__(self, model: nn.Module, span: int) -> None:
        self._model = model
        self._share = 1.0 / span
        self._steps = 0
        self._means: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Memory it takes, where the weights are."""
        return sum(mean.nbytes for mean in self._means.values())

    def update(self) -> None:
        """Take in the weights as they are after a step."""
        with torch.no_grad():
            live = self._live()
            if live.keys() != self._means.keys() or any(t.shape != self._means[n].shape for n, t in live.items()):
                self.restart()
                self._means = {name: tensor.detach().float().clone() for name, tensor in live.items()}
            # The mean of the first steps, until there are as many as the average reaches back.
            self._steps += 1
            share = max(self._share, 1.0 / self._steps)
            torch._foreach_lerp_([*self._means.values()], [t.detach().float() for t in live.values()], share)

    def restart(self) -> None:
        """Forget what the weights have been."""
        self._means, self._steps = {}, 0

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model holds the average inside, and what it held before, bit for bit, afterwards."""
        with torch.no_grad():
            live = self._live() if self._means else {}
            held = {name: tensor.detach().clone() for name, tensor in live.items()}
        try:
            self._write(live, self._means)
            yield
        finally:
            self._write(live, held)

    def _write(self, live: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in live.items():
                if name in values:
                    tensor.copy_(values[name])

    def _live(self) -> dict[str, Tensor]:
        both = (*self._model.named_parameters(), *self._model.named_buffers())
        return {name: local(tensor) for name, tensor in both if tensor.is_floating_point()}
