"""``nowcast serve``, ``nowcast config`` and ``nowcast key``."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer


def register(root: typer.Typer) -> None:
    """Add the subcommands to the command line."""
    root.command("serve")(serve)
    root.command("config")(config)
    root.command("key")(key)


def serve(
    config: Annotated[Path | None, typer.Option(help="TOML file of settings; environment and options win.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port; 0 takes a free one; 8500 by default.")] = None,
    unix_socket: Annotated[Path | None, typer.Option(help="Listen on this unix socket instead.")] = None,
    port_file: Annotated[Path | None, typer.Option(help="Write the bound URL to this file.")] = None,
    parent_fd: Annotated[int | None, typer.Option(help="End at once when this inherited pipe closes.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Default checkpoint: a registered name or a path.")] = None,
    predictor: Annotated[str | None, typer.Option(help="Default predictor.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:0.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    allow_anonymous: Annotated[
        bool | None, typer.Option("--allow-anonymous", help="Serve other machines without keys.")
    ] = None,
) -> None:
    """Serve nowcasts. Every setting is also read from the environment, as NOWCAST_<NAME>."""
    run({name: value for name, value in locals().items() if value is not None})


@wraps(serve, assigned=("__annotations__",))
def config(**options: Any) -> None:
    """Print the settings `nowcast serve` would have with the same options, and where each came from."""
    from nowcast_service.settings import Settings

    given = {name: value for name, value in options.items() if value is not None}
    settings, origins = Settings.traced(given.pop("config", None), **given)
    for name, origin in origins.items():
        value = getattr(settings, name)
        if name in ("api_key", "api_key_hashes"):
            value = "********" if value else None
        shown = "" if value is None else str(int(value)) if isinstance(value, int) else str(value)
        typer.echo(f"{name:<22} {shown:<24} {origin}")


def key(tenant: Annotated[str, typer.Option(help="Who the key is for.")] = "default") -> None:
    """Make a key. The key goes to its user, the hash to the service; the key is shown once."""
    from nowcast_service.runtime.keys import hash_key, new_key

    fresh = new_key()
    typer.echo(f"key:  {fresh}")
    typer.echo(f"hash: {tenant}:{hash_key(fresh)}")


def run(given: dict[str, Any]) -> None:
    """Serve until told to stop.

    Args:
        given: Settings that override the environment, and under ``config`` the file that the environment overrides.

    Raises:
        NowcastError: A setting is wrong, or the address cannot be bound.
    """
    from nowcast_service.runtime.container import device_named
    from nowcast_service.settings import Settings

    given = dict(given)
    settings = Settings.read(given.pop("config", None), **given)
    device_named(settings.device, "NOWCAST_DEVICE")  # said before everything else is imported
    from nowcast_service.http.process import serve_until_told

    serve_until_told(settings)
