"""Frameworks hand on the losses on held-out data that they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nowcast_client.handle import Handle
from torch.utils.data import DataLoader

from .test_frameworks import SETTINGS, Rows, data, fit, module, trainer

pytestmark = pytest.mark.socket


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Step and loss of every held-out loss that a handle is told."""
    losses: list[tuple[int, float]] = []
    observe = Handle.observe

    def note(handle: Handle, loss: Any, **kwargs: Any) -> None:
        if kwargs.get("split") == "validation":
            losses.append((handle.step, float(loss)))
        observe(handle, loss, **kwargs)

    monkeypatch.setattr(Handle, "observe", note)
    return losses


def test_a_trainer_s_evaluations(url: str, tmp_path: Path, told: list[tuple[int, float]]) -> None:
    from nowcast_client.integrations.huggingface import add_nowcast
    from transformers.trainer_utils import IntervalStrategy

    made = trainer(tmp_path, 10, eval_steps=5)
    made.eval_dataset, made.args.eval_strategy = Rows(4), IntervalStrategy.STEPS
    add_nowcast(made, url, **SETTINGS)
    made.train()
    logged = [(entry["step"], entry["eval_loss"]) for entry in made.state.log_history if "eval_loss" in entry]
    assert [step for step, _ in logged] == [5, 10]
    assert told == logged


def test_a_lightning_module_s_validation(
    url: str, tmp_path: Path, told: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nowcast_client.integrations.lightning import NowcastCallback

    made = module()

    def validation_step(batch: Any, batch_idx: int) -> None:
        made.log("val_loss", made.training_step(batch, batch_idx).detach())

    made.validation_step = validation_step
    loader = DataLoader(data(64), 32)
    monkeypatch.setattr(made, "val_dataloader", lambda: loader, raising=False)
    fit(tmp_path, made, NowcastCallback(url, **SETTINGS), 10, val_check_interval=4, num_sanity_val_steps=1)
    assert [step for step, _ in told] == [4, 8]
