"""Averages of the weights of a training, which are evaluated beside the live ones (AlgoPerf's target-setting runs and
LAWA, Kaddour, 2022): no training goes on from them."""

from __future__ import annotations

import copy
from collections import deque

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nowcast_lab.evaluate.arms import Average


class Averages:
    """The exponential average of a training's weights, and the mean of its newest snapshots.

    Args:
        model: What is trained.
        span: Steps that the exponential average reaches back.
        every: Steps between the snapshots of the mean.
        snapshots: How many.
    """

    def __init__(self, model: nn.Module, span: float, every: int, snapshots: int) -> None:
        decay = max(0.0, 1 - 1 / max(1.0, span))
        self._model, self._every = model, every
        self._ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self._snapshots: deque[dict[str, Tensor]] = deque(maxlen=snapshots)

    def update(self, step: int) -> None:
        """Take in the weights after step ``step``, counted from 1."""
        self._ema.update_parameters(self._model)
        if step % self._every == 0:
            self._snapshots.append({name: t.detach().clone() for name, t in self._model.state_dict().items()})

    def model(self, kind: Average) -> nn.Module:
        """The network with averaged weights; the live one before there is an average."""
        if kind == "ema":
            return self._ema.module
        if kind == "none" or not self._snapshots:
            return self._model
        mean = copy.deepcopy(self._model)
        mean.load_state_dict(
            {
                name: torch.stack([s[name] for s in self._snapshots]).mean(0) if tensor.is_floating_point() else tensor
                for name, tensor in self._snapshots[-1].items()
            }
        )
        return mean
