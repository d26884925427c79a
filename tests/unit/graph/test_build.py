from __future__ import annotations

import time

import pytest
import torch
from nowcast_proto.errors import InvalidSpec, UnsupportedArchitecture
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.graph.blocks import EdgeType
from nowcast_service.graph.families import families
from nowcast_service.graph.wiring.build import build_graph

from .specs import gpt2, llama, spec_of


def reasons(spec: ArchitectureSpec, **options: object) -> dict[str, str]:
    return {entry.parameter: entry.reason for entry in build_graph(spec, **options).coverage if entry.rule != "graph"}


def with_shapes(
    spec: ArchitectureSpec, changes: dict[str, tuple[int, ...] | None], **fields: object
) -> ArchitectureSpec:
    """The spec with tensors changed, added, or left out (None)."""
    shapes = {name: shape for name, shape in {**spec.shapes(), **changes}.items() if shape is not None}
    kept = {key: getattr(spec, key) for key in ("num_heads", "num_kv_heads", "head_dim", "wiring")}
    return spec_of(spec.family, shapes, **{**kept, **fields})


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(UnsupportedArchitecture, match="'mamba' is not known") as caught:
        build_graph(spec_of("mamba", {"a.weight": (2, 2)}))
    assert caught.value.detail["families"] == sorted(families())


def test_a_wiring_the_family_lacks_is_refused():
    with pytest.raises(UnsupportedArchitecture, match="'mistral' has no published wiring; expected faithful"):
        build_graph(llama(family="mistral", wiring="published"))


QUERY, _, OUT = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qko")


@pytest.mark.parametrize("wiring", ["published", "faithful"])
@pytest.mark.parametrize(
    ("changes", "fields", "tensor"),
    [
        ({QUERY: None}, {}, QUERY),
        ({QUERY: (13, 12)}, {}, QUERY),
        ({QUERY: (12, 13)}, {}, QUERY),
        ({OUT: (13, 12)}, {}, OUT),
        ({"model.layers.0.mlp.up_proj.weight": (23, 12)}, {}, "up_proj"),
        ({"model.embed_tokens.weight": None}, {}, "model.embed_tokens.weight"),
        ({"model.embed_tokens.weight": (180,)}, {}, "model.embed_tokens.weight"),
        ({"model.norm.weight": (11,)}, {}, "model.norm.weight"),
        ({"model.norm.weight": (3, 4)}, {}, "model.norm.weight"),
        ({}, {"num_heads": 5, "num_kv_heads": None}, "q_proj"),
        ({}, {"head_dim": 4}, "q_proj"),
    ],
)
def test_shapes_and_heads_that_contradict_each_other_name_the_tensor(wiring, changes, fields, tensor):
    with pytest.raises(InvalidSpec) as caught:
        build_graph(with_shapes(llama(), changes, **{"wiring": wiring, **fields}))
    assert tensor in str(caught.value)
    assert caught.value.expected


def test_heads_must_be_given():
    with pytest.raises(InvalidSpec, match="needs num_heads"):
        build_graph(with_shapes(gpt2(), {}, num_heads=None))


def test_a_fused_tensor_must_have_equal_parts():
    name = "transformer.h.0.attn.c_attn.weight"
    with pytest.raises(InvalidSpec, match="c_attn") as caught:
        build_graph(with_shapes(gpt2(), {name: (6, 17)}))
    assert "multiple of 3" in str(caught.value)


def test_a_network_of_another_family_finds_no_layers():
    with pytest.raises(InvalidSpec, match="finds no layer"):
        build_graph(spec_of("gpt2", llama().shapes(), num_heads=6))


def test_nothing_in_the_graph_is_an_error():
    with pytest.raises(UnsupportedArchitecture, match="no parameter"):
        build_graph(spec_of("sequential", {"a.weight": (4, 3, 5, 5)}))


