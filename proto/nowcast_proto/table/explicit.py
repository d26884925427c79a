"""What a table makes of a network, as a wiring that travels; which of its neurons the outside knows by place."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter

from nowcast_proto.errors import InvalidSpec
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.table.document import DeclaredTable
from nowcast_proto.table.emit import Wired, wire
from nowcast_proto.table.expand import Network
from nowcast_proto.wiring import ExplicitWiring, WiringRange

_READ_ONLY = re.compile(r"(embed_tokens|shared|wte|word_embeddings|tok_embeddings)\.weight$")
"""Aliases of an embedding that read it again as an embedding, not to score tokens."""


def wired_spec(spec: ArchitectureSpec, table: DeclaredTable) -> ArchitectureSpec:
    """A spec with the wiring a table gives its network, in place of a family.

    Args:
        spec: Parameters, heads and ties of the network; its family does not matter.
        table: The table.

    Raises:
        InvalidSpec, UnsupportedArchitecture: Table and network do not fit, or a tensor is placed twice or in part.
    """
    network = Network.of(spec, f"table {table.family!r}", table.roots)
    wired = wire(table.elements, network)
    _check_whole(wired, network)
    fixed = fixed_ranges(wired, spec)
    ranges = tuple(
        WiringRange(name=r.name, size=r.size, fixed=r.name in fixed, ordered=r.ordered) for r in wired.ranges
    )
    graph = ExplicitWiring(ranges=ranges, blocks=tuple(placed.block for placed in wired.blocks), left=wired.unplaced)
    return ArchitectureSpec(parameters=spec.parameters, ties=spec.ties, graph=graph)


def fixed_ranges(wired: Wired, spec: ArchitectureSpec) -> set[str]:
    """Names of the ranges whose neurons the outside knows by their place.

    Those are tokens and positions, what nothing feeds, and what feeds nothing unless a tied embedding scores it. Where
    a tensor has no place, nobody knows which neurons it touches, so all are fixed; a scalar cannot tell neurons apart.

    Args:
        wired: The wiring, faithful.
        spec: Its network.
    """
    shapes = spec.shapes()
    if any(math.prod(shapes[name]) > 1 for name in wired.unplaced):
        return {range_.name for range_ in wired.ranges}
    firsts = [range_.first for range_ in wired.ranges]

    def reached(first: int, count: int) -> range:
        return range(bisect_right(firsts, first) - 1, bisect_right(firsts, first + count - 1))

    feeds, fed, embeds, read, onward, linked = (set[int]() for _ in range(6))
    stream = list(range(len(firsts)))  # ranges paired one to one, as a forest

    def root(number: int) -> int:
        while stream[number] != number:
            stream[number] = stream[stream[number]]
            number = stream[number]
        return number

    tied = {name for alias, name in spec.ties.items() if not _READ_ONLY.search(alias)}
    for placed in wired.blocks:
        block = placed.block
        sources, targets = reached(block.source, block.n_sources), reached(block.target, block.n_targets)
        if block.diagonal:
            for number in (*sources, *targets):
                stream[root(number)] = root(sources[0])
        if block.parameter is None:
            onward.update(sources)
            linked.update(targets)
            continue
        feeds.update(sources)
        fed.update(targets)
        if block.type in ("token_embedding", "position_embedding") and block.n_sources > 1:
            embeds.update(sources)
        if block.parameter in tied:
            read.update(targets)
    # Links between streams make one stream of many ranges. Scores by a tied embedding read it, though no edge says so.
    scored = {root(number) for number in read}
    outputs = {number for number in fed - feeds - onward if root(number) not in scored}
    return {wired.ranges[number].name for number in embeds | (feeds - fed - linked) | outputs}


def _check_whole(wired: Wired, network: Network) -> None:
    """Every element of a placed tensor is one edge, which a table of one's own may get wrong."""
    edges: Counter[str] = Counter()
    parts: dict[str, set[object]] = {}
    for placed in wired.blocks:
        block = placed.block
        if block.parameter is None:
            continue
        edges[block.parameter] += block.n_edges * block.features
        seen = parts.setdefault(block.parameter, set())
        key = block.elements()
        if key in seen or edges[block.parameter] > math.prod(network.shapes[block.parameter]):
            raise InvalidSpec(
                f"the table places tensor {block.parameter!r} twice",
                expected="every element of a tensor to be one edge",
                remedy="name the tensor once, or once for each part of a cut",
            )
        seen.add(key)
    for name, count in edges.items():
        if count != math.prod(network.shapes[name]):
            raise InvalidSpec(
                f"the table places tensor {name!r} in part: {count} edges for "
                f"{math.prod(network.shapes[name])} elements",
                expected="every element of a tensor to be one edge",
                remedy="name every part of a cut",
            )
