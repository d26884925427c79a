"""DDP and FSDP2 on real processes, against a real service: all ranks patch in the same step, or none does."""

from __future__ import annotations

import time
from collections.abc import Callable
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
    import nowcast_client.loop.patching as module
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
        patcher = handle._nowcasting.patcher
        saving = patcher.save
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
                    patcher.save = full
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
            module.apply, patcher.save = original, saving
            if number % 10 == 0 or number in (23, 26):
                after[str(number)] = ranks.whole(model)
    return {"events": events, "before": before, "after": after}


class Inside(nn.Module):
    """A module of the user's: torch's own containers are not compiled by themselves."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def cornered(rank: int, kind: str, url: str, corner: str) -> dict[str, Any]:
    """45 steps in one of the corners where distribution matters; returns patches, what went out, and the weights."""
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model = inner = ranks.network()
    if corner == "compiled":
        torch._dynamo.reset()
        inner = Inside(inner)
        model = torch.compile(inner, backend=backend)
    if kind == "ddp":
        trained = model = wrapped(kind, model)
    else:
        trained = wrapped(kind, inner)
    names = dict(trained.named_parameters())
    halves = [[p for n, p in names.items() if (".0." in f".{n}") == first] for first in (True, False)]
    made = [list(names.values())] if corner != "optimizers" else halves
    # Fused optimizers are called even where gradient scaling skips the step: found_inf tells.
    optimizers = [torch.optim.AdamW(part, lr=2e-3, fused=corner == "accumulated") for part in made]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10_000)
    patches: list[int] = []
    settings = {**ranks.SETTINGS, "trial": False, **({"wait": 0.0} if corner == "beside" else {})}

    def attached() -> Any:
        def note(event: Any) -> None:
            patches.extend([event.step] if event.kind == "patched" else [])

        return attach(model, optimizers if corner == "optimizers" else optimizers[0], url, on_event=note, **settings)

    handle = attached()
    data = ranks.batches(rank)
    number = graphs_at_first_patch = 0
    while handle.step < 45:
        number += 1
        for optimizer in optimizers:
            optimizer.zero_grad()
        for _ in range(2 if corner == "accumulated" else 1):
            x, y = next(data)
            loss = nn.functional.cross_entropy(model(x), y)
            spoilt = corner == "accumulated" and number in (3, 11) and rank == 1
            scaler.scale(loss * (float("inf") if spoilt else 1.0)).backward()
        handle.observe(loss)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        if corner == "beside":
            handle.wait(30)  # the nowcast is there at the next look, whatever the machine is doing
        if corner == "resumed" and handle.step == 10:
            saved = handle.state_dict()
            handle.wait(30)
            # The run ends here and the service keeps what it holds; another handle goes on.
            handle._nowcasting.windows.uploader = None
            handle.close()
            handle = attached()
            handle.load_state_dict(saved)
        graphs_at_first_patch = graphs_at_first_patch or (graphs if patches else 0)
    summary = handle.summary()
    handle.close()
    return {
        "patches": patches,
        "made": number,
        "graphs": [graphs_at_first_patch, graphs],
        "counts": {name: summary[name] for name in ("snapshots", "arrived", "rejected")},
        "failed": summary["failed"],
        "weights": ranks.whole(trained),
    }


def off(rank: int, url: str) -> dict[str, Any]:
    model = wrapped("fsdp2", ranks.network())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with attach(model, optimizer, url, mode="off") as handle:
        ranks.step(model, optimizer, ranks.batches(rank), handle)
        return {"mode": handle.mode, "steps": handle.step}


def absent(rank: int, url: str) -> dict[str, Any]:
    """Rank 1 detaches early and tells nobody."""
    import nowcast_client.ranks.channel as module

    patience, module.PATIENCE = module.PATIENCE, 3.0
    model = wrapped("ddp", ranks.network())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    handle = attach(model, optimizer, url, period=20, trial=False)
    module.PATIENCE = patience
    data = ranks.batches(rank)
    begun = time.monotonic()
    for number in range(1, 46):
        ranks.step(model, optimizer, data, handle)
        if rank == 1 and number == 10:
            handle._hooks.remove()
    return {"mode": handle.mode, "seconds": time.monotonic() - begun, "hook": handle.summary()["hook_seconds"]}


def disagreeing(rank: int, url: str, how: str) -> str:
    import nowcast_client.ranks.channel as module

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


CORNERS = ("beside", "accumulated", "optimizers", "resumed", "compiled")
VERDICT = {"trial": TrialSettings(window=6, reference=15)}
UNJUDGED = {"trial": False}


def jobs(kind: str, size: int, url: str) -> dict[str, ranks.Job]:
    """What the ranks of one start run, one after another; what breaks the ranks apart comes last."""
    if kind == "apart":
        return {"absent": (absent, (url,)), "missing": (disagreeing, (url, "missing"))}
    found: dict[str, ranks.Job] = {}
    if size > 1:
        found["trained"] = (trained, (kind, url, 45, UNJUDGED))
    if kind == "fsdp2":
        found["same"] = (traced, (kind, url, 20, UNJUDGED, "", True))
    if size == 2:
        found |= {fault: (traced, (kind, url, 40, UNJUDGED, fault)) for fault in ("stage", "write")}
        found["loss"] = (traced, (kind, url, 30, VERDICT, "loss"))
        found |= {corner: (cornered, (kind, url, corner)) for corner in CORNERS}
        if kind == "fsdp2":
            found |= {"unsharded": (traced, (kind, url, 60, UNJUDGED, "unsharded")), "off": (off, (url,))}
        else:
            found |= {how: (disagreeing, (url, how)) for how in ("refused", "period")}
    return found


@pytest.fixture(scope="module")
def results(url: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, str], list[Any]]:
    """What a job returned on every rank, by kind, number of ranks and job; each set of ranks is started once."""
    ran: dict[tuple[str, int], dict[str, list[Any]]] = {}

    def look_up(kind: str, size: int, name: str) -> list[Any]:
        if (kind, size) not in ran:
            ran[kind, size] = ranks.run(jobs(kind, size, url), size, tmp_path_factory.mktemp(f"{kind}{size}"))
        return ranks.of(ran[kind, size], name)

    return look_up


Results = Callable[[str, int, str], list[Any]]


def kinds(result: dict[str, Any], *wanted: str) -> list[tuple[str, int]]:
    return [(kind, step) for kind, step, _ in result["events"] if kind in wanted]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_patch_in_the_same_step(kind: str, size: int, results: Results) -> None:
    found = results(kind, size, "trained")
    for result in found:
        assert [(k, s) for k, s in result["events"] if k == "patched"] == [("patched", 20), ("patched", 40)]
        assert equal(found[0]["weights"], result["weights"])
    # One rank speaks: the others have sent nothing.
    assert found[0]["summary"]["bytes_sent"] > 0
    assert all(result["summary"]["bytes_sent"] == 0 for result in found[1:])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_sharded_nowcast_is_the_unsharded_one_bit_for_bit(size: int, url: str, results: Results) -> None:
    """Same batches on every rank and steps without rounding, so that both trainings are the same until the patch."""
    alone = traced(0, "alone", url, 20, UNJUDGED, same=True)
    for result in results("fsdp2", size, "same"):
        assert kinds(result, "patched") == kinds(alone, "patched") == [("patched", 20)]
        assert equal(result["before"]["20"], alone["before"]["20"])
        assert equal(result["after"]["20"], alone["after"]["20"])
    assert not equal(alone["before"]["20"], alone["after"]["20"])


@pytest.mark.parametrize("fault", ["stage", "write"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_fails_stops_the_patch_on_all(kind: str, fault: str, results: Results) -> None:
    found = results(kind, 2, fault)
    for result in found:
        assert kinds(result, "patched", "rejected") == [("rejected", 20), ("patched", 40)]
        assert equal(result["before"]["20"], result["after"]["20"])
        assert equal(result["after"]["40"], found[0]["after"]["40"])
    assert "injected" in next(reason for kind, _, reason in found[1]["events"] if kind == "rejected")


def test_a_gathered_model_is_left_alone(results: Results) -> None:
    """While FSDP shows whole tensors they are no place to write to: whatever is written is lost at the next reshard."""
    for result in results("fsdp2", 2, "unsharded"):
        assert kinds(result, "patched", "off") == [("patched", 40), ("patched", 60)]
        assert any(step == 20 and "not sharded" in reason for _, step, reason in result["events"])
        assert equal(result["before"]["20"], result["after"]["20"])


@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_come_to_the_same_verdict(kind: str, results: Results) -> None:
    """One rank alone sees the loss rise: the patch is undone on both, bit for bit, in the same step."""
    for result in results(kind, 2, "loss"):
        assert kinds(result, "patched", "kept", "rolled_back") == [("patched", 20), ("rolled_back", 26)]
        assert not equal(result["before"]["26"], result["after"]["26"])
        assert equal(result["after"]["26"], result["before"]["20"])


def patched_alike(found: list[dict[str, Any]], *steps: int) -> None:
    for result in found:
        assert result["patches"] == list(steps), result
        assert not result["failed"]
        assert equal(result["weights"], found[0]["weights"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_travels_beside_the_next_step(kind: str, results: Results) -> None:
    """Nothing waits: asked for at 20, there when the ranks look at 22, on its way beside the step after that."""
    patched_alike(results(kind, 2, "beside"), 23, 43)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_accumulate_and_skip_steps_together(kind: str, results: Results) -> None:
    """Two steps overflow on one rank alone: they are no steps on any."""
    found = results(kind, 2, "accumulated")
    patched_alike(found, 20, 40)
    assert [result["made"] for result in found] == [47, 47]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_with_several_optimizers_count_once(kind: str, results: Results) -> None:
    patched_alike(results(kind, 2, "optimizers"), 20, 40)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_resume_in_the_middle_of_a_window(kind: str, results: Results) -> None:
    """The snapshots of steps 4 and 8 count as taken: the window went on."""
    found = results(kind, 2, "resumed")
    patched_alike(found, 20, 40)
    assert found[0]["counts"]["snapshots"] == 11


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_ranks_are_patched_without_recompiling(kind: str, results: Results) -> None:
    found = results(kind, 2, "compiled")
    patched_alike(found, 20, 40)
    for result in found:
        first, last = result["graphs"]
        assert first == last > 0


def test_off_leaves_sharded_trainings_alone_too(results: Results) -> None:
    assert results("fsdp2", 2, "off") == [{"mode": "off", "steps": 0}] * 2


def test_no_rank_can_hang_another(results: Results) -> None:
    here, _ = results("apart", 2, "absent")
    assert here["mode"] == "off"
    assert here["hook"] < 30.0  # three seconds of patience; without it, for ever


@pytest.mark.parametrize(
    ("how", "first", "second"),
    [
        ("refused", "another rank could not attach", "holds none"),
        ("period", "set up differently", "set up differently"),
        ("missing", "not all 2 ranks", "never came"),
    ],
)
def test_all_ranks_attach_or_none(how: str, first: str, second: str, results: Results) -> None:
    found = results("apart" if how == "missing" else "ddp", 2, how)
    assert first in found[0]
    assert second in found[1]
