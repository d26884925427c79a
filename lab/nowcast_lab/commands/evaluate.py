"""``nowcast evaluate``: train held-out tasks with and without nowcasts, and report what it gained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from nowcast_lab.evaluate.arms import Arm
    from nowcast_lab.evaluate.run import Predict

console = Console(stderr=True)


def register(root: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    root.command()(evaluate)


def evaluate(
    out: Annotated[Path, typer.Option(help="JSON lines; runs it already holds are not run again.")],
    tasks: Annotated[list[str] | None, typer.Option("--task", help="Task by name; repeatable.")] = None,
    arms: Annotated[
        Path | None, typer.Option(help="JSON list of arms; a list as a field's value means all combinations.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds per arm, the first of the fixed list.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Length of a run where it is not the task's.")] = None,
    until_target: Annotated[bool, typer.Option(help="End a run where it reaches the task's published target.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write Markdown tables here, and a plot per task beside.")] = None,
    data: Annotated[
        str | None,
        typer.Option(envvar="NOWCAST_DATA", help="Folder of CIFAR-10 and tinyshakespeare; ./data if not said."),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Ask this server for nowcasts instead of predicting here.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Time to target and end of run on tasks no shipped weights were trained on. Without --task only reports."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from nowcast_lab.evaluate.arms import read_arms
    from nowcast_lab.evaluate.paper import task
    from nowcast_lab.evaluate.plan import Plan, execute, read_runs
    from nowcast_lab.evaluate.pooled import pooled, pooled_markdown
    from nowcast_lab.evaluate.report import markdown, plot, reports
    from nowcast_lab.evaluate.tasks import SEEDS
    from nowcast_lab.metatrain.errors import InvalidRecipe

    if threads:
        torch.set_num_threads(threads)
    if not 1 <= seeds <= len(SEEDS):
        raise InvalidRecipe(f"--seeds {seeds}", expected=f"1 to {len(SEEDS)}")
    if tasks:
        if arms is None:
            raise InvalidRecipe("--task needs --arms", expected="a JSON file of arms, see docs/metatraining.md")
        plan = Plan(tuple(task(name) for name in tasks), read_arms(arms), SEEDS[:seeds], steps, until_target)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            runs = progress.add_task("runs", total=len(plan))
            current = progress.add_task("steps", total=max(steps or t.steps for t in plan.tasks))
            execute(
                plan,
                out,
                lambda arm: _predict(arm, url, device, threads),
                data=data,
                device=device,
                on_run=lambda _: progress.advance(runs),
                on_step=lambda step, _: progress.update(current, completed=step),
            )
    found = reports(read_runs(out))
    table = pooled_markdown(pooled(found)) + "\n" + markdown(found)
    if report is None:
        typer.echo(table)
        return
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(table)
    for one in found:
        plot(one, report.with_name(f"{report.stem}-{one.name}.png"))


def _predict(arm: Arm, url: str | None, device: str, threads: int | None) -> Predict | None:
    """Where an arm's nowcasts come from."""
    from nowcast_service.predictors import make_predictor
    from nowcast_service.predictors.baselines import Snoo
    from nowcast_service.weights.registry import resolve_checkpoint

    from nowcast_lab.evaluate.remote import Remote
    from nowcast_lab.evaluate.run import Local
    from nowcast_lab.metatrain.errors import InvalidRecipe

    if arm.predictor == "none":
        return None
    if url is not None:
        if arm.predictor == "snoo":
            raise InvalidRecipe("snoo carries a state between nowcasts", remedy="run it without --url")
        return Remote(url, arm.predictor, arm.checkpoint, update_scale=arm.update_scale)
    if arm.predictor == "snoo":
        return Local(Snoo(lr=arm.outer_lr, momentum=arm.outer_momentum), update_scale=arm.update_scale)
    checkpoint = resolve_checkpoint(arm.checkpoint) if arm.checkpoint is not None else None
    return Local(
        make_predictor(arm.predictor, checkpoint, device=device, threads=threads),
        checkpoint.digest if checkpoint is not None else "",
        arm.update_scale,
    )
