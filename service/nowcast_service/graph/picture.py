"""A neural graph as few boxes and curves: ranges of neurons and what joins them, for a drawing in a browser."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter

from nowcast_proto.errors import TooLarge
from nowcast_proto.trainings import GraphLink, GraphRange, GraphReply

from nowcast_service.graph.blocks import EdgeType, NeuralGraph

MOST = 600
"""Ranges that are drawn; more say nothing to anybody."""


def picture(graph: NeuralGraph) -> GraphReply:
    """Ranges in the order of the network's steps, and the edges between every two of them by type.

    Single nodes of 1-D tensors are left out, and so are self-loops. Where a block reaches over several ranges, as in
    the published wirings, the first of each side stands for it.

    Raises:
        TooLarge: It has too many ranges to draw.
    """
    shown = [number for number, r in enumerate(graph.ranges) if not r.name.startswith("#")]
    if len(shown) > MOST:
        raise TooLarge(f"a graph of {len(shown)} ranges is too large to draw", expected=f"at most {MOST}")
    place = {number: i for i, number in enumerate(shown)}
    firsts = [r.first for r in graph.ranges]
    steps = {
        step: i
        for i, step in enumerate(dict.fromkeys((graph.ranges[n].group, not graph.ranges[n].feeds) for n in shown))
    }
    joined: Counter[tuple[int, int, str]] = Counter()
    for block in graph.blocks:
        source, target = (bisect_right(firsts, node) - 1 for node in (block.source, block.target))
        if block.edge_type is not EdgeType.SELF_LOOP and source in place and target in place:
            joined[place[source], place[target], block.edge_type.name.lower()] += block.n_edges
    return GraphReply(
        ranges=tuple(
            GraphRange(name=r.name, size=r.size, group=steps[r.group, not r.feeds])
            for r in (graph.ranges[n] for n in shown)
        ),
        links=tuple(GraphLink(source=s, target=t, type=kind, edges=n) for (s, t, kind), n in joined.items()),
        nodes=graph.n_nodes,
        edges=graph.n_edges,
    )
