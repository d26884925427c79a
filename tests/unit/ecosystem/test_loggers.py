"""Adapters to loggers, against the real packages writing to files; the line in a terminal; the summary."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import struct
import sys
from pathlib import Path

import pytest
import torch
from nowcast_client.loggers import ProgressLine, describe, to_all, to_logging, to_mlflow, to_tensorboard, to_wandb

from .loops import Watched, digits, network, steps


def trained(metrics: object = None, on_event: object = None) -> Watched:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watched = Watched(model, optimizer, metrics=metrics, on_event=on_event)
    steps(45, model, optimizer, digits())
    assert watched.steps("patched") == [20, 40]
    watched.handle.close()
    return watched


def test_stdlib_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nowcast.metrics"):
        trained(to_logging())
    lines = [record.getMessage() for record in caplog.records if record.name == "nowcast.metrics"]
    assert sum("step 20" in line and "nowcast/patched=1" in line for line in lines) == 1


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    trained(to_tensorboard(writer))
    writer.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(row.step, row.value) for row in found.Scalars("nowcast/patched")] == [(20, 1.0), (40, 1.0)]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("nowcast")
    with mlflow.start_run() as run:
        trained(to_mlflow(mlflow))
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "nowcast/patched")
    assert [(row.step, row.value) for row in history] == [(20, 1.0), (40, 1.0)]


def history(path: Path) -> list[dict[str, float]]:
    """The rows of a run's history, read from the file an offline run leaves: a log in LevelDB's format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := -at % 32768) < 7:  # the rest of a block that holds no header any more
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    run = wandb.init(mode="offline", project="nowcast", dir=str(tmp_path), settings=wandb.Settings(silent=True))
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watched = Watched(model, optimizer, metrics=to_wandb(run))
    for epoch in (1, 2, 3):  # the training loop's own axis is far behind the optimizer's step
        steps(20, model, optimizer, digits())
        run.log({"loss": 4.0 - epoch}, step=epoch)
        assert run.step == epoch
    watched.handle.close()
    run.finish()
    wandb.teardown()  # what is still on its way to the file arrives
    rows = history(next(tmp_path.rglob("*.wandb")))
    assert [row["loss"] for row in rows if "loss" in row] == [3, 2, 1]
    assert [row["nowcast/step"] for row in rows if "nowcast/patched" in row] == [20, 40, 60]


def test_wandb_counts_the_events_that_share_a_row() -> None:
    class Run:
        """A run whose owner never logs: one row, open to the end."""

        def __init__(self) -> None:
            self.step, self.row = 0, {}

        def define_metric(self, *_: object, **__: object) -> None: ...

        def log(self, data: dict[str, float], *, commit: bool) -> None:
            assert not commit
            self.row |= data

    run = Run()
    trained(to_wandb(run))
    assert run.row["nowcast/patched"] == 2.0
    assert run.row["nowcast/step"] == 40


def test_several_at_once() -> None:
    one: list[int] = []
    other: list[int] = []
    trained(to_all(lambda numbers, step: one.append(step), lambda numbers, step: other.append(step)))
    assert one == other
    assert set(one) == {20, 40}


def test_the_line_is_drawn_only_in_a_terminal() -> None:
    file = io.StringIO()
    trained(on_event=ProgressLine(file))
    assert file.getvalue() == ""
    reading, writing = pty.openpty()
    with os.fdopen(writing, "w") as terminal:
        line = ProgressLine(terminal)
        trained(on_event=line)
        line.close()
        drawn = b""
        while not drawn.endswith(b"\n"):  # a terminal hands over what it has so far
            drawn += os.read(reading, 1 << 16)
    os.close(reading)
    assert "step 40  patched  (2 patched)" in drawn.decode()


def test_the_summary_says_what_happened() -> None:
    told = describe(trained().handle.summary())
    assert "over 45 steps: 2 nowcasts of 2 asked for; 2 patches" in told
    assert "s taken from the trainer" in told


def test_no_logger_is_imported_for_its_adapter() -> None:
    import subprocess

    script = (
        "import sys, nowcast_client.loggers\nassert not {'wandb', 'mlflow', 'tensorboard', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
