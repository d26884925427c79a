"""From JSON lines to what people read: Markdown tables and plots."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nowcast_lab.evaluate.arms import Arm
from nowcast_lab.evaluate.significance import sign_flip
from nowcast_lab.evaluate.tasks import TASKS, Task

Run = dict[str, Any]
GATED_OFF = 0.5
"""An arm that kept fewer than this share of its nowcasts has gated itself off: whatever it reached is no win."""

COLUMNS = (
    "arm",
    "rate",
    "schedule",
    "seeds",
    "steps to target",
    "against the strongest",
    "same recipe alone",
    "seconds to target",
    "final",
    "at equal time",
    "train loss",
    "kept",
    "nowcast time",
    "nowcast memory",
    "p",
)


@dataclass(frozen=True)
class Row:
    """One arm (with one rate and schedule) on one task, all seeds.

    Attributes:
        arm: The arm.
        runs: Its runs, by seed.
        steps: Median steps to the target; infinite where at least half of the seeds missed it.
        seconds: Median training seconds to the target, nowcasts included.
        final: Median final metric.
        spread: Half the range of the final metric over seeds.
        timed: Median metric at equal wall-clock, see `_at_equal_time`.
        same_rate: Steps to where the very same recipe ends without nowcasts, as a share of the steps it takes itself;
            None for a recipe without nowcasts, and where that was not run.
        kept: Share of nowcasts kept; None where none was made.
        p_value: Paired over seeds against the strongest recipe, final metric; None for itself or a single seed.
        edge: Whether its rate is at the edge of those that were tried of its method.
        nowcast_share: Nowcast time over training time.
        nowcast_bytes: Most memory that snapshots and a nowcast took; None where none of the runs measured it.
    """

    arm: Arm
    runs: tuple[Run, ...]
    steps: float
    seconds: float
    final: float
    spread: float
    timed: float
    same_rate: float | None
    kept: float | None
    p_value: float | None
    edge: bool
    nowcast_share: float
    nowcast_bytes: int | None


@dataclass(frozen=True)
class TaskReport:
    """All arms on one task at one length.

    Attributes:
        task: The task.
        steps: Length of its runs.
        target: What arms race to.
        baseline: The strongest recipe without nowcasts.
        rows: Every row, best final metric first.
    """

    task: Task
    steps: int
    target: float
    baseline: Row
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """The task, with the length where it is not the task's own."""
        return self.task.name if self.steps == self.task.steps else f"{self.task.name}-{self.steps}"


def reports(runs: Sequence[Run]) -> list[TaskReport]:
    """A report per task and length that has runs without nowcasts; the others have nothing to be compared with.

    Args:
        runs: Lines of a results file; those of the demo, which have no arm, are passed over.
    """
    runs = [run for run in runs if "arm" in run]
    out = []
    for name, steps in dict.fromkeys((run["task"], run["steps"]) for run in runs):
        here = [run for run in runs if (run["task"], run["steps"]) == (name, steps)]
        task = TASKS[name]
        arms: dict[str, list[Run]] = {}
        for run in here:
            arms.setdefault(Arm.model_validate(run["arm"]).model_dump_json(), []).append(run)
        plain = {key: group for key, group in arms.items() if "predictor" not in _changed(group[0])}
        if not plain:
            continue
        sign = 1 if task.metric == "accuracy" else -1
        tuned = max(plain.values(), key=lambda group: sign * _median(_finals(group), task))
        target = task.target
        if target is None or not any(_reached(run, target, task)[0] < math.inf for run in here):
            target = _median(_finals(tuned), task)
        twins = {_recipe(group[0]): group for group in plain.values()}
        edges = _edges([group[0] for group in arms.values()])
        rows = [_row(group, tuned, twins.get(_recipe(group[0])), target, task, edges) for group in arms.values()]
        rows.sort(key=lambda row: -sign * row.final if math.isfinite(row.final) else math.inf)
        baseline = next(row for row in rows if row.runs[0] is tuned[0] or row.runs[0]["key"] == _first(tuned)["key"])
        out.append(TaskReport(task, steps, target, baseline, tuple(rows)))
    return out


_RECIPE = {
    "optimizer", "lr", "rest_lr", "warmup", "schedule", "betas", "weight_decay", "clip", "init", "average", "ema_span"
}  # fmt: skip
"""Fields of an arm that have nothing to do with nowcasts."""


