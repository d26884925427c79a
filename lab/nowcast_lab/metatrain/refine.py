"""Refine a network on what a nowcast is for: the loss of a training after it has recovered from the jump.

`train` teaches where weights will be. What that is worth to a training is another matter: an error along a steep
direction of the loss is gone after twenty steps, one along a flat direction stays, and the L1 distance rewards
predictions that are too short. So here the network nowcasts live trainings of small networks, and is taught by what
becomes of them in the period that follows.

Every training goes on twice from each nowcast, with the same batches: having jumped a little farther than predicted,
and a little less far. From the second half of the period come

* the mean gradient g of the training loss. The derivative of the loss after recovery with respect to the displacement
  d is nearly g, taking the recovery itself as independent of d (the first-order approximation of MAML, Finn et al.,
  2017, section 5.2). These gradients are made by the trainings anyway.
* the difference of the two losses, which says exactly, recovery included, what the length of d is worth. Where it
  contradicts g . d, the part of g along d gives way.

Lessons are noisy. An update takes several episodes, which as many processes as there are cores can give, and the
checkpoint is an average over updates (Polyak and Juditsky, 1992).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nowcast_proto.errors import Unavailable
from nowcast_proto.rules.horizon import horizon_schedule
from nowcast_service.nino.checkpoint import Checkpoint
from nowcast_service.nino.config import NiNoConfig
from nowcast_service.nino.model import NiNoTwin
from nowcast_service.nino.scaling import EPSILON
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from nowcast_lab.metatrain.collect import (
    DIVERGED,
    batches,
    draw_trainings,
    flat_loss,
    initial_parameters,
    rates,
    vector_optimizer,
)
from nowcast_lab.metatrain.data import Images, Text, load
from nowcast_lab.metatrain.errors import InvalidRecipe
from nowcast_lab.metatrain.forward import check_trainable, forward
from nowcast_lab.metatrain.graphs import TrainingGraph, prepare
from nowcast_lab.metatrain.heldout import refuse_held_out
from nowcast_lab.metatrain.recipes import CONTEXT, Group, Recipe
from nowcast_lab.metatrain.sampler import standardised
from nowcast_lab.metatrain.train import STATE, basis, imported, read_state, resume, save
from nowcast_lab.metatrain.vector import learning_rate
from nowcast_lab.metatrain.zoo import Arch

log = logging.getLogger(__name__)

LR_GATE = 0.1
"""Share of the peak learning rate below which no nowcast is made, the client's default."""

