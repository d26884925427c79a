"""The service's benchmark runs, small, and its figures are there. How fast it is, is not for a test to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.socket, pytest.mark.slow]

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "bench_service.py"
SMALL = "--sizes 1 3 --repeats 1 --widths 8 16 4 --hidden 8"


def test_it_runs():
    done = subprocess.run([sys.executable, SCRIPT, *SMALL.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [way["over"] for way in found["streaming"]] == ["tcp", "unix"]
    for way in found["streaming"]:
        assert way["share_of_bare"] > 0
        # Nothing but the tensor itself and buffers of a fixed size, on either side.
        assert max(way["peak_beyond_one_tensor"].values()) < 64
    assert found["one_shot"]["parameters"] == 8 * 16 + 16 + 16 * 4 + 4
    assert found["one_shot"]["timings_of_last"]["compute"] > 0
