"""Scaling of parameters before the network and back after it.

Each tensor is standardised over its elements and all snapshots together, x = (w - m) / (s + 1e-6) with the unbiased
standard deviation s; the way back is y * s + m, *without* the epsilon (NiNo paper, section 3.4, as the released
weights are used). A tensor that is constant has s = 0 and stays where it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nowcast_service.history import History

EPSILON = 1e-6
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements converted to float64 at once: about a CPU's second-level cache, or enough to fill a GPU."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Mean and standard deviation of one tensor over elements and snapshots, both exact float32 numbers.

    Attributes:
        mean: In units of the weights.
        std: Unbiased; 0 where the tensor is constant.
    """

    mean: float
    std: float

    @property
    def constant(self) -> bool:
        """Whether all elements of all snapshots are equal: such a tensor must not move."""
        return self.std == 0.0

    @property
    def factor(self) -> float:
        """1 / (s + 1e-6), what centred weights are multiplied with."""
        return 1.0 / (self.std + EPSILON)

    def apply(self, weights: Tensor) -> Tensor:
        """Scaled weights, float32 (float64 where the weights are)."""
        weights = weights if weights.dtype == torch.float64 else weights.float()
        return (weights - self.mean) * self.factor

    def invert(self, scaled: Tensor) -> Tensor:
        """Weights from scaled ones."""
        return scaled * self.std + self.mean


def scale_of(snapshots: Sequence[Tensor]) -> Scale:
    """Scale of one tensor.

    Sums run in float64 around one of the values, a chunk at a time: tensors of any size, far from zero or spread over
    a hair's breadth, lose nothing, and no copy of the tensor is made.

    Args:
        snapshots: The tensor in every snapshot, same shape, floating point and finite.
    """
    first = snapshots[0]
    pivot = first.reshape(-1)[0].double()
    chunk = _CHUNK.get(first.device.type, _CHUNK["cuda"])
    total = torch.zeros((), dtype=torch.float64, device=first.device)
    squares = torch.zeros_like(total)
    count = 0
    for snapshot in snapshots:
        flat = snapshot.reshape(-1)
        count += flat.numel()
        for part in flat.split(chunk):
            centred = part.double() - pivot
            total += centred.sum()
            squares += torch.dot(centred, centred)
    base, shift, spread = torch.stack((pivot, total, squares)).tolist()
    variance = max(0.0, spread - shift * shift / count) / (count - 1) if count > 1 else 0.0
    return Scale(_float32(base + shift / count), _float32(math.sqrt(variance)))


def scales_of(history: History) -> dict[str, Scale]:
    """Scale of every tensor of a history."""
    return {name: scale_of(history.flat(name)) for name in history.spec.shapes()}


def scale_snapshots(history: History, scales: Mapping[str, Scale]) -> tuple[dict[str, Tensor], ...]:
    """All snapshots scaled, float32 copies in the spec's shapes. For twins and training; the engine streams instead."""
    return tuple(
        {name: scale.apply(snapshot[name]) for name, scale in scales.items()} for snapshot in history.snapshots
    )


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).float().item()
