"""Batches for training the network: slices of trajectories, scaled as inference scales them.

A trajectory saved every s steps is read at any stride m * s. All randomness comes from (seed, step), so a run that was
stopped continues with the batches it would have seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from nowcast_service.nino.scaling import EPSILON
from torch import Tensor

from nowcast_lab.metatrain.errors import InvalidTrajectories
from nowcast_lab.metatrain.graphs import TrainingGraph, prepare
from nowcast_lab.metatrain.store import Shard, TrajectoryStore

KIND_WEIGHTS = {"convnet": 3.0, "gpt2": 1.5, "llama": 1.5}
"""How often a kind of network is drawn, relative to 1 for every other."""
VALIDATION_EVERY = 3
"""The last trajectory of every third shard is for validation."""


@dataclass(frozen=True)
class Item:
    """Slices of one architecture.

    Attributes:
        graph: The architecture.
        kind: What is counted in logs.
        inputs: (elements + 2, slices, context) scaled snapshots, then the fixed features of auxiliary edges.
        displacement: (elements + 2, slices, horizons) scaled future minus newest snapshot, zero where masked.
        mask: As `displacement`: whether there is a target. The future may end earlier than 40 strides (at a nowcast,
            too), a tensor that was constant has no scale, and auxiliary edges have no future.
        encoding: (nodes, 8) positional encoding.
        ks: Horizons in strides.
    """

    graph: TrainingGraph
    kind: str
    inputs: Tensor
    displacement: Tensor
    mask: Tensor
    encoding: Tensor
    ks: tuple[int, ...]


@dataclass(frozen=True)
class SamplerConfig:
    """How slices are drawn.

    Attributes:
        seed: All randomness.
        context: Snapshots in.
        seq_len: Farthest horizon.
        horizons: Horizons drawn per item; the loss over a random few is unbiased and much cheaper than over all.
        trajectories: Items per batch.
        max_slices: Most slices per item.
        edge_budget: Most edges of an item, all slices together; large networks get fewer slices.
        strides: Shortest and longest stride in optimizer steps.
        min_future: Strides that must lie ahead of every slice.
        max_vocabulary: Vocabulary rows kept per item.
        clip: Displacements are clipped to this many standard deviations of their tensor.
        smooth: Targets are averages of the snapshots from (1 - smooth) k to (1 + smooth) k strides ahead; 0 for the
            snapshot k strides ahead alone, as in the paper. What a single snapshot holds beyond its average is the
            noise of its last batches, which nobody can predict, and averaged weights are the better place to jump to.
        rotate: Share of items whose encoding is a random basis; the others use inference's own under random signs.
    """

    seed: int = 0
    context: int = 5
    seq_len: int = 40
    horizons: int = 8
    trajectories: int = 4
    max_slices: int = 4
    edge_budget: int = 60_000
    strides: tuple[int, int] = (20, 200)
    min_future: int = 5
    max_vocabulary: int = 1000
    clip: float = 5.0
    smooth: float = 0.25
    rotate: float = 0.5


class Sampler:
    """Draws items from a trajectory folder.

    Args:
        store: Where from.
        config: How.
        device: Where tensors end up.
        shards: Read the first so many shards only: a training that goes on must not see what was collected since.

    Raises:
        InvalidTrajectories: No trajectory is long enough for any allowed stride.
    """

    def __init__(
        self, store: TrajectoryStore, config: SamplerConfig, device: torch.device, *, shards: int | None = None
    ) -> None:
        self.store, self.config, self.device = store, config, device
        self._shards = [shard for shard in store.manifest.shards[:shards] if self.multiples(shard)]
        if not self._shards:
            raise InvalidTrajectories(
                f"no trajectory in {store.folder} is long enough",
                expected=f"{config.context + config.min_future} snapshots or more at a stride of "
                f"{config.strides[0]} to {config.strides[1]} steps",
                remedy="collect longer trajectories or allow other strides",
            )
        self._arrays = [store.open(shard) for shard in self._shards]
        kinds = Counter(_kind(shard) for shard in self._shards)
        weights = np.array([KIND_WEIGHTS.get(_kind(s), 1.0) / kinds[_kind(s)] for s in self._shards])
        self._weights = weights / weights.sum()
        self._graphs: dict[str, TrainingGraph] = {}

    def multiples(self, shard: Shard) -> list[int]:
        """Stride multiples this shard allows."""
        config = self.config
        low, high = config.strides
        return [
            m for m in range(1, high // shard.every + 1) if m * shard.every >= low and len(self.starts(shard, m)) > 0
        ]

    def starts(self, shard: Shard, multiple: int) -> np.ndarray:
        """Snapshots a slice of this stride may begin with: `min_future` strides lie ahead, and no nowcast between the
        snapshots it sees or within those strides."""
        config = self.config
        seen, ahead = multiple * (config.context - 1), multiple * config.min_future
        starts = np.arange(max(0, shard.snapshots - seen - ahead))
        for jump in shard.jumps:
            starts = starts[(starts > jump) | (starts + seen + ahead <= jump)]
        return starts

    def models(self, index: int, *, validation: bool) -> Sequence[int]:
        """Trajectories of one shard for training, or for validation."""
        count = len(self._shards[index].trainings)
        held = index % VALIDATION_EVERY == 0 and count > 1
        if validation:
            return [count - 1] if held else []
        return range(count - held)

    def graph(self, shard: Shard) -> TrainingGraph:
        """The shard's prepared graph, built once per architecture."""
        digest = shard.spec.digest()
        if digest not in self._graphs:
            self._graphs[digest] = prepare(shard.spec, max_vocabulary=self.config.max_vocabulary).to(self.device)
        return self._graphs[digest]

    def batch(self, step: int) -> list[Item]:
        """The items of one training step."""
        generator = np.random.default_rng((self.config.seed, step))
        picks = generator.choice(len(self._shards), self.config.trajectories, p=self._weights)
        return [self.item(int(pick), generator, validation=False) for pick in picks]

    def validation(self) -> list[Item]:
        """The same items every time, a fixed draw from every validation trajectory."""
        items = []
        for index in range(len(self._shards)):
            if self.models(index, validation=True):
                items.append(self.item(index, np.random.default_rng((7, index)), validation=True))
        return items

    def item(self, index: int, generator: np.random.Generator, *, validation: bool) -> Item:
        """Random slices of random trajectories of one shard."""
        config, shard, array = self.config, self._shards[index], self._arrays[index]
        graph = self.graph(shard)
        slices = int(np.clip(config.edge_budget // graph.n_edges, 1, config.max_slices))
        ks = np.sort(1 + generator.choice(config.seq_len, min(config.horizons, config.seq_len), replace=False))
        rows = None
        if graph.vocabulary is not None:
            rows = np.sort(generator.choice(graph.vocabulary, config.max_vocabulary, replace=False))
        multiples, models = self.multiples(shard), self.models(index, validation=validation)
        odds = 1 / np.array(multiples)  # log-uniform: every doubling of the stride is as likely
        past, future, reached = [], [], []
        for _ in range(slices):
            m = int(generator.choice(multiples, p=odds / odds.sum()))
            model = int(generator.choice(models))
            frames = int(generator.choice(self.starts(shard, m))) + m * np.arange(config.context)
            past.append(np.array(array[model, frames], dtype=np.float32))
            end = min((jump + 1 for jump in shard.jumps if jump >= frames[-1]), default=shard.snapshots)
            ahead, there = _future(array[model, :end], int(frames[-1]), m, ks, config.smooth)
            future.append(ahead)
            reached.append(there)
        seen = torch.from_numpy(np.stack(past)).float()  # (slices, context, elements)
        ahead_of = torch.from_numpy(np.stack(future)).float()  # (slices, horizons, elements)
        if rows is not None and graph.vocabulary is not None:
            keep = _vocabulary_elements(shard, graph.vocabulary, rows)
            seen, ahead_of = seen[..., keep], ahead_of[..., keep]
        inputs, displacement, mask = scale_item(
            seen.to(self.device), ahead_of.to(self.device), graph.segments, config.clip
        )
        mask = mask & torch.from_numpy(np.stack(reached)).to(self.device)
        torch_generator = torch.Generator().manual_seed(int(generator.integers(2**62)))
        rotated = not validation and generator.random() < config.rotate
        encoding = graph.random_encoding(torch_generator) if rotated else graph.signed_encoding(torch_generator)
        return Item(graph, _kind(shard), inputs, displacement * mask, mask, encoding, tuple(int(k) for k in ks))


def _future(
    trajectory: np.ndarray, newest: int, multiple: int, ks: np.ndarray, smooth: float
) -> tuple[np.ndarray, np.ndarray]:
    """Targets of one slice.

    Args:
        trajectory: (snapshots, elements).
        newest: Snapshot the horizons count from.
        multiple: Snapshots per stride.
        ks: Horizons in strides.
        smooth: See `SamplerConfig`.

    Returns:
        (horizons, elements) float32, and (horizons,) whether the whole of each target lies within the trajectory.
    """
    out = np.zeros((len(ks), trajectory.shape[1]), np.float32)
    there = np.zeros(len(ks), bool)
    for i, k in enumerate(ks):
        reach = int(smooth * k) * multiple
        centre = newest + multiple * int(k)
        there[i] = centre + reach < len(trajectory)
        if there[i]:
            # At most nine snapshots of the window: more would cost reading, not take away noise worth the while.
            step = max(1, 2 * reach // 8)
            out[i] = trajectory[centre - reach : centre + reach + 1 : step].mean(0, dtype=np.float32)
    return out, there


def standardised(seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Snapshots of one parameter tensor as inference scales them (NiNo paper, section 3.4), zero where it stood still.

    Args:
        seen: (slices, context, elements).

    Returns:
        The same standardised; (slices, 1, 1) deviations in units of the weights; (slices, 1, 1) whether it moved.
    """
    deviation, mean = torch.std_mean(seen, (1, 2), keepdim=True)
    # Relative to the magnitude: float32 snapshots of a tensor at 1 differ by rounding alone below 1e-7.
    moving = deviation > 1e-6 * mean.abs() + 1e-12
    return torch.where(moving, (seen - mean) / (deviation + EPSILON), 0.0), deviation, moving


def scale_item(seen: Tensor, ahead: Tensor, segments: Sequence[int], clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Standardise slices by what was seen, tensor by tensor, exactly as inference does.

    The published training divides by a standard deviation that may be zero (a bias before its first step, a vocabulary
    row group nobody used) or so small that the targets overflow half precision; that is where its NaN losses come
    from. Here a tensor that did not move has no target, and displacements are clipped.

    Args:
        seen: (slices, context, elements) snapshots.
        ahead: (slices, horizons, elements) the future.
        segments: Elements of each parameter tensor.
        clip: Bound on displacements, in standard deviations.

    Returns:
        Inputs (elements + 2, slices, context), displacement and mask (elements + 2, slices, horizons).
    """
    inputs, moves, masks = [], [], []
    for past, future in zip(seen.split(list(segments), -1), ahead.split(list(segments), -1), strict=True):
        x, deviation, moving = standardised(past)
        inputs.append(x)
        move = (future - past[:, -1:]) / (deviation + EPSILON)
        moves.append(torch.where(moving, move.clamp(-clip, clip), 0.0))
        masks.append(moving.expand_as(future))
    fixed = seen.new_tensor([1.0, 2.0]).view(2, 1, 1)
    x = torch.cat((torch.cat(inputs, -1).permute(2, 0, 1), fixed.expand(2, *seen.shape[:2])))
    pad = (0, 0, 0, 0, 0, 2)
    displacement = torch.nn.functional.pad(torch.cat(moves, -1).permute(2, 0, 1), pad)
    mask = torch.nn.functional.pad(torch.cat(masks, -1).permute(2, 0, 1), pad)
    return x.contiguous(), displacement.contiguous(), mask.contiguous()


def _kind(shard: Shard) -> str:
    return shard.arch.kind if shard.arch is not None else shard.spec.kind


@lru_cache(maxsize=64)
def _starts(shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    sizes = [int(np.prod(shape)) for shape in shapes]
    return tuple(np.cumsum([0, *sizes])[:-1].tolist())


def _vocabulary_elements(shard: Shard, vocabulary: int, rows: np.ndarray) -> Tensor:
    """Indices of the elements that stay when every vocabulary matrix is cut to some rows."""
    shapes = tuple(p.shape for p in shard.spec.parameters)
    parts = []
    for start, shape in zip(_starts(shapes), shapes, strict=True):
        if len(shape) == 2 and shape[0] == vocabulary:
            parts.append((start + rows[:, None] * shape[1] + np.arange(shape[1])).reshape(-1))
        else:
            parts.append(start + np.arange(int(np.prod(shape))))
    return torch.from_numpy(np.concatenate(parts))
