"""What the trainings came to: numbers, a table, a sentence."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from nowcast_lab.demo.training import Training

SMALL = 0.05
"""Share of the steps below which a saving is called small."""
NOTHING = "–"


def numbers(trainings: list[Training]) -> dict[str, Any]:
    """All figures of the demo, for a file.

    Args:
        trainings: The one alone first; its final held-out loss is the target of all.
    """
    target = trainings[0].final
    found: dict[str, Any] = {"target_held_out_loss": target, "about": trainings[0].about, "trainings": {}}
    for training in trainings:
        point = training.reached(target)
        found["trainings"][training.name] = {
            "final_held_out_loss": training.final,
            "seconds": training.seconds,
            "steps_to_target": point.step if point else None,
            "seconds_to_target": point.seconds if point else None,
            "killed_at": training.killed_at,
            "hook": training.report,
            "nowcasts": training.nowcasts,
            "points": [asdict(point) for point in training.points],
        }
    return found


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _lost(report: dict[str, Any]) -> str:
    """Nowcasts that came to nothing before any patch: what failed or was skipped, and why."""
    parts = [f"{count} {reason}" for reason, count in {**report.get("failed", {}), **report.get("skipped", {})}.items()]
    return "; ".join(parts) or "0"


def table(trainings: list[Training]) -> Table:
    """The trainings side by side.

    Args:
        trainings: The one alone first.
    """
    target = trainings[0].final
    out = Table(
        title=f"Held-out loss of training alone: {target:.4f} {trainings[0].about['unit']}", title_justify="left"
    )
    out.add_column("")
    for training in trainings:
        out.add_column(training.label, justify="right")

    def row(label: str, *cells: str) -> None:
        out.add_row(label, *cells)

    points = [training.reached(target) for training in trainings]
    row("steps to that loss", *(f"{p.step}" if p else "not reached" for p in points))
    row("wall-clock to that loss", *(f"{p.seconds:.1f} s" if p else "not reached" for p in points))
    row("final held-out loss", *(f"{t.final:.4f}" for t in trainings))
    row("wall-clock, all steps", *(f"{t.seconds:.1f} s" for t in trainings))
    out.add_section()
    attached = [
        t.report if t.report.get("mode", "off") != "off" or t.report.get("snapshots") else None for t in trainings
    ]
    for label, name in (
        ("nowcasts asked for", "asked"),
        ("applied", "patched"),
        ("kept after trial", "kept"),
        ("rolled back", "rolled_back"),
        ("rejected by checks", "rejected"),
        ("on trial at the end", "unjudged"),
        ("steps lost to rollbacks", "harm_steps"),
    ):
        row(label, *(str(report[name]) if report else NOTHING for report in attached))
    row("failed or skipped", *(_lost(report) if report else NOTHING for report in attached))
    out.add_section()
    row("bytes sent", *(_bytes(report["bytes_sent"]) if report else NOTHING for report in attached))
    row(
        "time taken from the trainer",
        *(
            f"{t.report['hook_seconds']:.2f} s ({100 * t.report['hook_seconds'] / t.seconds:.2f} %)"
            if report
            else NOTHING
            for t, report in zip(trainings, attached, strict=True)
        ),
    )
    return out


def findings(trainings: list[Training]) -> list[str]:
    """What the numbers say, one sentence per nowcast training, small gains and losses named as such."""
    alone, target = trainings[0], trainings[0].final
    base = alone.reached(target)
    sentences = []
    for training in trainings[1:]:
        point = training.reached(target)
        if base is None or point is None:
            sentences.append(
                f"{training.label}: never reached the loss of training alone; it ended at {training.final:.4f}, "
                f"{training.final - target:+.4f}."
            )
            continue
        saved = 1 - point.step / base.step
        gain = f"{training.label}: {point.step} steps instead of {base.step} to the same held-out loss, "
        if saved >= SMALL:
            gain += f"{100 * saved:.0f} % fewer"
        elif saved > 0:
            gain += f"{100 * saved:.1f} % fewer, which is a small gain"
        else:
            gain += "no gain"
        sentences.append(f"{gain}; final loss {training.final - target:+.4f}.")
    return sentences
