"""Train a nowcasting network on trajectories, from random initialisation.

The paper's recipe (section 4.1: L1 on standardised parameters, direct multi-step targets, AdamW with cosine decay,
several slices of several trajectories a batch) with the departures written down in docs/metatraining.md.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nowcast_proto.errors import UnreadableFile
from nowcast_service.files.replacing import replacing
from nowcast_service.nino.checkpoint import Checkpoint, save_checkpoint
from nowcast_service.nino.config import NiNoConfig
from nowcast_service.nino.model import NiNoTwin
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from nowcast_lab.metatrain.errors import InvalidTrajectories
from nowcast_lab.metatrain.forward import check_trainable, forward, linear_in
from nowcast_lab.metatrain.sampler import Item, Sampler, SamplerConfig
from nowcast_lab.metatrain.store import TrajectoryStore
from nowcast_lab.metatrain.vector import learning_rate

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"
STILL = 0.05
"""Mean displacement, in standard deviations, below which the relative loss counts a slice as standing still."""
STATE = "state.pt"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result, beside the trajectories.

    Attributes:
        hidden: Width of the network.
        layers: Message passing layers.
        steps: Training steps.
        lr: Peak learning rate.
        weight_decay: AdamW's.
        grad_clip: Bound on the gradient's norm.
        warmup: Steps of linear warm-up.
        loss: ``l1`` as in the paper, or ``relative``: L1 divided by how far the parameters of the slice moved, so that
            slow trajectories count as much as fast ones.
        seed: Initial weights and batches.
        magnify: Size of the steps between snapshots in the coordinates it is trained in, see `basis`.
        sampler: How slices are drawn; its seed is `seed`.
    """

    hidden: int = 32
    layers: int = 3
    steps: int = 10_000
    lr: float = 3e-3
    weight_decay: float = 1e-2
    grad_clip: float = 0.5
    warmup: int = 100
    loss: str = "relative"
    seed: int = 0
    magnify: float = 15.0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def network(self) -> NiNoConfig:
        """The network it trains."""
        return NiNoConfig(
            hidden=self.hidden,
            layers=self.layers,
            token_positions=False,
            context=self.sampler.context,
            seq_len=self.sampler.seq_len,
        )


def initial_network(config: TrainConfig) -> NiNoTwin:
    """A fresh network: unit-gain weights (the published 0.02 all but silences eight maps in a row at small widths),
    and a small last map, so that training starts near the newest snapshot."""
    generator = torch.Generator().manual_seed(config.seed)
    twin = NiNoTwin(config.network())
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(module, nn.Linear):
                deviation = 1 / math.sqrt(module.in_features)
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * deviation)
                module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * 0.5)
        # Entries of a unit eigenvector over some hundred nodes are about 0.1: bring them to the size of the rest.
        linear_in(twin.node_proj, 0).weight.mul_(5)
        linear_in(twin.edge_out, 2).weight.mul_(0.05)
    return twin


def basis(context: int, magnify: float, device: torch.device) -> Tensor:
    """(context, context) change of inputs the network is trained in: the newest snapshot, and the steps between
    neighbours magnified.

    What tells where a weight is heading is the small differences between snapshots of nearly equal size; in these
    coordinates the optimizer sees them at the size of everything else. It is a linear map, so `exported` folds it into
    the first weights and the network itself is none the wiser.
    """
    same = torch.eye(context)
    return torch.cat((same[-1:], magnify * (same[1:] - same[:-1]))).to(device)


FIRST = "edge_proj.fc.0.weight"
"""The map of the inputs, which a change of their coordinates is folded into."""


def exported(twin: NiNoTwin, change: Tensor) -> dict[str, Tensor]:
    """The network's tensors for plain snapshots as inputs, float32 on the CPU."""
    state = {name: tensor.detach().cpu().float().clone() for name, tensor in twin.state_dict().items()}
    state[FIRST] = (state[FIRST].unflatten(1, (-1, len(change))) @ change.cpu()).flatten(1)
    return state


