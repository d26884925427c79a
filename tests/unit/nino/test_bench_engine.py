"""The engine's benchmarks run, on the smallest of their models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "bench_engine.py"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


def call(name: str, *args: object, **kwargs: object) -> dict:  # type: ignore[type-arg]
    command = [sys.executable, str(BENCH), "--call", json.dumps([name, args, kwargs])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_engine_against_its_floor() -> None:
    result = call("run_engine", "gpt2-24x2-1k", 1, share=0.5)
    assert result["edges"] > 60_000
    assert result["compiled ratio"] > 1  # the floor is a part of the work
    assert result["memory"] > 4 * result["parameters"]
    assert len(result["all floors"]) == 2


def test_error_of_bf16_products() -> None:
    rows = call("part_e", 1, ["gpt2-24x2-1k"])["rows"]
    assert all(1e-6 < row["k=40"] < 5e-2 for row in rows)
