"""Collect, train, refine and evaluate, small: the commands a user types, on data every machine has."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nowcast_service.cli import build_app
from nowcast_service.nino.checkpoint import load_checkpoint
from typer.testing import CliRunner, Result


def nowcast(*args: str) -> Result:
    result = CliRunner().invoke(build_app(), list(args))
    assert result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.mark.slow
def test_collect_train_refine_evaluate(tmp_path: Path) -> None:
    trajectories, trained = str(tmp_path / "trajectories"), tmp_path / "trained"
    nowcast("metatrain", "collect", "--out", trajectories, "--recipe", "smoke", "--threads", "1")
    nowcast("metatrain", "verify", "--trajectories", trajectories)
    train = ("metatrain", "train", "--trajectories", trajectories, "--out", str(trained), "--hidden", "8")
    train += ("--steps", "40", "--per-batch", "2", "--strides", "8", "40", "--lr", "0.01", "--threads", "1")
    answer = json.loads(nowcast(*train).stdout)
    # Better than standing still, on trajectories it was not trained on, after forty steps.
    assert answer["validation"]["all"] < 0.99
    checkpoint = load_checkpoint(answer["checkpoint"])
    assert checkpoint.config.hidden == 8
    assert checkpoint.metadata["step"] == "40"

    recipe = tmp_path / "recipe.json"
    group = {"arch": {"kind": "mlp", "widths": [12], "channels": 1, "size": 8}, "source": "digits", "models": 2}
    recipe.write_text(json.dumps({"groups": [group]}))
    refine = ("metatrain", "refine", "--start", answer["checkpoint"], "--recipe", str(recipe), "--updates", "3")
    refine += ("--episodes", "1", "--out", str(tmp_path / "refined"), "--threads", "1")
    refined = json.loads(nowcast(*refine).stdout)
    assert set(refined["last"]) == {"pairs/mlp", "gradients/mlp"}
    assert load_checkpoint(refined["checkpoint"]).metadata["start"] == checkpoint.digest

    arms = tmp_path / "arms.json"
    nino = {"predictor": "nino", "checkpoint": refined["checkpoint"], "lr": 3e-3, "period": 50}
    arms.write_text(json.dumps([{"lr": [1e-3, 3e-3]}, nino, {"predictor": "lawa", "lr": 3e-3, "period": 50}]))
    out, report = tmp_path / "runs.jsonl", tmp_path / "report.md"
    evaluate = ("evaluate", "--out", str(out), "--task", "digits-mlp", "--arms", str(arms), "--seeds", "2")
    evaluate += ("--steps", "120", "--threads", "1")
    nowcast(*evaluate, "--report", str(report))
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(runs) == 8
    for run in runs:
        assert run["nowcasts"] == run["kept"] == (0 if "predictor" not in run["arm"] else 2)
        assert run["curve"][-1][1] == run["final"] < run["curve"][0][1]  # every arm learns something
    assert (tmp_path / "report-digits-mlp-120.png").stat().st_size > 5000
    table = report.read_text()
    assert table.count("\n| ") == 5
    assert "**strongest**" in table

    before = out.read_bytes()
    nowcast(*evaluate)
    assert out.read_bytes() == before  # nothing is run twice


@pytest.mark.socket
def test_an_evaluation_through_a_server_ends_where_a_local_one_does(tmp_path: Path) -> None:
    """The same run with nowcasts from this process and from a real server: the wire changes nothing but the time."""
    port_file = tmp_path / "url"
    command = [sys.executable, "-m", "nowcast_service.cli", "serve", "--port", "0", "--port-file", str(port_file)]
    arms = tmp_path / "arms.json"
    arms.write_text(json.dumps([{"predictor": "linear", "lr": 3e-3, "period": 20}]))
    common = (
        "evaluate",
        "--task",
        "digits-mlp",
        "--arms",
        str(arms),
        "--seeds",
        "1",
        "--steps",
        "60",
        "--threads",
        "1",
    )
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
        try:
            deadline = time.monotonic() + 90
            while not (port_file.exists() and port_file.read_text().strip()):
                assert server.poll() is None, (tmp_path / "server.log").read_text()
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.1)
            url = port_file.read_text().strip()
            nowcast(*common, "--out", str(tmp_path / "remote.jsonl"), "--url", url)
        finally:
            server.terminate()
            server.wait(30)
    nowcast(*common, "--out", str(tmp_path / "local.jsonl"))
    remote, local = (json.loads((tmp_path / f"{name}.jsonl").read_text()) for name in ("remote", "local"))
    assert remote["nowcasts"] == local["nowcasts"] == 3
    assert [point[:2] for point in remote["curve"]] == [point[:2] for point in local["curve"]]
    assert remote["nowcast_seconds"] > 0
    assert remote["key"] != local["key"]
