"""The recipe of CONTRIBUTING.md for a new family, tried: one file beside the others is all the service needs."""

from __future__ import annotations

import importlib

import pytest
import torch
from nowcast_proto.errors import UnsupportedArchitecture
from nowcast_service.graph import families as package
from nowcast_service.graph.contract import contract
from nowcast_service.graph.families import families
from nowcast_service.graph.wiring.build import build_graph
from torch import nn

from .judge import Network, judge
from .specs import spec_of

RECIPE = '''
"""Toys: an entry, blocks with a way around them, an exit."""

from nowcast_proto.table.elements import Neurons, Residual, Stack

from nowcast_service.graph.families.family import Family
from nowcast_service.graph.families.parts import linear

_TOY = (
    Neurons(("x0",), fed_by=("inputs",)),
    *linear("entry", "inputs", "x0"),
    Stack(
        "steps.*.",
        (
            Neurons(("h{i}",)),
            Neurons(("x{i+1}",)),
            *linear("up", "x{i}", "h{i}"),
            *linear("down", "h{i}", "x{i+1}"),
            Residual("res", "x{i}", "x{i+1}"),
        ),
    ),
    Neurons(("labels",)),
    *linear("exit", "x{n}", "labels"),
)

FAMILIES = (Family("toy", {"faithful": _TOY}, heads=False),)
'''


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.entry, self.exit = nn.Linear(3, 5), nn.Linear(5, 2)
        self.steps = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(5, 7), "down": nn.Linear(7, 5)}) for _ in range(2))

    def forward(self, x):
        x = self.entry(x)
        for step in self.steps:
            x = x + step["down"](torch.tanh(step["up"](x)))
        return self.exit(x)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose modules are found beside the families of the package."""
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    return tmp_path


def test_a_file_beside_the_others_is_a_family(folder):
    model = Toy()
    spec = spec_of("toy", {name: tuple(tensor.shape) for name, tensor in model.named_parameters()})
    with pytest.raises(UnsupportedArchitecture, match="'toy' is not known"):
        build_graph(spec)
    (folder / "toy_of_the_recipe.py").write_text(RECIPE)
    importlib.invalidate_caches()
    graph = build_graph(spec)
    assert {entry.rule for entry in graph.coverage} == {"graph"}
    verdict = judge(contract(graph), Network(model, (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),)))
    assert not verdict.broken
    assert verdict.moved > 0.9
    assert {"h0"} in verdict.ranges


def test_two_families_of_one_name_are_an_error(folder):
    (folder / "another_gpt2.py").write_text(RECIPE.replace('"toy"', '"gpt2"'))
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="'gpt2' is in"):
        families()


def test_the_judge_tells_a_wrong_wiring():
    """Without the way around a step its two streams would move apart."""
    model = Toy()
    spec = spec_of("toy", {name: tuple(tensor.shape) for name, tensor in model.named_parameters()})
    namespace: dict = {}
    exec(compile(RECIPE.replace('            Residual("res", "x{i}", "x{i+1}"),\n', ""), "wrong", "exec"), namespace)
    graph = build_graph(spec, family=namespace["FAMILIES"][0])
    verdict = judge(contract(graph), Network(model, (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),)))
    assert any(what.startswith("neurons of x") and change > 1e-4 for what, change in verdict.broken)