LossGradients = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(rows, elements) parameters, inputs and targets of every row -> (rows, elements) gradients and (rows,) losses."""

CLIP = 2.0
"""A training counts at most this many times the mean of its episode: one that is about to diverge must not decide."""


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
        number = _number(f"{self._key}/{self.done}")
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


Teach = Callable[[Sequence[Job]], Iterator[Lesson]]


@contextlib.contextmanager
def _teachers(workers: int, *setup: Any) -> Iterator[Teach]:
    """What gives the lessons of many jobs, in their order: in this process, or in `workers` others."""
    if workers <= 1:
        teacher = Teacher(*setup)
        yield lambda jobs: map(teacher.teach, jobs)
        return
    # Processes that were forked would inherit this one's thread pools in an undefined state.
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, context, _begin, (threads, *setup)) as pool:
        try:
            yield lambda jobs: (Lesson(*_unpacked(each)) for each in pool.map(_teach, [_packed(job) for job in jobs]))
        except BrokenProcessPool as exc:
            raise Unavailable(
                "a process that trains has died",
                expected=f"memory for {workers} of them",
                remedy="start again with fewer workers; it goes on from the last save",
            ) from exc


_teacher: Teacher
"""Of a worker process."""


def _begin(threads: int, *setup: Any) -> None:
    global _teacher
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _teacher = Teacher(*setup)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its processes: they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _teach(job: bytes) -> bytes:
    return _packed(_teacher.teach(Job(*_unpacked(job))))


def _packed(values: tuple[Any, ...]) -> bytes:
    """As bytes: tensors handed to another process as they are would each hold a shared memory file open."""
    buffer = io.BytesIO()
    torch.save(tuple(values), buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> tuple[Any, ...]:
    return torch.load(io.BytesIO(packed), weights_only=True)


def refine(
    start: Checkpoint,
    recipe: Recipe,
    config: RefineConfig,
    out: Path,
    *,
    data: str | None = None,
    device: str = "cpu",
    workers: int = 1,
    compiled: bool = False,
    save_every: int = 20,
    on_update: Callable[[int, dict[str, float]], None] = lambda _update, _values: None,
    stop_after: int | None = None,
) -> dict[str, float]:
    """Refine a checkpoint, or go on with the refinement that `out` holds.

    Args:
        start: Where to start: a network that `train` made.
        recipe: Groups to train; episodes take them in turn, in a random order.
        config: How.
        out: Folder of the checkpoint, the state to resume from and the TensorBoard logs.
        data: Folder of the data files.
        device: ``cpu`` or ``cuda``.
        workers: Processes that train the episodes; their number does not change the result.
        compiled: See `loss_gradients`; it changes the result by rounding.
        save_every: Updates between saves.
        on_update: Called with the update and, by kind of network, what jumping farther would have done to the loss, see
            `lesson`: below zero where nowcasts are too short.
        stop_after: Stop at this update of the schedule (to be continued later).

    Returns:
        The values of the last update.

    Raises:
        InvalidRecipe: A group is held out for evaluation, or a period is no multiple of five.
        InvalidCheckpoint: The network cannot be trained.
        InvalidTrajectories: `out` holds a refinement of something else.
        Unavailable: A process that trains has died.
    """
    check_trainable(start.config)
    if any(period < CONTEXT or period % CONTEXT for period in config.periods):
        raise InvalidRecipe(f"periods {config.periods}", expected=f"multiples of {CONTEXT} steps")
    for group in recipe.groups:
        refuse_held_out(group.arch, group.source)
    where = torch.device(device)
    out.mkdir(parents=True, exist_ok=True)
    change = basis(CONTEXT, config.magnify, where)
    twin = imported(start, change).train()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    identity = {
        "config": json.dumps(dataclasses.asdict(config), sort_keys=True),
        "recipe": recipe.model_dump_json(exclude_defaults=True),
        "start": start.digest,
        "start_metadata": json.dumps(dict(start.metadata), sort_keys=True),
    }
    saved = read_state(out / STATE, where, "episodes", "average")
    update, episodes = 0, [None] * config.episodes
    averaged = AveragedModel(twin, multi_avg_fn=get_ema_multi_avg_fn(config.average))
    if saved is not None:
        update, episodes = resume(out / STATE, saved, twin, optimizer, identity), saved["episodes"]
        averaged.load_state_dict(saved["average"])
    values: dict[str, float] = {}
    seconds = [0.0] * config.episodes
    end = config.updates if stop_after is None else min(stop_after, config.updates)
    setup = (start.config, recipe, config, data, device, compiled)
    with SummaryWriter(str(out / "logs"), purge_step=update) as writer, _teachers(workers, *setup) as teach:
        while update < end:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * learning_rate("cosine", update, config.updates, config.warmup)
            optimizer.zero_grad(set_to_none=True)
            measured: dict[str, list[float]] = {}
            network = twin.state_dict()
            jobs = [Job(slot, update, network, episode) for slot, episode in enumerate(episodes)]
            # The longest first, so that the processes end together; summed up in the slots' order, whatever that was.
            order = sorted(range(len(jobs)), key=lambda slot: -seconds[slot])
            lessons = dict(zip(order, teach([jobs[slot] for slot in order]), strict=True))
            for slot, given in sorted(lessons.items()):
                episodes[slot], seconds[slot] = given.episode, given.seconds
                for parameter, gradient in zip(twin.parameters(), given.gradients, strict=True):
                    if gradient is not None:
                        share = gradient / len(jobs)
                        parameter.grad = share if parameter.grad is None else parameter.grad + share
                measured.setdefault(f"pairs/{given.kind}", []).append(given.paired)
                measured.setdefault(f"gradients/{given.kind}", []).append(given.first_order)
            norm = nn.utils.clip_grad_norm_(twin.parameters(), config.grad_clip)
            if bool(norm.isfinite()):
                optimizer.step()
                averaged.update_parameters(twin)
            else:
                log.warning("update %d is left out: its gradient is not finite", update)
            update += 1
            values = {name: sum(each) / len(each) for name, each in measured.items()}
            on_update(update, values)
            writer.add_scalar("gradient norm", float(norm), update)
            for name, number in values.items():
                writer.add_scalar(name, number, update)
            if update % save_every == 0 or update == end:
                more = {"episodes": episodes, "average": averaged.state_dict()}
                save(out, update, twin, change, optimizer, identity, values, more, checkpoint_of=averaged.module)
    return values


def _twice(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same inputs and targets for both rows of every pair."""
    inputs, targets = batch
    return torch.cat((inputs, inputs)), torch.cat((targets, targets))


def _encoding(graph: TrainingGraph, config: RefineConfig, key: str) -> Tensor:
    """Inference's encoding under random signs, or a random basis, as in `Sampler`."""
    generator = torch.Generator().manual_seed(_number(f"{config.seed}/{key}"))
    if torch.rand((), generator=generator) < 0.5:
        return graph.random_encoding(generator)
    return graph.signed_encoding(generator)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest())


def _kind(group: Group) -> str:
    return "-".join([group.arch.kind] + ["bn"] * group.arch.norm + [group.optimizer] * (group.optimizer != "adamw"))
