"""Specs derived from live networks, and the symmetries that their faithful graphs claim, judged on the networks."""

from __future__ import annotations

import pytest
import torch
from nowcast_client.network.derive import derive_spec
from nowcast_service.graph.contract import contract
from nowcast_service.graph.wiring.build import build_graph
from torch import nn

from ..graph.fingerprint import fingerprint
from ..graph.judge import IN_FLOAT32, TOLERANCE, Network, Wiring, judge
from .networks import NETWORKS

pytest.importorskip("transformers")

RANGES = {
    # What must have been moved, beside whatever else: a graph without claims would pass any check.
    "gpt2": ({"q0", "v0", "heads0"}, {"q1"}, {"v1"}, {"h0"}, {"x0", "m0", "x1", "m1", "x2"}),
    "nanogpt": ({"q0", "v0", "heads0"}, {"h1"}, {"x0", "m0", "x1", "m1", "x2"}),
    "nanogpt modern": ({"q0", "v0", "heads0"}, {"v0"}, {"h1"}),
    "llama": ({"q0", "z0", "heads0"}, {"q0", "k0", "v0", "z0", "heads0"}, {"v1", "z1"}, {"h0", "up0"}),
    "qwen3": ({"q0", "z0", "heads0"}, {"q0", "k0", "v0", "z0", "heads0"}, {"v1", "z1"}, {"h0", "up0"}),
    "bert": ({"x0", "m0", "x1", "m1", "x2", "transform"}, {"q0", "v0", "heads0"}),
    "t5": (
        {"q0", "v0", "q1", "v1", "heads"},  # one table of positions: the heads of all layers move together
        {"dq0", "dv0", "dq1", "dv1", "dheads"},
        {"cq0", "cv0", "cheads0"},
        {"cq1"},
        {"x0", "m0", "x1", "m1", "x2", "y0", "s0", "c0", "y1", "s1", "c1", "y2"},
        {"dh1"},
    ),
    "t5 gated": ({"h0", "up0"}, {"dh1", "dup1"}),
    "whisper": (
        {"stem"},
        {"x0", "m0", "x1", "m1", "x2"},
        {"y0", "s0", "c0", "y1", "s1", "c1", "y2"},
        {"q1", "v1", "heads1"},
        {"cq0", "cv0", "cheads0"},
        {"cv1"},
    ),
}
ROTARY = ("nanogpt modern", "llama", "mistral", "qwen3", "gemma3", "phi3", "gpt_neox", "modernbert")


@pytest.fixture(params=NETWORKS, scope="module")
def case(request):
    family, build = NETWORKS[request.param]
    torch.manual_seed(0)
    model, inputs = build()
    return request.param, family, model, inputs, derive_spec(model)


def _graph(spec):
    return build_graph(spec.model_copy(update={"wiring": "faithful"}), max_features=1 << 20)


def test_the_family_is_derived_and_places_every_tensor(case):
    name, family, model, _, spec = case
    assert spec.family == family
    named = dict(model.named_parameters())
    assert list(spec.shapes()) == list(named)
    assert all(spec.shapes()[key] == tuple(tensor.shape) for key, tensor in named.items())
    graph = _graph(spec)
    outside = {entry.parameter: entry.reason for entry in graph.coverage if entry.rule != "graph"}
    scalars = {key for key, tensor in named.items() if tensor.dim() == 0}
    assert set(outside) == scalars, (name, outside)
    placed = sum(block.n_edges * block.features for block, _ in graph.weighted())
    assert placed == spec.numel - len(scalars)


def test_every_claim_of_the_graph_holds(case):
    name, _, model, inputs, spec = case
    in_float32 = any(kind in type(module).__name__ for module in model.modules() for kind in ("RMSNorm", "T5LayerNorm"))
    tolerance = IN_FLOAT32 if in_float32 else TOLERANCE
    verdict = judge(contract(_graph(spec)), Network(model, inputs), tolerance=tolerance)
    assert not verdict.broken
    assert verdict.moved > 0.85
    moved = [{r for r in ranges if not r.startswith("#")} for ranges in verdict.ranges]
    for ranges in RANGES.get(name, ()):
        assert ranges in moved, (ranges, moved)
    if name in ROTARY:
        assert {"q0"} not in moved, "rotary pairs were separated"


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_claims_keep_the_fingerprint_of_the_weighted_graph(name):
    """The judge and the graph speak of the same thing: a claimed move gives an isomorphic weighted graph."""
    model, inputs = NETWORKS[name][1]()
    graph = _graph(derive_spec(model))
    network, wiring = Network(model, inputs), Wiring(contract(graph))
    mark = fingerprint(graph, network.tensors)
    tried = list(wiring.claims())[::12]
    assert tried
    for claim in tried:
        moved = wiring.moved(network.tensors, claim.order)
        assert moved
        assert fingerprint(graph, {**network.tensors, **moved}) == mark, claim.what
        if len(moved) > 1:
            first = next(iter(moved))
            assert fingerprint(graph, {**network.tensors, first: moved[first]}) != mark, (claim.what, first)


def _turned(tensors, pattern, axis, size):
    order = torch.arange(size).roll(4)  # heads of four neurons
    return {name: t.index_select(axis, order) for name, t in tensors.items() if pattern in name}


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        # Heads of one layer, while the shared table of positions and the other layer keep theirs.
        (
            "t5",
            [("encoder.block.1.layer.0.SelfAttention." + part, axis) for part, axis in
             (("q", 0), ("k", 0), ("v", 0), ("o", 1))],
        ),
        # The encoder's stream as the decoder reads it, without the encoder.
        ("t5", [("decoder.block.0.layer.1.EncDecAttention.k", 1), ("decoder.block.0.layer.1.EncDecAttention.v", 1)]),
        ("whisper", [("decoder.layers.1.encoder_attn.q_proj", 0), ("decoder.layers.1.encoder_attn.q_proj", 0)]),
        ("whisper", [("encoder.conv2.weight", 1)]),
    ],
    ids=["heads of one layer", "memory of one layer", "queries without keys", "stem alone"],
)  # fmt: skip
def test_moves_that_change_the_function_change_the_graph(name, moves):
    model, inputs = NETWORKS[name][1]()
    graph = _graph(derive_spec(model))
    network = Network(model, inputs)
    moved: dict[str, torch.Tensor] = {}
    for pattern, axis in dict(moves).items():
        moved |= _turned(network.tensors, pattern, axis, 12)
    assert moved
    original = network.outputs()[0]
    assert (network.outputs(moved)[0] - original).abs().max() > 1e-4, "the test is wrong: the function stays"
    assert fingerprint(graph, {**network.tensors, **moved}) != fingerprint(graph, network.tensors)


def test_value_embeddings_whose_layers_are_not_in_their_names_stay_out():
    model, _ = NETWORKS["nanogpt modern"][1]()
    model.value_embeds["0"] = model.value_embeds.pop("1")  # one table called 0 for two layers: which ones read it?
    graph = build_graph(derive_spec(model))
    (entry,) = (entry for entry in graph.coverage if entry.parameter.startswith("value_embeds"))
    assert entry.rule == "left"
    assert "1 value embeddings for 2 layers" in entry.reason


def test_running_statistics_do_not_tell_channels_apart():
    """The judge resets them: a checkpoint's own would be permuted by nobody."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model[1].running_mean.copy_(torch.arange(4.0))
    graph = _graph(derive_spec(model))
    image = torch.linspace(-1, 1, 3 * 49, dtype=torch.float64).reshape(1, 3, 7, 7)
    verdict = judge(contract(graph), Network(model, (image,)))
    assert verdict.tried
    assert not verdict.broken
