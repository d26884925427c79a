"""``nowcast metatrain``: collect trajectories and train a predictor on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, help="Collect trajectories of small trainings and train a predictor on them.")
console = Console(stderr=True)

Folder = Annotated[Path, typer.Option(help="Folder of trajectories.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


def register(root: typer.Typer) -> None:
    """Add the subcommands to the command line."""
    root.add_typer(app, name="metatrain")


@app.command()
def collect(
    out: Folder,
    recipe: Annotated[str, typer.Option(help="cpu, gpu, smoke, or a JSON file.")] = "cpu",
    data: Annotated[
        str | None,
        typer.Option(envvar="NOWCAST_DATA", help="Folder of CIFAR-10 and tinyshakespeare; ./data if not said."),
    ] = None,
    device: Device = "cpu",
    precision: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    disk_budget: Annotated[float, typer.Option(help="Most GB all shards together may take.")] = 20.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    from_snapshots: Annotated[
        list[Path] | None, typer.Option(help="Import a folder of saved snapshots of one run instead; repeatable.")
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="SPEC.json of the imported snapshots.")] = None,
    every: Annotated[int | None, typer.Option(help="Optimizer steps between imported snapshots.")] = None,
) -> None:
    """Train many small networks and write down their parameters; resumes where it was stopped."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from nowcast_lab.metatrain.collect import collect as run
    from nowcast_lab.metatrain.errors import InvalidRecipe
    from nowcast_lab.metatrain.imports import import_snapshots
    from nowcast_lab.metatrain.recipes import read_recipe
    from nowcast_lab.metatrain.store import Precision, TrajectoryStore

    if threads:
        torch.set_num_threads(threads)
    if precision not in ("float32", "float16"):
        raise InvalidRecipe(f"--precision {precision} is unknown", expected="float32 or float16")
    kept: Precision = "float16" if precision == "float16" else "float32"
    store = TrajectoryStore(out, budget=int(disk_budget * 1e9), create=True)
    if from_snapshots:
        if spec is None or every is None:
            raise InvalidRecipe("--from-snapshots needs --spec and --every", expected="SPEC.json and a step count")
        new = import_snapshots(store, from_snapshots, spec, every=every, precision=kept)
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            new = run(read_recipe(recipe), store, data=data, device=device, precision=kept, progress=progress)
    trajectories = sum(len(shard.trainings) for shard in store)
    console.print(
        f"{len(new)} new shards; {len(store)} shards, {trajectories} trajectories, {store.bytes_used:,} bytes"
    )


