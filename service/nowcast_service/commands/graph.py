"""``nowcast graph``: draw the neural graph of a spec and say what became of every parameter."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Uncovered(StrEnum):
    """What becomes of parameters outside the graph."""

    LEFT = "left"
    EDGEWISE = "edgewise"


class Large(StrEnum):
    """What becomes of kernels with more positions than the checkpoint takes."""

    SPLIT = "split"
    LEFT = "left"


def register(root: typer.Typer) -> None:
    """Add ``graph``."""
    root.command("graph")(graph)


def graph(
    spec: Annotated[Path, typer.Argument(help="Architecture spec, JSON.", metavar="SPEC.json")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Drawing to write: .png, .svg or .pdf.")] = None,
    coverage: Annotated[bool, typer.Option("--coverage", help="Print what became of every parameter.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print sizes, coverage and the wiring itself as one JSON document.")
    ] = False,
    max_features: Annotated[int, typer.Option(min=1, help="Kernel positions the checkpoint takes per edge.")] = 9,
    large: Annotated[
        Large, typer.Option(help="Split larger convolution kernels into several edges, or leave them out.")
    ] = Large.SPLIT,
    uncovered: Annotated[
        Uncovered, typer.Option(help="Keep parameters outside the graph, or give them to the edge-wise predictor.")
    ] = Uncovered.LEFT,
) -> None:
    """Build the neural graph of a network: draw it, and print its coverage table.

    Without -o the table is printed in any case. Drawings are block by block where there are too many neurons to see.
    """
    import json
    import sys

    from nowcast_proto.spec import ArchitectureSpec

    from nowcast_service.graph.wiring.build import build_graph

    architecture = ArchitectureSpec.read(spec)
    neural_graph = build_graph(architecture, max_features=max_features, uncovered=uncovered.value, large=large.value)
    if output is not None:
        from nowcast_service.graph.draw import draw

        draw(neural_graph, output)
    if as_json:
        from nowcast_service.graph.contract import contract

        document: dict[str, object] = {
            "family": architecture.kind,
            "wiring": neural_graph.wiring,
            "digest": architecture.digest(),
            "nodes": neural_graph.n_nodes,
            "edges": neural_graph.n_edges,
            "coverage": [
                {"parameter": c.parameter, "rule": c.rule, "role": c.role, "reason": c.reason}
                for c in neural_graph.coverage
            ],
            **contract(neural_graph),
        }
        typer.echo(json.dumps(document, indent=2))
        return
    if coverage or output is None:
        from nowcast_service.graph.coverage import table

        typer.echo(table(neural_graph))
    outside = sum(entry.rule != "graph" for entry in neural_graph.coverage)
    if outside and not coverage and output is not None:
        print_to = f"{outside} of {len(neural_graph.coverage)} parameters are not in the graph; see --coverage"
        sys.stderr.write(f"nowcast: {print_to}\n")
