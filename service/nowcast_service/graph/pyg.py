"""The neural graph edge by edge, for the reference twin, meta-training and tests.

The exact engine never needs this: it works on blocks. Here every edge is a row, in the order of the published code
(block by block, source-major, self-loops last).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from nowcast_proto.errors import InvalidSnapshot
from torch import Tensor
from torch_geometric.data import Data

from nowcast_service.graph.blocks import NeuralGraph
from nowcast_service.history import History

Snapshots = History | Sequence[Mapping[str, Tensor]]


def to_pyg(
    graph: NeuralGraph, history: Snapshots | None = None, *, max_features: int = 9, positions: Tensor | None = None
) -> Data:
    """The graph as a PyG object.

    Args:
        graph: The neural graph.
        history: Snapshots, oldest first, already scaled where a network is to read them; adds ``edge_attr``.
        max_features: Kernel positions per edge in ``edge_attr``.
        positions: (n_nodes, dim) positional encoding; adds ``pos``.

    Returns:
        ``edge_index`` (2, n_edges), ``edge_type`` (n_edges,), ``pos_w`` (n_nodes,) token-position index (1 … n_tokens
        for vocabulary rows, else 0), ``num_nodes``; ``pos`` and ``edge_attr`` as asked.

    Raises:
        InvalidSnapshot: A tensor of the graph is missing or has another size.
    """
    data = Data(
        edge_index=torch.cat([block.edge_index() for block in graph.blocks], dim=1),
        edge_type=torch.cat([torch.full((block.n_edges,), int(block.edge_type)) for block in graph.blocks]),
        pos_w=token_positions(graph),
        num_nodes=graph.n_nodes,
    )
    if positions is not None:
        data.pos = positions
    if history is not None:
        data.edge_attr = edge_values(graph, history, max_features=max_features)
    return data


def token_positions(graph: NeuralGraph) -> Tensor:
    """(n_nodes,) index into the token-position table: 1, 2, … for the rows of a vocabulary, 0 for every other node."""
    index = torch.zeros(graph.n_nodes, dtype=torch.long)
    for first, rows in graph.vocabularies:
        index[first : first + rows] = torch.arange(1, rows + 1)
    return index


def edge_values(graph: NeuralGraph, history: Snapshots, *, max_features: int = 9) -> Tensor:
    """Features of every edge.

    Differentiable in the snapshots.

    Args:
        graph: The neural graph.
        history: Snapshots, oldest first.
        max_features: Kernel positions per edge; smaller kernels fill the first ones row-major, the rest is zero.

    Returns:
        (n_edges, max_features * snapshots), position-major: column ``snapshots * position + snapshot``. Auxiliary
        edges carry their fixed feature in position 0 of every snapshot.

    Raises:
        InvalidSnapshot: A tensor of the graph is missing or has another size.
    """
    snapshots = history.snapshots if isinstance(history, History) else tuple(history)
    sizes = {parameter.name: parameter.numel for parameter in graph.spec.parameters}
    flat: dict[str, list[Tensor]] = {}
    for _, view in graph.weighted():
        name = view.parameter
        if name in flat:
            continue
        for number, snapshot in enumerate(snapshots):
            if name not in snapshot or snapshot[name].numel() != sizes[name]:
                found = f"{list(snapshot[name].shape)}" if name in snapshot else "nothing"
                raise InvalidSnapshot(
                    f"snapshot {number + 1} has {found} for tensor {name!r}", expected=f"{sizes[name]} elements"
                )
        flat[name] = [snapshot[name].reshape(-1).contiguous() for snapshot in snapshots]
    like = next(iter(flat.values()))[0]
    rows = []
    for block in graph.blocks:
        values = like.new_zeros(block.n_edges, max_features, len(snapshots))
        if isinstance(block.values, float):
            values[:, 0, :] = block.values
        else:
            view = block.values
            parts = [
                view.of(tensor, block.n_sources, block.n_targets, diagonal=block.diagonal).reshape(-1, view.features)
                for tensor in flat[view.parameter]
            ]
            values[:, : view.features, :] = torch.stack(parts, dim=2)
        rows.append(values.flatten(1))
    return torch.cat(rows)


def scatter(graph: NeuralGraph, values: Tensor) -> dict[str, Tensor]:
    """The way back from edges to tensors.

    Args:
        graph: The neural graph.
        values: (n_edges, features) or (n_edges, features, horizons), one row per edge in the order of `to_pyg`.

    Returns:
        Name -> tensor of the spec's shape (a last axis of horizons added where there was one) for every parameter in
        the graph; parameters the graph does not cover are absent.
    """
    shapes = graph.spec.shapes()
    numels = {parameter.name: parameter.numel for parameter in graph.spec.parameters}
    trailing = values.shape[2:]
    index: dict[str, list[Tensor]] = {}
    edges: dict[str, list[Tensor]] = {}
    row = 0
    for block in graph.blocks:
        if not isinstance(block.values, float) and block.writes:
            view = block.values
            numel = numels[view.parameter]
            where = view.of(torch.arange(numel), block.n_sources, block.n_targets, diagonal=block.diagonal)
            index.setdefault(view.parameter, []).append(where.reshape(-1))
            part = values[row : row + block.n_edges, : view.features]
            edges.setdefault(view.parameter, []).append(part.reshape(-1, *trailing))
        row += block.n_edges
    tensors = {}
    for name, rows in index.items():
        order = torch.argsort(torch.cat(rows))
        tensors[name] = torch.cat(edges[name])[order].reshape(*shapes[name], *trailing)
    return tensors
