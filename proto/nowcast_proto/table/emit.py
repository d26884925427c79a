"""From measured links to ranges of numbered neurons and blocks of edges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nowcast_proto.errors import InvalidSpec, UnsupportedArchitecture
from nowcast_proto.table.elements import Diagonal, Heads, Residual, Spread, Table, Vector, Weight
from nowcast_proto.table.expand import Expanded, Link, Network, expand
from nowcast_proto.table.measure import Sizes, matrix
from nowcast_proto.wiring import LinkKind, WiringBlock


@dataclass(frozen=True, slots=True)
class PlacedRange:
    """A range of neurons where it lies.

    Attributes:
        name: Its name in the table, or, for the single node that a 1-D tensor adds, ``#`` and the tensor's name.
        first: First node.
        size: Number of nodes.
        group: Ranges of one group belong to one step of the network.
        feeds: It feeds the group, rather than being one of its results.
        ordered: Its neurons have places of their own inside a head.
    """

    name: str
    first: int
    size: int
    group: int
    feeds: bool
    ordered: bool = False


@dataclass(frozen=True, slots=True)
class PlacedBlock:
    """A block with what the table calls it.

    Attributes:
        label: The parameter, a part of it or an auxiliary link.
        block: The block.
        transposed: Rows and columns of a tensor whose transpose fills the edges, row by row, in place of strides.
    """

    label: str
    block: WiringBlock
    transposed: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Wired:
    """What a table makes of one network.

    Attributes:
        ranges: All neurons, in order.
        blocks: All edges but self-loops, in the table's order.
        roles: Parameter -> the part it plays, where a rule speaks of it.
        unplaced: Parameter -> why it is not in the graph.
    """

    ranges: tuple[PlacedRange, ...]
    blocks: tuple[PlacedBlock, ...]
    roles: dict[str, str]
    unplaced: dict[str, str]


def wire(
    elements: Table, network: Network, *, unplaced: dict[str, str] | None = None, max_features: int | None = None
) -> Wired:
    """Wire a network by a table.

    Args:
        elements: The table.
        network: The network.
        unplaced: Tensors that are to have no place, and why.
        max_features: Kernel positions that are let in; kernels with more have no place. None for all.

    Raises:
        InvalidSpec: A tensor the table needs is missing, contradicts another, or heads do not divide it.
        UnsupportedArchitecture: No parameter found a place, or the table places no neurons for one that did.
    """
    expanded = expand(elements, network)
    sizes = Sizes(network, dict(unplaced or {}), max_features)
    for link in expanded.links:
        sizes.measure(link)
    links = [link for link in expanded.links if sizes.keep(link)]
    ranges = _number(links, expanded, sizes, network)
    emit = _Emitter(sizes, network, {range_.name: range_.first for range_ in ranges})
    blocks = tuple(block for link in links for block in emit.blocks(link))
    for name, shape in network.shapes.items():
        if name not in expanded.roles:
            reason = "a scalar belongs to no neuron" if not shape else f"no rule of {network.kind} for this name"
            sizes.unplaced.setdefault(name, reason)
    if len(sizes.unplaced) == len(network.shapes):
        reasons = [f"{name}: {sizes.unplaced[name]}" for name in list(network.shapes)[:3]]
        raise UnsupportedArchitecture(
            f"no parameter of this network has a place in a graph of {network.kind}",
            expected=f"tensor names and shapes of {network.kind}",
            remedy="check the family; " + "; ".join(reasons),
        )
    return Wired(tuple(ranges), blocks, expanded.roles, sizes.unplaced)


def _number(links: list[Link], expanded: Expanded, sizes: Sizes, network: Network) -> list[PlacedRange]:
    """Place every range that carries a weight, in layout order."""
    used: dict[str, None] = {}  # in order of first use
    own: dict[str, list[str]] = {}  # range -> nodes that 1-D tensors add beside it
    weighted = {end.partition(":")[0] for link in links if link.parameter for end in link.ends}
    for link in links:
        ranges = [end.partition(":")[0] for end in link.ends]
        # Auxiliary links exist only between neurons that weights reach; a node per head is its own reason.
        if link.parameter or ranges[1] in weighted:
            for range_ in ranges if link.parameter or isinstance(link.element, Heads) else ():
                used.setdefault(range_)
        if isinstance(link.element, Vector):
            own.setdefault(ranges[1], []).append(ranges[0])
    ordered = {link.ends[1] for link in links if isinstance(link.element, Heads) and link.element.ordered}
    rank = {range_: position for position, range_ in enumerate(used)}
    placed: dict[str, PlacedRange] = {}
    nodes = 0
    for number, (ranges, fed_by) in enumerate(expanded.layout):
        group = [range_ for range_ in ranges if range_ not in expanded.same]
        feeders = {feeder for feeder in fed_by if feeder not in expanded.same}
        feeders |= {node for range_ in (*group, *feeders) for node in own.get(range_, ())}
        for range_ in (*sorted(feeders & rank.keys(), key=rank.__getitem__), *group):
            if range_ in rank and range_ not in placed:
                size = sizes.of(range_)
                placed[range_] = PlacedRange(range_, nodes, size, number, range_ in feeders, range_ in ordered)
                nodes += size
    unplaced = [range_ for range_ in used if range_ not in placed]
    if unplaced:
        raise UnsupportedArchitecture(
            f"the table of {network.kind} places no neurons for range {unplaced[0]!r}",
            remedy="add a Neurons element for it",
        )
    return list(placed.values())


class _Emitter:
    """Writes links as blocks."""

    def __init__(self, sizes: Sizes, network: Network, offsets: dict[str, int]) -> None:
        self.sizes, self.network, self.offsets = sizes, network, offsets

    def blocks(self, link: Link) -> Iterator[PlacedBlock]:
        """The blocks of one link, none where it joins ranges that do not exist."""
        element = link.element
        if any(end.partition(":")[0] not in self.offsets for end in link.ends):
            return
        match element:
            case Weight():
                yield from self._weight(link, element)
            case Vector():
                yield from self._vector(link, element)
            case Diagonal():
                size = math.prod(link.shape)
                ends = [self._start(end, size) for end in link.ends]
                block = WiringBlock(
                    type=element.type, parameter=link.parameter, diagonal=True, source_stride=1,
                    source=ends[0], n_sources=size, target=ends[1], n_targets=size,
                )  # fmt: skip
                yield PlacedBlock(link.label, block)
            case Residual():
                source, target = (self.offsets[end] for end in link.ends)
                yield _link(link.label, "residual", source, target, self._equal(link))
            case Heads():
                heads = self.network.count(element.count)
                size = self._per_head(self.sizes.of(link.ends[1]), heads, link)
                first = self._start(link.ends[0], heads)
                for head in range(heads):
                    target = self.offsets[link.ends[1]] + head * size
                    yield _link(f"{link.label}{head}", "head", first + head, target, size)
            case Spread():
                yield from self._spread(link, element)

    def _weight(self, link: Link, element: Weight) -> Iterator[PlacedBlock]:
        source, target, features = self.sizes.axes(link, element)
        start_s, start_t = self._start(link.ends[0], source.size), self._start(link.ends[1], target.size)
        width = self.sizes.of(link.ends[0].partition(":")[0])

        def block(
            first_s: int, n_s: int, first_t: int, n_t: int, offset: int, *, steps: tuple[int, ...]
        ) -> WiringBlock:
            return WiringBlock(
                type=element.type, parameter=link.parameter, offset=offset,
                source=start_s + first_s, n_sources=n_s, target=start_t + first_t, n_targets=n_t,
                source_stride=steps[0], target_stride=steps[1], feature_stride=steps[2], features=steps[3],
            )  # fmt: skip

        whole = (source.stride, target.stride, 1, features)
        if element.transposed:
            rows, columns = matrix(link.shape, element)
            yield PlacedBlock(link.label, block(0, source.size, 0, target.size, 0, steps=whole), (rows, columns))
        elif element.flattened and source.size > width:  # channel-major pixels: each channel's are one edge's features
            pixels = source.size // width
            steps = (pixels * source.stride, target.stride, source.stride, pixels)
            yield PlacedBlock(link.label, block(0, width, 0, target.size, 0, steps=steps))
        elif element.grouped and source.size == 1 and target.size == width > 1:
            depthwise = WiringBlock(
                type=element.type, parameter=link.parameter, diagonal=True, source=start_s, n_sources=width,
                target=start_t, n_targets=width, source_stride=target.stride, features=features,
            )  # fmt: skip
            yield PlacedBlock(link.label, depthwise)
        elif element.grouped and source.size < width:
            groups = width // source.size
            n = target.size // groups
            for group in range(groups):
                part = block(group * source.size, source.size, group * n, n, group * n * target.stride, steps=whole)
                yield PlacedBlock(f"{link.label}[{group}]", part)
        else:
            for label, from_s, n_s, off_s in source.runs(link.label):
                for label_t, from_t, n_t, off_t in target.runs(label):
                    yield PlacedBlock(label_t, block(from_s, n_s, from_t, n_t, off_s + off_t, steps=whole))

    def _vector(self, link: Link, element: Vector) -> Iterator[PlacedBlock]:
        axis = self.sizes.vector_axis(link, element)
        if axis is None:
            return
        node, neurons = (self.offsets[end] for end in link.ends)
        for label, first, size, offset in axis.runs(link.label):
            ends = (neurons + first, size, node, 1) if element.reverse else (node, 1, neurons + first, size)
            block = WiringBlock(
                type=element.type, parameter=link.parameter, offset=offset, source_stride=1, target_stride=1,
                source=ends[0], n_sources=ends[1], target=ends[2], n_targets=ends[3],
            )  # fmt: skip
            yield PlacedBlock(label, block)

    def _spread(self, link: Link, element: Spread) -> Iterator[PlacedBlock]:
        few, many = self.network.count(element.few), self.network.count(element.many)
        if link.ends[0] == link.ends[1]:
            return
        size = self._per_head(self.sizes.of(link.ends[0]), few, link)
        if many % few or self.sizes.of(link.ends[1]) != size * many:
            raise InvalidSpec(
                f"{link.label!r}: {few} heads of {size} neurons do not match {many} heads over "
                f"{self.sizes.of(link.ends[1])} neurons",
                expected="heads of one size",
                remedy="check num_heads, num_kv_heads and head_dim against the network",
            )
        for head in range(many):
            shared = self.offsets[link.ends[0]] + head // (many // few) * size
            query = self.offsets[link.ends[1]] + head * size
            source, target = (query, shared) if element.fold else (shared, query)
            yield _link(f"{link.label}{head}", "residual", source, target, size)

    def _start(self, end: str, size: int) -> int:
        """First node of an end, given how many neurons its tensor has there."""
        range_, _, part = end.partition(":")
        start, known = self.offsets[range_], self.sizes.of(range_)
        if part == "last":
            start += known - size
            if start < 0:
                raise InvalidSpec(f"{size} neurons end at range {range_!r}", expected=f"at most {start + size}")
        elif part == "next":
            start += size
        elif part == "first" and size > known:
            raise InvalidSpec(
                f"{size} neurons are taken from {known} (range {range_!r})",
                expected=f"at most {known}",
                remedy="check num_kv_heads and the shapes of the key tensors",
            )
        return start

    def _equal(self, link: Link) -> int:
        source, target = (self.sizes.of(end) for end in link.ends)
        if source != target:
            raise InvalidSpec(
                f"tensor {self.sizes.origin(link.ends[1])!r} has {target} neurons on the residual stream",
                expected=f"{source}, as {self.sizes.origin(link.ends[0])!r} has",
                remedy="check the shapes against the network",
            )
        return source

    def _per_head(self, neurons: int, heads: int, link: Link) -> int:
        origin = self.sizes.origin(link.ends[1])
        if neurons % heads:
            raise InvalidSpec(
                f"tensor {origin!r} has {neurons} neurons, which {heads} heads do not divide",
                expected=f"a multiple of {heads}",
                remedy="check num_heads and num_kv_heads against the network",
            )
        size = neurons // heads
        if self.network.head_dim is not None and size != self.network.head_dim:
            raise InvalidSpec(
                f"tensor {origin!r} has {neurons} neurons, so {heads} heads have {size} each",
                expected=f"head_dim={self.network.head_dim}",
                remedy="check num_heads, num_kv_heads and head_dim against the network",
            )
        return size


def _link(label: str, type_: LinkKind, source: int, target: int, size: int) -> PlacedBlock:
    """A link without weights: one to one, or from a head's node to all neurons of the head."""
    head = type_ == "head"
    block = WiringBlock(
        type=type_, source=source, n_sources=1 if head else size, target=target, n_targets=size, diagonal=not head
    )
    return PlacedBlock(label, block)