def _changed(run: Run) -> dict[str, Any]:
    """The fields of a run's arm that are not at their default."""
    return Arm.model_validate(run["arm"]).model_dump(mode="json", exclude_defaults=True)


def _recipe(run: Run) -> str:
    """What an arm shares with the same training without nowcasts."""
    return Arm.model_validate(run["arm"]).model_dump_json(include=_RECIPE)


def _edges(runs: Sequence[Run]) -> dict[str, set[float]]:
    """Lowest and highest rate that was tried, by method; one rate alone is no sweep and has no edge."""
    rates: dict[str, set[float]] = {}
    for run in runs:
        arm = Arm.model_validate(run["arm"])
        rates.setdefault(arm.method, set()).add(arm.lr)
    return {method: {min(tried), max(tried)} if len(tried) > 1 else set() for method, tried in rates.items()}


def _first(group: Sequence[Run]) -> Run:
    return min(group, key=lambda run: run["seed"])


def _finals(group: Sequence[Run]) -> list[float]:
    return [float(run["final"]) for run in group]


def _median(values: Sequence[float], task: Task) -> float:
    """Median with a run that ended in NaN counted as the worst there is."""
    worst = -math.inf if task.metric == "accuracy" else math.inf
    return statistics.median([v if math.isfinite(v) else worst for v in values])


def _reached(run: Run, target: float, task: Task) -> tuple[float, float]:
    """Steps and seconds at the first evaluation at or beyond the target; infinite where there is none."""
    for step, metric, seconds in run["curve"]:
        if task.better(metric, target):
            return float(step), float(seconds)
    return math.inf, math.inf


def _steps(group: Sequence[Run], target: float, task: Task) -> float:
    """Median steps to a target, a miss counted as infinite."""
    return statistics.median_high([_reached(run, target, task)[0] for run in group])


def _at_equal_time(run: Run) -> float:
    """The metric when the run's own steps alone, without nowcasts, would have been done.

    That is equal wall-clock on a machine where both take the same time for a step; seconds of two runs, made at
    different times on a shared machine, cannot be compared. Linear between evaluations. NaN where the run ended early.
    """
    curve = [(0, math.nan, 0.0), *run["curve"]]
    if curve[-1][0] != run["steps"]:
        return math.nan
    budget = min(run["training_seconds"], curve[-1][2])
    for (_, before, since), (_, after, until) in itertools.pairwise(curve):
        if until >= budget:
            # Within the first stretch there is nothing to start from.
            share = 1.0 if math.isnan(before) else (budget - since) / max(1e-9, until - since)
            return float(after if share == 1.0 else before + share * (after - before))
    return float(curve[-1][1])


def _row(
    group: list[Run],
    tuned: list[Run],
    twin: list[Run] | None,
    target: float,
    task: Task,
    edges: Mapping[str, set[float]],
) -> Row:
    arm = Arm.model_validate(group[0]["arm"])
    group = sorted(group, key=lambda run: run["seed"])
    same_rate = None
    if twin is not None and twin[0]["arm"] != group[0]["arm"]:
        seeds = {run["seed"] for run in group}
        twin = [run for run in twin if run["seed"] in seeds]
        own = _median(_finals(twin), task) if twin else math.nan
        # Of two seeds one lies above the median of their ends, and may never have been there.
        if math.isfinite(own) and math.isfinite(alone := _steps(twin, own, task)):
            same_rate = _steps(group, own, task) / alone
    hits = [_reached(run, target, task) for run in group]
    made = sum(run["nowcasts"] for run in group)
    finals = _finals(group)
    return Row(
        arm=arm,
        runs=tuple(group),
        steps=_steps(group, target, task),
        seconds=statistics.median_high([seconds for _, seconds in hits]),
        final=_median(finals, task),
        spread=(max(finals) - min(finals)) / 2,
        timed=_median([_at_equal_time(run) for run in group], task),
        same_rate=same_rate,
        kept=sum(run["kept"] for run in group) / made if made else None,
        p_value=None if group[0]["arm"] == tuned[0]["arm"] else paired_p(group, tuned),
        edge=arm.lr in edges[arm.method],
        nowcast_share=sum(r["nowcast_seconds"] for r in group) / max(1e-9, sum(r["training_seconds"] for r in group)),
        nowcast_bytes=max((n for r in group if (n := r.get("nowcast_bytes")) is not None), default=None),
    )


