"""Results of bench_engine.py as the tables of docs/benchmarks.md."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Result = dict[str, Any]


RESULTS = ROOT / "docs" / "results"


PAGE = ROOT / "docs" / "benchmarks.md"


# -- results and tables ------------------------------------------------------------------------------------------------


def load(part: str) -> Result | None:
    path = RESULTS / f"engine-{part}.json"
    return json.loads(path.read_text()) if path.exists() else None


def where(result: Result) -> str:
    m = result["machine"]
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} thread{'s' if m['threads'] > 1 else ''}, torch {m['torch']} "
        f"({m['capability']}), {m['date']}, load average before the run {m['load before']}."
    )


def mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render_a(r: Result) -> str:
    rows = [
        ["this engine, float32", f"{r['seconds']:.2f} s", mb(r["memory"])],
        ["floor, float32", f"{r['floor']:.2f} s", ""],
        *stricter(r),
    ]
    ratios = f"Time over floor **{r['ratio']:.2f}**"
    if "published" in r:
        p = r["published"]
        rows.append(["published code", f"{p['seconds']:.1f} s", mb(p["memory"])])
        ratios += (
            f"; **{r['faster']:.0f}x** faster and **{r['less memory']:.0f}x** less extra memory than the published "
            f"code, predictions differ by {p['difference of the update']:.1e} of the update"
        )
    return f"{table(['', 'time', 'memory beyond the snapshots'], rows)}\n\n{r['edges']:,} edges. {ratios}.\n{phases(r)}"


def render_b(r: Result) -> str:
    rows = [
        ["this engine, float32", f"{r['seconds']:.1f} s", mb(r["memory"])],
        [f"floor, from {r['floor share']:.0%} of every block", f"{r['floor']:.1f} s", ""],
        *stricter(r),
    ]
    return (
        f"{table(['', 'time', 'memory beyond the snapshots'], rows)}\n\n{r['edges']:,} edges, {r['nodes']:,} nodes. "
        f"Time over floor **{r['ratio']:.2f}**. "
        f"Of the memory {mb(4 * r['parameters'])} are the predicted parameters.\n{phases(r)}"
    )


def stricter(r: Result) -> list[list[str]]:
    """The row of the floor with the engine's own SiLU, where that was measured."""
    if "compiled floor" not in r:
        return []
    return [
        [
            f"floor with the engine's own SiLU (the engine takes {r['compiled ratio']:.2f} times that)",
            f"{r['compiled floor']:.2f} s",
            "",
        ]
    ]


def phases(r: Result) -> str:
    return "Seconds by phase: " + ", ".join(f"{name} {value:.2f}" for name, value in r["phases"].items()) + "."


def render_c(r: Result) -> str:
    rows = [
        [
            row["model"],
            f"{row['edges']:,}",
            f"{row['seconds']:.2f} s",
            f"{1e6 * row['seconds'] / row['edges']:.2f} us",
            mb(row["memory"]),
        ]
        for row in r["rows"]
    ]
    plot(r)
    return (
        f"{table(['model', 'edges', 'time', 'per edge', 'memory beyond the snapshots'], rows)}\n\n"
        f"Log-log slope **{r['slope']:.2f}**.\n\n![time against edges](img/engine-scaling.png)"
    )


def plot(r: Result) -> None:
    """Time against edges, log-log, with the line through the points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    x, y = ([row[key] for row in r["rows"]] for key in ("edges", "seconds"))
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    logs = [math.log(v) for v in x]
    slope, offset = statistics.linear_regression(logs, [math.log(v) for v in y])
    axes.loglog(x, [math.exp(offset + slope * v) for v in logs], color="0.6", label=f"slope {slope:.2f}")
    axes.loglog(x, y, "o", color="C0", label="measured")
    axes.set(xlabel="edges of the neural graph", ylabel="seconds for one nowcast", title="Exact engine, float32")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(ROOT / "docs" / "img" / "engine-scaling.png", dpi=120)
    pyplot.close(figure)


def render_d(r: Result) -> str:
    base = r["rows"][0]["seconds"]
    rows = [
        [str(row["horizons"]), f"{row['seconds']:.2f} s", f"{row['seconds'] / base:.2f}", mb(row["memory"])]
        for row in r["rows"]
    ]
    return table(["horizons", "time", "against one", "memory beyond the snapshots"], rows)


def render_e(r: Result) -> str:
    rows = [[row["model"], f"{row['edges']:,}", f"{row['k=1']:.1e}", f"{row['k=40']:.1e}"] for row in r["rows"]]
    return f"{table(['model', 'edges', 'k = 1', 'k = 40'], rows)}\n\nCheckpoint: {r['checkpoint']}."


def render_f(r: Result) -> str:
    return table(["kernel", "ns per edge"], [[row["kernel"], f"{row['ns per edge']:.0f}"] for row in r["rows"]])


RENDER = {"a": render_a, "b": render_b, "c": render_c, "d": render_d, "e": render_e, "f": render_f}


def render() -> None:
    """Put all results there are between their markers in docs/benchmarks.md."""
    text = PAGE.read_text()
    for part, renderer in RENDER.items():
        result = load(part)
        if result is None:
            continue
        start, end = f"<!-- engine {part} -->", f"<!-- /engine {part} -->"
        head, _, rest = text.partition(start)
        _, found, tail = rest.partition(end)
        if not found:
            raise RuntimeError(f"{PAGE} lacks {start} … {end}")
        text = f"{head}{start}\n{renderer(result)}\n\n{where(result)}\n{end}{tail}"
    PAGE.write_text(text)
