"""Many small trainings at once, their parameters written down every few steps.

All networks of a group live in one (models, elements) tensor; ``torch.func.vmap`` evaluates their losses together and
the optimizer updates all of them in a few tensor operations, each with its own learning rate and weight decay. The same
code runs on a CPU core and on an accelerator.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import platform
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from nowcast_proto.errors import InvalidSnapshot
from nowcast_proto.rules.horizon import horizon_at, horizon_schedule
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.history import History
from nowcast_service.nino.checkpoint import Checkpoint
from nowcast_service.predictors import make_predictor
from nowcast_service.predictors.base import ahead
from nowcast_service.weights.registry import resolve_checkpoint
from rich.progress import Progress
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import cross_entropy

from nowcast_lab.metatrain import zoo
from nowcast_lab.metatrain.data import Images, Text, load
from nowcast_lab.metatrain.errors import InvalidRecipe
from nowcast_lab.metatrain.heldout import refuse_held_out
from nowcast_lab.metatrain.recipes import CONTEXT, Group, Recipe
from nowcast_lab.metatrain.store import Precision, Shard, Training, TrajectoryStore
from nowcast_lab.metatrain.vector import Matrix, VectorOptimizer, learning_rate
from nowcast_lab.metatrain.zoo import Arch, Init, initialised

log = logging.getLogger(__name__)


DIVERGED = 1.5
"""A training that ends above this many times the loss of a uniform guess has diverged and teaches nothing."""


def flat_loss(arch: Arch) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Cross-entropy of one network as a function of its flattened parameters.

    Returns:
        A function of (elements,) parameters, inputs (images, or token ids) and targets (labels, or token ids).
    """
    # Only its structure is used; the weights come from the flat vector at every call.
    model = arch.build()
    layout = [(name, p.shape, p.numel()) for name, p in model.named_parameters()]

    def loss(flat: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        parts = flat.split([numel for _, _, numel in layout])
        weights = {name: part.view(shape) for (name, shape, _), part in zip(layout, parts, strict=True)}
        output = functional_call(model, weights, (inputs,))
        return cross_entropy(output.reshape(-1, output.shape[-1]), targets.reshape(-1))

    return loss


def initial_parameters(arch: Arch, seeds: list[int], init: Init = "torch") -> Tensor:
    """(models, elements) float32: each row a fresh network of its own seed."""
    rows = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            rows.append(torch.cat([p.detach().reshape(-1) for p in initialised(arch.build(), init).parameters()]))
    return torch.stack(rows)


def hidden_matrices(arch: Arch) -> tuple[Matrix, ...]:
    """Where in a row of parameters the matrices lie that Muon is for, see `zoo.hidden_matrices`."""
    with torch.device("meta"):
        model = arch.build()
    hidden, start, found = zoo.hidden_matrices(model), 0, []
    for name, p in model.named_parameters():
        if name in hidden:
            found.append(Matrix(start, p.shape[0], p.numel() // p.shape[0]))
        start += p.numel()
    return tuple(found)


def vector_optimizer(group: Group, parameters: Tensor, weight_decay: Tensor) -> VectorOptimizer:
    """The optimizer of a group's trainings, fresh."""
    matrices = hidden_matrices(group.arch)
    return VectorOptimizer.of(group.optimizer, parameters, weight_decay, matrices=matrices, betas=group.betas)


def rates(group: Group, trainings: Sequence[Training], step: int, steps: int) -> list[list[float]]:
    """(models, 1) learning rates at a step of a run of so many."""
    warmup = round(group.warmup * steps if group.warmup < 1 else group.warmup)
    return [[(t.lr or 0.0) * learning_rate(t.schedule or "constant", step, steps, warmup)] for t in trainings]


def batches(data: Images | Text, arch: Arch, models: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches, a different one for every model.

    Yields:
        Inputs (models, batch, …) and targets (models, batch, …).
    """
    device = (data.train if isinstance(data, Text) else data.train_x).device
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(arch.context + 1, device=device)
    while True:
        if isinstance(data, Text):
            starts = torch.randint(len(data.train) - arch.context - 1, (models, batch, 1), generator=generator)
            windows = data.train[starts.to(device) + offsets]  # (models, batch, context + 1)
            yield windows[..., :-1], windows[..., 1:]
        else:
            index = torch.randint(len(data.train_y), (models, batch), generator=generator).to(device)
            yield data.train_x[index], data.train_y[index]


def _seed_of(recipe_seed: int, key: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{recipe_seed}/{key}".encode(), digest_size=6).digest())


def draw_trainings(group: Group, key: str, recipe_seed: int) -> list[Training]:
    """Seeds, rates, decays and schedules of a group's models, a function of the recipe's seed and the key alone."""
    generator = np.random.default_rng(_seed_of(recipe_seed, key))
    low, high = (math.log(rate) for rate in group.lr)
    return [
        Training(
            seed=int(generator.integers(2**31)),
            lr=float(math.exp(generator.uniform(low, high))),
            weight_decay=float(generator.choice(group.weight_decay)),
            schedule=str(generator.choice(group.schedules)),
        )
        for _ in range(group.models)
    ]


def train_group(
    group: Group,
    trainings: list[Training],
    data: Images | Text,
    out: np.ndarray,
    *,
    device: torch.device,
    jump: Callable[[np.ndarray, int], np.ndarray] | None = None,
    on_snapshot: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Train the networks of a group together and write their snapshots.

    Args:
        group: What to train.
        trainings: Rate, decay, schedule and seed of each model.
        data: The group's source, on `device`.
        out: (models, snapshots, elements) to fill; the first snapshot is the initial network.
        device: Where to train.
        jump: What the group's nowcasts are made with: (models, 5, elements) and the horizon to (models, elements).
        on_snapshot: Called with the step after each snapshot.

    Returns:
        (models,) mean training loss of the last tenth of the run; not finite where a training diverged.
    """
    seeds = [training.seed or 0 for training in trainings]
    parameters = initial_parameters(group.arch, seeds, group.init).to(device)
    decay = torch.tensor([[training.weight_decay or 0.0] for training in trainings], device=device)
    optimizer = vector_optimizer(group, parameters, decay)
    gradients = vmap(grad_and_value(flat_loss(group.arch)))
    stream = batches(data, group.arch, len(trainings), group.batch, seeds[0])
    out[:, 0] = parameters.cpu().numpy()
    tail = torch.zeros(len(trainings), device=device)
    tail_steps = max(1, group.steps // 10)
    for step in range(group.steps):
        inputs, targets = next(stream)
        gradient, loss = gradients(parameters, inputs, targets)
        lr = torch.tensor(rates(group, trainings, step, group.steps), device=device)
        optimizer.step(parameters, gradient, lr)
        if step >= group.steps - tail_steps:
            tail += loss / tail_steps
        if (step + 1) % group.every == 0:
            newest = (step + 1) // group.every
            out[:, newest] = parameters.cpu().numpy()
            if jump is not None and group.nowcasts is not None and newest in jumps(group):
                stride = group.nowcasts.period // CONTEXT // group.every
                horizons = horizon_schedule(group.steps, group.nowcasts.period)
                seen = out[:, newest - (CONTEXT - 1) * stride : newest + 1 : stride]
                k = horizon_at(step, horizons, group.nowcasts.period)
                parameters.copy_(torch.from_numpy(jump(seen, k)))
            on_snapshot(step + 1)
    return tail.cpu()


def jumps(group: Group) -> tuple[int, ...]:
    """Snapshots right after which the group's trainings are nowcast."""
    if group.nowcasts is None:
        return ()
    return tuple((i + 1) * group.nowcasts.period // group.every for i in range(group.nowcasts.count))


def nowcaster(spec: ArchitectureSpec, checkpoint: Checkpoint) -> Callable[[np.ndarray, int], np.ndarray]:
    """What `train_group` takes as ``jump``. A network that has diverged stays where it is."""
    predictor = make_predictor("nino", checkpoint)
    sizes = [p.numel for p in spec.parameters]

    def jump(seen: np.ndarray, k: int) -> np.ndarray:
        moved = np.array(seen[:, -1], np.float32)
        for row, past in zip(moved, seen, strict=True):
            snapshots = [
                {p.name: part.view(p.shape) for p, part in zip(spec.parameters, flat.split(sizes), strict=True)}
                for flat in torch.from_numpy(np.array(past, np.float32))
            ]
            with contextlib.suppress(InvalidSnapshot):
                parameters, _ = ahead(predictor, History.of(spec, snapshots), k)
                row[:] = torch.cat([parameters[p.name].reshape(-1) for p in spec.parameters]).numpy()
        return moved

    return jump


def collect(
    recipe: Recipe,
    store: TrajectoryStore,
    *,
    data: str | None = None,
    device: str = "cpu",
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> list[Shard]:
    """Collect every group of a recipe that the store does not hold yet.

    Args:
        recipe: What to collect.
        store: Where to.
        data: Folder of the data files.
        device: ``cpu`` or ``cuda``.
        precision: How snapshots are stored.
        progress: Shows bars when given.

    Returns:
        The shards that are new.

    Raises:
        InvalidRecipe: A group is held out for evaluation, or does not fit its data.
        TooLarge: The disk budget is used up; what was collected stays.
    """
    for group in recipe.groups:
        refuse_held_out(group.arch, group.source)
    store.manifest.made_with = {"torch": torch.__version__, "python": platform.python_version(), "device": device}
    jobs = [(f"{i}/{repeat}", group) for i, group in enumerate(recipe.groups) for repeat in range(group.repeats)]
    overall = progress.add_task("shards", total=len(jobs)) if progress else None
    new: list[Shard] = []
    for position, group in jobs:
        key = f"{recipe.seed}/{position}/{group.digest}"
        if not store.has(key):
            new.append(_collect_group(group, key, recipe.seed, store, data, torch.device(device), precision, progress))
        if progress and overall is not None:
            progress.advance(overall)
    return new


def _collect_group(
    group: Group,
    key: str,
    recipe_seed: int,
    store: TrajectoryStore,
    folder: str | None,
    device: torch.device,
    precision: Precision,
    progress: Progress | None,
) -> Shard:
    source = load(group.source, folder).to(device)
    _check_fit(group, source)
    trainings = draw_trainings(group, key, recipe_seed)
    spec = group.arch.spec()
    snapshots = group.steps // group.every + 1
    part, out = store.create((len(trainings), snapshots, spec.numel), precision)
    bar = progress.add_task(f"{group.arch.label} on {group.source}", total=group.steps) if progress else None

    def advance(step: int) -> None:
        if progress and bar is not None:
            progress.update(bar, completed=step)

    checkpoint = resolve_checkpoint(group.nowcasts.checkpoint) if group.nowcasts is not None else None
    jump = nowcaster(spec, checkpoint) if checkpoint is not None else None
    final = train_group(group, trainings, source, out, device=device, jump=jump, on_snapshot=advance)
    if progress and bar is not None:
        progress.remove_task(bar)
    guess = math.log(group.arch.vocabulary if group.arch.is_text else group.arch.classes)
    # Written so that a loss of NaN counts as diverged too.
    good = [i for i in range(len(trainings)) if np.isfinite(out[i]).all() and float(final[i]) < DIVERGED * guess]
    if not good:
        part.unlink()
        raise InvalidRecipe(
            f"every training of {group.arch.label} on {group.source} diverged",
            remedy="lower the group's learning rates",
        )
    if len(good) < len(trainings):
        # The shard is written again without them.
        kept = np.array(out[good])
        log.warning(
            "%d of %d trainings of %s diverged and were dropped", len(trainings) - len(good), len(trainings), key
        )
        del out
        part, out = store.create(kept.shape, precision)
        out[:] = kept
    out.flush()
    return store.add(
        part,
        key=key,
        spec=spec,
        arch=group.arch,
        source=group.source,
        source_sha256=source.digest,
        snapshots=snapshots,
        every=group.every,
        optimizer=group.optimizer,
        batch=group.batch,
        trainings=tuple(trainings[i].model_copy(update={"final_loss": float(final[i])}) for i in good),
        jumps=jumps(group),
        nowcasts=checkpoint.digest if checkpoint is not None else None,
    )


def _check_fit(group: Group, data: Images | Text) -> None:
    """Refuse a group whose architecture does not fit its data."""
    arch = group.arch
    if isinstance(data, Text) != arch.is_text:
        raise InvalidRecipe(f"{arch.label} cannot be trained on {group.source}", expected="text for text networks")
    if isinstance(data, Text):
        came, expected = f"vocabulary {arch.vocabulary}", f"vocabulary {data.vocabulary}"
    else:
        came = f"images of {arch.channels} x {arch.size} x {arch.size}, {arch.classes} classes"
        channels, size = data.train_x.shape[1:3]
        expected = f"images of {channels} x {size} x {size}, {data.classes} classes"
    if came != expected:
        raise InvalidRecipe(f"{arch.label} on {group.source} takes {came}", expected=expected)
