"""``nowcast average`` and ``nowcast merge``: one network from several checkpoints, all files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

FILES = ".safetensors, .npz or .pt"


def register(app: typer.Typer) -> None:
    """Add ``average`` and ``merge``."""
    app.command("average")(average)
    app.command("merge")(merge)


def average(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="C1 C2 …", help=f"Oldest first: {FILES}.")],
    out: Annotated[Path, typer.Option(metavar="OUT.safetensors", help="Where the average goes.")],
    weights: Annotated[
        str, typer.Option(help="mean, ema, or the rate's decay that the average stands in for: sqrt, cosine.")
    ] = "mean",
    decay: Annotated[float, typer.Option(help="With ema: what a checkpoint counts, against the next newer one.")] = 0.5,
) -> None:
    """Average the newest checkpoints of one training, as a decay of its learning rate would."""
    from nowcast_service.files.merging import averaged, weights_of
    from nowcast_service.files.snapshots import check_writable, read_snapshot, write_parameters

    check_writable(out)
    counts: Any = weights_of(weights, len(checkpoints), decay)  # type: ignore[arg-type]
    write_parameters(out, averaged([read_snapshot(path) for path in checkpoints], counts))


def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help=f"What was fine-tuned: {FILES}.")],
    tuned: Annotated[list[Path], typer.Argument(metavar="FT1 FT2 …", help="Its fine-tunings.")],
    out: Annotated[Path, typer.Option(metavar="OUT.safetensors", help="Where the merged network goes.")],
    method: Annotated[str, typer.Option(help="nowcast, mean (plain average) or task (task arithmetic).")] = "nowcast",
    scale: Annotated[
        float | None, typer.Option(help="Factor on the predicted change (1), or on every fine-tuning's change (0.5).")
    ] = None,
    spec: Annotated[Path | None, typer.Option(metavar="SPEC.json", help="The architecture, for nowcast.")] = None,
    checkpoint: Annotated[
        str, typer.Option(metavar="CKPT", help="File or registered name of the network that nowcasts.")
    ] = "nino_no_posw",
    k: Annotated[
        list[int] | None, typer.Option("--k", metavar="K", help="Horizon in strides; repeatable, averaged.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Merge fine-tunings of one network into a network that does what each of them does."""
    from nowcast_proto.errors import InvalidRequest

    from nowcast_service.files.merging import added, averaged, nowcast, weights_of
    from nowcast_service.files.snapshots import check_writable, read_snapshot, write_parameters

    if method not in ("nowcast", "mean", "task"):
        raise InvalidRequest(f"--method {method}", expected="nowcast, mean or task")
    if method == "nowcast" and spec is None:
        raise InvalidRequest("--method nowcast without --spec", expected="the architecture, as for `nowcast predict`")
    check_writable(out)
    start, ends = read_snapshot(base), [read_snapshot(path) for path in tuned]
    if method == "mean":
        write_parameters(out, averaged(ends, weights_of("mean", len(ends))))
        return
    if method == "task" or spec is None:
        write_parameters(out, added(start, ends, 0.5 if scale is None else scale))
        return
    from nowcast_proto.spec import ArchitectureSpec

    from nowcast_service.predictors import make_predictor
    from nowcast_service.weights.registry import resolve_checkpoint

    network = resolve_checkpoint(checkpoint)
    predictor = make_predictor("nino" if network.config.gnn else "wnn", network, threads=threads)
    factor = 1.0 if scale is None else scale
    write_parameters(out, nowcast(predictor, ArchitectureSpec.read(spec), start, ends, k or [1, 2, 3, 4, 5], factor))
