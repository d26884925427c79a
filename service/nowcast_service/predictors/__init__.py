"""Predictors behind one contract: NiNo, WNN+, and the simple rivals.

`make_predictor` is the way in; the modules are imported when a predictor is made.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from nowcast_proto.errors import InvalidCheckpoint, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, device

    from nowcast_service.nino.checkpoint import Checkpoint
    from nowcast_service.predictors.base import Predictor
    from nowcast_service.predictors.graphs import Source

BASELINES = ("linear", "lawa", "snoo", "identity")
"""Predictors that need no checkpoint."""
NAMES = ("nino", "wnn", *BASELINES)


def predictor_for(checkpoint: Checkpoint) -> str:
    """The predictor a checkpoint is for: ``nino`` for a graph network, ``wnn`` for an edge-wise one."""
    return "nino" if checkpoint.config.gnn else "wnn"


def make_predictor(
    name: str | None = None,
    checkpoint: Checkpoint | None = None,
    *,
    positions: Tensor | None = None,
    update_scale: float = 1.0,
    uncovered: str = "left",
    edgewise: Checkpoint | None = None,
    device: device | str = "cpu",
    precision: str = "float32",
    memory_budget: int | None = None,
    threads: int | None = None,
    graphs: Source | None = None,
    reference: bool = False,
    progress: Callable[[int, int], None] | None = None,
    timings: dict[str, float] | None = None,
) -> Predictor:
    """Make a predictor.

    Args:
        name: One of `NAMES`; None for the one the checkpoint is for.
        checkpoint: The trained network of ``nino`` and ``wnn``; the others take none and ignore it.
        positions: (n_nodes, 8) positional encoding for ``nino`` in place of the graph's own.
        update_scale: Factor on the update of any predictor.
        uncovered: ``left`` or ``edgewise``: what ``nino`` does with tensors its graph does not cover.
        edgewise: Edge-wise checkpoint for those tensors.
        device: Where networks are evaluated.
        precision: Of the exact engine's products.
        memory_budget: Bytes the exact engine may use beyond the snapshots; None for its default.
        threads: CPU threads of the exact engine; None for all.
        graphs: Where neural graphs come from; computed on the spot when None.
        reference: Evaluate ``nino`` by the reference twin.
        progress: Called with (done, total) as work goes on.
        timings: Filled with seconds by phase.

    Raises:
        InvalidRequest: An unknown name or option value.
        InvalidCheckpoint: No checkpoint where one is needed, or one of the wrong kind.
    """
    if name is None:
        if checkpoint is None:
            raise InvalidCheckpoint("neither a predictor nor a checkpoint is named", expected="at least one of them")
        name = predictor_for(checkpoint)
    if name not in NAMES:
        raise InvalidRequest(f"predictor {name!r} is not known", expected="one of " + ", ".join(NAMES))
    if not math.isfinite(update_scale):
        raise InvalidRequest(f"update scale {update_scale}", expected="a finite number")
    if name in BASELINES:
        from nowcast_service.predictors import baselines

        classes: dict[str, Any] = {
            "linear": baselines.Linear,
            "lawa": baselines.Lawa,
            "snoo": baselines.Snoo,
            "identity": baselines.Identity,
        }
        return classes[name](update_scale=update_scale)
    if checkpoint is None:
        raise InvalidCheckpoint(
            f"predictor {name!r} needs a checkpoint", expected="a path or a registered name, see `nowcast weights list`"
        )
    if uncovered not in ("left", "edgewise"):
        raise InvalidRequest(f"uncovered={uncovered!r}", expected="left or edgewise")
    if name == "wnn":
        from nowcast_service.predictors.wnn import Wnn

        if precision != "float32":
            raise InvalidRequest(f"precision {precision!r} is not available for predictor wnn", expected="float32")
        return Wnn(
            checkpoint, device=device, update_scale=update_scale, graphs=graphs, progress=progress, timings=timings
        )
    from nowcast_service.predictors.nino import NiNo

    return NiNo(
        checkpoint,
        positions=positions,
        update_scale=update_scale,
        uncovered=uncovered,
        edgewise=edgewise,
        device=device,
        precision=precision,
        memory_budget=memory_budget,
        threads=threads,
        graphs=graphs,
        reference=reference,
        progress=progress,
        timings=timings,
    )
