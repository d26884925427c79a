"""Neural graphs: from an architecture spec to blocks of typed edges between ranges of neurons."""

from nowcast_service.graph.blocks import Block, Coverage, EdgeType, NeuralGraph, View

__all__ = ["Block", "Coverage", "EdgeType", "NeuralGraph", "View"]
