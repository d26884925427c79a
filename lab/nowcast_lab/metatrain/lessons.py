"""What an episode teaches the network that nowcast it."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from nowcast_service.nino.config import NiNoConfig
from nowcast_service.nino.model import NiNoTwin
from nowcast_service.nino.scaling import EPSILON
from torch import Tensor

from nowcast_lab.metatrain.collect import DIVERGED
from nowcast_lab.metatrain.data import Images, Text, load
from nowcast_lab.metatrain.episodes import Episode, LossGradients, Outcome, RefineConfig, loss_gradients, number_of
from nowcast_lab.metatrain.forward import forward
from nowcast_lab.metatrain.graphs import TrainingGraph, prepare
from nowcast_lab.metatrain.recipes import CONTEXT, Group, Recipe
from nowcast_lab.metatrain.sampler import standardised
from nowcast_lab.metatrain.train import basis
from nowcast_lab.metatrain.zoo import Arch

CLIP = 2.0
"""A training counts at most this many times the mean of its episode: one that is about to diverge must not decide."""


def displacement(
    twin: NiNoTwin, graph: TrainingGraph, seen: Tensor, k: int, encoding: Tensor, change: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the network sees the parameters going, as inference computes it, but differentiable.

    Args:
        twin: The network, in the coordinates `change` (see `basis`).
        graph: The architecture.
        seen: (models, 5, elements) snapshots, oldest first.
        k: Horizon in strides.
        encoding: (nodes, 8) positional encoding.
        change: (5, 5) coordinates of the inputs.

    Returns:
        (models, elements) displacement from the newest snapshot in units of the weights, and (models, elements) the
        standard deviation of each element's tensor. A tensor that did not move does not move now.
    """
    scaled, deviations = [], []
    for part in seen.split(list(graph.segments), -1):
        x, deviation, moving = standardised(part)
        scaled.append(x)
        deviations.append(torch.where(moving, deviation, 0.0)[:, 0].expand(-1, part.shape[-1]))
    spread = torch.cat(deviations, -1)
    x = torch.cat(scaled, -1).permute(2, 0, 1)  # (elements, models, 5)
    fixed = x.new_tensor([1.0, 2.0]).view(2, 1, 1).expand(2, *x.shape[1:])
    predictions = forward(twin, graph, torch.cat((x, fixed)) @ change.T, encoding, (k,))
    moves = x.new_zeros(x.shape[0] + 2, x.shape[1])
    for group, prediction in zip(graph.groups, predictions, strict=True):
        rows = group.gather[group.weighted].flatten()  # (edges * features,)
        values = prediction[group.weighted].squeeze(-1).transpose(1, 2).flatten(0, 1)  # (edges * features, models)
        moves = moves.index_copy(0, rows, values)
    return moves[:-2].T * spread, spread


def lesson(moved: Tensor, spread: Tensor, outcome: Outcome, apart: float, guess: float) -> tuple[Tensor, float, float]:
    """What to minimise: the change of the loss after recovery with the displacement, in comparable units.

    Every episode counts the same however steep its losses are, and a training at most `CLIP` times its episode's mean.

    Args:
        moved: (models, elements) displacements, with gradient.
        spread: (models, elements) standard deviations of the elements' tensors.
        outcome: What became of them.
        apart: See `RefineConfig`.
        guess: Loss of a uniform guess.

    Returns:
        A scalar, whose gradient is what is meant; what jumping farther by all of the displacement would do to the loss,
        by the pairs and by the gradients; both NaN, and the scalar zero, where none was nowcast without diverging.
    """
    good = (outcome.far < DIVERGED * guess) & (outcome.near < DIVERGED * guess) & outcome.gradient.isfinite().all(1)
    good &= outcome.jumped
    if not bool(good.any()):
        return 0.0 * moved.nan_to_num().sum(), math.nan, math.nan
    moved, spread, gradient = moved[good], spread[good], outcome.gradient[good]
    # In the coordinates the network predicts in; a tensor that stood still does not move.
    step = moved.detach() / spread.clamp(min=EPSILON)
    slope = gradient * spread
    measured = (outcome.far - outcome.near)[good] / (2 * apart)
    expected = (slope * step).sum(1)
    slope = slope + ((measured - expected) / step.square().sum(1).clamp(min=EPSILON))[:, None] * step
    norm = slope.norm(dim=1)
    mean = norm.mean().clamp(min=1e-12)
    weight = (CLIP * mean / norm.clamp(min=1e-12)).clamp(max=1.0) / mean
    direction = slope * weight[:, None] / spread.clamp(min=EPSILON)
    return (direction * moved).sum(1).mean(), float(measured.mean()), float(expected.mean())


