"""DDP and FSDP2 on real processes, against a real service: all ranks patch in the same step, or none does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nowcast_client import TrialSettings, attach
from nowcast_client.errors import AttachError
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from . import ranks

pytestmark = pytest.mark.socket
KINDS = ("ddp", "fsdp2")


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model


def trained(rank: int, kind: str, url: str, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """A training; returns what happened and the weights around the first patch."""
    model = wrapped(kind, ranks.network())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    events: list[tuple[str, int]] = []
    around: dict[str, Any] = {}

    def note(event: Any) -> None:
        events.append((event.kind, event.step))
        if event.kind == "patched" and "after" not in around:
            around["after"] = ranks.whole(model)

    data = ranks.batches(rank)
    with attach(model, optimizer, url, on_event=note, **{**ranks.SETTINGS, **settings}) as handle:
        for _ in range(steps):
            ranks.step(model, optimizer, data, handle)
        summary = handle.summary()
    told = {k: v for k, v in summary.items() if isinstance(v, int | float)}
    return {"events": events, "summary": told, "weights": ranks.whole(model), **around}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_patch_in_the_same_step(kind: str, size: int, url: str, tmp_path: Path) -> None:
    results = ranks.run(trained, size, tmp_path / "ranks", kind, url, 45, {"trial": False})
    for result in results:
        assert [(k, s) for k, s in result["events"] if k == "patched"] == [("patched", 20), ("patched", 40)]
    first = results[0]["weights"]
    for result in results[1:]:
        assert all(torch.equal(first[name], weight) for name, weight in result["weights"].items())
    # One rank speaks: the others have sent nothing.
    assert results[0]["summary"]["bytes_sent"] > 0
    assert all(result["summary"]["bytes_sent"] == 0 for result in results[1:])


def traced(
    rank: int,
    kind: str,
    url: str,
    steps: int,
    settings: dict[str, Any],
    fault: str = "",
    same: bool = False,
) -> dict[str, Any]:
    """A training that keeps the weights from before and after every step the hook acts on."""
    import nowcast_client.distributed as module
    from nowcast_client.errors import PatchRefused

    model: nn.Module = ranks.network()
    if kind != "alone":
        model = wrapped(kind, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-9 if same else 2e-2, momentum=0.0 if same else 0.9)
    events: list[tuple[str, int, str]] = []
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    settings = {**ranks.SETTINGS, **settings, "acts": "when_told"}
    original = module.apply

    def failing(*arguments: Any, **named: Any) -> None:
        raise PatchRefused("injected: the write failed")

    def full(*arguments: Any, **named: Any) -> None:
        raise MemoryError("injected: no room for the backup")

    with attach(
        model,
        optimizer,
        url,
        on_event=lambda e: events.append((e.kind, e.step, str(e.detail.get("reason", "")))),
        **settings,
    ) as handle:
        saving = handle._save
        data = ranks.batches(rank, same)
        for number in range(1, steps + 1):
            loss = ranks.step(model, optimizer, data, exact=same)
            bad = fault == "loss" and rank == 1 and any(kind == "patched" for kind, *_ in events)
            handle.observe(loss + (100.0 if bad else 0.0), step=number - 1)
            if number % 10 == 0 or number in (23, 26):
                before[str(number)] = ranks.whole(model)
            if rank == 1 and number == 20:
                if fault == "write":
                    module.apply = failing
                elif fault == "stage":
                    handle._save = full
            gathered = fault == "unsharded" and number == 20
            if gathered:
                for part in model.modules():
                    if hasattr(part, "unshard"):
                        part.unshard()
            handle.act()
            if gathered:
                for part in model.modules():
                    if hasattr(part, "reshard"):
                        part.reshard()
            module.apply, handle._save = original, saving
            if number % 10 == 0 or number in (23, 26):
                after[str(number)] = ranks.whole(model)
    return {"events": events, "before": before, "after": after}


def kinds(result: dict[str, Any], *wanted: str) -> list[tuple[str, int]]:
    return [(kind, step) for kind, step, _ in result["events"] if kind in wanted]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_sharded_nowcast_is_the_unsharded_one_bit_for_bit(size: int, url: str, tmp_path: Path) -> None:
    """Same batches on every rank and steps without rounding, so that both trainings are the same until the patch."""
    alone = traced(0, "alone", url, 20, {"trial": False}, same=True)
    sharded = ranks.run(traced, size, tmp_path / "ranks", "fsdp2", url, 20, {"trial": False}, "", True)
    for result in sharded:
        assert kinds(result, "patched") == kinds(alone, "patched") == [("patched", 20)]
        assert equal(result["before"]["20"], alone["before"]["20"])
        assert equal(result["after"]["20"], alone["after"]["20"])
    assert not equal(alone["before"]["20"], alone["after"]["20"])


@pytest.mark.parametrize("fault", ["stage", "write"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_fails_stops_the_patch_on_all(kind: str, fault: str, url: str, tmp_path: Path) -> None:
    results = ranks.run(traced, 2, tmp_path / "ranks", kind, url, 40, {"trial": False}, fault)
    for result in results:
        assert kinds(result, "patched", "rejected") == [("rejected", 20), ("patched", 40)]
        assert equal(result["before"]["20"], result["after"]["20"])
        assert equal(result["after"]["40"], results[0]["after"]["40"])
    assert "injected" in next(reason for kind, _, reason in results[1]["events"] if kind == "rejected")


def test_a_gathered_model_is_left_alone(url: str, tmp_path: Path) -> None:
    """While FSDP shows whole tensors they are no place to write to: whatever is written is lost at the next reshard."""
    results = ranks.run(traced, 2, tmp_path / "ranks", "fsdp2", url, 60, {"trial": False}, "unsharded")
    for result in results:
        assert kinds(result, "patched", "off") == [("patched", 40), ("patched", 60)]
        assert any(step == 20 and "not sharded" in reason for _, step, reason in result["events"])
        assert equal(result["before"]["20"], result["after"]["20"])


@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_come_to_the_same_verdict(kind: str, url: str, tmp_path: Path) -> None:
    """One rank alone sees the loss rise: the patch is undone on both, bit for bit, in the same step."""
    settings = {"trial": TrialSettings(window=6, reference=15)}
    results = ranks.run(traced, 2, tmp_path / "ranks", kind, url, 30, settings, "loss")
    for result in results:
        assert kinds(result, "patched", "kept", "rolled_back") == [("patched", 20), ("rolled_back", 26)]
        assert not equal(result["before"]["26"], result["after"]["26"])
        assert equal(result["after"]["26"], result["before"]["20"])


def off(rank: int, url: str) -> dict[str, Any]:
    model = wrapped("fsdp2", ranks.network())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with attach(model, optimizer, url, mode="off") as handle:
        ranks.step(model, optimizer, ranks.batches(rank), handle)
        return {"mode": handle.mode, "steps": handle.step}


def test_off_leaves_sharded_trainings_alone_too(url: str, tmp_path: Path) -> None:
    assert ranks.run(off, 2, tmp_path / "ranks", url) == [{"mode": "off", "steps": 0}] * 2


def absent(rank: int, url: str) -> dict[str, Any]:
    """Rank 1 detaches early and tells nobody."""
    import nowcast_client.distributed as module

    module.PATIENCE = 3.0
    model = wrapped("ddp", ranks.network())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    handle = attach(model, optimizer, url, period=20, trial=False)
    data = ranks.batches(rank)
    begun = time.monotonic()
    for number in range(1, 46):
        ranks.step(model, optimizer, data, handle)
        if rank == 1 and number == 10:
            handle._closed = True
    return {"mode": handle.mode, "seconds": time.monotonic() - begun, "hook": handle.summary()["hook_seconds"]}


def test_no_rank_can_hang_another(url: str, tmp_path: Path) -> None:
    here, _ = ranks.run(absent, 2, tmp_path / "ranks", url)
    assert here["mode"] == "off"
    assert here["hook"] < 30.0  # three seconds of patience; without it, for ever


def disagreeing(rank: int, url: str, how: str) -> str:
    import nowcast_client.distributed as module

    if how == "missing":  # else a rank that is only late would be taken for one that never comes
        module.PATIENCE = 3.0
    model = wrapped("ddp", ranks.network())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    if how == "refused" and rank == 1:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=1e-2)
    try:
        if how == "missing" and rank == 1:
            time.sleep(6.0)
            return "never came"
        attach(model, optimizer, url, period=20 + 5 * (how == "period" and rank == 1), trial=False)
    except AttachError as exc:
        return str(exc)
    finally:
        dist.barrier()
    return "attached"


@pytest.mark.parametrize(
    ("how", "first", "second"),
    [
        ("refused", "another rank could not attach", "holds none"),
        ("period", "set up differently", "set up differently"),
        ("missing", "not all 2 ranks", "never came"),
    ],
)
def test_all_ranks_attach_or_none(how: str, first: str, second: str, url: str, tmp_path: Path) -> None:
    results = ranks.run(disagreeing, 2, tmp_path / "ranks", url, how)
    assert first in results[0]
    assert second in results[1]
