"""What the service did with each parameter reaches the training: in the log once, and in the summary."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from nowcast_client import attach

from ...unit.specs.networks import Nano
from .harness import Server

TOKENS = torch.tensor([[1, 5, 3, 7, 2, 8]])


def _train(server: Server, predictor: str) -> dict:
    torch.manual_seed(0)
    model = Nano(modern=True, value_layers=(1,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with attach(
        model, optimizer, server.url, period=10, predictor=predictor, trial=False, wait=120, patch_bound=1e6
    ) as handle:
        for _ in range(21):
            loss = model(TOKENS).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        summary = handle.summary()
    assert summary["patched"] == 2, summary
    return summary


def test_the_table_is_there_after_the_first_step(server: Server, caplog) -> None:
    model = Nano(modern=True, value_layers=(1,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with (
        caplog.at_level(logging.INFO, logger="nowcast"),
        attach(model, optimizer, server.url, predictor="nino") as handle,
    ):
        assert handle.summary()["coverage"] is None  # it is traced from its first forward pass
        model(TOKENS).square().mean().backward()
        optimizer.step()
        assert handle.wait(60)
        assert handle.step == 1
        assert handle.summary()["coverage"]["parameters"] == {"graph": len(list(model.parameters()))}
        assert "coverage of family traced" in caplog.text


def test_coverage_is_logged_once_and_summed_up(server: Server, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="nowcast"):
        coverage = _train(server, "nino")["coverage"]
    parameters = dict(Nano(modern=True, value_layers=(1,)).named_parameters())
    assert coverage["parameters"] == {"graph": len(parameters)}
    assert coverage["elements"] == {"graph": sum(p.numel() for p in parameters.values())}
    assert coverage["outside"] == {}
    tables = [record.getMessage() for record in caplog.records if "coverage of family" in record.getMessage()]
    assert len(tables) == 1
    assert "coverage of family traced" in tables[0]
    assert "  proven  " in tables[0]


def test_a_predictor_without_a_graph_has_no_coverage(server: Server, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="nowcast"):
        assert _train(server, "linear")["coverage"] is None
    assert not [record for record in caplog.records if "coverage" in record.getMessage()]


def test_a_table_of_one_s_own_wires_every_parameter(server: Server, monkeypatch) -> None:
    examples = Path(__file__).resolve().parents[3] / "client" / "examples"
    monkeypatch.syspath_prepend(str(examples))
    from own_network import TABLE, Own

    model = Own()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with attach(model, optimizer, server.url, predictor="nino", table=TABLE) as handle:
        assert handle.wait(60)
        assert handle.summary()["coverage"]["parameters"] == {"graph": len(list(model.parameters()))}
