"""Pictures of a neural graph: its adjacency by edge type and its layers, in the manner of the NiNo paper's figures.

Small graphs are drawn neuron by neuron. Beyond a few hundred neurons both pictures are drawn block by block: in the
matrix a range takes room by the square root of its size, in the layers it is a box.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Curve
from matplotlib.patheffects import withStroke
from nowcast_proto.errors import InvalidRequest, UnreadableFile
from numpy.typing import NDArray

from nowcast_service.graph.blocks import Block, EdgeType, NeuralGraph, Range

COLOURS = {
    EdgeType.LINEAR: "#3b6fb6",
    EdgeType.OTHER: "#9aa3ad",
    EdgeType.CONV: "#1b8a8f",
    EdgeType.NORM: "#c98a2b",
    EdgeType.TOKEN_EMBEDDING: "#7b4fb0",
    EdgeType.POSITION_EMBEDDING: "#d067a8",
    EdgeType.QUERY: "#d1373f",
    EdgeType.KEY: "#ef8a3c",
    EdgeType.VALUE: "#3f9b4f",
    EdgeType.RESIDUAL: "#1d2733",
    EdgeType.HEAD: "#35a7dd",
    EdgeType.SELF_LOOP: "#dfe3e8",
}
_NAMES = {EdgeType.OTHER: "bias and other", EdgeType.CONV: "convolution"}
_PARTS = {
    "x": "stream",
    "m": "stream",
    "copy": "copy",
    "q": "q, k",
    "k": "keys",
    "v": "v",
    "z": "mixed v",
    "h": "hidden",
    "up": "up",
    "heads": "heads",
    "c": "channels",
    "b": "channels",
    "d": "channels",
    "q_norm": "q norm",
    "k_norm": "k norm",
}
_NEURON_BY_NEURON = 420
"""Up to this many nodes every neuron is drawn."""
_MOST_STEPS = 11
"""A drawing by blocks shows this many steps of the network, and says how many it leaves out."""
_INK = "#1d2733"


def draw(graph: NeuralGraph, path: Path, *, title: str | None = None) -> None:
    """Draw the adjacency matrix and the layers of a graph into one file.

    Args:
        graph: The neural graph.
        path: Where to; the suffix says the format (``.png``, ``.svg``, ``.pdf``).
        title: Heading; the family, wiring and sizes by default.

    Raises:
        InvalidRequest: A format matplotlib does not write.
        UnreadableFile: The file cannot be written.
    """
    steps = len({(r.group, r.feeds) for r in _shown(graph)})
    figure = Figure(figsize=(7.2 + max(5.0, 1.05 * steps), 7.6), layout="constrained", facecolor="white")
    if path.suffix.lstrip(".").lower() not in figure.canvas.get_supported_filetypes():
        raise InvalidRequest(f"{path} has suffix {path.suffix!r}", expected=".png, .svg or .pdf")
    matrix, layers = figure.subplots(1, 2, width_ratios=(7.2, max(5.0, 1.05 * steps)))
    adjacency(graph, matrix)
    layered(graph, layers)
    types = [kind for kind in COLOURS if any(block.edge_type is kind for block in graph.blocks)]
    figure.legend(
        handles=[Rectangle((0, 0), 1, 1, color=COLOURS[kind], label=_type_name(kind)) for kind in types],
        loc="outside lower center",
        ncols=min(len(types), 12),
        frameon=False,
        handlelength=1,
        handleheight=1,
        columnspacing=1.6,
        fontsize=10,
        labelcolor=_INK,
    )
    heading = f"{graph.spec.kind}, {graph.wiring} wiring: {graph.n_nodes:,} neurons, {graph.n_edges:,} edges"
    figure.suptitle(title or heading, fontsize=13, color=_INK)
    try:
        figure.savefig(path, dpi=150)
    except OSError as exc:
        raise UnreadableFile(f"{path} cannot be written: {exc.strerror}", remedy="check the folder") from exc


def adjacency(graph: NeuralGraph, axes: Axes) -> None:
    """The adjacency matrix: row source, column target, coloured by edge type."""
    place = _scale(graph)
    size = float(place[-1])
    by_node = graph.n_nodes <= _NEURON_BY_NEURON
    for block in sorted(graph.blocks, key=lambda block: block.edge_type is not EdgeType.SELF_LOOP):
        top, bottom = place[block.source], place[block.source + block.n_sources]
        left, right = place[block.target], place[block.target + block.n_targets]
        colour = COLOURS[block.edge_type]
        if not block.diagonal:
            least = 0 if by_node else size / 400
            box = (left, top), max(right - left, least), max(bottom - top, least)
            axes.add_patch(Rectangle(*box, facecolor=colour, edgecolor="none"))
        elif by_node:
            for i in range(block.n_sources):
                axes.add_patch(
                    Rectangle((place[block.target + i], place[block.source + i]), 1, 1, facecolor=colour, linewidth=0)
                )
        else:
            axes.plot((left, right), (top, bottom), color=colour, linewidth=1.1, solid_capstyle="butt")
    named = [r for r in _shown(graph) if not r.name.startswith("#") and place[r.first + r.size] - place[r.first] > 0]
    bounds = sorted({float(place[edge]) for r in named for edge in (r.first, r.first + r.size)})
    axes.hlines(bounds, 0, size, color="#eceff3", linewidth=0.6, zorder=0)
    axes.vlines(bounds, 0, size, color="#eceff3", linewidth=0.6, zorder=0)
    roomy = [r for r in named if place[r.first + r.size] - place[r.first] > size / 75]
    centres = [float(place[r.first] + place[r.first + r.size]) / 2 for r in roomy]
    labels = [_range_name(r, graph) for r in roomy]
    axes.set_xticks(centres, labels, rotation=90, fontsize=7.5, color=_INK)
    axes.set_yticks(centres, labels, fontsize=7.5, color=_INK)
    axes.tick_params(length=0)
    axes.set(xlim=(0, size), ylim=(size, 0), aspect="equal")
    axes.set_xlabel("target neuron", color=_INK)
    axes.set_ylabel("source neuron", color=_INK)
    axes.spines[:].set_color("#c5ccd4")


def layered(graph: NeuralGraph, axes: Axes) -> None:
    """The layers from left to right: neurons and the edges between them. Self-loops are not drawn."""
    axes.set_axis_off()
    shown = _shown(graph)
    if graph.n_nodes <= _NEURON_BY_NEURON:
        _by_neurons(graph, axes)
    else:
        _by_blocks(graph, shown, axes)
    hidden = len(graph.ranges) - len(shown)
    if hidden:
        axes.set_title(f"the first and last steps; {hidden:,} ranges in between are left out", fontsize=10, color=_INK)


def _by_neurons(graph: NeuralGraph, axes: Axes) -> None:
    columns = _columns(list(graph.ranges))
    first, *others = columns
    rows = max(sum(r.size for r in column) + 1.6 * (len(column) - 1) for column in (first, *others))
    spot = np.zeros((graph.n_nodes, 2))
    for number, column in enumerate(columns):
        beside = number > 0 and column[0].feeds  # heads, biases and norms stand below what they feed
        gap = 1.0 if beside else 1.6
        used = sum(r.size for r in column) + gap * (len(column) - 1)
        ahead = sum(r.size for r in columns[number + 1]) if beside else 0
        y = -0.5 * ahead - 0.14 * rows if beside else (used - 1) / 2
        for r in column:
            for node in range(r.first, r.first + r.size):
                spot[node] = number, y
                y -= 1
            y -= gap - 1 if r.name.startswith("#") else gap
    tall = float(np.ptp(spot[:, 1]))
    for block in graph.blocks:
        if block.edge_type is EdgeType.SELF_LOOP:
            continue
        source, target = block.edge_index().numpy()
        curves = _curves(spot[source], spot[target], block, tall)
        alpha = float(np.clip(7 / np.sqrt(block.n_edges), 0.14, 0.8))
        axes.add_collection(
            LineCollection(list(curves), colors=COLOURS[block.edge_type], linewidths=0.8, alpha=alpha, zorder=1)
        )
    for column in columns:
        for r in column:
            xy = spot[r.first : r.first + r.size]
            own = r.name.startswith("#")
            marker, size, ink = ("s", 16, "#6b7682") if own else ("o", 20, _INK)
            axes.scatter(
                xy[:, 0], xy[:, 1], size, color=ink, marker=marker, edgecolors="white", linewidths=0.6, zorder=3
            )
            if own:
                _label(axes, xy[0, 0] - 0.07, xy[0, 1], _tensor_name(r.name), 6.5, "#59636e", ha="right", va="center")
            else:
                _label(axes, xy[0, 0], xy[0, 1] + 0.018 * tall, _range_name(r, graph), 8.5, _INK, weight="bold")
    axes.set(xlim=(-0.6, len(columns) - 0.5), ylim=(spot[:, 1].min() - 0.1 * tall, spot[:, 1].max() + 0.14 * tall))


def _curves(start: NDArray[np.float64], end: NDArray[np.float64], block: Block, tall: float) -> NDArray[np.float64]:
    """(edges, points, 2): straight to the right, bowed where edges run back (below) or skip ahead (above)."""
    t = np.linspace(0, 1, 22)[None, :, None]
    across = end[:, 0] - start[:, 0]
    bow = np.zeros(len(across))
    bow[across < 0] = -0.07 * tall
    bow[across > 2] = 0.26 * tall if block.edge_type is EdgeType.RESIDUAL else 0.0
    aside = np.where(across == 0, 0.5, 0.0)  # links inside a column stand out to the right
    bend = np.stack([(start[:, 0] + end[:, 0]) / 2 + aside, (start[:, 1] + end[:, 1]) / 2 + 2 * bow], axis=1)
    curve: NDArray[np.float64] = (1 - t) ** 2 * start[:, None] + 2 * t * (1 - t) * bend[:, None] + t**2 * end[:, None]
    return curve


def _by_blocks(graph: NeuralGraph, shown: list[Range], axes: Axes) -> None:
    boxes: dict[str, tuple[float, float, float, float]] = {}  # left, bottom, width, height
    columns = _columns([r for r in shown if not r.name.startswith("#")])
    starts = np.array([r.first for r in graph.ranges])
    for number, column in enumerate(columns):
        heights = [0.5 + 0.28 * np.log10(r.size + 1) for r in column]
        y = (sum(heights) + 0.5 * (len(column) - 1)) / 2
        if number > 0 and column[0].feeds:  # heads stand below what they feed
            y = -2.6
        for r, height in zip(column, heights, strict=True):
            boxes[r.name] = (number - 0.3, y - height, 0.6, height)
            y -= height + 0.5
            axes.add_patch(
                FancyBboxPatch(
                    boxes[r.name][:2], 0.6, height, boxstyle="round,pad=0,rounding_size=0.08",
                    facecolor="#f4f6f9", edgecolor=_INK, linewidth=0.9, zorder=3,
                )
            )  # fmt: skip
            middle = boxes[r.name][1] + height / 2
            _label(axes, number, middle + 0.02, _range_name(r, graph), 8, _INK, weight="bold")
            _label(axes, number, middle - 0.04, f"{r.size:,}", 7, "#59636e", va="top")
    drawn: dict[tuple[str, str, EdgeType], float] = {}
    vectors: dict[str, set[EdgeType]] = {}
    for block in graph.blocks:
        source = graph.ranges[int(np.searchsorted(starts, block.source, "right")) - 1].name
        target = graph.ranges[int(np.searchsorted(starts, block.target, "right")) - 1].name
        for own, other in ((source, target), (target, source)):
            if own.startswith("#"):
                vectors.setdefault(other, set()).add(block.edge_type)
        if source in boxes and target in boxes and source != target:
            key = (source, target, block.edge_type)
            drawn[key] = drawn.get(key, 0) + block.n_edges
    for order, ((source, target, kind), edges) in enumerate(drawn.items()):
        a, b = boxes[source], boxes[target]
        width = 0.8 + 0.55 * np.log10(edges)
        _connect(axes, a, b, COLOURS[kind], width, residual=kind is EdgeType.RESIDUAL, order=order)
    for name, kinds in vectors.items():  # biases and norms: a row of small squares on the box they belong to
        if name in boxes:
            left, bottom, width, height = boxes[name]
            for number, kind in enumerate(sorted(kinds)):
                corner = (left + 0.05 + 0.1 * number, bottom + height - 0.02)
                axes.add_patch(Rectangle(corner, 0.08, 0.09, facecolor=COLOURS[kind], edgecolor="white", zorder=4))
    for number, (column, following) in enumerate(pairwise(columns)):
        if following[0].group > column[0].group + 1 and len(shown) < len(graph.ranges):
            _label(axes, number + 0.5, 0, "…", 22, _INK, va="center")
    axes.set_xlim(-0.6, len(columns) - 0.4)
    low = min(box[1] for box in boxes.values())
    high = max(box[1] + box[3] for box in boxes.values())
    axes.set_ylim(low - 1.4, high + 2.0)


def _connect(
    axes: Axes,
    a: tuple[float, float, float, float],
    b: tuple[float, float, float, float],
    colour: str,
    width: float,
    *,
    residual: bool,
    order: int,
) -> None:
    back = b[0] < a[0]
    start = (a[0] if back else a[0] + a[2], a[1] + a[3] / 2 - (0.12 if back else 0))
    end = (b[0] + b[2] if back else b[0], b[1] + b[3] / 2 - (0.12 if back else 0))
    lift = 0.0
    if back:
        lift = -0.9
    elif b[0] - a[0] > 1.5:
        lift = 2.2 if residual else 0.35 * (-1) ** order
    reach = 0.45 * abs(end[0] - start[0]) * (-1 if back else 1)
    path = Curve(
        [start, (start[0] + reach, start[1] + lift), (end[0] - reach, end[1] + lift), end],
        [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4],
    )
    axes.add_patch(PathPatch(path, facecolor="none", edgecolor=colour, linewidth=width, alpha=0.75, zorder=2))


def _label(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    size: float,
    colour: str,
    *,
    weight: str = "normal",
    ha: str = "center",
    va: str = "bottom",
) -> None:
    halo = [withStroke(linewidth=2.2, foreground="white", alpha=0.85)]
    axes.text(x, y, text, ha=ha, va=va, fontsize=size, color=colour, weight=weight, zorder=5, path_effects=halo)


def _columns(ranges: list[Range]) -> list[list[Range]]:
    """Ranges by step: what feeds a group stands left of its results."""
    columns: dict[tuple[int, bool], list[Range]] = {}
    for r in ranges:
        columns.setdefault((r.group, not r.feeds), []).append(r)
    return [columns[key] for key in sorted(columns)]


def _shown(graph: NeuralGraph) -> list[Range]:
    """All ranges, or, drawn by blocks, those of the first and last steps."""
    groups = sorted({r.group for r in graph.ranges})
    if graph.n_nodes <= _NEURON_BY_NEURON or len(groups) <= _MOST_STEPS:
        return list(graph.ranges)
    kept = {*groups[: _MOST_STEPS - 2], *groups[-2:]}
    return [r for r in graph.ranges if r.group in kept]


def _scale(graph: NeuralGraph) -> NDArray[np.float64]:
    """(n_nodes + 1,) coordinate of each node's beginning."""
    if graph.n_nodes <= _NEURON_BY_NEURON:
        return np.arange(graph.n_nodes + 1, dtype=np.float64)
    room = np.concatenate([np.full(r.size, r.size**-0.5) for r in graph.ranges])
    return np.concatenate([[0.0], np.cumsum(room)])


def _range_name(r: Range, graph: NeuralGraph) -> str:
    match = re.fullmatch(r"([a-z_]+?)(\d[\d.]*)?", r.name)
    if match is None:
        return r.name
    part, index = match[1], match[2] or ""
    if part == "q" and any(other.name == f"k{index}" for other in graph.ranges):
        return f"queries {index}"
    name = _PARTS.get(part, part)
    return f"{name} {index}{'½' if part == 'm' else ''}".strip()


def _tensor_name(name: str) -> str:
    """``ln_1.weight`` of ``#transformer.h.0.ln_1.weight``."""
    parts = name.removeprefix("#").split(".")
    return ".".join(parts[-2:]).replace("weight", "w").replace("bias", "b")


def _type_name(kind: EdgeType) -> str:
    return _NAMES.get(kind, kind.name.lower().replace("_", " ").replace("self loop", "self-loop"))
