"""More hidden units, the same function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nowcast_lab.metatrain.episodes import RefineConfig
from nowcast_lab.metatrain.recipes import Group, Recipe
from nowcast_lab.metatrain.refine import refine
from nowcast_lab.metatrain.widen import widen
from nowcast_lab.metatrain.zoo import Arch
from nowcast_proto.errors import InvalidCheckpoint
from nowcast_service.cli import build_app
from nowcast_service.history import History
from nowcast_service.nino.checkpoint import Checkpoint, load_checkpoint
from nowcast_service.predictors import make_predictor
from nowcast_service.predictors.base import ahead
from nowcast_service.weights.registry import resolve_checkpoint
from typer.testing import CliRunner

ARCHS = (
    Arch(kind="convnet", widths=(4, 6), norm=True, size=8),
    Arch(kind="llama", dim=16, layers=1, heads=4, kv_heads=2, vocabulary=20, context=8),
)


@pytest.fixture(scope="module")
def narrow() -> Checkpoint:
    return resolve_checkpoint("nowcast-h32")


def predicted(checkpoint: Checkpoint, arch: Arch, k: int) -> torch.Tensor:
    spec = arch.spec()
    torch.manual_seed(1)
    start = {p.name: 0.1 * torch.randn(p.shape) for p in spec.parameters}
    snapshots = [{n: w + 0.01 * i + 0.02 * torch.randn(w.shape) for n, w in start.items()} for i in range(5)]
    parameters, _ = ahead(make_predictor("nino", checkpoint), History.of(spec, snapshots), k, None)
    return torch.cat([(parameters[n] - snapshots[-1][n]).flatten() for n in start])


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.kind)
@pytest.mark.parametrize("hidden", [33, 64])
def test_it_computes_the_same(narrow: Checkpoint, arch: Arch, hidden: int) -> None:
    wide = widen(narrow, hidden)
    assert wide.config.hidden == hidden
    for k in (1, 20):
        one, two = predicted(narrow, arch, k), predicted(wide, arch, k)
        assert one.norm() > 0.1
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_new_units_learn(narrow: Checkpoint, tmp_path: Path) -> None:
    wide = widen(narrow, 40)
    group = Group(arch=Arch(kind="mlp", widths=(6,), channels=1, size=8), source="digits", models=2, batch=16)
    config = RefineConfig(updates=2, episodes=1, periods=(10,), nowcasts=(2, 3), warmup=1, average=0.5)
    refine(wide, Recipe(groups=(group,)), config, tmp_path)
    refined = load_checkpoint(tmp_path / "checkpoint.safetensors")
    name = "edge_out.fc.2.weight"
    assert not wide.state[name][:, 32:].any()
    assert refined.state[name][:, 32:].any()
    assert json.loads(refined.metadata["start_metadata"])["widened_from"] == narrow.digest


def test_a_network_that_is_not_narrower_is_refused(narrow: Checkpoint) -> None:
    with pytest.raises(InvalidCheckpoint, match="narrower than 32"):
        widen(narrow, 32)


def test_the_command_writes_it(narrow: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "wide.safetensors"
    arguments = ["metatrain", "widen", "--start", "nowcast-h32", "--hidden", "48", "--out", str(out)]
    result = CliRunner().invoke(build_app(), arguments)
    assert result.exit_code == 0, result.output
    written = load_checkpoint(out)
    assert result.stdout.strip() == written.digest == widen(narrow, 48).digest
    assert json.loads(written.metadata["start_metadata"]) == dict(narrow.metadata)
