"""The reference twin against the paper's equations written out, batches, gradients, embeddings."""

from __future__ import annotations

import pytest
import torch
from nowcast_proto.errors import HorizonOutOfRange, InvalidCheckpoint, InvalidSnapshot
from torch_geometric.data import Batch, Data

from .made import checkpoint


def _graph(seed: int, nodes: int = 7, edges: int = 30, features: int = 9, tokens: int = 0, context: int = 5) -> Data:
    draw = torch.Generator().manual_seed(seed)
    data = Data(
        edge_index=torch.randint(nodes - 1, (2, edges), generator=draw),  # the last node has no edge at all
        edge_type=torch.randint(15, (edges,), generator=draw),
        edge_attr=torch.randn(edges, features * context, generator=draw),
        pos=torch.randn(nodes, 8, generator=draw),
        pos_w=torch.zeros(nodes, dtype=torch.long),
        num_nodes=nodes,
    )
    data.pos_w[:tokens] = torch.arange(1, tokens + 1)
    return data


def _by_hand(made, data: Data) -> torch.Tensor:
    """All horizons, edge by edge in float64."""
    config, w = made.config, {name: tensor.double() for name, tensor in made.state.items()}
    act = {"silu": torch.nn.functional.silu, "relu": torch.relu, "tanh": torch.tanh, "gelu": torch.nn.functional.gelu}
    act = act[config.act]

    def linear(name, x):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def entry(name, x):
        x = linear(f"{name}.fc.0", x)
        return linear(f"{name}.fc.2", act(x)) if config.input_layer == "mlp" else x

    edges = list(zip(*data.edge_index.tolist(), strict=True))
    types = w["layer_embed.weight"][data.edge_type] if config.edge_types else torch.zeros(len(edges), config.hidden)
    h = data.edge_attr.double()
    width = config.inputs
    h = torch.nn.functional.pad(h, (0, width - h.shape[1]))
    e = [entry("edge_proj", h[n]) + types[n].double() for n in range(len(edges))]
    x = [torch.zeros(config.hidden).double() for _ in range(data.num_nodes)]
    for v in range(data.num_nodes):
        if config.lpe:
            x[v] = x[v] + entry("node_proj", data.pos[v, : config.lpe].double())
        if config.token_positions:
            x[v] = x[v] + w["wte_pos_enc_layer.weight"][data.pos_w[v]]
    size = config.hidden // config.towers
    for layer in range(config.layers):
        conv = f"gnn.convs.{layer}"
        new = []
        for v in range(data.num_nodes):
            parts = []
            for tower in range(config.towers):
                own = slice(tower * size, (tower + 1) * size)
                messages = []
                for (s, t), edge in zip(edges, e, strict=True):
                    if t == v:
                        scale, shift = linear(f"{conv}.edge_encoder", edge).chunk(2)
                        pair = torch.cat((x[t][own], x[s][own]))
                        messages.append(scale * linear(f"{conv}.pre_nns.{tower}.0", pair) + shift)
                mean = torch.stack(messages).mean(0) if messages else torch.zeros(size).double()
                parts.append(linear(f"{conv}.post_nns.{tower}.0", torch.cat((x[v][own], mean))))
            new.append(linear(f"{conv}.lin", torch.cat(parts)))
        if layer < config.edge_updates:
            x = [act(v) for v in new]
            u = f"gnn.edge_update.{layer}"
            e = [
                linear(
                    f"{u}.lin1",
                    act(linear(f"{u}.lin_e", edge) + linear(f"{u}.lin_s", x[s]) + linear(f"{u}.lin_t", x[t])),
                )
                for (s, t), edge in zip(edges, e, strict=True)
            ]
        else:
            x = new
    out = torch.stack([linear("edge_out.fc.2", act(linear("edge_out.fc.0", edge))) for edge in e])
    out = config.update_scale * out.view(len(edges), config.max_features, config.seq_len)
    last = h.view(len(edges), config.max_features, config.context)[..., -1:]
    return (last + out if config.residual else out), torch.stack(x), torch.stack(e)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layers": 1},
        {"layers": 4, "act": "gelu"},
        {"towers": 4},
        {"final_edge_update": True, "act": "tanh"},
        {"input_layer": "mlp", "act": "relu"},
        {"edge_types": 0, "residual": False},
        {"token_positions": True, "vocab_size": 5, "lpe": 0},
        {"token_positions": True, "vocab_size": 5, "update_scale": 0.5},
        {"max_features": 4, "seq_len": 6, "context": 3, "lpe": 5},
    ],
    ids=str,
)
def test_the_twin_is_the_equations(fields):
    made = checkpoint(**fields)
    config = made.config
    data = _graph(1, features=config.max_features, tokens=3 if config.token_positions else 0, context=config.context)
    wanted, nodes, edges = _by_hand(made, data)
    twin = made.twin(dtype=torch.float64)
    data.edge_attr, data.pos = data.edge_attr.double(), data.pos.double()
    with torch.no_grad():
        torch.testing.assert_close(twin(data), wanted, rtol=1e-9, atol=1e-9)
        embedded = twin.embed(data)
    torch.testing.assert_close(embedded.nodes, nodes, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(embedded.edges, edges, rtol=1e-9, atol=1e-9)


def test_horizons_one_several_or_all_agree():
    twin, data = checkpoint().twin(), _graph(2)
    with torch.no_grad():
        everything = twin(data)
        assert everything.shape == (30, 9, 40)
        torch.testing.assert_close(twin(data, 8), everything[..., 7])
        torch.testing.assert_close(twin(data, [40, 1]), everything[..., [39, 0]])


@pytest.mark.parametrize("k", [0, 41, -1])
def test_other_horizons_are_refused(k):
    with pytest.raises(HorizonOutOfRange, match=f"k={k}"):
        checkpoint().twin()(_graph(2), k)


def test_absent_kernel_positions_count_as_zero():
    twin = checkpoint().twin()
    small = _graph(3, features=2)
    padded = _graph(3, features=2)
    padded.edge_attr = torch.nn.functional.pad(small.edge_attr, (0, 7 * 5))
    with torch.no_grad():
        torch.testing.assert_close(twin(small), twin(padded)[:, :2])


def test_a_batch_is_its_graphs():
    twin = checkpoint(token_positions=True, vocab_size=4).twin()
    graphs = [_graph(4, nodes=5, edges=12, tokens=2), _graph(5, nodes=9, edges=40, tokens=4)]
    with torch.no_grad():
        together = twin(Batch.from_data_list(graphs), 5)
        torch.testing.assert_close(together, torch.cat([twin(graph, 5) for graph in graphs]), rtol=1e-4, atol=1e-5)


def test_every_weight_that_can_matter_gets_a_gradient_and_it_is_right():
    made = checkpoint(layers=2, final_edge_update=True, hidden=4, seq_len=2, max_features=1, edge_types=3)
    twin = made.twin(dtype=torch.float64).train()
    data = _graph(6, nodes=4, edges=6, features=1)
    data.edge_attr, data.pos, data.edge_type = data.edge_attr.double(), data.pos.double(), data.edge_type % 3
    twin(data).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in twin.parameters())
    weight, eps = twin.gnn.convs[0].pre_nns[0][0].weight, 1e-6
    found = weight.grad[1, 2].item()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[1, 2] += sign * eps
            values.append(twin(data).square().sum().item())
            weight[1, 2] -= sign * eps
    assert found == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-5)


def test_edge_wise_network_reads_nothing_but_the_edge():
    twin, data = checkpoint(gnn=False).twin(), _graph(7, features=9)
    with torch.no_grad():
        out = twin(Data(edge_attr=data.edge_attr, edge_type=data.edge_type), [3, 9])
        assert out.shape == (30, 9, 2)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
        mixed = data.edge_attr.view(30, 9, 5)[:, order].flatten(1)
        torch.testing.assert_close(twin(Data(edge_attr=mixed, edge_type=data.edge_type), [3, 9]), out[:, order])
    with pytest.raises(InvalidCheckpoint, match="no graph embeddings"):
        twin.embed(data)


def test_inputs_that_do_not_fit_are_refused():
    data = _graph(8)
    with pytest.raises(InvalidSnapshot, match="kernel positions"):
        checkpoint(max_features=4).twin()(data, 1)
    data.edge_attr = data.edge_attr[:, :7]
    with pytest.raises(InvalidSnapshot, match=r"shape \[30, 7\]"):
        checkpoint().twin()(data, 1)
    with pytest.raises(InvalidCheckpoint, match="for 2 tokens; expected at least 3"):
        checkpoint(token_positions=True, vocab_size=2).twin()(_graph(8, tokens=3), 1)
