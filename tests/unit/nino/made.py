"""Checkpoints and histories made up for tests."""

from __future__ import annotations

import itertools

import torch
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.history import History
from nowcast_service.nino.checkpoint import Checkpoint, expected_shapes
from nowcast_service.nino.config import NiNoConfig


def checkpoint(seed: int = 0, **fields: object) -> Checkpoint:
    """Weights large enough that every part of the network matters to the outcome."""
    config = NiNoConfig(**{"hidden": 8, "token_positions": False, **fields})
    draw = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(shape, generator=draw) * (0.5 if len(shape) == 1 else shape[-1] ** -0.5)
        for name, shape in expected_shapes(config).items()
    }
    return Checkpoint.of(config, state, source="made")


def history(spec: ArchitectureSpec, n: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> History:
    """A random walk with drift."""
    draw = torch.Generator().manual_seed(seed)
    weights = {p.name: torch.randn(p.shape, generator=draw) for p in spec.parameters}
    drift = {name: 0.1 * torch.randn(weight.shape, generator=draw) for name, weight in weights.items()}
    snapshots = []
    for _ in range(n):
        weights = {
            name: weight + drift[name] + 0.02 * torch.randn(weight.shape, generator=draw)
            for name, weight in weights.items()
        }
        snapshots.append({name: weight.to(dtype) for name, weight in weights.items()})
    return History.of(spec, snapshots)


def mlp(*sizes: int, ties: dict[str, str] | None = None) -> ArchitectureSpec:
    """A sequential network of linear layers."""
    parameters = []
    for number, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        parameters += [
            {"name": f"{number}.weight", "shape": [n_out, n_in]},
            {"name": f"{number}.bias", "shape": [n_out]},
        ]
    return ArchitectureSpec(family="sequential", parameters=parameters, ties=ties or {})


def convnet() -> ArchitectureSpec:
    """Two 3x3 convolutions with biases and a linear layer."""
    shapes = {"0.weight": [4, 3, 3, 3], "0.bias": [4], "2.weight": [5, 4, 3, 3], "2.bias": [5], "4.weight": [6, 5]}
    parameters = [{"name": name, "shape": shape} for name, shape in shapes.items()]
    return ArchitectureSpec(family="sequential", parameters=parameters)


def update_error(found: dict, wanted: dict, newest: dict) -> float:
    """Relative error of the predicted update over all tensors together."""
    off = torch.cat([(found[name].double() - wanted[name].double()).reshape(-1) for name in wanted])
    update = torch.cat([(wanted[name].double() - newest[name].double()).reshape(-1) for name in wanted])
    return float(off.norm() / update.norm())
