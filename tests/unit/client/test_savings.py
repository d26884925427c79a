"""Steps saved, measured against a run alone; and a training that really jumps ahead."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from nowcast_client.errors import AttachError
from nowcast_client.loggers import describe
from nowcast_client.loop.savings import SMOOTHED, Baseline

from ..ecosystem.loops import Watched, digits, network, step


def test_a_run_alone_is_measured_where_its_losses_come_to_the_same_level(tmp_path: Path) -> None:
    losses = [4.0 - 1e-3 * step for step in range(2000)]
    steps = np.arange(900, 900 + SMOOTHED, dtype=float)
    newest = 4.0 - 1e-3 * (steps + 300)
    (tmp_path / "alone.json").write_text(json.dumps(losses))
    (tmp_path / "alone.csv").write_text("step,loss\n" + "\n".join(f"{i},{loss}" for i, loss in enumerate(losses)))
    for baseline in (losses, tmp_path / "alone.json", str(tmp_path / "alone.csv")):
        assert Baseline(baseline).saved(steps, newest) == pytest.approx(300, abs=1)
    assert Baseline(losses).saved(steps, newest - 2.0) is None
    assert Baseline(losses).saved(steps[:5], newest[:5]) is None


@pytest.mark.parametrize("baseline", [[], [1.0] * 10, "nowhere.csv", ["a"] * 99])
def test_what_is_no_baseline_is_refused(baseline: object) -> None:
    model = network()
    with pytest.raises(AttachError, match="baseline"):
        Watched(model, torch.optim.SGD(model.parameters(), lr=0.1)).handle.summary(baseline)  # type: ignore[arg-type]


def test_a_training_that_jumps_ahead_says_by_how_much(tmp_path: Path) -> None:
    """The nowcast is where the training alone really came to, 150 steps later."""
    jump, steps = 150, 400
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-2)
    data, losses, states = digits(256), [], []
    for _ in range(steps + jump):
        losses.append(step(model, optimizer, data))
        states.append({name: p.detach().numpy().copy() for name, p in model.named_parameters()})
    (tmp_path / "alone.json").write_text(json.dumps(losses))

    def oracle(history: Sequence[Mapping[str, np.ndarray]], k: int) -> Mapping[str, np.ndarray]:
        return {name: states[200 + jump - 1][name] - old for name, old in history[-1].items()}

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-2)
    watched = Watched(model, optimizer, oracle, period=200, trial=True, patch_bound=1e6)
    data = digits(256)
    for _ in range(steps - 1):
        step(model, optimizer, data, watched.handle)
    assert watched.steps("kept") == [250]
    summary = watched.handle.summary(baseline=tmp_path / "alone.json")
    assert summary["steps_saved"] == pytest.approx(jump, abs=25)
    told = describe(summary)
    assert f"saved {summary['steps_saved']} steps, " in told
