"""The coverage table: what became of every parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nowcast_proto.messages import CoverageReport, OutsideGraph
from nowcast_proto.spec import ArchitectureSpec

from nowcast_service.graph.blocks import Coverage, NeuralGraph

SHOWN_OUTSIDE = 32
"""Parameters outside the graph that a report names; the others are counted."""

_FATE = {"graph": "graph", "left": "left as it is", "edgewise": "edge-wise"}


def table(graph: NeuralGraph) -> str:
    """The coverage of a graph as aligned plain text, one line per parameter and a line of totals."""
    shapes, sizes = graph.spec.shapes(), {p.name: p.numel for p in graph.spec.parameters}
    rows = [
        (
            entry.parameter,
            " x ".join(map(str, shapes[entry.parameter])) or "scalar",
            (entry.role or "-").replace("_", " "),
            _FATE[entry.rule],
            entry.reason,
        )
        for entry in graph.coverage
    ]
    head = ("parameter", "shape", "role", "treated", "why not in the graph")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
    covered = [entry.parameter for entry in graph.coverage if entry.rule == "graph"]
    elements = sum(sizes[name] for name in covered)
    share = 100 * elements / graph.spec.numel
    lines.append("")
    lines.append(
        f"{len(covered)} of {len(rows)} parameters in the graph, {elements:,} of {graph.spec.numel:,} elements "
        f"({share:.2f} %); {graph.n_nodes:,} neurons, {graph.n_edges:,} edges, {graph.wiring} wiring"
    )
    return "\n".join(lines)


def report(entries: Sequence[Coverage], spec: ArchitectureSpec) -> CoverageReport:
    """The coverage of a spec's parameters, counted."""
    sizes = {parameter.name: parameter.numel for parameter in spec.parameters}
    elements: Counter[str] = Counter()
    for entry in entries:
        elements[entry.rule] += sizes[entry.parameter]
    outside = [entry for entry in entries if entry.rule != "graph"]
    return CoverageReport(
        parameters=Counter(entry.rule for entry in entries),
        elements=elements,
        outside=tuple(
            OutsideGraph(parameter=entry.parameter, rule=entry.rule, reason=entry.reason)
            for entry in outside[:SHOWN_OUTSIDE]
        ),
    )
