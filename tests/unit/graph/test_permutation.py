"""The permutation experiment of NiNo paper, appendix A.6, run small."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[2] / "bench" / "permutation.py"
    found = importlib.util.spec_from_file_location("permutation_bench", path)
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


def test_our_graph_tells_the_permutations_apart_and_a_naive_one_does_not(bench, tmp_path):
    outcomes = bench.experiment(repeats=4)
    kept = [outcome for outcome in outcomes if outcome.function < 1e-9]
    broken = [outcome for outcome in outcomes if outcome.function > 1e-2]
    assert {outcome.kind for outcome in kept} == {"whole heads", "q and k inside heads", "v inside heads"}
    assert len(kept) + len(broken) == len(outcomes)
    assert max(outcome.ours for outcome in kept) < 1e-10
    assert min(outcome.ours for outcome in broken) > 1e-6
    assert max(outcome.naive for outcome in outcomes) < 1e-10  # blind to all of them
    apart = bench.told_apart(outcomes)
    assert apart["ours"] == 1.0
    assert apart["naive"] < 0.8
    bench.plot(outcomes, tmp_path / "permutation.png")
    assert imread(tmp_path / "permutation.png").std() > 0.05
