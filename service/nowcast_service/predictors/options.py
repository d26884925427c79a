"""What a predictor may be made with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nowcast_proto.errors import InvalidCheckpoint

if TYPE_CHECKING:
    from torch import Tensor, device

    from nowcast_service.nino.checkpoint import Checkpoint
    from nowcast_service.nino.exact.products import Precision
    from nowcast_service.predictors.graphs import Source, Uncovered


@dataclass(frozen=True)
class Options:
    """How a predictor is made; each takes what concerns it.

    Attributes:
        checkpoint: The trained network; there for every predictor that needs one.
        positions: (n_nodes, 8) positional encoding in place of the graph's own.
        uncovered: What becomes of tensors that the graph does not cover.
        edgewise: Edge-wise checkpoint for those tensors.
        device: Where networks are evaluated.
        precision: Of wide matrix products.
        memory_budget: Bytes the exact engine may use beyond the snapshots; None for its default.
        threads: CPU threads; None for all.
        graphs: Where neural graphs come from; computed on the spot when None.
        reference: Evaluate the graph network by the reference twin.
        progress: Called with (done, total) as work goes on.
        timings: Filled with seconds by phase.
    """

    checkpoint: Checkpoint | None = None
    positions: Tensor | None = None
    uncovered: Uncovered = "left"
    edgewise: Checkpoint | None = None
    device: device | str = "cpu"
    precision: Precision = "float32"
    memory_budget: int | None = None
    threads: int | None = None
    graphs: Source | None = None
    reference: bool = False
    progress: Callable[[int, int], None] | None = None
    timings: dict[str, float] | None = None

    @property
    def network(self) -> Checkpoint:
        """The checkpoint, of a predictor that needs one."""
        if self.checkpoint is None:
            raise InvalidCheckpoint("no checkpoint was given", expected="a path or a registered name")
        return self.checkpoint
