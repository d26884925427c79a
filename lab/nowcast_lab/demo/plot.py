"""The loss curves as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nowcast_lab.demo.training import Training

# Dark grey for the baseline, three hues that stay apart for colour-blind eyes and on paper.
COLOURS = ("#444444", "#0072b2", "#d55e00", "#009e73")
MARKS = {"kept": ("^", "nowcast kept"), "rolled_back": ("X", "nowcast rolled back")}
ROOM = 0.06
"""Share of the height left free below the curves."""


def draw(trainings: list[Training], path: Path) -> None:
    """Draw held-out loss by step and by wall-clock time.

    Args:
        trainings: The one alone first.
        path: PNG to write.
    """
    with plt.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e6e6e6",
            "grid.linewidth": 0.6,
        }
    ):
        figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True, layout="constrained")
        _curves(by_step, trainings, "step")
        _curves(by_time, trainings, "seconds")
        about = trainings[0].about
        by_step.set(xlabel="optimizer steps", ylabel=f"held-out loss ({about['unit']})")
        by_time.set(xlabel="wall-clock time of the training (s)")
        figure.legend(handles=_legend(trainings), loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(f"{about['about']}, {len(trainings)} times from the same seed", fontsize=10.5)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _curves(axes: Axes, trainings: list[Training], by: str) -> None:
    low, high = _range(trainings)
    axes.set_ylim(low, high)
    axes.axhline(trainings[0].final, color=COLOURS[0], linewidth=0.9, linestyle=":")
    for training, colour in zip(trainings, COLOURS, strict=False):
        x = [getattr(point, by) for point in training.points]
        y = [point.held_out for point in training.points]
        axes.plot(x, y, color=colour, linewidth=1.6, clip_on=True)
        for event in training.nowcasts:
            if event["kind"] in MARKS:
                # Where the nowcast set out from; the verdict falls a recovery window later.
                i = _nearest(training, int(event["of"]))
                axes.plot(x[i], min(y[i], high), MARKS[event["kind"]][0], color=colour, markersize=7, mec="white")
        if training.killed_at is not None:
            where = x[_nearest(training, training.killed_at)]
            axes.axvline(where, color=colour, linewidth=0.9, linestyle="--")
            axes.annotate(
                "service killed", (where, low), xytext=(-4, 5), textcoords="offset points", color=colour, ha="right"
            )
        reached = training.reached(trainings[0].final)
        if reached is not None:
            axes.plot(getattr(reached, by), reached.held_out, "o", color=colour, markersize=6, mfc="white", zorder=4)


def _range(trainings: list[Training]) -> tuple[float, float]:
    """Lowest and highest loss to show: the steep fall of the first third would flatten everything else."""
    alone = trainings[0].points
    high = max(point.held_out for point in alone[len(alone) // 3 :])
    low = min(point.held_out for training in trainings for point in training.points)
    return low - ROOM * (high - low), high + ROOM * (high - low)


def _legend(trainings: list[Training]) -> list[Line2D]:
    entries = [
        Line2D([], [], color=colour, label=f"{training.label}: {training.final:.3f} at the end")
        for training, colour in zip(trainings, COLOURS, strict=False)
    ]
    happened = {event["kind"] for training in trainings for event in training.nowcasts}
    entries += [
        Line2D([], [], color="#777777", marker=marker, linestyle="", markersize=7, mec="white", label=label)
        for kind, (marker, label) in MARKS.items()
        if kind in happened
    ]
    entries.append(
        Line2D(
            [], [], color="#777777", marker="o", linestyle="", mfc="white", label="final loss of training alone reached"
        )
    )
    return entries


def _nearest(training: Training, step: int) -> int:
    return min(range(len(training.points)), key=lambda i: abs(training.points[i].step - step))
