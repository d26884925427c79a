"""The training forward pass against the reference twin, and the encoding against inference's."""

from __future__ import annotations

import pytest
import torch
from nowcast_lab.metatrain.forward import check_trainable, forward
from nowcast_lab.metatrain.graphs import prepare
from nowcast_lab.metatrain.train import TrainConfig, initial_network
from nowcast_lab.metatrain.zoo import Arch
from nowcast_proto.errors import InvalidCheckpoint
from nowcast_service.graph.positional import laplacian_eigenvalues
from nowcast_service.graph.pyg import to_pyg
from nowcast_service.graph.wiring.build import build_graph
from nowcast_service.nino.config import NiNoConfig

ARCHS = [
    Arch(kind="convnet", widths=(4, 6), channels=1, size=8),
    Arch(kind="convnet", widths=(4, 5), norm=True, size=8),
    Arch(kind="mlp", widths=(5, 4), channels=1, size=4),
    Arch(kind="gpt2", layers=2, dim=6, heads=2, vocabulary=11, context=5),
    Arch(kind="llama", layers=2, dim=8, heads=4, kv_heads=2, vocabulary=9, context=5),
    Arch(kind="vit", layers=1, dim=6, heads=2, size=6, patch=3),
]


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.label)
def test_forward_equals_the_twin(arch: Arch) -> None:
    spec = arch.spec()
    torch.manual_seed(3)
    slices = 2
    snapshots = [
        [{p.name: torch.randn(p.shape, dtype=torch.float64) for p in spec.parameters} for _ in range(5)]
        for _ in range(slices)
    ]
    twin = initial_network(TrainConfig(hidden=8, seed=1)).eval().double()
    with torch.no_grad():
        for parameter in twin.parameters():  # biases and the last map away from their small starting values
            parameter.add_(0.3 * torch.randn_like(parameter))
    training, graph = prepare(spec), build_graph(spec)
    flat = torch.stack(
        [
            torch.stack([torch.cat([tensor.reshape(-1) for tensor in snapshot.values()]) for snapshot in one])
            for one in snapshots
        ]
    )  # (slices, context, elements)
    fixed = torch.tensor([1.0, 2.0], dtype=torch.float64).view(2, 1, 1).expand(2, slices, 5)
    inputs = torch.cat((flat.permute(2, 0, 1), fixed))
    ks = (1, 7, 40)
    with torch.no_grad():
        groups = forward(twin, training, inputs, training.encoding.double(), ks)
        for s in range(slices):
            got = torch.full((inputs.shape[0], len(ks)), torch.nan, dtype=torch.float64)
            for group, predicted in zip(training.groups, groups, strict=True):
                got[group.gather[group.weighted]] = predicted[group.weighted][:, s]
            data = to_pyg(graph, snapshots[s], positions=training.encoding)
            expected = twin(data, ks)  # (edges, 9, horizons)
            row = 0
            for block in graph.blocks:
                rows = expected[row : row + block.n_edges]
                row += block.n_edges
                if isinstance(block.values, float):
                    continue
                start = 0
                for p in spec.parameters:
                    if p.name == block.values.parameter:
                        break
                    start += p.numel
                where = block.values.of(
                    torch.arange(start, start + p.numel), block.n_sources, block.n_targets, diagonal=block.diagonal
                ).reshape(-1, block.features)
                newest = flat[s, -1][where].unsqueeze(-1)
                torch.testing.assert_close(newest + got[where], rows[:, : block.features], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.label)
def test_random_encodings_span_the_same_eigenspaces(arch: Arch) -> None:
    spec = arch.spec()
    training, graph = prepare(spec), build_graph(spec)
    values = laplacian_eigenvalues(graph, 9)[1:]
    generator = torch.Generator().manual_seed(0)
    one, other = training.random_encoding(generator).double(), training.random_encoding(generator).double()
    torch.testing.assert_close(one.T @ one, torch.eye(8, dtype=torch.float64), atol=1e-5, rtol=0)
    assert not torch.allclose(one, other, atol=1e-3)
    column = 0
    for space in training.spaces:
        assert values[column] == pytest.approx(values[column + space.columns - 1], abs=1e-4)
        for encoding in (one, training.encoding.double()):
            mine = encoding[:, column : column + space.columns]
            torch.testing.assert_close(space.basis @ (space.basis.T @ mine), mine, atol=1e-5, rtol=0)
        column += space.columns
    assert column == 8


def test_a_network_without_a_formula_is_refused() -> None:
    with pytest.raises(InvalidCheckpoint, match="cannot be meta-trained"):
        check_trainable(NiNoConfig(token_positions=True))
