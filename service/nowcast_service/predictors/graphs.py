"""What predictors need of a spec before they can predict: its neural graph, and the positional encoding of that."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from nowcast_proto.errors import InvalidCheckpoint, InvalidSnapshot
from nowcast_proto.spec import ArchitectureSpec

from nowcast_service.graph.blocks import Coverage, NeuralGraph
from nowcast_service.nino.config import NiNoConfig

if TYPE_CHECKING:  # the process that works on specs does without
    from torch import Tensor

Uncovered = Literal["left", "edgewise"]
"""What becomes of tensors the graph does not cover: left as they are, or predicted edge-wise."""
KEPT = 8
"""Architectures remembered at once; an encoding takes 32 bytes per neuron."""


@dataclass(frozen=True)
class Needs:
    """What a predictor wants computed from a spec.

    Attributes:
        max_features: Kernel positions the checkpoint takes per edge; larger kernels stay out of the graph.
        uncovered: What becomes of tensors outside the graph; None where the predictor treats all tensors alike, so
            that there is nothing to report.
        positions: The positional encoding too.
    """

    max_features: int
    uncovered: Uncovered | None = "left"
    positions: bool = False


@dataclass(frozen=True, eq=False)
class Prepared:
    """What was computed.

    Attributes:
        graph: The neural graph.
        positions: (n_nodes, 8) positional encoding, where it was asked for. Shared: not to be written to.
    """

    graph: NeuralGraph
    positions: Tensor | None = None


class Source(Protocol):
    """Where predictors get it from."""

    def prepared(self, spec: ArchitectureSpec, needs: Needs) -> Prepared:
        """What the needs name, of this spec.

        Raises:
            NowcastError: It cannot be computed: see `build_graph`, and whatever bounds the source sets.
        """
        ...


def prepare(spec: ArchitectureSpec, needs: Needs) -> Prepared:
    """Compute it, here and now; see `build_graph` for the errors."""
    from nowcast_service.graph.positional import positional_encoding

    graph = graph_of(spec, needs)
    return Prepared(graph, positional_encoding(graph) if needs.positions else None)


def graph_of(spec: ArchitectureSpec, needs: Needs) -> NeuralGraph:
    """The neural graph alone; see `build_graph` for the errors."""
    from nowcast_service.graph.wiring.build import build_graph

    return build_graph(spec, max_features=needs.max_features, uncovered=needs.uncovered or "left")


class Graphs:
    """Computes in the calling thread and keeps the latest by the spec's digest. Safe to use from several threads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, Needs], Prepared] = OrderedDict()
        self._lock = threading.Lock()

    def prepared(self, spec: ArchitectureSpec, needs: Needs) -> Prepared:
        """See `Source.prepared`. Two threads that ask for the same at once both compute it: no lock is held."""
        key = spec.digest(), needs
        with self._lock:
            found = self._kept.get(key)
        made = found or prepare(spec, needs)
        with self._lock:
            made = self._kept.setdefault(key, made)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return made


def coverage(source: Source, spec: ArchitectureSpec, needs: Sequence[Needs]) -> tuple[Coverage, ...]:
    """What a predictor with these needs does with every parameter; empty where it treats all alike."""
    reported = next((need for need in needs if need.uncovered is not None), None)
    return () if reported is None else source.prepared(spec, reported).graph.coverage


def check_fit(graph: NeuralGraph, config: NiNoConfig) -> None:
    """Refuse a checkpoint that has no embedding for something in the graph.

    Raises:
        InvalidCheckpoint: Fewer token positions, edge types or kernel positions than the graph has.
    """
    if config.token_positions and graph.n_tokens > config.vocab_size:
        raise InvalidCheckpoint(
            f"the checkpoint has token-position embeddings for {config.vocab_size} tokens, the model has "
            f"{graph.n_tokens}",
            expected=f"at least {graph.n_tokens}",
            remedy="use a checkpoint without token-position embeddings",
        )
    last = max(int(block.edge_type) for block in graph.blocks)
    if config.edge_types and last >= config.edge_types:
        raise InvalidCheckpoint(
            f"the checkpoint has {config.edge_types} edge types, the graph of family {graph.spec.kind!r} uses type "
            f"{last}",
            expected=f"at least {last + 1}",
            remedy="use a checkpoint trained with the full table of edge types",
        )
    if config.gnn and graph.features > config.max_features:
        raise InvalidCheckpoint(
            f"the checkpoint takes {config.max_features} kernel positions per edge, the graph has {graph.features}",
            expected=f"at least {graph.features}",
        )


def check_positions(positions: Tensor, graph: NeuralGraph) -> None:
    """Refuse a positional encoding of another shape.

    Raises:
        InvalidSnapshot: As said.
    """
    if tuple(positions.shape) != (graph.n_nodes, 8):
        raise InvalidSnapshot(
            f"positions have shape {list(positions.shape)}",
            expected=f"shape [{graph.n_nodes}, 8], one row per node of the graph",
            remedy="leave --positions away to have them computed",
        )
