"""The coverage table: what became of every parameter."""

from __future__ import annotations

from nowcast_service.graph.blocks import NeuralGraph

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
