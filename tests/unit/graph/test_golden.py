"""Published wiring against graphs of the published implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nowcast_service.graph.pyg import edge_values, scatter, to_pyg
from nowcast_service.graph.wiring.build import build_graph

from .golden import GOLDEN, load

pytestmark = pytest.mark.skipif(
    not GOLDEN, reason="recorded graphs of the published implementation are in ../shared/golden, which is absent"
)


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def case(request):
    return load(request.param)


def _edges(index: np.ndarray) -> list[tuple[int, ...]]:
    return sorted(map(tuple, index.T.tolist()))


def test_every_slice_has_the_same_edges_and_types_in_the_same_order_of_slices(case):
    graph = build_graph(case.spec)
    assert graph.n_nodes == len(case.arrays["pos_w"])
    assert graph.n_edges == case.arrays["edge_index"].shape[1]
    *blocks, loops = graph.blocks
    assert [block.name for block in blocks] == [name for name, _, _ in case.meta["edge_slices"]]
    for block, (name, start, end) in zip(blocks, case.meta["edge_slices"], strict=True):
        assert _edges(block.edge_index().numpy()) == _edges(case.arrays["edge_index"][:, start:end]), name
        assert set(case.arrays["edge_type"][start:end].tolist()) == {int(block.edge_type)}, name
    assert np.array_equal(loops.edge_index().numpy(), case.arrays["edge_index"][:, -graph.n_nodes :])
    assert set(case.arrays["edge_type"][-graph.n_nodes :].tolist()) == {int(loops.edge_type)}
    assert all(entry.rule == "graph" for entry in graph.coverage)


def test_token_index_and_in_degree(case):
    graph = build_graph(case.spec)
    degree = np.bincount(case.arrays["edge_index"][1], minlength=graph.n_nodes)
    assert np.array_equal(graph.in_degree.numpy(), degree)
    assert np.array_equal(to_pyg(graph).pos_w.numpy(), case.arrays["pos_w"])


def test_tensors_go_to_edges_and_back(case):
    graph = build_graph(case.spec)
    numbers = torch.arange(case.spec.numel, dtype=torch.float64) + 1
    parts = numbers.split([parameter.numel for parameter in case.spec.parameters])
    tensors = {p.name: part.reshape(p.shape) for p, part in zip(case.spec.parameters, parts, strict=True)}
    values = edge_values(graph, [tensors])
    weighted = torch.cat([torch.full((b.n_edges,), not isinstance(b.values, float)) for b in graph.blocks])
    used = values[weighted]
    assert torch.equal(used[used > 0].sort().values, numbers)  # every element is a feature of exactly one edge
    back = scatter(graph, values)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