class Lesson(NamedTuple):
    """What one episode has to say about one update.

    Attributes:
        kind: Of network.
        gradients: By parameter of the nowcasting network, in its order; None for one it does not depend on.
        paired: What jumping farther would have done to the loss, by the pairs, see `lesson`.
        first_order: The same by the gradients.
        episode: Its state after the period, see `Episode.state`.
        seconds: What it took.
    """

    kind: str
    gradients: list[Tensor | None]
    paired: float
    first_order: float
    episode: dict[str, Any]
    seconds: float


class Job(NamedTuple):
    """What a lesson is made from.

    Attributes:
        slot: Which of the episodes beside each other.
        update: Of the network.
        network: The network's tensors, in the coordinates of `basis`.
        episode: The episode's state; None where none has begun.
    """

    slot: int
    update: int
    network: dict[str, Tensor]
    episode: dict[str, Any] | None


class Teacher:
    """Gives lessons: keeps data, graphs and compiled gradients, and nothing of any training.

    Args:
        network: The nowcasting network.
        recipe: Groups to train.
        config: How.
        data: Folder of the data files.
        device: ``cpu`` or ``cuda``.
        compiled: See `loss_gradients`.
    """

    def __init__(
        self, network: NiNoConfig, recipe: Recipe, config: RefineConfig, data: str | None, device: str, compiled: bool
    ) -> None:
        self._groups, self._config, self._folder, self._compiled = recipe.groups, config, data, compiled
        self._device = torch.device(device)
        self._twin = NiNoTwin(network).to(self._device).train()
        self._change = basis(CONTEXT, config.magnify, self._device)
        self._data: dict[tuple[str, float], tuple[Images | Text, Images | Text | None]] = {}
        self._graphs: dict[str, TrainingGraph] = {}
        self._gradients: dict[Arch, LossGradients] = {}

    def teach(self, job: Job) -> Lesson:
        """Nowcast an episode's trainings, train them for a period, and see what that teaches."""
        config, twin, begun = self._config, self._twin, time.perf_counter()
        twin.load_state_dict(job.network)
        twin.zero_grad(set_to_none=True)
        episode = self._episode(job)
        encoding = _encoding(episode.graph, config, f"{job.slot}/{job.update}")
        moved, spread = displacement(twin, episode.graph, episode.seen, episode.horizon, encoding, self._change)
        outcome = episode.advance(moved.detach())
        arch = episode.group.arch
        guess = math.log(arch.vocabulary if arch.is_text else arch.classes)
        value, paired, first_order = lesson(moved, spread, outcome, config.apart, guess)
        value.backward()
        gradients = [parameter.grad for parameter in twin.parameters()]
        seconds = time.perf_counter() - begun
        return Lesson(_kind(episode.group), gradients, paired, first_order, episode.state(), seconds)

    def _episode(self, job: Job) -> Episode:
        """The one under way or, where that is over, a new one. Slots share the groups out among them, so that all are
        seen as often; they differ in length, so networks early and late in training soon learn side by side."""
        if job.episode is not None:
            episode = self._make(job.episode["key"])
            episode.restore(job.episode)
            if not episode.over:
                return episode
        slots = self._config.episodes
        own = [i for i in range(len(self._groups)) if i % slots == job.slot % len(self._groups)]
        draw = np.random.default_rng([self._config.seed, job.slot, job.update])
        episode = self._make(f"{int(draw.choice(own))}/{job.slot}/{job.update}")
        episode.advance()
        return episode

    def _make(self, key: str) -> Episode:
        group = self._groups[int(key.partition("/")[0])]
        arch, spec = group.arch, group.arch.spec()
        source = group.source, group.seen
        if source not in self._data:
            data = load(group.source, self._folder).to(self._device)
            self._data[source] = (data, None) if group.seen == 1 else data.split(group.seen)
        if spec.digest() not in self._graphs:
            self._graphs[spec.digest()] = prepare(spec).to(self._device)
        if arch not in self._gradients:
            self._gradients[arch] = loss_gradients(arch, compiled=self._compiled)
        (data, unseen), graph = self._data[source], self._graphs[spec.digest()]
        return Episode(group, key, self._config, data, graph, self._device, self._gradients[arch], unseen)


def _encoding(graph: TrainingGraph, config: RefineConfig, key: str) -> Tensor:
    """Inference's encoding under random signs, or a random basis, as in `Sampler`."""
    generator = torch.Generator().manual_seed(number_of(f"{config.seed}/{key}"))
    if torch.rand((), generator=generator) < 0.5:
        return graph.random_encoding(generator)
    return graph.signed_encoding(generator)


def _kind(group: Group) -> str:
    return "-".join([group.arch.kind] + ["bn"] * group.arch.norm + [group.optimizer] * (group.optimizer != "adamw"))
