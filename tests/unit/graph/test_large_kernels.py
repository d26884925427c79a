"""The benchmark of large kernels, small: what each of its arms puts into the graph."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "large_kernels.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("large_kernels", SCRIPT)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["large_kernels"] = module
    spec.loader.exec_module(module)
    return module


def test_arms_differ_in_what_is_in_the_graph(bench):
    def share(network: str, arm: str) -> float:
        graph = bench.graph_of(bench.NETWORKS[network](), arm)
        return sum(block.n_edges * block.features for block, _ in graph.weighted()) / graph.spec.numel

    assert share("lenet", "left") < share("lenet", "kernels") < share("lenet", "split") == 1
    assert (
        share("conv5", "left") < share("conv5", "kernels") == share("conv5", "split") == share("conv5", "single") == 1
    )
