"""What nowcasts are written on without being asked to, and what is only watched."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from nowcast_client import attach
from nowcast_client.loop.evidence import unproven
from schedulefree import AdamWScheduleFree
from torch import nn

MATRIX = [nn.Parameter(torch.zeros(3, 3))]


class AdamW8bit(torch.optim.Optimizer):
    """As libraries name theirs, derived from nothing known."""


class Mine(torch.optim.AdamW):
    """As people derive theirs."""


class MuonWithAuxAdam(torch.optim.Optimizer):
    """As its author names it: half of it is Adam."""


@pytest.mark.parametrize(
    "optimizers",
    [
        [torch.optim.AdamW(MATRIX)],
        [torch.optim.SGD(MATRIX), torch.optim.NAdam(MATRIX)],
        [AdamW8bit(MATRIX, {})],
        [Mine(MATRIX)],
    ],
)
def test_nowcasts_are_on_where_they_gained(optimizers: list[object]) -> None:
    assert unproven(optimizers) == ""


@pytest.mark.parametrize(
    ("optimizers", "why"),
    [
        ([torch.optim.AdamW(MATRIX), torch.optim.Muon(MATRIX)], "is Muon:.*did harm"),
        ([MuonWithAuxAdam(MATRIX, {})], "is MuonWithAuxAdam:.*did harm"),
        ([AdamWScheduleFree(MATRIX)], "is AdamWScheduleFree:.*no gain"),
        ([torch.optim.RMSprop(MATRIX)], "is RMSprop:.*no gain"),
    ],
)
def test_they_are_watched_where_nothing_speaks_for_them(optimizers: list[object], why: str) -> None:
    assert re.search(why, unproven(optimizers))


@pytest.mark.parametrize(("mode", "expected"), [(None, "shadow"), ("on", "on")])
def test_attach_watches_on_muon_and_says_so_unless_told(
    mode: str | None, expected: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOWCAST_MODE", raising=False)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    optimizer = torch.optim.Muon(model.parameters())
    with (
        caplog.at_level(logging.WARNING),
        attach(model, optimizer, "http://127.0.0.1:9", total_steps=1000, mode=mode) as handle,  # type: ignore[arg-type]
    ):
        assert handle.mode == expected
    told = [record.message for record in caplog.records if "the optimizer is Muon" in record.message]
    assert len(told) == (mode is None)
