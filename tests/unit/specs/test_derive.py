"""What `derive_spec` reads off live modules, and what it refuses to guess."""

from __future__ import annotations

import json

import pytest
import torch
from nowcast_client.network.derive import derive_spec
from nowcast_client.network.named import UNKNOWN_FAMILY
from nowcast_proto.errors import UnsupportedArchitecture
from nowcast_service.graph.wiring.build import build_graph
from torch import nn

from .networks import NETWORKS, Nano


def test_names_of_wrappers_are_taken_off():
    bare = Nano(modern=False)
    wrapped = torch.compile(nn.DataParallel(torch.compile(bare)))
    assert all(name.startswith("_orig_mod.module._orig_mod.") for name, _ in wrapped.named_parameters())
    assert derive_spec(wrapped) == derive_spec(bare)


def test_tied_tensors_are_listed_once():
    spec = derive_spec(Nano(modern=False))
    assert spec.ties == {"lm_head.weight": "transformer.wte.weight"}
    assert "lm_head.weight" not in spec.shapes()


def test_heads_are_read_off_modules_where_there_is_no_config():
    assert derive_spec(Nano(modern=False)).num_heads == 3
    model = Nano(modern=False)
    for block in model.transformer["h"]:
        del block.attn.n_head
    with pytest.raises(UnsupportedArchitecture, match="number of attention heads of this nanogpt model"):
        derive_spec(model)
    model.config = {"n_head": 6}
    assert derive_spec(model).num_heads == 6


def test_fixed_positions_travel_and_other_frozen_tensors_are_refused():
    model, _ = NETWORKS["whisper"][1]()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.encoder.embed_positions.weight"]
    assert frozen[0] in derive_spec(model).shapes()
    model.model.encoder.conv1.weight.requires_grad_(False)
    with pytest.raises(UnsupportedArchitecture, match=r"1 parameters are frozen \(first: 'model\.encoder\.conv1"):
        derive_spec(model)
    assert "model.encoder.conv1.weight" in derive_spec(model, include_frozen=True).shapes()


@pytest.mark.parametrize(
    ("name", "field", "value", "said"),
    [
        ("llama", "model_type", "olmo2", "LlamaForCausalLM of type 'olmo2'.*embed_tokens"),
        ("bert", "model_type", "electra", "of type 'electra'"),
        ("t5", "model_type", "umt5", "of type 'umt5'"),
        ("gpt_neox", "use_parallel_residual", False, "variant: attention and feed-forward follow one another"),
        ("whisper", "decoder_attention_heads", 6, "encoder and decoder have 3 and 6 heads"),
    ],
)
def test_relatives_with_other_wiring_are_refused(name, field, value, said):
    model, _ = NETWORKS[name][1]()
    derive_spec(model)
    setattr(model.config, field, value)
    with pytest.raises(UnsupportedArchitecture, match=said) as caught:
        derive_spec(model)
    assert "table" in str(caught.value)


class Chain(nn.Module):
    """Three layers of one width, so that widths say nothing of how they are put together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = torch.flatten(x.relu(), 1)
        return self.c(self.b(self.a(x.view(x.size(0), -1))).sigmoid().mul(2))


class Skip(Chain):
    def forward(self, x):
        x = self.a(x)
        return self.c(x + self.b(x))


class Shuffled(Chain):
    def forward(self, x):
        return self.c(self.a(self.b(x)))


class Twice(Chain):
    def forward(self, x):
        return self.c(self.b(self.a(self.a(x))))


class Branch(Chain):
    def forward(self, x):
        return self.c(self.a(x)), self.b(x)


class Choosing(Chain):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class Gate(Chain):
    def forward(self, x):
        return self.c(self.b(self.a(x)) * x)


def test_plain_chains_are_sequential():
    for model in (Chain(), nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))):
        spec = derive_spec(model)
        assert spec.family == "sequential"
        assert all(entry.rule == "graph" for entry in build_graph(spec).coverage)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Skip, "values of a and b meet in 'add'"),
        (Shuffled, "layers run in the order b, a, c"),
        (Twice, "layers run in the order a, a, b, c"),
        (Branch, "its output comes from b and c"),
        (Choosing, "cannot be traced"),
        (Gate, "values of b and the input meet"),
    ],
)
def test_what_only_looks_like_a_chain_is_refused(kind, said):
    with pytest.raises(UnsupportedArchitecture, match=said) as caught:
        derive_spec(kind())
    assert kind.__name__ in caught.value.message
    assert "a.weight" in caught.value.message


def test_an_unknown_network_is_taken_without_a_graph_only_when_asked():
    spec = derive_spec(Skip(), unknown="edgewise")
    assert spec.family == UNKNOWN_FAMILY
    assert list(spec.shapes()) == ["a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "c.bias"]
    with pytest.raises(UnsupportedArchitecture, match="predictor that needs no graph"):
        build_graph(spec)
    assert derive_spec(Chain(), unknown="edgewise").family == "sequential"


def test_a_spec_is_the_same_in_every_process_and_survives_json():
    for name in ("t5", "nanogpt modern"):
        spec = derive_spec(NETWORKS[name][1]()[0])
        assert type(spec).model_validate(json.loads(spec.canonical())) == spec