def imported(checkpoint: Checkpoint, change: Tensor) -> NiNoTwin:
    """The way back from `exported`: a checkpoint's network in the coordinates it is trained in, on their device."""
    twin = checkpoint.twin().to(change.device)
    weight = twin.state_dict()[FIRST]
    weight.copy_((weight.unflatten(1, (-1, len(change))) @ torch.linalg.inv(change)).flatten(1))
    return twin


def item_loss(twin: NiNoTwin, item: Item, loss: str, change: Tensor | None = None) -> Tensor:
    """Mean absolute error of one item, a scalar; see `TrainConfig.loss` and `errors`."""
    error, moved, count = errors(twin, item, change)
    if loss == "l1":
        return error.sum() / count.sum().clamp(min=1)
    # The floor keeps a slice that hardly moves (the end of a cosine schedule) from outweighing all others.
    return (error.sum(1) / (moved + STILL * count).sum(1).clamp(min=1e-6)).mean()


def errors(twin: NiNoTwin, item: Item, change: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Summed absolute error, summed absolute displacement and number of targets, each (slices, horizons).

    Args:
        twin: The network.
        item: The slices.
        change: Coordinates the network is trained in, see `basis`; None where it takes plain snapshots.
    """
    inputs = item.inputs if change is None else item.inputs @ change.T
    predictions = forward(twin, item.graph, inputs, item.encoding, item.ks)
    sums = [torch.zeros(item.mask.shape[1:], device=item.mask.device) for _ in range(3)]
    for group, prediction in zip(item.graph.groups, predictions, strict=True):
        target = item.displacement[group.gather].transpose(1, 2)  # (edges, slices, features, horizons)
        mask = item.mask[group.gather].transpose(1, 2)
        sums[0] = sums[0] + ((prediction - target).abs() * mask).sum((0, 2))
        sums[1] = sums[1] + target.abs().sum((0, 2))
        sums[2] = sums[2] + mask.sum((0, 2))
    return sums[0], sums[1], sums[2]


@torch.no_grad()
def validate(twin: NiNoTwin, items: Sequence[Item], change: Tensor | None = None) -> dict[str, float]:
    """Error relative to standing still, by kind of network and over all; below 1 is better than the newest snapshot."""
    by_kind: dict[str, list[float]] = {}
    for item in items:
        error, moved, _ = errors(twin, item, change)
        for slice_error, slice_moved in zip(error.sum(1).tolist(), moved.sum(1).tolist(), strict=True):
            if slice_moved > 0:
                by_kind.setdefault(item.kind, []).append(slice_error / slice_moved)
    means = {kind: sum(values) / len(values) for kind, values in by_kind.items()}
    if means:
        means["all"] = sum(means.values()) / len(means)
    return means


def train(
    store: TrajectoryStore,
    config: TrainConfig,
    out: Path,
    *,
    device: str = "cpu",
    save_every: int = 500,
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
    stop_after: int | None = None,
) -> dict[str, float]:
    """Train, or go on with the training that `out` holds.

    Args:
        store: The trajectories.
        config: What to train and how.
        out: Folder of the checkpoint, the optimizer's state and the TensorBoard logs.
        device: ``cpu`` or ``cuda``.
        save_every: Steps between saves.
        on_step: Called with step and loss.
        stop_after: Stop at this step of the schedule (to be continued later).

    Returns:
        Validation errors of the final network, see `validate`.

    Raises:
        InvalidTrajectories: The trajectories are too short, or `out` was trained with another config or on others.
        InvalidCheckpoint: The network asked for cannot be trained.
    """
    check_trainable(config.network())
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, seed=config.seed))
    where = torch.device(device)
    out.mkdir(parents=True, exist_ok=True)
    state = read_state(out / STATE, where, "shards")
    shards = len(store) if state is None else int(state["shards"])
    sampler = Sampler(store, config.sampler, where, shards=shards)
    twin = initial_network(config).to(where).train()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    identity = {
        "config": json.dumps(dataclasses.asdict(config), sort_keys=True),
        "trajectories": store.digest(shards),
        "shards": str(shards),
    }
    step = 0 if state is None else resume(out / STATE, state, twin, optimizer, identity)
    held = sampler.validation()
    change = basis(config.sampler.context, config.magnify, where)
    results: dict[str, float] = {}
    end = config.steps if stop_after is None else min(stop_after, config.steps)
    with SummaryWriter(str(out / "logs"), purge_step=step) as writer:
        began = time.monotonic()
        while step < end:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * learning_rate("cosine", step, config.steps, config.warmup)
            items = sampler.batch(step)
            optimizer.zero_grad(set_to_none=True)
            value = 0.0
            for item in items:
                loss = item_loss(twin, item, config.loss, change) / len(items)
                loss.backward()
                value += float(loss.detach())
            norm = nn.utils.clip_grad_norm_(twin.parameters(), config.grad_clip)
            if not math.isfinite(value) or not bool(norm.isfinite()):
                kinds = ", ".join(item.kind for item in items)
                raise InvalidTrajectories(
                    f"loss {value} with gradient norm {float(norm)} at step {step} on {kinds}",
                    expected="finite trajectories",
                    remedy="run `nowcast metatrain verify`; the state before this step is saved",
                )
            optimizer.step()
            step += 1
            on_step(step, value)
            if step % 10 == 0:
                writer.add_scalar("loss", value, step)
                writer.add_scalar("gradient norm", float(norm), step)
                writer.add_scalar("steps per second", 10 / max(1e-9, time.monotonic() - began), step)
                began = time.monotonic()
            if step % save_every == 0 or step == end:
                results = validate(twin, held, change)
                for kind, error in results.items():
                    writer.add_scalar(f"validation/{kind}", error, step)
                log.info("step %d validation %s", step, {k: round(v, 4) for k, v in results.items()})
                save(out, step, twin, change, optimizer, identity, results)
    return results or validate(twin, held, change)


def save(
    out: Path,
    step: int,
    twin: NiNoTwin,
    change: Tensor,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, str],
    results: Mapping[str, float],
    more: Mapping[str, Any] | None = None,
    checkpoint_of: NiNoTwin | None = None,
) -> None:
    """Write the state to resume from, with whatever else it takes, and the checkpoint: of the network, or of another
    (an average over its past)."""
    state = {"step": step, "optimizer": optimizer.state_dict(), "network": twin.state_dict(), **(more or {})}
    with replacing(out / STATE) as scratch:
        torch.save(state | dict(identity), scratch)
    metadata = {"step": str(step), "validation": json.dumps(results), **identity}
    checkpoint = Checkpoint.of(twin.config, exported(checkpoint_of or twin, change), metadata=metadata)
    save_checkpoint(out / CHECKPOINT, checkpoint)


def read_state(path: Path, device: torch.device, *more: str) -> dict[str, Any] | None:
    """What an earlier training left behind, None where there was none.

    Args:
        path: The file.
        device: Where its tensors go.
        more: What it must hold besides network, optimizer and step.

    Raises:
        UnreadableFile: The file is damaged.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as exc:
        raise UnreadableFile(f"{path} is damaged: {exc}", remedy="remove it, or give --out another folder") from exc
    if not isinstance(state, dict) or not {"step", "network", "optimizer", *more} <= state.keys():
        raise UnreadableFile(f"{path} is no state of a training", remedy="give --out another folder")
    return state


def resume(
    path: Path,
    state: Mapping[str, Any],
    twin: NiNoTwin,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, str],
) -> int:
    """Restore network and optimizer; the step to go on from.

    Raises:
        InvalidTrajectories: The state is of another config or of other trajectories.
    """
    for name, value in identity.items():
        if state.get(name) != value:
            raise InvalidTrajectories(
                f"{path} was trained with other {name}: {state.get(name)}",
                expected=f"{value}",
                remedy="give --out another folder",
            )
    twin.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
