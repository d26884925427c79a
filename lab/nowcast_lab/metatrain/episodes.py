"""Trainings that a network is refined on: pairs that jump a little farther and less far than it predicts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from nowcast_proto.rules.horizon import horizon_schedule
from torch import Tensor
from torch.func import grad_and_value, vmap

from nowcast_lab.metatrain.collect import (
    batches,
    draw_trainings,
    flat_loss,
    initial_parameters,
    rates,
    vector_optimizer,
)
from nowcast_lab.metatrain.data import Images, Text
from nowcast_lab.metatrain.graphs import TrainingGraph
from nowcast_lab.metatrain.recipes import CONTEXT, Group
from nowcast_lab.metatrain.zoo import Arch

LR_GATE = 0.1
"""Share of the peak learning rate below which no nowcast is made, the client's default."""

LossGradients = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(rows, elements) parameters, inputs and targets of every row -> (rows, elements) gradients and (rows,) losses."""


@dataclass(frozen=True)
class RefineConfig:
    """Everything that decides the result, beside the recipe and the checkpoint it starts from.

    Attributes:
        updates: Steps of the network; each is one nowcast of every training of every episode.
        episodes: Groups that are trained beside each other; a step of the network averages over them.
        periods: Steps between nowcasts an episode may have, multiples of five.
        nowcasts: Fewest and most nowcasts of a training. Its horizons decay as inference's do.
        farthest: Horizon of a training's first nowcast, in strides.
        settle: Share of a period that is left to recovery before gradients and losses count.
        apart: How much farther, and less far, than predicted the two of a pair jump, as a share.
        lr: Peak learning rate.
        weight_decay: AdamW's.
        grad_clip: Bound on the gradient's norm.
        warmup: Updates of linear warm-up.
        magnify: Coordinates the network is trained in, see `basis`.
        average: Share of the average over updates that an update leaves; that average is the checkpoint.
        seed: All randomness.
    """

    updates: int = 300
    episodes: int = 10
    periods: tuple[int, ...] = (100, 160, 240)
    nowcasts: tuple[int, int] = (5, 12)
    farthest: int = 20
    settle: float = 0.5
    apart: float = 0.4
    lr: float = 7e-4
    weight_decay: float = 1e-2
    grad_clip: float = 1.0
    warmup: int = 10
    magnify: float = 15.0
    average: float = 0.98
    seed: int = 0


class Episode:
    """Small trainings of one group, side by side, which are nowcast every period.

    Each is a pair of rows, `far` and `near`, equal until a nowcast and again after the period that follows, when one
    of the two, chosen at random, takes the place of both.

    Args:
        group: What is trained; its ``steps``, ``every`` and ``nowcasts`` do not count here.
        key: What its random choices are drawn from, with the config's seed.
        config: How often it is nowcast.
        data: What is trained on, on `device`.
        graph: The group's prepared graph, on `device`.
        device: Where to train.
        gradients: What takes the trainings' gradients, made by `loss_gradients`; made anew where None.
        unseen: What losses and gradients of the outcome are taken on; None for what is trained on.

    Attributes:
        seen: (models, 5, elements) snapshots of the period that has just ended.
        done: Periods trained.
    """

    def __init__(
        self,
        group: Group,
        key: str,
        config: RefineConfig,
        data: Images | Text,
        graph: TrainingGraph,
        device: torch.device,
        gradients: LossGradients | None = None,
        unseen: Images | Text | None = None,
    ) -> None:
        self.group, self.graph, self._key, self._config = group, graph, key, config
        self._trainings = draw_trainings(group, key, config.seed)
        self._data, self._unseen = data, unseen
        draw = np.random.default_rng([config.seed, *key.encode()])
        self.period = int(draw.choice(config.periods))
        count = int(draw.integers(config.nowcasts[0], config.nowcasts[1] + 1))
        # The first period is not nowcast: it gives the first snapshots.
        self._periods = count + 1
        self._horizons = horizon_schedule(self.period * count, self.period, farthest=config.farthest)
        parameters = initial_parameters(group.arch, [t.seed or 0 for t in self._trainings], group.init)
        self._parameters = torch.cat((parameters, parameters)).to(device)
        decay = torch.tensor([[t.weight_decay or 0.0] for t in self._trainings], device=device)
        self._optimizer = vector_optimizer(group, self._parameters, torch.cat((decay, decay)))
        self._gradients = gradients or loss_gradients(group.arch)
        self.seen = self._parameters.new_zeros(len(self._trainings), CONTEXT, self._parameters.shape[1])
        self.done = 0

    @property
    def over(self) -> bool:
        """Whether no nowcast is left."""
        return self.done >= self._periods

    @property
    def horizon(self) -> int:
        """Of the next nowcast, in strides."""
        return self._horizons[self.done - 1]

    def advance(self, moved: Tensor | None = None) -> Outcome:
        """Jump, where there is something to jump by, and train for one period, taking snapshots.

        Args:
            moved: (models, elements) displacement predicted.
        """
        group, models, period = self.group, len(self._trainings), self.period
        jumped = torch.zeros(models, dtype=torch.bool, device=self._parameters.device)
        if moved is not None:
            jumped = self._moving()
            moved = moved * jumped[:, None]
            self._parameters += torch.cat(((1 + self._config.apart) * moved, (1 - self._config.apart) * moved))
        # Streams of its own for every period: an episode that is picked up again sees what it would have seen.
        number = number_of(f"{self._key}/{self.done}")
        stream = batches(self._data, group.arch, models, group.batch, number)
        unseen = self._unseen and batches(self._unseen, group.arch, models, group.batch, number)
        first = int(self._config.settle * period)
        gradients, losses = torch.zeros_like(self._parameters), self._parameters.new_zeros(2 * models)
        seen = self._parameters.new_zeros(2 * models, CONTEXT, self._parameters.shape[1])
        whole = self._periods * period
        for step in range(period):
            gradient, loss = self._gradients(self._parameters, *_twice(next(stream)))
            if step >= first:
                told = (gradient, loss) if not unseen else self._gradients(self._parameters, *_twice(next(unseen)))
                gradients += told[0] / (period - first)
                losses += told[1] / (period - first)
            lr = self._parameters.new_tensor(2 * rates(group, self._trainings, self.done * period + step, whole))
            self._optimizer.step(self._parameters, gradient, lr)
            if (step + 1) % (period // CONTEXT) == 0:
                seen[:, (step + 1) // (period // CONTEXT) - 1] = self._parameters
        draw = torch.Generator().manual_seed(number)
        # A pair one of which has diverged goes on as the other.
        coin = torch.rand(models, generator=draw).to(losses.device) < 0.5
        far, near = losses.split(models)
        take_near = (coin & near.isfinite()) | ~far.isfinite()
        survivors = torch.arange(models, device=losses.device) + models * take_near
        self.seen = seen[survivors]
        survivors = survivors.repeat(2)
        self._parameters = self._parameters[survivors]
        self._optimizer.first, self._optimizer.second = (
            self._optimizer.first[survivors],
            self._optimizer.second[survivors],
        )
        self.done += 1
        return Outcome(gradients.view(2, models, -1).mean(0), far, near, jumped)

    def _moving(self) -> Tensor:
        """(models,) whether a training's rate is still at or above the gate below which inference makes no nowcast."""
        now = rates(self.group, self._trainings, self.done * self.period, self._periods * self.period)
        peaks = [t.lr or 0.0 for t in self._trainings]
        moving = [rate >= LR_GATE * peak for (rate,), peak in zip(now, peaks, strict=True)]
        return torch.tensor(moving, device=self._parameters.device)

    def state(self) -> dict[str, Any]:
        """What `restore` takes: tensors, numbers and the key."""
        return {
            "key": self._key,
            "parameters": self._parameters,
            "seen": self.seen,
            "done": self.done,
            "first": self._optimizer.first,
            "second": self._optimizer.second,
            "steps": self._optimizer.steps,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where an episode of the same key was."""
        self._parameters, self.seen, self.done = state["parameters"], state["seen"], int(state["done"])
        self._optimizer.first, self._optimizer.second = state["first"], state["second"]
        self._optimizer.steps = int(state["steps"])


class Outcome(NamedTuple):
    """What became of a nowcast, over the steps of its period after `settle`.

    Attributes:
        gradient: (models, elements) mean gradient of the training loss.
        far: (models,) mean loss of those that jumped farther than predicted.
        near: (models,) of those that jumped less far.
        jumped: (models,) whether a training was nowcast at all.
    """

    gradient: Tensor
    far: Tensor
    near: Tensor
    jumped: Tensor


def loss_gradients(arch: Arch, *, compiled: bool = False) -> LossGradients:
    """Gradients and losses of many networks at once.

    Args:
        arch: The networks.
        compiled: Let `torch.compile` fuse them: nearly twice as fast for transformers, after some twenty seconds.
    """
    gradients = vmap(grad_and_value(flat_loss(arch)))
    if not compiled:
        return gradients
    # All architectures share one piece of code: to the compiler, each is a recompilation of it.
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(gradients, dynamic=False)


def _twice(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same inputs and targets for both rows of every pair."""
    inputs, targets = batch
    return torch.cat((inputs, inputs)), torch.cat((targets, targets))


def number_of(text: str) -> int:
    """A seed from a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest())
