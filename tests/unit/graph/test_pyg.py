from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nowcast_proto.errors import InvalidSnapshot
from nowcast_service.graph.pyg import edge_values, scatter, to_pyg
from nowcast_service.graph.wiring.build import build_graph

from .specs import gpt2, llama, spec_of

WIRINGS = st.sampled_from(["published", "faithful"])


@st.composite
def networks(draw):
    wiring = draw(WIRINGS)
    kind = draw(st.sampled_from(["llama", "qwen3", "gpt2", "chain"]))
    if kind == "gpt2":
        heads = draw(st.integers(1, 3))
        return gpt2(draw(st.integers(1, 3)), heads * draw(st.integers(1, 3)), heads, draw(st.integers(1, 9)), wiring)
    if kind == "chain":
        width, shapes = draw(st.integers(1, 5)), {}
        for layer in range(draw(st.integers(1, 5))):
            outputs, kernel = draw(st.integers(1, 5)), draw(st.sampled_from([(), (1, 1), (3, 3), (3,), (1, 2, 2)]))
            shapes[f"{layer}.weight"] = (outputs, width, *kernel)
            if draw(st.booleans()):
                shapes[f"{layer}.bias"] = (outputs,)
            width = outputs
        return spec_of("sequential", shapes, wiring=wiring)
    kv_heads = draw(st.integers(1, 2))
    heads, size = kv_heads * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return llama(
        draw(st.integers(1, 2)), draw(st.integers(2 * size, 9)), heads, kv_heads, draw(st.integers(1, 7)),
        draw(st.integers(1, 9)), head_dim=size, family=kind, wiring=wiring, head_norms=kind == "qwen3" and heads > 1,
    )  # fmt: skip


def snapshots(spec, count=2):
    generator = torch.Generator().manual_seed(1)
    return [{p.name: torch.randn(p.shape, generator=generator) for p in spec.parameters} for _ in range(count)]


@given(networks())
@settings(max_examples=60, deadline=None)
def test_tensors_go_to_edges_and_back(spec):
    graph = build_graph(spec)
    history = snapshots(spec)
    values = edge_values(graph, history)
    assert values.shape == (graph.n_edges, 18)
    # Position-major: column 2 q + s is position q of snapshot s.
    back = scatter(graph, values.reshape(-1, 9, 2))
    covered = {entry.parameter for entry in graph.coverage if entry.rule == "graph"}
    assert back.keys() == covered
    for name in covered:
        for number, snapshot in enumerate(history):
            assert torch.equal(back[name][..., number], snapshot[name]), name
    assert sum(block.n_edges * block.features for block, _ in graph.weighted()) == sum(
        p.numel for p in spec.parameters if p.name in covered
    )


def test_the_pyg_object_has_every_edge_with_its_type_and_features():
    spec = gpt2()
    graph = build_graph(spec)
    data = to_pyg(graph, snapshots(spec, 5), max_features=1, positions=torch.zeros(graph.n_nodes, 8))
    data.validate(raise_on_error=True)
    assert data.num_nodes == graph.n_nodes
    assert data.edge_attr.shape == (graph.n_edges, 5)
    assert data.edge_type.bincount(minlength=15).sum() == graph.n_edges
    assert data.edge_attr[data.edge_type == 10].unique().tolist() == [1.0]
    assert data.edge_attr[data.edge_type == 11].unique().tolist() == [1.0]
    assert data.edge_attr[data.edge_type == 13].unique().tolist() == [2.0]
    assert data.pos_w.tolist() == [*range(1, 12), *[0] * (graph.n_nodes - 11)]


def test_edge_values_are_differentiable():
    spec = llama()
    history = [{name: tensor.requires_grad_() for name, tensor in snapshots(spec, 1)[0].items()}]
    edge_values(build_graph(spec), history).square().sum().backward()
    assert all(torch.allclose(tensor.grad, 2 * tensor) for tensor in history[0].values())


def test_a_missing_or_misshapen_tensor_is_named():
    spec = gpt2()
    graph = build_graph(spec)
    history = snapshots(spec)
    del history[1]["transformer.wpe.weight"]
    with pytest.raises(InvalidSnapshot, match=r"snapshot 2 has nothing for tensor 'transformer\.wpe\.weight'"):
        edge_values(graph, history)
    history[1]["transformer.wpe.weight"] = torch.zeros(2, 2)
    with pytest.raises(InvalidSnapshot, match=r"expected 18 elements"):
        edge_values(graph, history)
