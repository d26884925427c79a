"""Every example runs as its reader would run it, against a real service, and nowcasts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[3] / "client" / "examples"
SHORT = {
    "plain_digits": (60, 30),
    "accelerate_digits": (60, 30),
    "lightning_digits": (60, 30),
    "huggingface_text": (60, 30),
    "own_network": (60, 30),
    "ddp_digits": (60, 30),
    "fsdp2_digits": (60, 30),
}
"""Example -> steps and period, enough for a nowcast and its verdict."""


def test_all_examples_are_run() -> None:
    told = {
        path.stem for path in EXAMPLES.glob("*.py") if f"Run: python client/examples/{path.name}" in path.read_text()
    }
    assert set(SHORT) == told


@pytest.mark.socket
@pytest.mark.parametrize("name", sorted(SHORT))
def test_example(name: str, url: str, tmp_path: Path) -> None:
    steps, period = SHORT[name]
    done = subprocess.run(
        [
            sys.executable,
            str(EXAMPLES / f"{name}.py"),
            "--url",
            url,
            "--steps",
            str(steps),
            "--period",
            str(period),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = re.search(r"over (\d+) steps: (\d+) nowcasts of (\d+) asked for; (\d+) patches", done.stderr)
    assert told, done.stderr[-2000:]
    counted, arrived, asked, patched = map(int, told.groups())
    assert counted == steps
    assert arrived == asked >= 1
    assert patched >= 1