def paired_p(one: Sequence[Run], other: Sequence[Run]) -> float | None:
    """`sign_flip` on the final metric over the seeds both have."""
    finals = {run["seed"]: float(run["final"]) for run in other}
    return sign_flip([float(run["final"]) - finals[run["seed"]] for run in one if run["seed"] in finals])


def markdown(task_reports: Sequence[TaskReport]) -> str:
    """One table per task."""
    parts = []
    for report in task_reports:
        task = report.task
        unit = " %" if task.metric == "accuracy" else ""
        seeds = sorted({run["seed"] for row in report.rows for run in row.runs})
        origin = "published" if report.target == task.target else "end of the strongest recipe"
        parts.append(
            f"### {report.name}: {task.arch.label} on {task.source}\n\n"
            f"Batch {task.batch}, {report.steps:,} steps, seeds {', '.join(map(str, seeds))}. "
            f"Target {report.target:.4g}{unit} ({origin}). "
            "A miss counts as infinite. Column *same recipe alone*: against the same optimizer, rate and schedule "
            "without nowcasts, to where that ends.\n\n" + f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|"
        )
        for row in report.rows:
            parts.append(_line(row, report))
        parts.append("")
    return "\n".join(parts)


def _line(row: Row, report: TaskReport) -> str:
    label = row.arm.method + (" **strongest**" if row is report.baseline else "")
    if row.edge and row is _best_of(report, row.arm.method):
        label += " (edge of the sweep)"
    if row.kept is not None and row.kept < GATED_OFF:
        label += " (gated off)"
    gain = "" if row is report.baseline else _gain(row.steps, report.baseline.steps)
    cells: list[str] = [
        label,
        f"{row.arm.lr:g}",
        row.arm.recipe,
        str(len(row.runs)),
        _number(row.steps, "{:.0f}"),
        gain,
        "" if row.same_rate is None else _gain(row.same_rate, 1.0),
        _number(row.seconds, "{:.1f}"),
        f"{row.final:.4g} ± {row.spread:.2g}",
        f"{row.timed:.4g}" if math.isfinite(row.timed) else "",
        f"{statistics.median(run['train_loss'] for run in row.runs):.4g}",
        "" if row.kept is None else f"{100 * row.kept:.0f} %",
        "" if row.kept is None else f"{100 * row.nowcast_share:.1f} %",
        "" if row.nowcast_bytes is None else f"{row.nowcast_bytes / 1e6:.1f} MB",
        "" if row.p_value is None else f"{row.p_value:.3g}",
    ]
    return "| " + " | ".join(cells) + " |"


def _best_of(report: TaskReport, method: str) -> Row:
    return next(row for row in report.rows if row.arm.method == method)


def _gain(steps: float, baseline: float) -> str:
    if not math.isfinite(baseline) or not math.isfinite(steps):
        return "missed" if not math.isfinite(steps) else ""
    return f"{100 * (steps / baseline - 1):+.0f} %"


def _number(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "∞"


def plot(report: TaskReport, path: Path, *, most: int = 8) -> None:
    """Median metric over steps of the best row of every kind of arm, as a PNG.

    Args:
        report: The task.
        path: Where to.
        most: Most lines.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=130)
    shown: set[str] = set()
    for row in report.rows:
        if row.arm.method in shown or len(shown) >= most:
            continue
        shown.add(row.arm.method)
        length = min(len(run["curve"]) for run in row.runs)
        steps = [point[0] for point in row.runs[0]["curve"][:length]]
        middle = np.median([[point[1] for point in run["curve"][:length]] for run in row.runs], axis=0)
        name = f"{row.arm.method}, rate {row.arm.lr:g} {row.arm.recipe}"
        axes.plot(steps, middle, label=name, lw=2.2 if row is report.baseline else 1.4)
    axes.axhline(report.target, color="grey", lw=0.8, ls=":")
    axes.set_xlabel("steps")
    axes.set_ylabel("test accuracy, %" if report.task.metric == "accuracy" else "validation loss")
    axes.set_title(f"{report.name}: {report.task.arch.label} on {report.task.source}", fontsize=10)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
