"""The coverage table: what the service did with each parameter, in a few lines for a log."""

from __future__ import annotations

from typing import Any

from nowcast_proto.messages import CoverageReport

_FATE = {"graph": "in the graph", "edgewise": "edge-wise", "left": "left as they are"}
SHOWN = 8
"""Parameters outside the graph that the table names."""


def lines(report: CoverageReport, family: str, proven: float | None = None) -> str:
    """The table, one line per treatment, then the parameters outside the graph and why.

    Args:
        report: What the service said.
        family: How the network was wired.
        proven: Share of the elements whose wiring was tried on the live network; None where none was.
    """
    total = sum(report.elements.values())
    rows = [f"coverage of family {family}:"]
    for rule, count in sorted(report.parameters.items(), key=lambda item: item[0] != "graph"):
        elements = report.elements.get(rule, 0)
        share = 100 * elements / max(1, total)
        rows.append(f"  {_FATE.get(rule, rule):<17} {count:>6} parameters  {elements:>15,} elements  {share:6.2f} %")
    if proven is not None:
        rows.append(f"  {'proven':<17} {'':>6}             {'':>15}           {100 * proven:6.2f} %")
    rows += [f"    {entry.parameter}: {entry.reason}" for entry in report.outside[:SHOWN]]
    unnamed = sum(count for rule, count in report.parameters.items() if rule != "graph") - len(report.outside[:SHOWN])
    if unnamed > 0:
        rows.append(f"    … and {unnamed} more")
    return "\n".join(rows)


def numbers(report: CoverageReport) -> dict[str, Any]:
    """The same as plain numbers and strings, for `Handle.summary`."""
    return {
        "parameters": dict(report.parameters),
        "elements": dict(report.elements),
        "outside": {entry.parameter: entry.reason for entry in report.outside},
    }
