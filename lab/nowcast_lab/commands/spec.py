"""``nowcast spec``: what a live model's spec is, and whether a network keeps the symmetries its graph claims."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from nowcast_proto.errors import ErrorBody, InvalidSpec, NowcastError, UnreadableFile, UnsupportedArchitecture
from nowcast_proto.spec import ArchitectureSpec
from pydantic import ValidationError

if TYPE_CHECKING:
    from nowcast_service.graph.blocks import NeuralGraph

ANY_KERNEL = 1 << 20
"""Kernel positions that are let into the graph when symmetries are checked: all."""

Model = Annotated[
    str,
    typer.Option(
        "--model", help="Function without arguments that returns the model and its inputs.", metavar="module:function"
    ),
]
Table = Annotated[Path | None, typer.Option(help="Table that says how the network is wired.", metavar="TABLE.json")]
Frozen = Annotated[bool, typer.Option("--include-frozen", help="List parameters that do not train as well.")]


def register(root: typer.Typer) -> None:
    """Add ``spec check`` and ``spec show``."""
    app = typer.Typer(help="Derive architecture specs from live models, and check tables.", no_args_is_help=True)
    app.command("show")(show)
    app.command("check")(check)
    root.add_typer(app, name="spec")


def show(model: Model, table: Table = None, include_frozen: Frozen = False) -> None:
    """Print the spec that `attach` would derive from a model, and the coverage of its graph on standard error."""
    from nowcast_service.graph.coverage import table as coverage
    from nowcast_service.graph.wiring.build import build_graph

    spec = derived(model, table, include_frozen)
    typer.echo(json.dumps(json.loads(spec.canonical()), indent=2))
    typer.echo(coverage(build_graph(spec)), err=True)


def check(
    what: Annotated[Path, typer.Argument(help="A table, or the spec of a network.", metavar="TABLE_OR_SPEC.json")],
    model: Model,
    seed: Annotated[int, typer.Option(help="Of the weights and the permutations.")] = 0,
    include_frozen: Frozen = False,
) -> None:
    """Permute the neurons that a table says are alike in a small live model, and see that its outputs stay.

    Exit status 0 where every claim holds, 2 where one does not: the parameter that is wired otherwise is named. The
    model's weights are replaced by random ones; it runs in float64.
    """
    from nowcast_proto.reference import load_function
    from nowcast_service.graph import check as symmetries

    spec = derived(model, what, include_frozen) if _is_table(what) else ArchitectureSpec.read(what)
    graph = _faithful(spec)
    built = load_function(model)()
    if not isinstance(built, tuple) or len(built) != 2:
        raise InvalidSpec(
            f"{model} returns a {type(built).__name__}",
            expected="a tuple of the model and its inputs (a mapping of keyword arguments, a tuple, or one tensor)",
        )
    live, inputs = built
    inputs = inputs if isinstance(inputs, dict | tuple) else (inputs,)
    findings = []
    for finding in symmetries.check(graph, symmetries.Network(live, inputs, graph, seed), seed=seed):
        findings.append(finding)
        verdict = ("holds" if finding.seen else "not seen by the outputs") if finding.holds else "BROKEN"
        typer.echo(f"{verdict}\t{finding.change:.1e}\t{finding.claim.what}")
    for entry in graph.coverage:
        if entry.rule != "graph":
            typer.echo(f"outside the graph\t-\t{entry.parameter}: {entry.reason}")
    broken = [finding for finding in findings if not finding.holds]
    if broken:
        first = broken[0]
        raise InvalidSpec(
            f"{len(broken)} of {len(findings)} claims are broken: permuting {first.claim.what} changes the outputs by "
            f"{first.change:.1e}; {', '.join(map(repr, first.blamed[:6]))}: {first.why}",
            expected="outputs that stay the same",
            remedy="correct the table: what is paired in the network needs a link, what has places of its own "
            "(rotary pairs) needs ordered heads",
            detail={"parameters": list(first.blamed), "ranges": list(first.claim.ranges)},
        )
    if not any(finding.seen for finding in findings):
        raise InvalidSpec(
            "the table makes no claim that this model can test",
            expected="neurons between the inputs and the outputs",
            remedy="use a model with two heads or more and layers wider than one neuron",
        )


def derived(model: str, table: Path | None, include_frozen: bool) -> ArchitectureSpec:
    """The spec the client derives, in a process of its own: client and service do not know each other.

    Raises:
        NowcastError: What the client raises.
    """
    command = [sys.executable, "-m", "nowcast_client.network.describe", model]
    command += ["--table", str(table)] if table else []
    command += ["--include-frozen"] if include_frozen else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ArchitectureSpec.parse(done.stdout, origin=model)
    last = done.stderr.strip().rpartition("\n")[2]
    try:
        raise NowcastError.from_body(ErrorBody.model_validate_json(last))
    except ValidationError:
        raise InvalidSpec(f"{model} failed: {last}", remedy="call the function yourself to see why") from None


def _is_table(path: Path) -> bool:
    try:
        document: Any = json.loads(path.read_bytes())
    except OSError as exc:
        raise UnreadableFile(f"{path} cannot be read: {exc.strerror}", remedy="check the path") from exc
    except ValueError as exc:
        raise InvalidSpec(f"{path} is not JSON: {exc}", expected="a table or an architecture spec") from exc
    return isinstance(document, dict) and "elements" in document


def _faithful(spec: ArchitectureSpec) -> NeuralGraph:
    from nowcast_service.graph.wiring.build import build_graph

    if spec.wiring == "published":
        raise UnsupportedArchitecture(
            "the spec asks for published wiring, which departs from the symmetries of networks on purpose",
            expected="faithful wiring",
            remedy="leave wiring out of the spec",
        )
    return build_graph(spec.model_copy(update={"wiring": "faithful"}), max_features=ANY_KERNEL)
