"""Faithful wiring, on the real models: permutations of neurons keep the graph exactly when they keep the function."""

from __future__ import annotations

import re

import pytest
import torch
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.graph.wiring.build import build_graph
from torch import Tensor, nn

from .faithful_models import (
    CASES,
    IDS,
    SMALL,
    TOKENS,
    _case,
    _resnet,
    _vit,
    transformers,
)
from .fingerprint import fingerprint


@pytest.fixture(params=CASES, ids=lambda build: build.__name__.lstrip("_"), scope="module")
def case(request):
    return request.param()


def test_every_parameter_is_covered(case):
    graph = build_graph(case.spec)
    assert graph.wiring == "faithful"
    assert {entry.rule for entry in graph.coverage} == {"graph"}
    assert sum(block.n_edges * block.features for block, _ in graph.weighted()) == case.spec.numel


def test_permutations_that_keep_the_function_keep_the_graph(case):
    graph = build_graph(case.spec)
    output, mark = case.output(), fingerprint(graph, case.tensors())
    original = case.tensors()
    for name, moves in case.keep.items():
        moved = case.moved(moves)
        assert any(not torch.equal(moved[key], original[key]) for key in moved), name
        _load(case.model, moved)
        assert torch.allclose(case.output(), output, atol=1e-5), f"the test is wrong: {name} changes the function"
        assert fingerprint(graph, moved) == mark, name
        _load(case.model, original)


def test_permutations_that_break_the_function_break_the_graph(case):
    graph = build_graph(case.spec)
    output, mark = case.output(), fingerprint(graph, case.tensors())
    original = case.tensors()
    for name, moves in case.break_.items():
        moved = case.moved(moves)
        _load(case.model, moved)
        assert not torch.allclose(case.output(), output, atol=1e-4), f"the test is wrong: {name} keeps the function"
        assert fingerprint(graph, moved) != mark, name
        _load(case.model, original)


def _load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def _renamed(spec: ArchitectureSpec, *changes: tuple[str, str]) -> ArchitectureSpec:
    """The same network under other names."""

    def name(old: str) -> str:
        for pattern, new in changes:
            old = re.sub(pattern, new, old)
        return old

    parameters = [{"name": name(p.name), "shape": p.shape} for p in spec.parameters]
    heads = {"num_heads": spec.num_heads, "num_kv_heads": spec.num_kv_heads}
    return ArchitectureSpec(family=spec.family, parameters=parameters, **heads)


def _wiring(spec: ArchitectureSpec) -> list[tuple[int, ...]]:
    graph = build_graph(spec)
    assert [entry.rule for entry in graph.coverage].count("graph") > len(graph.coverage) - 2
    return sorted((b.edge_type, b.source, b.n_sources, b.target, b.n_targets, b.diagonal) for b in graph.blocks)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_torchvision_names_are_wired_like_those_of_transformers(kind):
    ours = _resnet(kind).spec
    theirs = _renamed(
        ours,
        (r"resnet\.embedder\.embedder\.convolution", "conv1"),
        (r"resnet\.embedder\.embedder\.normalization", "bn1"),
        (r"classifier\.1", "fc"),
        (r"resnet\.encoder\.stages\.0", "layer1"),
        (r"resnet\.encoder\.stages\.1", "layer2"),
        (r"\.layers\.(\d)\.shortcut\.convolution", r".\1.downsample.0"),
        (r"\.layers\.(\d)\.shortcut\.normalization", r".\1.downsample.1"),
        *((rf"\.layers\.(\d)\.layer\.{n}\.convolution", rf".\1.conv{n + 1}") for n in range(3)),
        *((rf"\.layers\.(\d)\.layer\.{n}\.normalization", rf".\1.bn{n + 1}") for n in range(3)),
    )
    assert "layer1.0.conv1.weight" in theirs.shapes()
    assert _wiring(theirs) == _wiring(ours)


def test_older_vit_names_are_wired_like_current_ones():
    ours = _vit().spec
    older = _renamed(
        ours,
        (r"vit\.layers", "vit.encoder.layer"),
        (r"attention\.q_proj", "attention.attention.query"),
        (r"attention\.k_proj", "attention.attention.key"),
        (r"attention\.v_proj", "attention.attention.value"),
        (r"attention\.o_proj", "attention.output.dense"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
    )
    assert any("attention.attention.query" in name for name in older.shapes())
    assert _wiring(older) == _wiring(ours)


def test_classifiers_read_the_pooled_token_or_the_stream():
    settings = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 10, **SMALL, **IDS}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**settings))
    tagger = transformers.BertForTokenClassification(transformers.BertConfig(**settings))
    settings["max_position_embeddings"] = 12
    roberta = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**settings))
    for family, model, pooled in (("bert", bert, True), ("bert", tagger, False), ("roberta", roberta, True)):
        graph = build_graph(_case(family, model, TOKENS, num_heads=3).spec)
        assert all(entry.rule == "graph" for entry in graph.coverage), family
        assert any(range_.name == "pooled" for range_ in graph.ranges) == pooled
