"""One figure a method: its runs on all tasks together, against the strongest recipe of each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from nowcast_lab.evaluate.report import Row, TaskReport
from nowcast_lab.evaluate.significance import sign_flip


@dataclass(frozen=True)
class Pooled:
    """A method on all tasks.

    Attributes:
        method: Its name.
        steps: By task, steps to where the strongest recipe ends, as a share of the steps that takes; infinite where
            missed.
        p_value: Of `sign_flip` over all pairs of task and seed, the differences of a task in units of the strongest
            recipe's end; None where no seeds are shared.
        better: Pairs in which the method ended better.
        pairs: All pairs.
    """

    method: str
    steps: dict[str, float]
    p_value: float | None
    better: int
    pairs: int

    @property
    def median(self) -> float:
        """Median over tasks of `steps`."""
        return statistics.median_high(self.steps.values())


def pooled(reports: Sequence[TaskReport]) -> list[Pooled]:
    """Every method at the best of its rates on each task, as the strongest recipe is.

    Args:
        reports: One per task.
    """
    methods: dict[str, dict[str, tuple[TaskReport, Row]]] = {}
    for report in reports:
        for row in report.rows:  # best first
            methods.setdefault(row.arm.method, {}).setdefault(report.name, (report, row))
    out = []
    for method, found in methods.items():
        gaps: list[float] = []
        steps = {}
        for name, (report, row) in found.items():
            if row is not report.baseline:
                gaps += _gaps(report, row)
            steps[name] = row.steps / report.baseline.steps if math.isfinite(report.baseline.steps) else math.nan
        out.append(Pooled(method, steps, sign_flip(gaps), sum(gap > 0 for gap in gaps), len(gaps)))
    return sorted(out, key=lambda one: (-len(one.steps), one.median if not math.isnan(one.median) else math.inf))


def _gaps(report: TaskReport, row: Row) -> list[float]:
    sign = 1 if report.task.metric == "accuracy" else -1
    base = {run["seed"]: float(run["final"]) for run in report.baseline.runs}
    scale = abs(report.baseline.final) or 1.0
    return [sign * (float(run["final"]) - base[run["seed"]]) / scale for run in row.runs if run["seed"] in base]


def pooled_markdown(found: Sequence[Pooled]) -> str:
    """A row per method, for methods that were run on more than one task."""
    lines = [
        "| method | tasks | steps to where the strongest recipe ends (median) | by task | ends better | p |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        if len(one.steps) < 2:
            continue
        each = ", ".join(f"{name} {_share(share)}" for name, share in one.steps.items())
        p = "" if one.p_value is None else f"{one.p_value:.3g}"
        better = f"{one.better} of {one.pairs}" if one.pairs else ""
        lines.append(f"| {one.method} | {len(one.steps)} | {_share(one.median)} | {each} | {better} | {p} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _share(value: float) -> str:
    return f"{100 * value:.0f} %" if math.isfinite(value) else "missed"
