"""The benchmarks of the hook run, and their figures hold what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])


@pytest.mark.socket
def test_bench_integrations(url: str) -> None:
    import bench_integrations

    found = bench_integrations.bench(55, 40, ["plain"], wait=30.0, url=url)["plain"]
    assert (found["steps"], found["patched"], found["judged"]) == (55, 1, 1)
    assert 0.0 < found["waiting"] < found["cost"] < 1.0
    with pytest.raises(RuntimeError, match="no patch was judged"):
        bench_integrations.bench(30, 40, ["plain"], url=url)


@pytest.mark.socket
def test_bench_hook(url: str) -> None:
    import bench_hook

    found = bench_hook.measure("small", 12, 15, "linear", rounds=2, running=url)
    assert (found.steps, found.snapshots) == (12, 4)
    assert 0.0 < found.hook_idle < found.hook_snapshot < found.step
    assert found.hook_share > 0.0  # of these few steps; the first one's trace of the network is in it
    assert 0.0 < found.hook_share_200 < 1.0
    assert found.wall_ratio > 0.0
