"""A plan of runs, and the file their results are in."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nowcast_proto.errors import UnreadableFile

from nowcast_lab.evaluate.arms import Arm, run_key
from nowcast_lab.evaluate.run import Predict, run, seen_as
from nowcast_lab.evaluate.tasks import Task
from nowcast_lab.metatrain.data import Images, Text, load
from nowcast_lab.metatrain.errors import InvalidRecipe


@dataclass(frozen=True)
class Plan:
    """Runs to make: every arm on every task with every seed, in an order that finishes seeds together."""

    tasks: tuple[Task, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    steps: int | None = None
    until_target: bool = False

    def __iter__(self) -> Iterator[tuple[Task, Arm, int]]:
        for task in self.tasks:
            for seed in self.seeds:
                for arm in self.arms:
                    yield task, arm, seed

    def __len__(self) -> int:
        return len(self.tasks) * len(self.arms) * len(self.seeds)


def execute(
    plan: Plan,
    out: Path,
    make: Callable[[Arm], Predict | None],
    *,
    data: str | None = None,
    device: str = "cpu",
    on_run: Callable[[dict[str, Any]], None] = lambda _: None,
    on_step: Callable[[int, float], None] = lambda *_: None,
) -> int:
    """Make all runs of a plan that `out` does not hold, and append them.

    Args:
        plan: What to run.
        out: JSON lines.
        make: The predictor of an arm, None for the arm without.
        data: Folder of the data files.
        device: Where to train.
        on_run: Called with every finished run, old or new.
        on_step: Called with every step of the current run and its training loss.

    Returns:
        Number of trainings. Arms that differ only in the average that is evaluated are one training.
    """
    if out.suffix == ".xz":
        raise InvalidRecipe(f"runs cannot be added to {out}, which is compressed", expected="a file of JSON lines")
    done = {line["key"]: line for line in read_runs(out)}
    new = 0
    predicts = {arm: make(arm) for arm in plan.arms}
    for task, arm, seed in plan:
        steps = plan.steps or task.steps
        predict = predicts[arm]
        identity = predict.identity if predict else ""
        key = run_key(task, arm, seed, steps, identity, until_target=plan.until_target)
        if key in done:
            on_run(done[key])
            continue
        siblings = [arm.model_copy(update={"average": kind}) for kind in ("none", "ema", "lawa")]
        keys = [run_key(task, one, seed, steps, identity, until_target=plan.until_target) for one in siblings]
        trained = None if plan.until_target else next((done[each] for each in keys if each in done), None)
        if trained is not None:
            line = seen_as(trained, arm.average, key)
        else:
            source = load(task.source, data)
            _check_fit(task, source)
            line = run(
                task,
                arm,
                seed,
                source.to(torch.device(device)),
                predict,
                steps=steps,
                until_target=plan.until_target,
                device=device,
                on_step=on_step,
            )
            new += 1
        done[key] = line
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        on_run(line)
    return new


def _check_fit(task: Task, data: Images | Text) -> None:
    if isinstance(data, Text) != task.arch.is_text:
        raise InvalidRecipe(f"task {task.name} cannot be trained on {task.source}", expected="text for text networks")


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of a results file, compressed where its name ends in ``.xz``; a last line cut short by a crash is
    dropped.

    Raises:
        UnreadableFile: A line that is not the last is no JSON, or the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        text = lzma.decompress(path.read_bytes()).decode() if path.suffix == ".xz" else path.read_text()
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as exc:
        raise UnreadableFile(f"{path} cannot be read: {exc}") from exc
    lines = text.splitlines()
    runs = []
    for number, line in enumerate(lines, 1):
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError as exc:
            if number == len(lines) and path.suffix != ".xz":
                path.write_text("".join(f"{good}\n" for good in lines[:-1]))
                break
            raise UnreadableFile(f"{path}, line {number}, is no JSON: {exc}", remedy="remove that line") from exc
    return runs