def test_unknown_tensors_and_scalars_are_reported_and_left():
    spec = with_shapes(gpt2(), {"logit_scale": (), "transformer.h.0.attn.gate": (6,), "transformer.extra": (2, 6, 3)})
    known = build_graph(gpt2())
    graph = build_graph(spec)
    assert graph.blocks == known.blocks
    outside = reasons(spec)
    assert list(outside) == ["logit_scale", "transformer.h.0.attn.gate", "transformer.extra"]
    assert "scalar" in outside["logit_scale"]
    assert "no rule" in outside["transformer.h.0.attn.gate"]
    assert {entry.rule for entry in build_graph(spec, uncovered="edgewise").coverage} == {"graph", "edgewise"}


def test_kernels_wider_than_the_checkpoint_leave_the_graph_and_nothing_else_moves():
    shapes = {"0.weight": (4, 3, 5, 5), "0.bias": (4,), "2.weight": (6, 4, 3, 3), "4.weight": (10, 6)}
    graph = build_graph(spec_of("sequential", shapes))
    assert reasons(graph.spec) == {"0.weight": "25 kernel positions, the checkpoint takes 9"}
    assert graph.n_nodes == 1 + 4 + 6 + 10  # the bias node; no node for the pixels nothing reaches
    assert not reasons(graph.spec, max_features=25)
    assert list(reasons(graph.spec, max_features=1)) == ["0.weight", "2.weight"]


def test_sequential_leaves_out_what_does_not_fit_the_chain():
    shapes = {
        "0.weight": (8, 4),
        "norm.gamma": (8,),
        "1.bias": (5,),
        "scale": (),
        "tok_embed.weight": (11, 8),
        "2.weight": (8, 7),
        "3.weight": (3, 8),
        "4.lora": (3, 3),
    }
    outside = reasons(spec_of("sequential", shapes))
    assert set(outside) == set(shapes) - {"0.weight", "3.weight"}
    assert "8 neurons" in outside["2.weight"]


