"""Tell whether two weighted neural graphs are the same up to the numbering of their nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from nowcast_service.graph.blocks import NeuralGraph
from nowcast_service.graph.pyg import edge_values
from torch import Tensor


def fingerprint(graph: NeuralGraph, tensors: Mapping[str, Tensor], rounds: int = 4) -> Counter[int]:
    """Colours of all nodes after some rounds of colour refinement (Weisfeiler-Leman) with edge types and exact weights.

    Graphs that are isomorphic have equal fingerprints; with distinct random weights, others have not.
    """
    values = edge_values(graph, [{name: tensor.detach().double() for name, tensor in tensors.items()}], max_features=64)
    types = torch.cat([torch.full((block.n_edges,), int(block.edge_type)) for block in graph.blocks])
    sources, targets = torch.cat([block.edge_index() for block in graph.blocks], dim=1).tolist()
    labels = [hash((kind, *row)) for kind, row in zip(types.tolist(), values.tolist(), strict=True)]
    colours = [0] * graph.n_nodes
    for _ in range(rounds):
        arriving, leaving = [0] * graph.n_nodes, [0] * graph.n_nodes
        for source, target, label in zip(sources, targets, labels, strict=True):
            # Sums of hashes: neighbours are a multiset, their order means nothing.
            arriving[target] += hash((label, colours[source]))
            leaving[source] += hash((label, colours[target], "out"))
        colours = [hash(state) for state in zip(colours, arriving, leaving, strict=True)]
    return Counter(colours)
