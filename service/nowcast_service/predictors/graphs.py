"""Neural graphs and positional encodings of the architectures at hand, kept by the spec's digest."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Literal

from nowcast_proto.errors import InvalidCheckpoint, InvalidSnapshot
from nowcast_proto.spec import ArchitectureSpec
from torch import Tensor

from nowcast_service.graph.blocks import NeuralGraph
from nowcast_service.nino.config import NiNoConfig

Uncovered = Literal["left", "edgewise"]
"""What becomes of tensors the graph does not cover: left as they are, or predicted edge-wise."""
KEPT = 8
"""Architectures remembered at once; an encoding takes 32 bytes per neuron."""


class Graphs:
    """Graphs with one limit on kernel positions, and their encodings. Safe to use from several threads.

    Args:
        max_features: Kernel positions the checkpoint takes per edge.
        uncovered: What the coverage table is to say of tensors outside the graph.
    """

    def __init__(self, max_features: int, uncovered: Uncovered = "left") -> None:
        self._max_features = max_features
        self._uncovered: Uncovered = uncovered
        self._graphs: OrderedDict[str, NeuralGraph] = OrderedDict()
        self._positions: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def graph(self, spec: ArchitectureSpec) -> NeuralGraph:
        """The graph of an architecture; see `build_graph` for the errors."""
        from nowcast_service.graph.wiring.build import build_graph

        key = spec.digest()
        with self._lock:
            if key in self._graphs:
                self._graphs.move_to_end(key)
            else:
                self._graphs[key] = build_graph(spec, max_features=self._max_features, uncovered=self._uncovered)
                while len(self._graphs) > KEPT:
                    self._positions.pop(self._graphs.popitem(last=False)[0], None)
            return self._graphs[key]

    def positions(self, graph: NeuralGraph) -> Tensor:
        """(n_nodes, 8) positional encoding of a graph."""
        from nowcast_service.graph.positional import positional_encoding

        key = graph.spec.digest()
        with self._lock:
            if key not in self._positions:
                encoding = positional_encoding(graph)
                if key not in self._graphs:
                    return encoding
                self._positions[key] = encoding
            return self._positions[key]


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
