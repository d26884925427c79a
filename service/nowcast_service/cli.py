"""``nowcast``: the command line. Every subcommand lives in a module of its own under `nowcast_service.commands`.

Other packages add theirs through the entry-point group ``nowcast.commands``: a function that is handed the application.

Data goes to files or stdout, everything said about it to stderr. A request that cannot be served ends with exit status
2 and one message, whatever the reason; heavy libraries are imported by the subcommand that needs them.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Annotated

import typer
from nowcast_proto.errors import NowcastError

from nowcast_service import commands

FAILED = 2
"""Exit status of a request that cannot be served, and of wrong usage."""


def _version(asked: bool) -> None:
    if asked:
        try:
            typer.echo(version("nowcast-sidecar"))
        except PackageNotFoundError:
            typer.echo("unknown (not installed as a package)")
        raise typer.Exit


def build_app() -> typer.Typer:
    """The application with all subcommands registered."""
    app = typer.Typer(
        name="nowcast",
        help="Predict where a training job's weights are heading, with a graph network over its neurons.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def _root(
        version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    ) -> None: ...

    for module in sorted(pkgutil.iter_modules(commands.__path__), key=lambda module: module.name):
        if not module.name.startswith("_"):
            importlib.import_module(f"{commands.__name__}.{module.name}").register(app)
    for entry in sorted(entry_points(group="nowcast.commands"), key=lambda entry: entry.name):
        entry.load()(app)
    return app


def main(args: list[str] | None = None) -> None:
    """Entry point of the ``nowcast`` script.

    Args:
        args: Arguments, those of the process where None.
    """
    try:
        build_app()(args=args, prog_name="nowcast")
    except NowcastError as exc:
        typer.echo(f"nowcast: {exc.code}: {exc}", err=True)
        sys.exit(FAILED)
    except BrokenPipeError:  # whoever read stdout has gone, as `head` does
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
