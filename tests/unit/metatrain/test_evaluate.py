"""Runs, verdicts and reports of the evaluation."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nowcast_lab.evaluate.arms import Arm, expand, read_arms, run_key
from nowcast_lab.evaluate.measure import batches, evaluate
from nowcast_lab.evaluate.optimizers import KernelMuon, Optimizers
from nowcast_lab.evaluate.plan import Plan, execute, read_runs
from nowcast_lab.evaluate.pooled import pooled, pooled_markdown
from nowcast_lab.evaluate.report import markdown, paired_p, reports
from nowcast_lab.evaluate.run import Local, Nowcasts, run
from nowcast_lab.evaluate.tasks import TASKS
from nowcast_lab.metatrain.data import load
from nowcast_lab.metatrain.errors import InvalidRecipe
from nowcast_lab.metatrain.zoo import Arch
from nowcast_proto.errors import UnreadableFile
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.predictors import make_predictor
from torch import Tensor

TASK = TASKS["digits-mlp"]


class Harmful:
    """Throws the weights away at every nowcast, and counts them."""

    identity = "harmful"

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(
        self, spec: ArchitectureSpec, snapshots: list[dict[str, Tensor]], k: int, state: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.asked.append(k)
        assert len(snapshots) == 5
        return {name: 10 * torch.ones_like(tensor) for name, tensor in snapshots[-1].items()}, state


def test_runs_of_one_seed_differ_by_the_arm_alone() -> None:
    data = load("digits")
    plain = run(TASK, Arm(lr=3e-3), 1, data, None, steps=40)
    still = run(TASK, Arm(lr=3e-3, predictor="linear", period=10), 1, data, Local(make_predictor("identity")), steps=40)
    assert still["nowcasts"] == still["kept"] == 4
    assert [point[:2] for point in still["curve"]] == [point[:2] for point in plain["curve"]]
    assert run(TASK, Arm(lr=3e-3), 2, data, None, steps=40)["final"] != plain["final"]
    linear = run(TASK, Arm(lr=3e-3, predictor="linear", period=10), 1, data, Local(make_predictor("linear")), steps=40)
    assert linear["final"] != plain["final"]


def test_what_a_training_has_reached_is_measured_before_a_nowcast_but_after_an_average() -> None:
    data = load("digits")
    plain = run(TASK, Arm(lr=3e-3), 1, data, None, steps=40)["curve"]
    ahead = run(TASK, Arm(lr=3e-3, predictor="linear", period=20), 1, data, Harmful(), steps=40)["curve"]
    after = run(TASK, Arm(lr=3e-3, predictor="lawa", period=20), 1, data, Harmful(), steps=40)["curve"]
    assert ahead[0][:2] == plain[0][:2]
    assert ahead[1][1] > 2 * plain[1][1]  # twenty steps after a harmful one
    assert after[0][1] > plain[0][1] + 0.5


def test_horizons_follow_the_schedule_and_the_gates() -> None:
    data, ask = load("digits"), Harmful()
    run(TASK, Arm(predictor="linear", period=10), 1, data, ask, steps=100)
    assert ask.asked == [40, 33, 26, 21, 16, 11, 8, 5, 3, 1]
    ask = Harmful()
    run(TASK, Arm(predictor="linear", period=10, stop_at=0.5, farthest=9), 1, data, ask, steps=100)
    assert len(ask.asked) == 5
    assert ask.asked[0] == 9
    ask = Harmful()
    run(TASK, Arm(predictor="linear", period=10, schedule="cosine", lr_gate=0.5), 1, data, ask, steps=100)
    assert len(ask.asked) == 5  # cosine is at half its peak half-way


def test_a_harmful_nowcast_is_undone_on_trial_and_only_then() -> None:
    data, always, trial = load("digits"), Harmful(), Harmful()
    kept = run(TASK, Arm(predictor="linear", period=100), 1, data, always, steps=200)
    undone = run(TASK, Arm(predictor="linear", period=100, verdict="trial"), 1, data, trial, steps=200)
    plain = run(TASK, Arm(), 1, data, None, steps=200)
    assert kept["kept"] == kept["nowcasts"] == 2
    assert undone["kept"] == 0
    assert undone["nowcasts"] >= 1
    assert kept["final"] > 2 * plain["final"]
    assert undone["final"] < 1.5 * plain["final"]


@pytest.mark.parametrize(("verdict", "moved"), [("trial", 0.3), ("always", 1.0)])
def test_where_many_nowcasts_are_planned_the_first_on_trial_are_small(verdict: str, moved: float) -> None:
    """As in the client: of what it predicts three tenths are written."""

    class Shift(Harmful):
        def __call__(self, spec: Any, snapshots: Any, k: int, state: Any) -> Any:
            return {name: tensor + 1.0 for name, tensor in snapshots[-1].items()}, state

    arm, model = Arm(predictor="linear", period=30, verdict=verdict), TASK.arch.build(running_stats=True)
    before = [p.detach().clone() for p in model.parameters()]
    made = Nowcasts(arm, model, Optimizers(arm, model, 900), Shift(), TASK, 900, "cpu")
    for step in range(1, 31):
        made.after_step(step, 1.0)
    assert made.made == 1
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.allclose(new, old + moved, atol=1e-5)


def test_ema_nesterov_steps_from_a_point_ahead_along_the_average_of_its_steps() -> None:
    """Against the rule written out, with gradient descent on half a parabola."""
    arm = Arm(optimizer="sgd", lr=0.1, weight_decay=0.0, nesterov=2.0, nesterov_decay=0.5, warmup=0.2)
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    made, w, trend, momentum = Optimizers(arm, model, 10), 1.0, 0.0, 0.0
    for step in range(10):
        made.look_ahead(step)
        model.zero_grad()
        (model.weight**2 / 2).sum().backward()
        made.step(step)
        ahead = w + (2.0 * trend if 2 <= step < 8 else 0.0)
        momentum = ahead if step == 0 else 0.9 * momentum + ahead  # of the gradient, as torch's SGD has it
        new = ahead - 0.1 * made.fraction(step) * momentum
        trend, w = 0.5 * trend + 0.5 * (new - w), new
        assert model.weight.item() == pytest.approx(w, abs=1e-6)
    assert run(TASK, Arm(nesterov=1.0), 1, load("digits"), None, steps=40)["final"] > 0
    assert "EMA-Nesterov 2 (0.5)" in arm.method


class Creeping(Harmful):
    """Makes an untrained network a little surer of its guesses at every nowcast."""

    def __call__(
        self, spec: ArchitectureSpec, snapshots: list[dict[str, Tensor]], k: int, state: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.asked.append(k)
        return {name: 1.03 * tensor for name, tensor in snapshots[-1].items()}, state


def test_harm_too_small_for_any_verdict_ends_nowcasts_on_trial() -> None:
    data, always, trial = load("digits"), Creeping(), Creeping()
    drifted = run(TASK, Arm(lr=1e-7, predictor="linear", period=60), 1, data, always, steps=1800)
    halted = run(TASK, Arm(lr=1e-7, predictor="linear", period=60, verdict="trial"), 1, data, trial, steps=1800)
    plain = run(TASK, Arm(lr=1e-7), 1, data, None, steps=60)
    assert drifted["nowcasts"] == 30
    assert halted["kept"] >= halted["nowcasts"] - 1
    assert 2 <= halted["nowcasts"] <= 25
    assert halted["train_loss"] - plain["train_loss"] < 0.3 * (drifted["train_loss"] - plain["train_loss"])


def test_a_good_nowcast_stays_on_trial() -> None:
    line = run(
        TASK,
        Arm(predictor="linear", period=100, verdict="trial"),
        1,
        load("digits"),
        Local(make_predictor("identity")),
        steps=160,
    )
    assert line["kept"] == line["nowcasts"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak")
def test_memory_of_nowcasts_is_measured_and_reported() -> None:
    class Hungry(Harmful):
        def __call__(self, spec: Any, snapshots: Any, k: int, state: Any) -> Any:
            np.ones(8_000_000)  # 64 MB, and gone again
            return super().__call__(spec, snapshots, k, state)

    data = load("digits")
    lines = [
        run(TASK, Arm(predictor="linear", period=20), 1, data, Hungry(), steps=60),
        run(TASK, Arm(predictor="lawa", period=20), 1, data, Local(make_predictor("lawa")), steps=60),
        run(TASK, Arm(), 1, data, None, steps=60),
    ]
    hungry, lawa, none = (line["nowcast_bytes"] for line in lines)
    assert 60e6 <= hungry < 80e6
    snapshots = 5 * 4 * TASK.arch.spec().numel
    assert snapshots <= lawa < 16e6
    assert none is None
    for line in lines[1:]:
        del line["nowcast_bytes"]  # as in files from before it was measured
    table = markdown(reports(lines))
    assert f"| {hungry / 1e6:.1f} MB |" in table
    assert table.count(" MB |") == 1


def test_results_are_resumed_and_a_cut_line_is_dropped(tmp_path: Path) -> None:
    out = tmp_path / "runs.jsonl"
    plan = Plan((TASK,), (Arm(lr=1e-3), Arm(lr=3e-3)), (1,), 20)
    assert execute(plan, out, lambda _: None) == 2
    with out.open("a") as file:
        file.write('{"key": "cut sho')
    assert execute(Plan((TASK,), plan.arms, (1, 2), 20), out, lambda _: None) == 2
    assert [line["seed"] for line in read_runs(out)] == [1, 1, 2, 2]
    out.write_text("no json\n" + out.read_text())
    with pytest.raises(UnreadableFile, match="line 1"):
        read_runs(out)


@pytest.mark.parametrize("name", ["results.jsonl.xz", "results-h32.jsonl.xz"])
def test_the_published_runs_can_be_read_and_are_not_added_to(name: str) -> None:
    path = Path(__file__).parents[3] / "docs" / "results" / name
    found = {report.name: report for report in reports(read_runs(path))}
    assert found["half-16-1000"].baseline.arm == Arm(lr=6e-3, weight_decay=0.01)
    assert {"gpt2-code-600", "llama-code-600"} <= set(found)
    with pytest.raises(InvalidRecipe, match="compressed"):
        execute(Plan((TASK,), (Arm(),), (1,), 20), path, lambda _: None)


def test_arms_multiply_out(tmp_path: Path) -> None:
    arms = list(expand({"predictor": "nino", "lr": [1e-3, 2e-3], "period": [50, 100, 200]}))
    assert len(arms) == 6
    assert {(arm.lr, arm.period) for arm in arms} == {(r, p) for r in (1e-3, 2e-3) for p in (50, 100, 200)}
    path = tmp_path / "arms.json"
    path.write_text(json.dumps([{"predictor": "magic"}]))
    with pytest.raises(InvalidRecipe, match="no arm"):
        read_arms(path)
    path.write_text(json.dumps([{"optimiser": "muon", "lr": 0.1}]))
    with pytest.raises(InvalidRecipe, match=r"no 'optimiser'.*optimizer"):
        read_arms(path)
    pairs = list(expand({"betas": [[0.9, 0.99], [0.9, 0.999]], "lr": 1e-3}))
    assert [arm.betas for arm in pairs] == [(0.9, 0.99), (0.9, 0.999)]
    assert [arm.betas for arm in expand({"betas": [0.9, 0.99]})] == [(0.9, 0.99)]
    path.write_text("{}")
    with pytest.raises(InvalidRecipe, match="not a list"):
        read_arms(path)


def line(seed: int, final: float, curve: list[tuple[int, float]], **arm: Any) -> dict[str, Any]:
    made = 0 if arm.get("predictor", "none") == "none" else 4
    kept = arm.pop("kept", made)
    return {
        "key": f"{seed}{arm}", "task": "half-16", "arm": Arm(**arm).model_dump(mode="json"), "seed": seed, "steps": 100,
        "curve": [[s, m, s / 10] for s, m in curve], "final": final, "train_loss": 1.0, "nowcasts": made, "kept": kept,
        "training_seconds": 10.0, "nowcast_seconds": 1.0,
    }  # fmt: skip


def test_a_report_takes_medians_counts_misses_as_infinite_and_compares_with_the_strongest() -> None:
    runs = [line(s, 50 + s, [(50, 40.0), (100, 50 + s)], lr=1e-3) for s in (1, 2, 3)]
    runs += [line(s, 30.0, [(50, 20.0), (100, 30.0)], lr=1e-2) for s in (1, 2, 3)]
    runs += [line(s, 60.0 + s, [(50, 55.0), (100, 60.0 + s)], lr=1e-3, predictor="lawa") for s in (1, 2, 3)]
    runs += [line(1, 52.0, [(100, 52.0)], predictor="snoo"), line(2, 41.0, [(100, 41.0)], predictor="snoo")]
    runs += [line(s, math.nan, [(50, 10.0)], predictor="linear", kept=1) for s in (1, 2, 3)]
    (report,) = reports(runs)
    assert report.name == "half-16-100"  # a hundred steps, not the task's own length
    assert report.baseline.arm.lr == 1e-3
    assert report.target == 52.0
    rows = {row.arm.predictor: row for row in report.rows if row.arm.predictor != "none"}
    assert report.baseline.steps == 100
    assert (rows["lawa"].steps, rows["lawa"].seconds) == (50, 5.0)
    assert rows["snoo"].steps == math.inf  # one of two seeds missed
    assert rows["linear"].steps == math.inf
    assert rows["lawa"].p_value == 0.25  # all three seeds better: as far as three seeds can go
    # AdamW at this rate ends at 52 after 100 steps, at the other at 30; at SNOO's it was not run.
    assert (rows["lawa"].same_rate, rows["snoo"].same_rate, report.baseline.same_rate) == (0.5, None, None)
    fast = [line(s, 35.0, [(50, 31.0), (100, 35.0)], lr=1e-2, predictor="lawa") for s in (1, 2)]
    assert next(row for row in reports([*runs, *fast])[0].rows if row.arm.lr == 1e-2).same_rate == 0.5
    # Of two seeds only one reaches the median of their ends, the mean.
    two = [line(s, 30.0 + s, [(50, 20.0), (100, 30.0 + s)], lr=2e-3) for s in (1, 2)]
    two += [line(s, 40.0, [(50, 35.0), (100, 40.0)], lr=2e-3, predictor="lawa") for s in (1, 2)]
    assert [row.same_rate for row in reports([*runs, *two])[0].rows if row.arm.lr == 2e-3] == [None, None]
    # At 10 of 11 seconds four fifths of the last stretch are done.
    late = [line(1, 60.0, [], predictor="lawa") | {"curve": [[50, 40.0, 6.0], [100, 60.0, 11.0]]}]
    assert reports([*runs[:3], *late])[0].rows[0].timed == pytest.approx(56.0)
    assert report.baseline.timed == report.baseline.final
    stopped = [line(1, 60.0, [(50, 60.0)], predictor="lawa")]
    assert math.isinf(reports([*runs[:3], *stopped])[0].rows[0].timed)
    table = markdown([report])
    assert "-50 %" in table
    assert "(gated off)" in next(row for row in table.splitlines() if "linear" in row)
    assert "∞" in next(row for row in table.splitlines() if "snoo" in row)


def test_runs_of_different_lengths_are_not_compared() -> None:
    runs = [line(1, 50.0, [(100, 50.0)], lr=1e-3), line(1, 70.0, [(200, 70.0)], lr=1e-3) | {"steps": 200}]
    assert [(report.steps, report.target) for report in reports(runs)] == [(100, 50.0), (200, 70.0)]


def test_a_run_may_end_where_it_reaches_the_target() -> None:
    data, task = load(TASK.source), TASK.model_copy(update={"eval_every": 10})
    whole = run(task, Arm(lr=3e-3), 1, data, None, steps=60)
    losses = [loss for _, loss, _ in whole["curve"]]
    assert losses == sorted(losses, reverse=True)
    task = task.model_copy(update={"target": losses[2]})
    cut = run(task, Arm(lr=3e-3), 1, data, None, steps=60, until_target=True)
    assert [point[:2] for point in cut["curve"]] == [point[:2] for point in whole["curve"][:3]]
    assert cut["final"] == losses[2]
    assert cut["key"] != run(task, Arm(lr=3e-3), 1, data, None, steps=60)["key"]


def test_the_paired_test_is_exact() -> None:
    one = [line(s, 10.0 + s, [], lr=1e-3) for s in range(5)]
    other = [line(s, 9.0 + s / 2, [], lr=1e-3) for s in range(5)]
    assert paired_p(one, other) == pytest.approx(2 / 32)
    assert paired_p(one, one) == 1.0
    assert paired_p(one[:1], other) is None
    mixed = [line(s, 9.0 + s / 2 + (2 if s % 2 else -2), [], lr=1e-3) for s in range(4)]
    assert paired_p(mixed, other[:4]) == 1.0


ARMS = {
    "sgd": {"optimizer": "sgd", "lr": 0.05},
    "muon": {"optimizer": "muon", "lr": 0.02},
    "soap": {"optimizer": "soap", "lr": 1e-2},
    "schedulefree": {"optimizer": "schedulefree", "lr": 1e-2},
    "strong": {"lr": 1e-2, "warmup": 0.1, "schedule": "linear", "betas": (0.9, 0.99), "clip": 1.0, "init": "he"},
}


@pytest.mark.parametrize("name", ARMS)
def test_every_optimizer_trains(name: str) -> None:
    task = TASK.model_copy(update={"arch": Arch(kind="convnet", widths=(6, 8), channels=1, size=8)})
    line = run(task, Arm(**ARMS[name]), 1, load("digits"), None, steps=120)
    assert line["final"] < 0.8 * math.log(10)


def test_the_rate_follows_the_schedule_in_every_group() -> None:
    arm = Arm(optimizer="muon", lr=0.04, rest_lr=0.002, warmup=0.2, schedule="linear")
    model = TASK.arch.build()
    optimizers = Optimizers(arm, model, 10)
    seen = []
    for step in range(10):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizers.step(step)
        seen.append([group["lr"] for one in optimizers.each for group in one.param_groups])
    assert seen[0] == pytest.approx([0.02, 0.001])
    assert seen[2] == pytest.approx([0.04, 0.002])
    assert seen[6] == pytest.approx([0.02, 0.001])


def test_muon_sees_a_kernel_as_a_matrix() -> None:
    kernel, matrix = torch.nn.Parameter(torch.randn(4, 3, 3, 3)), torch.nn.Parameter(torch.empty(4, 27))
    matrix.data.copy_(kernel.detach().view(4, 27))
    one, two = KernelMuon([kernel], lr=0.1), torch.optim.Muon([matrix], lr=0.1)
    for seed in range(3):
        kernel.grad = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
        matrix.grad = kernel.grad.view(4, 27).clone()
        one.step()
        two.step()
    assert torch.equal(kernel.view(4, 27), matrix)


def test_averaged_weights_are_evaluated_in_every_run_and_cost_no_training(tmp_path: Path) -> None:
    data = load("digits")
    runs = {kind: run(TASK, Arm(lr=3e-2, average=kind), 1, data, None, steps=60) for kind in ("none", "ema", "lawa")}
    for kind, line in runs.items():
        assert line["averaged"] == runs["none"]["averaged"]
        assert line["final"] == line["averaged"][kind][-1]
        assert [point[1] for point in line["curve"]] == line["averaged"][kind]
    assert len({line["final"] for line in runs.values()}) == 3
    arms = tuple(Arm(lr=3e-2, average=kind) for kind in ("none", "ema", "lawa"))
    out = tmp_path / "runs.jsonl"
    assert execute(Plan((TASK,), arms, (1,), 60), out, lambda _: None) == 1
    for line, arm in zip(read_runs(out), arms, strict=True):
        assert line["final"] == runs[arm.average]["final"]
        assert line["key"] == run_key(TASK, arm, 1, 60)
    # The mean of the snapshots of steps 20, 40 and so on is what LAWA is.
    means = []

    def mean(step: int, model: torch.nn.Module) -> None:
        means.append((step, {name: p.detach().clone() for name, p in model.named_parameters()}))

    torch.manual_seed(1)
    model, arm = TASK.arch.build(), Arm(lr=3e-2)
    optimizers, stream = Optimizers(arm, model, 60), batches(TASK, data, 1)
    for step in range(60):
        inputs, targets = next(stream)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizers.step(step)
        if (step + 1) % 20 == 0:
            mean(step, model)
    model.load_state_dict({name: sum(seen[name] for _, seen in means) / 3 for name in means[0][1]})
    assert evaluate(model, TASK, data) == pytest.approx(runs["lawa"]["final"], abs=1e-4)


def test_context_and_stride_are_free_of_the_period_and_horizons_may_stay() -> None:
    class Asked(Harmful):
        def __call__(self, spec: Any, snapshots: Any, k: int, state: Any) -> Any:
            self.asked.append((len(snapshots), k))
            return {name: tensor.clone() for name, tensor in snapshots[-1].items()}, state

    ask = Asked()
    arm = Arm(predictor="linear", period=20, context=3, stride=4, farthest=7, fixed=True)
    run(TASK, arm, 1, load("digits"), ask, steps=60)
    assert ask.asked == [(3, 7)] * 3
    run(TASK, arm.model_copy(update={"stride": 12}), 1, load("digits"), ask, steps=60)
    assert ask.asked[3:] == [(3, 7)]  # three snapshots twelve steps apart take two periods


def test_a_text_may_be_read_once() -> None:
    task = TASKS["gpt2-code"].model_copy(update={"once": True, "batch": 4})
    data = load("stdlib:bytes")
    few = replace(data, train=torch.arange(64 * 8 + 1))
    seen = []
    stream = batches(task, few, 1)
    for _ in range(2):
        inputs, targets = next(stream)
        seen += inputs.flatten().tolist()
        assert torch.equal(targets[:, :-1], inputs[:, 1:])
    with pytest.raises(InvalidRecipe, match="read once"):
        next(stream)
    assert sorted(seen) == list(range(64 * 8))


def test_the_strongest_recipe_sets_the_target_and_edges_of_sweeps_are_told() -> None:
    runs = [line(s, 40.0, [(100, 40.0)], lr=1e-3) for s in (1, 2)]
    runs += [line(s, 50.0, [(50, 45.0), (100, 50.0)], lr=lr, optimizer="muon") for s in (1, 2) for lr in (0.02,)]
    runs += [line(s, 48.0, [(100, 48.0)], lr=0.04, optimizer="muon") for s in (1, 2)]
    runs += [line(s, 51.0, [(50, 50.0), (100, 51.0)], lr=0.02, optimizer="muon", predictor="linear") for s in (1, 2)]
    twice = runs + [one | {"task": "half-24"} for one in runs]
    (report, other) = reports(twice)
    assert (report.target, report.baseline.arm.optimizer) == (50.0, "muon")
    table = markdown([report])
    assert "| Muon **strongest** (edge of the sweep) | 0.02 |" in table
    assert "| Muon | 0.04 |" in table
    found = {one.method: one for one in pooled([report, other])}
    linear = next(one for method, one in found.items() if "linear" in method)
    assert linear.median == 0.5
    assert (linear.better, linear.pairs) == (4, 4)
    assert linear.p_value == 2 / 16
    assert found["AdamW"].median == math.inf
    assert "| 2 | 50 % | half-16-100 50 %, half-24-100 50 % | 4 of 4 | 0.125 |" in pooled_markdown(list(found.values()))
