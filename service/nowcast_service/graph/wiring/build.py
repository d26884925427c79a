"""From an architecture spec to its neural graph: the wiring code all families share.

NiNo paper, section 3.2 and appendix A: neurons are nodes, weights are edges. A family's table is expanded for the
layers a spec has, every end of a link gets the neurons its tensor says it has, ranges are numbered in layout order,
and each link becomes one block (a few, where heads or groups cut it). Nothing here is proportional to the number of
edges, so the graph of a billion-parameter network is built in well under a second.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from nowcast_proto.errors import InvalidSpec, UnsupportedArchitecture
from nowcast_proto.spec import ArchitectureSpec, Wiring

from nowcast_service.graph.blocks import Block, Coverage, EdgeType, NeuralGraph, Range, View
from nowcast_service.graph.declared import declared_family
from nowcast_service.graph.families import FAMILIES
from nowcast_service.graph.table import (
    Cut,
    Diagonal,
    Element,
    Family,
    Heads,
    Neurons,
    Residual,
    Same,
    Size,
    Spread,
    Stack,
    Vector,
    Weight,
)

Uncovered = Literal["left", "edgewise"]

LINK_FEATURE = 1.0
"""Feature of residual and head links, set after scaling (NiNo paper, appendix A)."""
SELF_LOOP_FEATURE = 2.0

_TEMPLATE = re.compile(r"\{(\w+)(#?)([+-]\d+)?\}")


def build_graph(
    spec: ArchitectureSpec, *, max_features: int = 9, uncovered: Uncovered = "left", family: Family | None = None
) -> NeuralGraph:
    """Build the neural graph of an architecture.

    Args:
        spec: The architecture; ``spec.wiring`` picks the wiring, the family's own default otherwise.
        max_features: Kernel positions the checkpoint takes per edge; larger kernels stay out of the graph.
        uncovered: What the coverage says of parameters outside the graph: ``left`` untouched, or for the
            ``edgewise`` predictor.
        family: A table of your own, instead of the one the spec carries or ``spec.family`` names.

    Returns:
        The graph; ``coverage`` has one entry per parameter, in order.

    Raises:
        UnsupportedArchitecture: No such family or wiring, or no parameter found a place in the graph.
        InvalidSpec: A tensor the family needs is missing, has a shape that contradicts another, or the heads are not
            given or do not divide a tensor.
    """
    if family is None and spec.table is not None:
        family = declared_family(spec)
    family = family or FAMILIES.get(spec.family)
    if family is None:
        raise UnsupportedArchitecture(
            f"family {spec.family!r} is not known",
            expected=f"one of {', '.join(sorted(FAMILIES))}",
            remedy="name the family whose tensor names the network uses, give the spec a table of its own, or use a "
            "predictor that needs no graph",
            detail={"families": sorted(FAMILIES)},
        )
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
    return _Builder(spec, family, wiring, max_features, uncovered).build()


@dataclass(frozen=True, slots=True)
class _Link:
    """An element of a table with its templates filled in."""

    element: Weight | Vector | Diagonal | Heads | Residual | Spread
    label: str
    ends: tuple[str, ...]  # source, target; a vector has its own node and the range
    parameter: str | None = None
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Axis:
    """One axis of a link's tensor: where its elements lie, part of a fused axis allowed for."""

    size: int
    stride: int
    offset: int = 0
    run: int = 0  # elements side by side before a jump (fused head by head); 0 where there is no jump
    jump: int = 0  # elements from the start of one run to the next


