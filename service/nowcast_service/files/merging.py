"""One network from several checkpoints: the average of one training's, or the fine-tunings of one base merged.

Averages of a training's newest checkpoints stand in for the decay of its learning rate (WSM, 2026): an average that
gives checkpoint i the weight c_i is the training whose updates are scaled, from checkpoint to checkpoint, by what is
left of the sum of the weights. So a schedule of the rate is a set of weights; equal ones are the linear decay.

Fine-tunings are merged by their mean (model soups, Wortsman et al., 2022), by adding up what each has changed (task
arithmetic, Ilharco et al., 2023), or by a nowcast from base and fine-tunings as a history (as NiNo's code does).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from nowcast_proto.errors import InvalidRequest, InvalidSnapshot
from nowcast_proto.spec import ArchitectureSpec
from torch import Tensor

from nowcast_service.history import History
from nowcast_service.predictors.base import Predictor, ahead, check_horizon

Snapshot = Mapping[str, Tensor]
Weights = Literal["mean", "ema", "sqrt", "cosine"]
Method = Literal["nowcast", "mean", "task"]


def weights_of(kind: Weights, count: int, decay: float = 0.5) -> list[float]:
    """What each of several checkpoints, oldest first, counts in their average.

    Args:
        kind: ``mean`` (a linear decay of the rate), ``ema`` (each older one ``decay`` times the next), ``sqrt`` and
            ``cosine`` (those decays of the rate).
        count: How many checkpoints there are.
        decay: Of ``ema``.

    Returns:
        (count,) weights that sum to 1.

    Raises:
        InvalidRequest: There is no such kind, no checkpoint, or a decay outside 0 … 1.
    """
    if kind not in get_args(Weights) or count < 1 or not 0 <= decay <= 1:
        raise InvalidRequest(
            f"the weights {kind!r} of {count} checkpoints with decay {decay:g}",
            expected=f"one of {', '.join(get_args(Weights))}, at least one checkpoint, and a decay from 0 to 1",
        )
    if kind == "ema":
        raw = [decay ** (count - 1 - i) for i in range(count)]
    else:
        left = {"mean": lambda x: 1 - x, "sqrt": lambda x: 1 - math.sqrt(x), "cosine": _cosine}[kind]
        raw = [left(i / count) - left((i + 1) / count) for i in range(count)]
    return [one / sum(raw) for one in raw]


def _cosine(x: float) -> float:
    return (1 + math.cos(math.pi * x)) / 2


def averaged(snapshots: Sequence[Snapshot], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted average of checkpoints.

    Args:
        snapshots: Name -> tensor, oldest first.
        weights: What each counts.

    Returns:
        Name -> tensor of the first one's type; what is not floating point (counters) is the newest's.

    Raises:
        InvalidSnapshot: They are not of one network.
    """
    _alike(snapshots)
    return {name: _sum([s[name] for s in snapshots], weights) for name in snapshots[-1]}


def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    if not tensors[-1].is_floating_point():
        return tensors[-1]
    total = torch.zeros_like(tensors[-1], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.double(), alpha=weight)
    return total.to(tensors[-1].dtype)


def added(base: Snapshot, tuned: Sequence[Snapshot], scale: float) -> dict[str, Tensor]:
    """Task arithmetic: the base, and ``scale`` times all that its fine-tunings have changed.

    Raises:
        InvalidSnapshot: They are not of one network.
    """
    _alike([base, *tuned])
    weights = [1 - scale * len(tuned), *[scale] * len(tuned)]
    return {name: _sum([base[name], *(one[name] for one in tuned)], weights) for name in base}


def nowcast(
    predictor: Predictor,
    spec: ArchitectureSpec,
    base: Snapshot,
    tuned: Sequence[Snapshot],
    horizons: Sequence[int],
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Fine-tunings merged by a nowcast: base and fine-tunings, there and back, are taken for a history.

    Args:
        predictor: Which predicts; reads five snapshots.
        spec: Of all of them.
        base: What they were tuned from.
        tuned: One to four fine-tunings; two make the history base, 1, 2, 2, 1, three base, 1, 2, 2, 3.
        horizons: In strides; the predictions are averaged, those of the fine-tunings in the opposite order among them.
        scale: Factor on the predicted change.

    Returns:
        Name -> float32 tensor.

    Raises:
        InvalidRequest: There are too few or too many fine-tunings, or no horizon.
        NowcastError: Whatever the predictor raises.
    """
    room = (predictor.context or 5) - 1
    if not 1 <= len(tuned) <= room or not horizons:
        raise InvalidRequest(
            f"{len(tuned)} fine-tunings at {len(horizons)} horizons",
            expected=f"one to {room} fine-tunings, as many as the predictor reads beside the base, and a horizon",
        )
    check_horizon(horizons, predictor.farthest)
    # As published for five snapshots: 1 2 2 1, 1 2 2 3, 1 2 3 4; one alone stands still.
    last = len(tuned) - 1
    order = [0, 1, 1, 2] if (len(tuned), room) == (3, 4) else [min(i, last) for i in range(room)]
    order = [0, 1, 1, 0] if (len(tuned), room) == (2, 4) else order
    found = []
    # A prediction sets out from the newest snapshot, one of the fine-tunings: all take their turn from either end.
    for turn in (tuned, tuned[::-1])[: len(tuned)]:
        history = History.of(spec, [base, *(turn[i] for i in order)])
        found += [ahead(predictor, history, k, update_scale=scale)[0] for k in horizons]
    return averaged(found, weights_of("mean", len(found)))


def _alike(snapshots: Sequence[Snapshot]) -> None:
    if not snapshots:
        raise InvalidSnapshot("no checkpoints were given", expected="at least one")
    first = {name: tuple(tensor.shape) for name, tensor in snapshots[0].items()}
    for number, one in enumerate(snapshots[1:], 2):
        shapes = {name: tuple(tensor.shape) for name, tensor in one.items()}
        off = sorted(name for name in first.keys() | shapes.keys() if first.get(name) != shapes.get(name))
        if off:
            raise InvalidSnapshot(
                f"checkpoint {number} differs from the first in {off[0]!r}"
                + (f" and {len(off) - 1} more" if off[1:] else ""),
                expected="checkpoints of one network: the same names and shapes",
            )
