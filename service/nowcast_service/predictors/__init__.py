"""Predictors behind one contract: NiNo, WNN+, the simple rivals, and what other packages add.

`make_predictor` is the way in; the modules are imported when a predictor is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nowcast_proto.errors import InvalidCheckpoint

from nowcast_service.predictors.options import Options
from nowcast_service.predictors.registry import entry

if TYPE_CHECKING:
    from nowcast_service.nino.checkpoint import Checkpoint
    from nowcast_service.predictors.base import Predictor


def predictor_for(checkpoint: Checkpoint) -> str:
    """The predictor a checkpoint is for: ``nino`` for a graph network, ``wnn`` for an edge-wise one."""
    return "nino" if checkpoint.config.gnn else "wnn"


def make_predictor(name: str | None = None, checkpoint: Checkpoint | None = None, **options: Any) -> Predictor:
    """Make a predictor.

    Args:
        name: One of `registry.names`; None for the one the checkpoint is for.
        checkpoint: The trained network, of predictors that need one; others ignore it.
        **options: See `Options`.

    Raises:
        InvalidRequest: An unknown name or option value.
        InvalidCheckpoint: No checkpoint where one is needed, or one of the wrong kind.
    """
    if name is None:
        if checkpoint is None:
            raise InvalidCheckpoint("neither a predictor nor a checkpoint is named", expected="at least one of them")
        name = predictor_for(checkpoint)
    found = entry(name)
    if found.needs_checkpoint and checkpoint is None:
        raise InvalidCheckpoint(
            f"predictor {name!r} needs a checkpoint", expected="a path or a registered name, see `nowcast weights list`"
        )
    return found.make(Options(checkpoint, **options))