@app.command()
def train(
    trajectories: Folder,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint, the state to resume from, and the logs.")],
    hidden: Annotated[int, typer.Option(help="Width of the network.")] = 32,
    layers: Annotated[int, typer.Option(help="Message passing layers.")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps of the whole schedule.")] = 10_000,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 1e-2,
    loss: Annotated[str, typer.Option(help="relative, or l1 as in the paper.")] = "relative",
    seed: Annotated[int, typer.Option(help="Initial weights and batches.")] = 0,
    per_batch: Annotated[int, typer.Option(help="Architectures per step.")] = 4,
    slices: Annotated[int, typer.Option(help="Most slices of each architecture per step.")] = 4,
    edge_budget: Annotated[int, typer.Option(help="Most edges per architecture, all slices together.")] = 60_000,
    strides: Annotated[tuple[int, int], typer.Option(help="Shortest and longest stride, in optimizer steps.")] = (
        20,
        200,
    ),
    device: Device = "cpu",
    save_every: Annotated[int, typer.Option(help="Steps between saves.")] = 500,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Train a network on trajectories, from random initialisation; resumes where it was stopped."""
    import json

    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from nowcast_lab.metatrain.errors import InvalidRecipe
    from nowcast_lab.metatrain.sampler import SamplerConfig
    from nowcast_lab.metatrain.store import TrajectoryStore
    from nowcast_lab.metatrain.train import TrainConfig
    from nowcast_lab.metatrain.train import train as run

    if threads:
        torch.set_num_threads(threads)
    sampler = SamplerConfig(
        seed=seed, trajectories=per_batch, max_slices=slices, edge_budget=edge_budget, strides=strides
    )
    if loss not in ("relative", "l1"):
        raise InvalidRecipe(f"--loss {loss} is unknown", expected="relative or l1")
    config = TrainConfig(
        hidden=hidden,
        layers=layers,
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        loss=loss,
        seed=seed,
        sampler=sampler,
    )
    store = TrajectoryStore(trajectories)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=steps)

        def on_step(step: int, value: float) -> None:
            progress.update(bar, completed=step, description=f"loss {value:.3f}")

        results = run(store, config, out, device=device, save_every=save_every, on_step=on_step)
    typer.echo(json.dumps({"checkpoint": str(out / "checkpoint.safetensors"), "validation": results}))


@app.command()
def widen(
    start: Annotated[str, typer.Option(help="Registered name or path of the network.")],
    hidden: Annotated[int, typer.Option(help="New width of its node and edge vectors.")],
    out: Annotated[Path, typer.Option(help="The wider network, a .safetensors file.")],
    seed: Annotated[int, typer.Option(help="Of the maps to new units.")] = 0,
) -> None:
    """Give a trained network more hidden units; it computes the same until it is refined."""
    from nowcast_service.nino.checkpoint import save_checkpoint
    from nowcast_service.weights.registry import resolve_checkpoint

    from nowcast_lab.metatrain.widen import widen as run

    wide = run(resolve_checkpoint(start), hidden, seed=seed)
    save_checkpoint(out, wide)
    typer.echo(wide.digest)


@app.command()
def average(
    before: Annotated[str, typer.Option(help="Registered name or path of a network.")],
    after: Annotated[str, typer.Option(help="Of one that was made from it.")],
    out: Annotated[Path, typer.Option(help="The network half-way between them, a .safetensors file.")],
) -> None:
    """Average two networks weight by weight, such as before and after refining."""
    from nowcast_service.nino.checkpoint import save_checkpoint
    from nowcast_service.weights.registry import resolve_checkpoint

    from nowcast_lab.metatrain.average import average as run

    middle = run(resolve_checkpoint(before), resolve_checkpoint(after))
    save_checkpoint(out, middle)
    typer.echo(middle.digest)


@app.command()
def refine(
    start: Annotated[str, typer.Option(help="Registered name or path of the network to start from.")],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint, the state to resume from, and the logs.")],
    recipe: Annotated[str, typer.Option(help="refine, another recipe's name, or a JSON file.")] = "refine",
    updates: Annotated[int, typer.Option(help="Steps of the network of the whole schedule.")] = 300,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 7e-4,
    episodes: Annotated[int, typer.Option(help="Groups of trainings beside each other.")] = 10,
    periods: Annotated[
        list[int] | None, typer.Option("--period", help="Steps between nowcasts an episode may have; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="All randomness.")] = 0,
    data: Annotated[
        str | None,
        typer.Option(envvar="NOWCAST_DATA", help="Folder of CIFAR-10 and tinyshakespeare; ./data if not said."),
    ] = None,
    device: Device = "cpu",
    save_every: Annotated[int, typer.Option(help="Updates between saves.")] = 20,
    workers: Annotated[int, typer.Option(min=1, help="Processes that train; they do not change the result.")] = 1,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the trainings: takes a C++ compiler.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Teach a trained network on live trainings what its nowcasts are worth; resumes where it was stopped."""
    import dataclasses
    import json

    import torch
    from nowcast_service.weights.registry import resolve_checkpoint
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from nowcast_lab.metatrain.episodes import RefineConfig
    from nowcast_lab.metatrain.recipes import read_recipe
    from nowcast_lab.metatrain.refine import refine as run

    if threads:
        torch.set_num_threads(threads)
    config = RefineConfig(updates=updates, lr=lr, episodes=episodes, seed=seed)
    if periods:
        config = dataclasses.replace(config, periods=tuple(periods))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("refining", total=updates)
        values = run(
            resolve_checkpoint(start),
            read_recipe(recipe),
            config,
            out,
            data=data,
            device=device,
            workers=workers,
            compiled=compiled,
            save_every=save_every,
            on_update=lambda update, _: progress.update(bar, completed=update),
        )
    typer.echo(json.dumps({"checkpoint": str(out / "checkpoint.safetensors"), "last": values}))


@app.command()
def verify(trajectories: Folder) -> None:
    """Compare every shard with its digest, and the manifest with what is held out for evaluation."""
    from nowcast_lab.metatrain.heldout import refuse_held_out
    from nowcast_lab.metatrain.store import TrajectoryStore

    store = TrajectoryStore(trajectories)
    store.verify()
    for shard in store:
        if shard.arch is not None:
            refuse_held_out(shard.arch, shard.source)
    console.print(f"{len(store)} shards are whole; nothing held out is among them; digest {store.digest()}")
