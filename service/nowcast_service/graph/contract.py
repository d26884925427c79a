"""A neural graph as plain data, so that anybody can judge a wiring with a program of his own.

Ranges cover all nodes. A block says which element of the flattened parameter every edge is: ``offset + i *
source_stride + j * target_stride + f * feature_stride`` from node ``source + i`` to node ``target + j`` at kernel
position f; a diagonal block has i = j and uses ``source_stride`` alone. Links without weights have no parameter.
``left`` blocks are known to move with their neurons and are no edges; of the parameters in the map ``left`` not even
that is known.
"""

from __future__ import annotations

from nowcast_service.graph.blocks import Block, EdgeType, NeuralGraph, View

Json = dict[str, object]


def contract(graph: NeuralGraph) -> Json:
    """``n_nodes``, ``ranges``, ``blocks`` and ``left`` of a graph; self-loops are left out."""
    known = {view.parameter for _, view in graph.weighted()}
    known |= {block.values.parameter for block in graph.beside if isinstance(block.values, View)}
    edges = [_block(block, left=False) for block in graph.blocks if block.edge_type is not EdgeType.SELF_LOOP]
    return {
        "n_nodes": graph.n_nodes,
        "ranges": [
            {"name": r.name, "first": r.first, "size": r.size, "fixed": r.fixed, "ordered": r.ordered}
            for r in graph.ranges
        ],
        "blocks": [*edges, *(_block(block, left=True) for block in graph.beside)],
        "left": {entry.parameter: entry.reason for entry in graph.coverage if entry.parameter not in known},
    }


def _block(block: Block, *, left: bool) -> Json:
    made: Json = {"type": block.edge_type.name.lower(), "parameter": None}
    made |= {"source": block.source, "n_sources": block.n_sources, "target": block.target, "n_targets": block.n_targets}
    made |= {"diagonal": block.diagonal}
    if isinstance(view := block.values, View):
        made |= {"parameter": view.parameter, "features": view.features, "offset": view.offset}
        made |= {"source_stride": view.source_stride, "target_stride": 0 if block.diagonal else view.target_stride}
        made |= {"feature_stride": view.feature_stride}
        if view.transposed is not None:  # of published wiring alone, which no strides describe
            made |= {"transposed": list(view.transposed)}
    return made | {"left": left}