class _Builder:
    def __init__(
        self, spec: ArchitectureSpec, family: Family, wiring: Wiring, max_features: int, uncovered: Uncovered
    ) -> None:
        self.spec, self.family, self.wiring = spec, family, wiring
        self.max_features, self.uncovered = max_features, uncovered
        self.shapes = spec.shapes()
        self.heads = spec.num_heads or 1
        self.kv_heads = spec.kv_heads or 1
        self.roots = (*family.roots, "")
        self.links: list[_Link] = []
        self.layout: list[tuple[list[str], set[str]]] = []
        self.same: dict[str, str] = {}
        self.sizes: dict[str, tuple[int, str]] = {}  # range -> neurons, tensor that said so
        self.roles: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def build(self) -> NeuralGraph:
        table = self.family.wirings[self.wiring]
        if callable(table):
            expansion = table(self.spec)
            table = expansion.elements
            self.reasons.update(expansion.unplaced)
        self._expand(table, {}, None)
        self._apply_same()
        for link in self.links:
            self._measure(link)
        self.links = [link for link in self.links if self._keep(link)]
        ranges = self._number()
        offsets = {range_.name: range_.first for range_ in ranges}
        n_nodes = sum(range_.size for range_ in ranges)
        blocks = [block for link in self.links for block in self._blocks(link, offsets)]
        if self.spec.table is not None:
            self._check_placed(blocks)
        coverage = tuple(self._coverage())
        if not any(entry.rule == "graph" for entry in coverage):
            raise UnsupportedArchitecture(
                f"no parameter of this network has a place in a {self.family.name!r} graph",
                expected=f"tensor names and shapes of family {self.family.name!r}",
                remedy="check the family; " + "; ".join(f"{c.parameter}: {c.reason}" for c in coverage[:3]),
            )
        blocks.append(Block("self_loop", EdgeType.SELF_LOOP, 0, n_nodes, 0, n_nodes, SELF_LOOP_FEATURE, diagonal=True))
        tokens = [b.n_sources for b in blocks if b.edge_type is EdgeType.TOKEN_EMBEDDING and b.source == 0]
        return NeuralGraph(
            self.spec, n_nodes, tuple(blocks), max(tokens, default=0), coverage, self.wiring, tuple(ranges)
        )

    # Expanding the table --------------------------------------------------------------------------------------------

    def _expand(self, elements: tuple[Element, ...], env: dict[str, str], prefix: str | None) -> None:
        # Layers first: a tensor listed before its stack may belong to the neurons after the last layer.
        layers = {element: self._layers(element, env, prefix) for element in elements if isinstance(element, Stack)}
        env.update({stack.count: str(len(found)) for stack, found in layers.items()})
        for element in elements:
            match element:
                case Stack():
                    for number, (written, start) in enumerate(layers[element]):
                        # A copy, so that the counts of inner stacks stay with their layer.
                        inside = {**env, element.var: str(number), f"{element.var}#": written}
                        self._expand(element.elements, inside, start)
                case Neurons():
                    ranges = [_fill(name, env) for name in element.ranges]
                    self.layout.append((ranges, {_fill(name, env) for name in element.fed_by}))
                case Same():
                    apart = element.when == "mha" and self.heads != self.kv_heads
                    if not apart and not self._has(element.unless, env, prefix):
                        self.same[_fill(element.alias, env)] = _fill(element.range, env)
                case Weight() | Vector() | Diagonal():
                    self._expand_tensor(element, env, prefix)
                case Heads():
                    ends = (_fill(element.heads, env), _fill(element.target, env))
                    self.links.append(_Link(element, (prefix or "") + _fill(element.label, env), ends))
                case Residual() | Spread():
                    if isinstance(element, Residual) and (
                        self._has(element.unless, env, prefix)
                        or (element.given is not None and not self._has(element.given, env, prefix))
                    ):
                        continue
                    ends = (_fill(element.source, env), _fill(element.target, env))
                    self.links.append(_Link(element, (prefix or "") + _fill(element.label, env), ends))

    def _layers(self, stack: Stack, env: dict[str, str], prefix: str | None) -> list[tuple[str, str]]:
        """Index as written and start of the tensor names of every layer, in order."""
        roots = "|".join(re.escape(root) for root in self.roots) if prefix is None else re.escape(prefix)
        pattern = re.compile(f"(?:{roots}){_fill(stack.find, env)}")
        found: dict[tuple[int, ...], tuple[str, str]] = {}
        for name in self.shapes:
            match = pattern.match(name)
            if match:
                key = tuple(int(index) for index in match.groups())
                start = match.group(0) if stack.relative else (prefix or "")
                found.setdefault(key, (".".join(match.groups()), start))
        if not found and stack.required:
            raise InvalidSpec(
                f"family {self.family.name!r} finds no layer in this network",
                expected=f"tensors whose names match {stack.find!r}, as in {self.family.name!r} networks",
                remedy=f"check the family; the first tensor is {self.spec.parameters[0].name!r}",
            )
        return [found[key] for key in sorted(found)]

    def _expand_tensor(self, element: Weight | Vector | Diagonal, env: dict[str, str], prefix: str | None) -> None:
        names = _fill(element.tensor, env).split("|")
        candidates = self._candidates(names, prefix)
        parameter = next((name for name in candidates if name in self.shapes), None)
        if parameter is None:
            if element.required:
                raise InvalidSpec(
                    f"tensor {candidates[0]!r} is missing",
                    expected=f"a {self.family.name!r} network to have it",
                    remedy="list every parameter in the spec, or name the family the network belongs to",
                )
            return
        label = parameter
        if element.label is not None:
            label = parameter.removesuffix(next(n for n in names if parameter.endswith(n))) + _fill(element.label, env)
        target = _fill(element.target, env)
        ends = (f"#{label}", target) if isinstance(element, Vector) else (_fill(element.source, env), target)
        shape = self.shapes[parameter]
        self.links.append(_Link(element, label, ends, parameter, shape, _strides(shape)))
        self.roles.setdefault(parameter, _role(element))

    def _candidates(self, names: list[str], prefix: str | None) -> list[str]:
        return [root + name for name in names for root in ((prefix,) if prefix is not None else self.roots)]

    def _has(self, tensor: str | None, env: dict[str, str], prefix: str | None) -> bool:
        if tensor is None:
            return False
        return any(name in self.shapes for name in self._candidates(_fill(tensor, env).split("|"), prefix))

    def _apply_same(self) -> None:
        def name(end: str) -> str:
            range_, colon, part = end.partition(":")
            passed = {range_}
            while range_ in self.same:
                range_ = self.same[range_]
                if range_ in passed:
                    raise InvalidSpec(
                        f"the table calls range {range_!r} another name of itself",
                        expected="aliases that end at a range",
                        remedy="take one of its 'same' elements away",
                    )
                passed.add(range_)
            return range_ + colon + part

        self.links = [replace(link, ends=tuple(name(end) for end in link.ends)) for link in self.links]

    # Sizes ----------------------------------------------------------------------------------------------------------

    def _measure(self, link: _Link) -> None:
        """Take the sizes of ranges from the tensor, and check that they agree with what other tensors said."""
        element = link.element
        if isinstance(element, Heads):
            self._bind(link.ends[0], self._count(element.count), link.label)
        elif isinstance(element, Vector):
            axis = self._vector_axis(link, element)
            if axis is not None:
                self._bind(link.ends[0], 1, link.label)
                self._bind(link.ends[1], axis.size, link.label)
        elif isinstance(element, Weight):
            shape = _matrix(link.shape, element)
            if len(shape) < 2:
                self._wrong_shape(link, "two or more axes")
            source, target, features = self._axes(link, element)
            self._bind(link.ends[1], target.size, link.label)
            width = self.sizes.get(link.ends[0], (source.size, ""))[0]
            grouped = element.grouped and width != source.size and width % source.size == 0
            pixels = element.flattened and width != source.size and source.size % width == 0
            if grouped and target.size % (width // source.size):
                self._wrong_shape(link, f"a multiple of {width // source.size} groups of outputs")
            if not grouped and not pixels:
                self._bind(link.ends[0], source.size, link.label)
            positions = source.size // width if pixels else features
            if positions > self.max_features:
                self._uncover(link, f"{positions} kernel positions, the checkpoint takes {self.max_features}")

    def _bind(self, end: str, size: int, label: str) -> None:
        range_, _, part = end.partition(":")
        if part:
            return
        known, origin = self.sizes.setdefault(range_, (size, label))
        if known != size:
            raise InvalidSpec(
                f"tensor {label!r} has {size} neurons on the side it shares with {origin!r}",
                expected=f"{known}, as {origin!r} has",
                remedy="check the shapes, and num_heads, num_kv_heads and head_dim, against the network",
            )

    def _count(self, size: Size) -> int:
        return {"H": self.heads, "K": self.kv_heads}[size] if isinstance(size, str) else size

    def _vector_axis(self, link: _Link, element: Vector) -> _Axis | None:
        shape = _squeeze(link.shape)
        if len(shape) > 1 or (link.shape == () and element.required):
            self._wrong_shape(link, "one axis")
        if link.shape == ():
            self._uncover(link, "a scalar belongs to no neuron")
            return None
        return self._cut(_Axis(math.prod(shape), 1), element.cut, link)

    def _axes(self, link: _Link, element: Weight) -> tuple[_Axis, _Axis, int]:
        """Source axis, target axis and kernel positions of a weight."""
        shape = _matrix(link.shape, element)
        strides = _strides(shape)
        axes = [_Axis(shape[0], strides[0]), _Axis(shape[1], strides[1])]
        if element.cut is not None:
            axes[element.cut.axis] = self._cut(axes[element.cut.axis], element.cut, link)
        target, source = axes if element.stored == "ts" else reversed(axes)
        return source, target, math.prod(shape[2:])

    def _cut(self, axis: _Axis, cut: Cut | None, link: _Link) -> _Axis:
        if cut is None:
            return axis
        ratio = [self._count(part) for part in cut.ratio]
        parts = sum(ratio) * (self.heads if cut.per_head else 1)
        if axis.size % parts:
            self._wrong_shape(link, f"an axis of {axis.size} that is a multiple of {parts} parts")
        unit = axis.size // parts
        before, size = sum(ratio[: cut.index]) * unit, ratio[cut.index] * unit
        if cut.per_head:
            return _Axis(size * self.heads, axis.stride, before * axis.stride, size, sum(ratio) * unit)
        return _Axis(size, axis.stride, before * axis.stride)

    def _wrong_shape(self, link: _Link, expected: str) -> None:
        raise InvalidSpec(
            f"tensor {link.parameter!r} has shape {list(link.shape)}",
            expected=expected,
            remedy=f"check the shape against a {self.family.name!r} network",
        )

    # What stays -----------------------------------------------------------------------------------------------------

    def _uncover(self, link: _Link, reason: str) -> None:
        if link.parameter is not None:
            self.reasons.setdefault(link.parameter, reason)

    def _keep(self, link: _Link) -> bool:
        """Drop links of tensors outside the graph, and parts of ranges that do not exist."""
        if link.parameter in self.reasons:
            return False
        if isinstance(link.element, Diagonal):
            size = math.prod(link.shape)
            for end in link.ends:
                range_, _, part = end.partition(":")
                known = self.sizes.get(range_, (0, ""))[0]
                needed = 2 * size if part == "next" else size
                if len(_squeeze(link.shape)) != 1 or needed > known or (not part and size != known):
                    self._uncover(link, f"{size} elements do not fit the {known} neurons it would join")
                    return False
        return True

    def _number(self) -> list[Range]:
        """Place every range that carries a weight, in layout order."""
        used: dict[str, None] = {}  # in order of first use
        own: dict[str, list[str]] = {}  # range -> nodes that 1-D tensors add beside it
        weighted = {end.partition(":")[0] for link in self.links if link.parameter for end in link.ends}
        for link in self.links:
            ranges = [end.partition(":")[0] for end in link.ends]
            # Auxiliary links exist only between neurons that weights reach; a node per head is its own reason.
            if link.parameter or ranges[1] in weighted:
                for range_ in ranges if link.parameter or isinstance(link.element, Heads) else ():
                    used.setdefault(range_)
            if isinstance(link.element, Vector):
                own.setdefault(ranges[1], []).append(ranges[0])
        ordered = {link.ends[1] for link in self.links if isinstance(link.element, Heads) and link.element.ordered}
        rank = {range_: position for position, range_ in enumerate(used)}
        placed: dict[str, Range] = {}
        nodes = 0
        for number, (ranges, fed_by) in enumerate(self.layout):
            group = [range_ for range_ in ranges if range_ not in self.same]
            feeders = {feeder for feeder in fed_by if feeder not in self.same}
            feeders |= {node for range_ in (*group, *feeders) for node in own.get(range_, ())}
            for range_ in (*sorted(feeders & rank.keys(), key=rank.__getitem__), *group):
                if range_ in rank and range_ not in placed:
                    size = self.sizes[range_][0]
                    placed[range_] = Range(range_, nodes, size, number, range_ in feeders, range_ in ordered)
                    nodes += placed[range_].size
        unplaced = [range_ for range_ in used if range_ not in placed]
        if unplaced:
            raise UnsupportedArchitecture(
                f"the table of family {self.family.name!r} places no neurons for range {unplaced[0]!r}",
                remedy="add a Neurons element for it",
            )
        return list(placed.values())

    # Blocks ---------------------------------------------------------------------------------------------------------

    def _blocks(self, link: _Link, offsets: dict[str, int]) -> Iterator[Block]:
        element = link.element
        if any(end.partition(":")[0] not in offsets for end in link.ends):
            return
        match element:
            case Weight():
                yield from self._weight_blocks(link, element, offsets)
            case Vector():
                yield from self._vector_blocks(link, element, offsets)
            case Diagonal():
                size = math.prod(link.shape)
                source, target = (self._start(end, size, offsets) for end in link.ends)
                view = View(str(link.parameter), 0, 1, 0)
                yield Block(link.label, element.edge_type, source, size, target, size, view, diagonal=True)
            case Residual():
                size = self._equal(link)
                source, target = (offsets[end] for end in link.ends)
                yield Block(link.label, EdgeType.RESIDUAL, source, size, target, size, LINK_FEATURE, diagonal=True)
            case Heads():
                heads = self._count(element.count)
                size = self._per_head(self.sizes[link.ends[1]][0], heads, link)
                first = self._start(link.ends[0], heads, offsets)
                for head in range(heads):
                    source, target = first + head, offsets[link.ends[1]] + head * size
                    yield Block(f"{link.label}{head}", EdgeType.HEAD, source, 1, target, size, LINK_FEATURE)
            case Spread():
                yield from self._spread_blocks(link, element, offsets)

    def _weight_blocks(self, link: _Link, element: Weight, offsets: dict[str, int]) -> Iterator[Block]:
        source, target, features = self._axes(link, element)
        start_s = self._start(link.ends[0], source.size, offsets)
        start_t = self._start(link.ends[1], target.size, offsets)
        width = self.sizes[link.ends[0].partition(":")[0]][0]
        name, kind = str(link.parameter), element.edge_type
        if element.transposed:
            rows, columns = _matrix(link.shape, element)
            view = View(name, 0, source.stride, target.stride, transposed=(rows, columns))
            yield Block(link.label, kind, start_s, source.size, start_t, target.size, view)
        elif element.flattened and source.size > width:  # channel-major pixels: each channel's are one edge's features
            pixels = source.size // width
            view = View(name, 0, pixels * source.stride, target.stride, source.stride, pixels)
            yield Block(link.label, kind, start_s, width, start_t, target.size, view)
        elif element.grouped and source.size == 1 and target.size == width > 1:
            view = View(name, 0, target.stride, 0, 1, features)
            yield Block(link.label, kind, start_s, width, start_t, width, view, diagonal=True)
        elif element.grouped and source.size < width:
            groups = width // source.size
            outputs = target.size // groups
            for group in range(groups):
                view = View(name, group * outputs * target.stride, source.stride, target.stride, 1, features)
                first_s, first_t = start_s + group * source.size, start_t + group * outputs
                yield Block(f"{link.label}[{group}]", kind, first_s, source.size, first_t, outputs, view)
        else:
            for label, from_s, n_s, off_s in _runs(link.label, source):
                for label_t, from_t, n_t, off_t in _runs(label, target):
                    view = View(name, off_s + off_t, source.stride, target.stride, 1, features)
                    yield Block(label_t, kind, start_s + from_s, n_s, start_t + from_t, n_t, view)

    def _vector_blocks(self, link: _Link, element: Vector, offsets: dict[str, int]) -> Iterator[Block]:
        axis = self._vector_axis(link, element)
        if axis is None:
            return
        node, neurons = (offsets[end] for end in link.ends)
        for label, first, size, offset in _runs(link.label, axis):
            view = View(str(link.parameter), offset, 1, 1)
            if element.reverse:
                yield Block(label, element.edge_type, neurons + first, size, node, 1, view)
            else:
                yield Block(label, element.edge_type, node, 1, neurons + first, size, view)

    def _spread_blocks(self, link: _Link, element: Spread, offsets: dict[str, int]) -> Iterator[Block]:
        few, many = self._count(element.few), self._count(element.many)
        if link.ends[0] == link.ends[1]:
            return
        size = self._per_head(self.sizes[link.ends[0]][0], few, link)
        if many % few or self.sizes[link.ends[1]][0] != size * many:
            raise InvalidSpec(
                f"{link.label!r}: {few} heads of {size} neurons do not match {many} heads over "
                f"{self.sizes[link.ends[1]][0]} neurons",
                expected="heads of one size",
                remedy="check num_heads, num_kv_heads and head_dim against the network",
            )
        for head in range(many):
            shared = offsets[link.ends[0]] + head // (many // few) * size
            query = offsets[link.ends[1]] + head * size
            source, target = (query, shared) if element.fold else (shared, query)
            yield Block(
                f"{link.label}{head}", EdgeType.RESIDUAL, source, size, target, size, LINK_FEATURE, diagonal=True
            )

    def _check_placed(self, blocks: list[Block]) -> None:
        """Every element of a placed tensor is one edge, which a table that came from outside may get wrong."""
        placed: dict[str, int] = {}
        for block in blocks:
            if isinstance(block.values, View):
                name = block.values.parameter
                placed[name] = placed.get(name, 0) + block.n_edges * block.features
        parts = Counter((link.parameter, getattr(link.element, "cut", None)) for link in self.links if link.parameter)
        twice = next((name for (name, _), times in parts.items() if times > 1), None)
        for name, elements in placed.items():
            if name == twice or elements != math.prod(self.shapes[name]):
                raise InvalidSpec(
                    f"the table places tensor {name!r} {'twice' if name == twice else 'in part'}: {elements} edges for "
                    f"{math.prod(self.shapes[name])} elements",
                    expected="every element of a tensor to be one edge",
                    remedy="name the tensor once, or once for each part of a cut",
                )

    def _start(self, end: str, size: int, offsets: dict[str, int]) -> int:
        """First node of an end, given how many neurons its tensor has there."""
        range_, _, part = end.partition(":")
        start, known = offsets[range_], self.sizes[range_][0]
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

    def _equal(self, link: _Link) -> int:
        source, target = (self.sizes[end] for end in link.ends)
        if source[0] != target[0]:
            raise InvalidSpec(
                f"tensor {target[1]!r} has {target[0]} neurons on the residual stream",
                expected=f"{source[0]}, as {source[1]!r} has",
                remedy="check the shapes against the network",
            )
        return source[0]

    def _per_head(self, neurons: int, heads: int, link: _Link) -> int:
        origin = self.sizes[link.ends[1]][1] or link.label
        if neurons % heads:
            raise InvalidSpec(
                f"tensor {origin!r} has {neurons} neurons, which {heads} heads do not divide",
                expected=f"a multiple of {heads}",
                remedy="check num_heads and num_kv_heads against the network",
            )
        size = neurons // heads
        if self.spec.head_dim is not None and size != self.spec.head_dim:
            raise InvalidSpec(
                f"tensor {origin!r} has {neurons} neurons, so {heads} heads have {size} each",
                expected=f"head_dim={self.spec.head_dim}",
                remedy="check num_heads, num_kv_heads and head_dim against the network",
            )
        return size

    # Coverage -------------------------------------------------------------------------------------------------------

    def _coverage(self) -> Iterator[Coverage]:
        for parameter in self.spec.parameters:
            role = self.roles.get(parameter.name)
            reason = self.reasons.get(parameter.name, "")
            if not reason and role is None:
                reason = "a scalar belongs to no neuron" if not parameter.shape else self._unknown(parameter.name)
            yield Coverage(parameter.name, self.uncovered if reason else "graph", role, reason)

    def _unknown(self, name: str) -> str:
        return f"no rule of family {self.family.name!r} for this name"


def _fill(template: str, env: dict[str, str]) -> str:
    """Fill ``{i}``, ``{i+1}`` and ``{i#}`` in a template."""

    def value(match: re.Match[str]) -> str:
        name, raw, step = match.groups()
        if name + raw not in env:
            return match.group(0)  # a quantifier of a regular expression
        return env[name + raw] if not step else str(int(env[name]) + int(step))

    return _TEMPLATE.sub(value, template)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without leading axes of size one, but never without any axis."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _matrix(shape: tuple[int, ...], element: Weight) -> tuple[int, ...]:
    """A batch axis of size one before an embedding dropped: positions are often (1, positions, width).

    Embeddings alone are stored by source; a 1-D convolution with one output is (1, inputs, positions) too.
    """
    return shape[1:] if element.stored == "st" and len(shape) == 3 and shape[0] == 1 else shape


def _runs(label: str, axis: _Axis) -> Iterator[tuple[str, int, int, int]]:
    """Label, first neuron, neurons and element offset of each stretch of an axis without a jump."""
    if not axis.run:
        yield label, 0, axis.size, axis.offset
        return
    for number in range(axis.size // axis.run):
        yield f"{label}[{number}]", number * axis.run, axis.run, axis.offset + number * axis.jump * axis.stride


def _role(element: Weight | Vector | Diagonal) -> str:
    return element.edge_type.name.lower().replace("other", "bias" if isinstance(element, Vector) else "other")
