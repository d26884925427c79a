"""What the service's settings make of its predictors."""

from __future__ import annotations

import pytest
import torch
from nowcast_proto.errors import TooLarge
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.history import History
from nowcast_service.runtime.catalogue import Catalogue
from nowcast_service.settings import Settings
from torch import nn


def _history() -> History:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    spec = ArchitectureSpec.model_validate(
        {"family": "sequential", "parameters": [{"name": name, "shape": shape} for name, shape in shapes.items()]}
    )
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    move = {name: torch.randn_like(value) for name, value in start.items()}
    return History.of(spec, [{name: start[name] + 0.01 * n * move[name] for name in start} for n in range(5)])


def _predict(settings: Settings) -> dict[str, torch.Tensor]:
    catalogue = Catalogue.of(settings)
    return catalogue.predictor(catalogue.resolve_default()).predict(_history(), 5)[0]


def test_precision_and_memory_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = _predict(Settings(device="cpu"))
    monkeypatch.setenv("NOWCAST_PRECISION", "bf16")
    rounded = _predict(Settings(device="cpu"))
    away = sum(float((rounded[name] - exact[name]).norm()) for name in exact)
    moved = sum(float(exact[name].norm()) for name in exact)
    assert 0 < away < 0.05 * moved
    monkeypatch.setenv("NOWCAST_ENGINE_MEMORY", "10KiB")
    with pytest.raises(TooLarge, match="memory budget of 10240 bytes"):
        _predict(Settings(device="cpu"))
