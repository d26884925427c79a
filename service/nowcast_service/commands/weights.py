"""``nowcast weights``: which trained networks there are, fetching the published ones, converting files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Trained networks: list, fetch, convert.")


def register(root: typer.Typer) -> None:
    """Add ``weights``."""
    root.add_typer(app, name="weights")


@app.command("list")
def list_weights(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")] = False,
) -> None:
    """List the registered names and which of them are at hand."""
    from nowcast_service.weights import registry as weights

    rows = [
        {
            "name": name,
            "at_hand": weights.shipped_path(name).exists(),
            "about": about,
            "license": "Apache-2.0",
            "source": "nowcast_service",
            "path": str(weights.shipped_path(name)),
        }
        for name, about in weights.SHIPPED.items()
    ]
    for name, entry in weights.PUBLISHED.items():
        path = weights.cached_path(name)
        rows.append(
            {
                "name": name,
                "at_hand": path.exists(),
                "about": entry.about,
                "license": "MIT",
                "source": f"github.com/{weights.OWNER}/{weights.REPOSITORY}",
                "path": str(path),
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo(f"{row['name']:<14} {'here' if row['at_hand'] else '-':<5} {row['about']} ({row['license']})")


@app.command("pull")
def pull(
    names: Annotated[list[str] | None, typer.Argument(help="Registered names of published files.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All published files.")] = False,
    url: Annotated[
        str | None, typer.Option(help="Folder of a mirror; by default NOWCAST_WEIGHTS_URL or the authors' repository.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is done.")] = False,
) -> None:
    """Fetch published files, resuming what broke off, and check them. Prints the path of each."""
    from nowcast_proto.errors import InvalidRequest

    from nowcast_service.commands._terminal import progress_bar, set_up_logging
    from nowcast_service.weights import registry as weights

    set_up_logging(verbose)
    chosen = list(weights.PUBLISHED) if everything else [name for name in names or [] if name not in weights.SHIPPED]
    if not chosen and not names:
        raise InvalidRequest("no weights are named", expected="names of `nowcast weights list`, or --all")
    for name in chosen:
        with progress_bar(name, unit_bytes=True) as progress:
            path = weights.pull(name, url=url, progress=progress)
        typer.echo(str(path))


@app.command("convert")
def convert(
    source: Annotated[str, typer.Argument(help="A published .pt file, or a registered name.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Write a checkpoint as .safetensors with its config in the metadata. Prints its digest, which stays the same."""
    from nowcast_proto.errors import InvalidRequest

    from nowcast_service.nino.checkpoint import save_checkpoint
    from nowcast_service.weights.registry import resolve_checkpoint

    if target.suffix != ".safetensors":
        raise InvalidRequest(f"target {target} has suffix {target.suffix!r}", expected=".safetensors")
    checkpoint = resolve_checkpoint(source)
    save_checkpoint(target, checkpoint)
    typer.echo(checkpoint.digest)
