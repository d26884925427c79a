"""The network half-way between two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nowcast_lab.metatrain.average import average
from nowcast_lab.metatrain.widen import widen
from nowcast_proto.errors import InvalidCheckpoint
from nowcast_service.cli import build_app
from nowcast_service.nino.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from nowcast_service.weights.registry import resolve_checkpoint
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def before() -> Checkpoint:
    return resolve_checkpoint("nowcast-h32")


@pytest.fixture(scope="module")
def after(before: Checkpoint) -> Checkpoint:
    state = {name: tensor + torch.randn_like(tensor) for name, tensor in before.state.items()}
    return Checkpoint.of(before.config, state, metadata={"start": before.digest})


def test_every_weight_lies_half_way_and_the_history_is_told(before: Checkpoint, after: Checkpoint) -> None:
    middle = average(before, after)
    for name, tensor in middle.state.items():
        torch.testing.assert_close(tensor - before.state[name], after.state[name] - tensor)
    assert json.loads(middle.metadata["average_of"]) == [before.digest, after.digest]
    assert json.loads(middle.metadata["start_metadata"]) == {"start": before.digest}


def test_networks_of_different_width_have_no_average(before: Checkpoint) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"different configs.*widen the narrower one"):
        average(before, widen(before, 48))


def test_the_command_writes_it(before: Checkpoint, after: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "after.safetensors", after)
    out = tmp_path / "middle.safetensors"
    arguments = ["metatrain", "average", "--before", "nowcast-h32", "--after", str(tmp_path / "after.safetensors")]
    result = CliRunner().invoke(build_app(), [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == load_checkpoint(out).digest == average(before, after).digest
