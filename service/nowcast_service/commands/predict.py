"""``nowcast predict``: snapshots in, future parameters out, all files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand


class ManyValues(TyperCommand):
    """A command whose ``--snapshots`` takes all values up to the next option: ``--snapshots S1 S2 S3 S4 S5``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give every value a flag of its own, the only way the parser takes several."""
        spread: list[str] = []
        rest = list(args)
        while rest:
            word = rest.pop(0)
            if word == "--":
                spread += [word, *rest]
                break
            if word != "--snapshots":
                spread.append(word)
                continue
            values = 0
            while rest and not rest[0].startswith("-"):
                spread += ["--snapshots", rest.pop(0)]
                values += 1
            if not values:
                raise typer.BadParameter("at least one file is needed", ctx, param_hint="--snapshots")
        return super().parse_args(ctx, spread)


def register(app: typer.Typer) -> None:
    """Add ``predict``."""
    app.command("predict", cls=ManyValues)(predict)


def predict(
    spec: Annotated[Path, typer.Option(metavar="SPEC.json", help="The architecture: family, parameters, heads.")],
    snapshots: Annotated[
        list[Path],
        typer.Option(metavar="S1 … S5", help="Evenly spaced snapshots, oldest first: .safetensors, .npz or .pt."),
    ],
    k: Annotated[int, typer.Option("--k", metavar="K", help="Horizon in strides from the newest snapshot.")],
    out: Annotated[Path, typer.Option(metavar="OUT.safetensors", help="Where the predicted parameters go.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="CKPT", help="File or registered name (see `nowcast weights list`) of the network."),
    ] = None,
    predictor: Annotated[
        str | None,
        typer.Option(help="nino, wnn, linear, lawa, snoo or identity; by default what the checkpoint is."),
    ] = None,
    positions: Annotated[
        Path | None, typer.Option(metavar="POS.npy", help="Positional encoding to use, float32 (nodes, 8).")
    ] = None,
    precision: Annotated[str, typer.Option(help="Of matrix products: float32, tf32 or bf16.")] = "float32",
    update_scale: Annotated[float, typer.Option(help="Factor on the predicted update.")] = 1.0,
    uncovered: Annotated[
        str, typer.Option(help="Tensors the graph does not cover: left as they are, or predicted edgewise.")
    ] = "left",
    edgewise_checkpoint: Annotated[
        str | None, typer.Option(metavar="CKPT", help="Edge-wise network for --uncovered edgewise.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    memory_budget: Annotated[
        str | None, typer.Option(metavar="BYTES", help="For the engine beyond the snapshots, such as 2G.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Evaluate with the slow reference network instead of the engine.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is done and how long it takes.")] = False,
) -> None:
    """Predict a network's parameters K strides after the newest of its snapshots.

    The output holds parameters, not deltas, under the names and shapes of the spec, in float32.
    """
    from nowcast_proto.spec import ArchitectureSpec

    from nowcast_service.commands._terminal import parse_bytes, progress_bar, set_up_logging
    from nowcast_service.files.snapshots import check_writable, read_positions, read_snapshot, write_parameters

    set_up_logging(verbose)
    timings: dict[str, float] = {}
    with _phase(timings, "start"):
        from nowcast_service.runtime.container import device_named

        budget = parse_bytes(memory_budget) if memory_budget else None
        device = device_named(device, "device")
        check_writable(out)
        architecture = ArchitectureSpec.read(spec)
    with progress_bar("predicting") as progress:
        with _phase(timings, "checkpoint"):
            from nowcast_service.predictors.graphs import Graphs

            graphs = Graphs()
            made = _predictor(
                predictor,
                checkpoint,
                edgewise_checkpoint,
                positions=None if positions is None else read_positions(positions),
                uncovered=uncovered,
                device=device,
                precision=precision,
                memory_budget=budget,
                threads=threads,
                graphs=graphs,
                reference=reference,
                progress=progress,
                timings=timings,
            )
        with _phase(timings, "snapshots"):
            from nowcast_service.history import History
            from nowcast_service.predictors.base import ahead, check_count, check_horizon

            check_count(len(snapshots), made.context, f"predictor {made.name}")
            check_horizon(k, made.farthest)
            history = History.of(architecture, [read_snapshot(path) for path in snapshots])
        start, inside = time.perf_counter(), sum(timings.values())
        parameters, _ = ahead(made, history, k, update_scale=update_scale)
        # What the predictor timed itself is listed by its own phases; this is the rest.
        timings["predict, other"] = time.perf_counter() - start - (sum(timings.values()) - inside)
    with _phase(timings, "write"):
        write_parameters(out, parameters)
    if verbose:
        _report(timings, made, graphs, architecture)


def _predictor(name: str | None, checkpoint: str | None, edgewise: str | None, **options: Any) -> Any:
    from nowcast_service.commands._terminal import progress_bar
    from nowcast_service.predictors import make_predictor
    from nowcast_service.predictors.registry import entry
    from nowcast_service.weights.registry import resolve_checkpoint

    def load(reference: str | None) -> Any:
        if reference is None:
            return None
        with progress_bar(f"fetching {reference}", unit_bytes=True) as fetched:
            return resolve_checkpoint(reference, progress=fetched)

    network = load(checkpoint) if name is None or entry(name).needs_checkpoint else None
    return make_predictor(name, network, edgewise=load(edgewise), **options)


def _report(timings: dict[str, float], predictor: Any, graphs: Any, spec: Any) -> None:
    from nowcast_service.predictors.graphs import coverage

    for phase, seconds in timings.items():
        typer.echo(f"{seconds:10.3f} s  {phase}", err=True)
    typer.echo(f"{sum(timings.values()):10.3f} s  together", err=True)
    for entry in coverage(graphs, spec, predictor.needs):
        if entry.rule != "graph":
            typer.echo(f"outside the graph ({entry.rule}): {entry.parameter}: {entry.reason}", err=True)


@contextmanager
def _phase(timings: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[name] = timings.get(name, 0.0) + time.perf_counter() - start
