"""``nowcast status``: the trainings on a service, in the terminal."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nowcast_proto.trainings import StatusReply, TrainingRow, TrainingsReply
    from rich.console import RenderableType

_BARS = "▁▂▃▄▅▆▇█"
Url = Annotated[
    str | None,
    typer.Argument(help="The service; NOWCAST_URL, then port 8500 here, where it is left out.", metavar="[URL]"),
]
Key = Annotated[
    str | None, typer.Option("--key", envvar="NOWCAST_API_KEY", help="API key.", show_envvar=True, metavar="KEY")
]


def register(root: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    root.command()(status)


def status(
    url: Url = None,
    key: Key = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on, until interrupted.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for other programs.")] = False,
) -> None:
    """Show the trainings on a service: step, loss, what became of their nowcasts; and how the service is."""
    from nowcast_client import NowcastClient
    from nowcast_proto.errors import NowcastError
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    with NowcastClient(url, api_key=key) as client:
        if as_json:
            health, found = client.status(), client.trainings()
            typer.echo(json.dumps({"service": health.model_dump(mode="json"), **found.model_dump(mode="json")}))
            return
        console = Console()
        if not watch:
            console.print(Group(heading(client.status()), table(client.trainings())))
            return
        shown: RenderableType = Text("…")
        with Live(shown, console=console, screen=False, auto_refresh=False) as live:
            while True:
                try:
                    shown = Group(heading(client.status()), table(client.trainings()))
                except NowcastError as error:
                    shown = Text(f"{error}; trying again", style="red")
                live.update(shown, refresh=True)
                time.sleep(2.0)


def heading(health: StatusReply) -> RenderableType:
    """One line about the service."""
    from rich.text import Text

    running = f", one running for {health.running:.1f} s" if health.running else ""
    return Text(
        f"Nowcast {health.version} on {health.device}: {health.queue} of {health.queue_limit} queued{running}; "
        f"{health.sessions} of {health.sessions_limit} sessions, {health.held / 2**20:,.0f} of "
        f"{health.budget / 2**20:,.0f} MiB held; up {health.uptime / 3600:.1f} h"
        + (" (draining)" if health.draining else "")
    )


def table(found: TrainingsReply) -> RenderableType:
    """The trainings, a line each."""
    from rich.table import Table

    shown = Table("training", "state", "network", "step", "loss", "", "nowcasts", "last", box=None, pad_edge=False)
    for row in found.trainings:
        told = [f"{row.counts[kind]} {word}" for kind, word in _TOLD.items() if row.counts.get(kind)]
        last = f"{row.last.kind.replace('_', ' ')} at {row.last.step:,}" if row.last else ""
        shown.add_row(
            row.name,
            row.mode if row.state == "live" and row.mode != "on" else row.state,
            f"{row.network}, {row.parameters:,}",
            f"{row.step:,}" + (f" of {row.total_steps:,}" if row.total_steps else ""),
            "" if row.loss is None else f"{row.loss:.4g}",
            spark(row),
            ", ".join(told),
            last,
        )
    return shown


_TOLD = {"kept": "kept", "rolled_back": "undone", "skipped": "skipped", "shadow": "in shadow"}


def spark(row: TrainingRow) -> str:
    """The latest losses as small bars."""
    values = row.recent[-16:]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    return "".join(_BARS[round((value - low) / ((high - low) or 1.0) * (len(_BARS) - 1))] for value in values)
