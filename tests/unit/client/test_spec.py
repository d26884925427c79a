"""Specs derived from live modules, by names and config alone."""

from __future__ import annotations

import pytest
import torch
from nowcast_client.network.derive import derive_spec
from nowcast_client.network.modules import plain_name
from nowcast_lab.demo.training_job.gpt import GPT, GPTConfig
from nowcast_proto.errors import UnsupportedArchitecture
from torch import nn

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LLAMA = {**TINY, "num_key_value_heads": 2, "vocab_size": 50}


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def mistral() -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA))


def qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA))


def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA, head_dim=16))


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TINY, vocab_size=50))


def roberta() -> nn.Module:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**TINY, vocab_size=50))


@pytest.mark.parametrize(
    ("build", "family", "heads", "kv_heads", "head_dim"),
    [
        (gpt2, "gpt2", 4, None, None),
        (llama, "llama", 4, 2, None),
        (mistral, "mistral", 4, 2, None),
        (qwen2, "qwen2", 4, 2, None),
        (qwen3, "qwen3", 4, 2, 16),
        (bert, "bert", 4, None, None),
        (roberta, "roberta", 4, None, None),
    ],
)
def test_transformers(build: object, family: str, heads: int, kv_heads: int | None, head_dim: int | None) -> None:
    model = build()  # type: ignore[operator]
    spec = derive_spec(model)
    assert (spec.family, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (family, heads, kv_heads, head_dim)
    assert spec.shapes() == {n: tuple(p.shape) for n, p in model.named_parameters()}


def test_tied_tensors_are_listed_once() -> None:
    spec = derive_spec(gpt2())
    assert spec.ties == {"lm_head.weight": "transformer.wte.weight"}
    assert "lm_head.weight" not in spec.shapes()


def test_a_model_without_a_library_is_known_by_its_names() -> None:
    spec = derive_spec(GPT(GPTConfig(n_embd=32, n_head=2)))
    assert (spec.family, spec.num_heads) == ("gpt2", 2)


def test_wrappers_do_not_show() -> None:
    model = GPT(GPTConfig(n_embd=32, n_head=2))
    plain = derive_spec(model)
    assert derive_spec(torch.compile(model)) == plain
    assert plain_name("module._orig_mod.module.h.0._checkpoint_wrapped_module.ln.weight") == "h.0.ln.weight"
    assert plain_name("encoder.module_list.0.weight") == "encoder.module_list.0.weight"


class NanoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(8, 24), nn.Linear(8, 8)


def test_gpt2_names_over_linear_layers_are_not_gpt2() -> None:
    """nanoGPT stores the transpose under the same names: wiring it as GPT-2 would be silently wrong.

    It is known for what it is, and asked for the heads that only a config tells.
    """
    block = nn.ModuleDict({"attn": NanoAttention()})
    model = nn.ModuleDict({"wte": nn.Embedding(10, 8), "h": nn.ModuleList([block])})
    with pytest.raises(UnsupportedArchitecture, match="heads of this nanogpt model"):
        derive_spec(model)


@pytest.mark.parametrize(
    ("model", "wiring"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), None),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 2)), None),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 2)), "faithful"),
        (nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8)), "faithful"),
    ],
)
def test_plain_chains(model: nn.Module, wiring: str | None) -> None:
    spec = derive_spec(model)
    assert (spec.family, spec.wiring) == ("sequential", wiring)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.Linear(6, 2)), "takes 6 inputs"),
        (nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 2)), "is a Embedding"),
        (nn.Sequential(nn.Linear(4, 8), nn.LSTM(8, 8)), "is a LSTM"),
        (nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(4)), "normalises"),
        (nn.Sequential(nn.ReLU()), "no parameters"),
    ],
)
def test_what_is_no_chain_is_refused_with_the_reason(model: nn.Module, why: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=why):
        derive_spec(model)


def test_frozen_tensors_of_a_family_must_be_asked_for() -> None:
    model = GPT(GPTConfig(n_embd=32, n_head=2))
    model.transformer.wpe.weight.requires_grad_(False)
    with pytest.raises(UnsupportedArchitecture, match="include_frozen"):
        derive_spec(model)
    assert "transformer.wpe.weight" in derive_spec(model, include_frozen=True).shapes()


def test_frozen_tensors_of_a_chain_stay_at_home() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    assert list(derive_spec(model).shapes()) == ["1.weight", "1.bias", "2.weight", "2.bias"]


def test_families_are_known_to_the_graph_builder() -> None:
    """Every spec a live model gives can be wired, nothing left out in silence."""
    build = pytest.importorskip("nowcast_service.graph.wiring.build")
    for make in (gpt2, llama, mistral, qwen2, qwen3, bert, roberta):
        graph = build.build_graph(derive_spec(make()))
        assert sum(entry.rule == "graph" for entry in graph.coverage) > 0.8 * len(graph.coverage), make.__name__