def test_grouped_convolutions_are_left_in_published_wiring_and_exact_in_faithful():
    shapes = {"0.weight": (8, 3, 3, 3), "1.weight": (8, 1, 3, 3), "2.weight": (12, 2, 3, 3), "3.weight": (5, 12)}
    published = reasons(spec_of("sequential", shapes))
    assert set(published) == {"1.weight", "2.weight"}
    assert "grouped" in published["1.weight"]
    graph = build_graph(spec_of("sequential", shapes, wiring="faithful"))
    by_name = {block.name: block for block in graph.blocks}
    assert all(entry.rule == "graph" for entry in graph.coverage)
    depthwise = by_name["1.weight"]
    assert depthwise.diagonal
    assert (depthwise.n_sources, depthwise.features) == (8, 9)
    groups = [by_name[f"2.weight[{group}]"] for group in range(4)]
    assert [(block.n_sources, block.n_targets) for block in groups] == [(2, 3)] * 4
    # The weights say which input reaches which output: compare with a convolution that multiplies by nothing.
    weight = torch.arange(12 * 2 * 9, dtype=torch.float64).reshape(12, 2, 3, 3) + 1
    dense = torch.zeros(12, 8, 3, 3, dtype=torch.float64)
    for output in range(12):
        dense[output, output // 3 * 2 : output // 3 * 2 + 2] = weight[output]
    found = torch.zeros_like(dense)
    for block in groups:
        values = block.values.of(weight.reshape(-1), block.n_sources, block.n_targets)  # (sources, targets, 9)
        first_in, first_out = block.source - groups[0].source, block.target - groups[0].target
        found[first_out : first_out + 3, first_in : first_in + 2] = values.permute(1, 0, 2).reshape(3, 2, 3, 3)
    assert torch.equal(found, dense)


def test_flattened_pixels_become_features_in_faithful_wiring():
    shapes = {"0.weight": (4, 3, 3, 3), "1.weight": (5, 16)}  # 4 channels of 2 x 2 pixels
    assert "16 inputs" in reasons(spec_of("sequential", shapes))["1.weight"]
    graph = build_graph(spec_of("sequential", shapes, wiring="faithful"))
    block = next(block for block in graph.blocks if block.name == "1.weight")
    assert (block.n_sources, block.n_targets, block.features) == (4, 5, 4)
    weight = torch.arange(80.0).reshape(5, 16)
    assert torch.equal(block.values.of(weight.reshape(-1), 4, 5), weight.reshape(5, 4, 4).transpose(0, 1))
    wide = spec_of("sequential", {"0.weight": (4, 3, 3, 3), "1.weight": (5, 64)}, wiring="faithful")
    assert "16 kernel positions" in reasons(wide)["1.weight"]


def test_real_qwen3_heads_are_wider_than_hidden_over_heads():
    spec = llama(family="qwen3", width=12, heads=6, kv_heads=2, head_dim=4, head_norms=True)
    graph = build_graph(spec)
    assert all(entry.rule == "graph" for entry in graph.coverage)
    by_name = {block.name: block for block in graph.blocks}
    q, v, o = (by_name[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qvo")
    assert (q.n_targets, v.n_targets, o.n_sources) == (24, 8, 24)
    assert o.source + o.n_sources == v.target + v.n_targets
    assert not reasons(spec_of("qwen3", spec.shapes(), num_heads=6, num_kv_heads=2, head_dim=4, wiring="faithful"))


def test_a_diagonal_that_does_not_fit_is_left_out():
    spec = llama(family="qwen3", width=6, heads=2, kv_heads=1, head_dim=4, head_norms=True)
    outside = reasons(spec)  # the published place of k_norm needs a stream of two heads
    assert list(outside) == [f"model.layers.{layer}.self_attn.k_norm.weight" for layer in (0, 1)]
    assert "do not fit" in outside["model.layers.0.self_attn.k_norm.weight"]


def test_layer_order_follows_the_index_not_the_listing():
    spec = gpt2(layers=11)
    shuffled = spec_of("gpt2", dict(sorted(spec.shapes().items())), num_heads=2)  # h.0, h.1, h.10, h.2 …
    assert build_graph(shuffled).blocks == build_graph(spec).blocks


def test_prefixes_are_optional():
    bare = {name.removeprefix("model."): shape for name, shape in llama().shapes().items()}
    graph = build_graph(spec_of("llama", bare, num_heads=6, num_kv_heads=2))
    assert all(entry.rule == "graph" for entry in graph.coverage)
    assert graph.n_edges == build_graph(llama()).n_edges


@pytest.mark.parametrize("wiring", ["published", "faithful"])
def test_a_billion_parameters_build_in_about_a_second(wiring):
    spec = llama(16, 2048, 32, 8, 8192, 128_256, wiring=wiring)
    start = time.process_time()
    graph = build_graph(spec)
    assert time.process_time() - start < 2  # measured 0.02 s; anything per edge takes minutes
    assert sum(block.n_edges for block, _ in graph.weighted()) == spec.numel


def test_self_loops_and_in_degree():
    graph = build_graph(spec_of("sequential", {"a.weight": (3, 2), "a.bias": (3,)}))
    assert graph.blocks[-1].edge_type is EdgeType.SELF_LOOP
    assert graph.in_degree.tolist() == [1, 1, 1, 4, 4, 4]
    assert graph.n_edges == 6 + 3 + 6


@pytest.mark.parametrize("wiring", ["published", "faithful"])
def test_one_output_of_a_1d_convolution_is_no_batch_axis(wiring):
    """(1, inputs, positions) looks like an embedding's (1, positions, width) and is not."""
    graph = build_graph(spec_of("sequential", {"0.weight": (1, 4, 3), "1.weight": (2, 1)}, wiring=wiring))
    first = graph.blocks[0]
    assert (first.n_sources, first.n_targets, first.features) == (4, 1, 3)
