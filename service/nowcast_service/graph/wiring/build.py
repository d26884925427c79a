"""From an architecture spec to its neural graph.

NiNo paper, section 3.2 and appendix A: neurons are nodes, weights are edges. A family's table is written out for the
layers a spec has; a spec with an explicit graph has all that written out already. Either becomes blocks of edges the
same way. Nothing here is proportional to the number of edges, so the graph of a billion-parameter network is built in
well under a second.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Literal

from nowcast_proto.errors import InvalidSpec, UnsupportedArchitecture
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.table import Network, PlacedBlock, Wired, fixed_ranges, wire
from nowcast_proto.wiring import ExplicitWiring

from nowcast_service.graph.blocks import NeuralGraph, Range
from nowcast_service.graph.families import Family, families
from nowcast_service.graph.wiring.assemble import Uncovered, assemble

__all__ = ["Uncovered", "build_graph"]

Large = Literal["split", "left"]


def build_graph(
    spec: ArchitectureSpec,
    *,
    max_features: int = 9,
    uncovered: Uncovered = "left",
    large: Large = "split",
    family: Family | None = None,
) -> NeuralGraph:
    """Build the neural graph of an architecture.

    Args:
        spec: The architecture; ``spec.wiring`` picks the wiring, the family's own default otherwise.
        max_features: Kernel positions the checkpoint takes per edge.
        uncovered: What the coverage says of parameters outside the graph: ``left`` untouched, or for the
            ``edgewise`` predictor.
        large: What becomes of convolution kernels with more positions: ``split`` into several edges, or ``left`` out of
            the graph. Published wiring knows no such edges and leaves them out in any case, as are dense layers that
            read more pixels of a channel.
        family: A table of your own, instead of the one ``spec.family`` names.

    Returns:
        The graph; ``coverage`` has one entry per parameter, in order.

    Raises:
        UnsupportedArchitecture: No such family or wiring, or no parameter found a place in the graph.
        InvalidSpec: A tensor the family needs is missing, has a shape that contradicts another, or the heads are not
            given or do not divide a tensor.
    """
    if spec.graph is not None and family is None:
        return _of_graph(spec, spec.graph, max_features=max_features, uncovered=uncovered, large=large)
    family = family or _known(spec)
    wiring = spec.wiring or next(iter(family.wirings))
    if wiring not in family.wirings:
        raise UnsupportedArchitecture(
            f"family {family.name!r} has no {wiring} wiring", expected=" or ".join(family.wirings)
        )
    if family.heads and spec.num_heads is None:
        raise InvalidSpec(
            f"family {family.name!r} needs num_heads",
            expected="the number of query heads per attention layer",
            remedy="add num_heads (and num_kv_heads where keys and values have fewer) to the spec",
        )
    table, unplaced = family.wirings[wiring], dict[str, str]()
    if callable(table):
        expansion = table(spec)
        table, unplaced = expansion.elements, expansion.unplaced
    published = wiring == "published"
    network = Network.of(spec, f"family {family.name!r}", family.roots)
    wired = wire(table, network, unplaced=unplaced, max_features=max_features if published else None)
    return assemble(
        spec,
        _ranges(wired, set() if published else fixed_ranges(wired, spec)),
        wired.blocks,
        # The published encoding counts the rows of a vocabulary from the first node.
        _vocabularies(
            (0, p.block.n_sources) for p in wired.blocks if p.block.type == "token_embedding" and p.block.source == 0
        ),
        wiring=wiring,
        roles=wired.roles,
        left=wired.unplaced,
        max_features=max_features,
        uncovered=uncovered,
        split=large == "split",
    )


def _known(spec: ArchitectureSpec) -> Family:
    known = families()
    if spec.family not in known:
        raise UnsupportedArchitecture(
            f"family {spec.family!r} is not known",
            expected=f"one of {', '.join(sorted(known))}",
            remedy="name the family whose tensor names the network uses, give the spec a graph of its own, or use a "
            "predictor that needs no graph",
            detail={"families": sorted(known)},
        )
    return known[spec.family]


def _ranges(wired: Wired, fixed: set[str]) -> tuple[Range, ...]:
    return tuple(
        Range(r.name, r.first, r.size, r.group, r.feeds, ordered=r.ordered, fixed=r.name in fixed) for r in wired.ranges
    )


def _of_graph(
    spec: ArchitectureSpec, graph: ExplicitWiring, *, max_features: int, uncovered: Uncovered, large: Large
) -> NeuralGraph:
    if all(parameter.name in graph.left for parameter in spec.parameters):
        reasons = [f"{name}: {reason}" for name, reason in list(graph.left.items())[:3]]
        raise UnsupportedArchitecture(
            "no parameter of this network has a place in its graph",
            expected="at least one parameter that is known",
            remedy="use a predictor that needs no graph; " + "; ".join(reasons),
        )
    used: dict[str, int] = {}
    placed = []
    for block in graph.blocks:
        label = block.parameter or block.type
        number = used[label] = used.get(label, -1) + 1
        placed.append(PlacedBlock(f"{label}[{number}]" if number else label, block))
    roles = {
        block.parameter: "bias" if block.type == "other" and block.n_sources == 1 else block.type
        for block in reversed(graph.blocks)
        if block.parameter is not None
    }
    return assemble(
        spec,
        _steps(graph),
        placed,
        _vocabularies((b.source, b.n_sources) for b in graph.blocks if b.type == "token_embedding" and b.n_sources > 1),
        wiring="faithful",
        roles=roles,
        left=graph.left,
        max_features=max_features,
        uncovered=uncovered,
        split=large == "split",
    )


def _vocabularies(rows: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint (first node, rows), ascending: a vocabulary that is embedded twice counts once."""
    found: list[tuple[int, int]] = []
    for first, count in sorted(set(rows), key=lambda row: (row[0], -row[1])):
        if not found or first >= sum(found[-1]):
            found.append((first, count))
    return found


def _steps(graph: ExplicitWiring) -> tuple[Range, ...]:
    """The ranges, in steps for drawings: single nodes that only send stand with the first range they send to."""
    firsts = graph.firsts()
    receives = {block.target for block in graph.blocks}
    sends: dict[int, int] = {}
    for block in graph.blocks:
        sends.setdefault(block.source, block.target)
    made = []
    for number, (first, range_) in enumerate(zip(firsts, graph.ranges, strict=True)):
        feeds = range_.size == 1 and first in sends and first not in receives
        group = bisect_right(firsts, sends[first]) - 1 if feeds else number
        made.append(Range(range_.name, first, range_.size, group, feeds, ordered=range_.ordered, fixed=range_.fixed))
    return tuple(made)
