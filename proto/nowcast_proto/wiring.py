"""A network's wiring, written out: ranges of neurons, and blocks of edges between them.

Where no published wiring exists for a network, its spec carries this. It is linear in the number of tensors (a dense
layer is one block, whatever its size), holds numbers and names and nothing to be evaluated, and is checked in linear
time. Which neurons may change places follows from it alone: those that every block takes together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_RANGES = 100_000
"""Cap on ranges; a transformer of a hundred layers has some thousand."""
MAX_BLOCKS = 100_000
"""Cap on blocks; one of a hundred layers with sixty-four heads has some thirty thousand, one for each head or so."""
MAX_NODES_PER_ELEMENT = 16
"""Cap on neurons, as a multiple of the network's elements (and a thousand more)."""
MAX_USES = 256
"""Cap on the edges of a parameter as a multiple of its elements, and on links without weights of the neurons."""
_SPARE = 1024
_SIZE = 2**48

WeightKind = Literal[
    "linear", "other", "conv", "norm", "token_embedding", "position_embedding", "query", "key", "value"
]
"""Types of edges that carry weights."""
LinkKind = Literal["residual", "tie", "head"]
"""Types of edges that carry none: neurons that are added, neurons that are one and the same, neurons of one head."""
WEIGHT_KINDS: frozenset[str] = frozenset(get_args(WeightKind))

Label = Annotated[str, Field(min_length=1, max_length=512)]
_Count = Annotated[int, Field(ge=1, lt=_SIZE)]
_Place = Annotated[int, Field(ge=0, lt=_SIZE)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WiringRange(_Part):
    """Neurons side by side that play one part.

    Attributes:
        name: What to call it.
        size: Number of neurons.
        fixed: The outside knows these neurons by their place (inputs, outputs, tokens, positions).
        ordered: They have places of their own inside their head (rotary pairs) and move only with all of it.
    """

    name: Label
    size: _Count
    fixed: bool = False
    ordered: bool = False


class WiringBlock(_Part):
    """Edges of one type from every source to every target, or from source i to target i.

    Element ``offset + i * source_stride + j * target_stride + f * feature_stride`` of the flattened parameter is the
    edge from node ``source + i`` to node ``target + j`` at kernel position f.

    Attributes:
        type: Type of the edges.
        parameter: Whose elements they are; None for links without weights.
        source: First source node.
        n_sources: Number of source nodes.
        target: First target node.
        n_targets: Number of target nodes.
        diagonal: Source i to target i only; ``target_stride`` is not used.
        features: Kernel positions.
        offset: Element of the first edge.
        source_stride: Elements from one source to the next.
        target_stride: Elements from one target to the next.
        feature_stride: Elements from one kernel position to the next.
        left: The elements are known to move with these neurons, and are no edges of the graph.
    """

    type: WeightKind | LinkKind
    parameter: Label | None = None
    source: _Place
    n_sources: _Count
    target: _Place
    n_targets: _Count
    diagonal: bool = False
    features: _Count = 1
    offset: _Place = 0
    source_stride: _Place = 0
    target_stride: _Place = 0
    feature_stride: _Place = 1
    left: bool = False

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return self.n_sources if self.diagonal else self.n_sources * self.n_targets

    def problem(self) -> str:
        """What is wrong with the block by itself; empty where nothing is."""
        if self.diagonal and self.n_sources != self.n_targets:
            return f"is diagonal between {self.n_sources} sources and {self.n_targets} targets"
        if self.type in WEIGHT_KINDS:
            return self._clash() if self.parameter is not None else f"of type {self.type!r} names no parameter"
        if self.parameter is not None:
            return f"of type {self.type!r} names a parameter, which such links do not have"
        if self.left or self.features != 1 or self.offset or self.source_stride or self.target_stride:
            return f"of type {self.type!r} says where elements lie, which such links do not have"
        if self.type == "head" and self.n_sources != 1:
            return f"of type 'head' starts from {self.n_sources} nodes, expected one node per head"
        if self.type != "head" and not self.diagonal:
            return f"of type {self.type!r} is not diagonal"
        return ""

    def last(self) -> int:
        """The highest element the block reaches."""
        return self.offset + sum(stride * (count - 1) for stride, count in self._steps())

    def elements(self) -> tuple[int, tuple[tuple[int, int], ...]]:
        """The set of elements as a key: blocks of one parameter with equal keys have the same elements."""
        return self.offset, tuple(sorted(step for step in self._steps() if step[1] > 1))

    def _steps(self) -> Iterator[tuple[int, int]]:
        """(stride, count) of each way to step."""
        yield self.source_stride, self.n_sources
        if not self.diagonal:
            yield self.target_stride, self.n_targets
        yield self.feature_stride, self.features

    def _clash(self) -> str:
        """Whether two edges may have one element: every stride has to go beyond all that smaller strides reach."""
        reach = 0
        for stride, count in self.elements()[1]:
            if stride <= reach:
                return f"of {self.parameter!r} gives one element to two edges (strides {self.elements()[1]})"
            reach += stride * (count - 1)
        return ""


class ExplicitWiring(_Part):
    """How the parameters of one network connect its neurons.

    Attributes:
        ranges: All neurons, in order; the first range starts at node 0, each other where the one before it ends.
        blocks: All edges but self-loops.
        left: Parameters of which not even the neurons are known, with the reason; what they may touch is ``fixed``.
    """

    ranges: Annotated[tuple[WiringRange, ...], Field(min_length=1, max_length=MAX_RANGES)]
    blocks: Annotated[tuple[WiringBlock, ...], Field(max_length=MAX_BLOCKS)] = ()
    left: dict[Label, Label] = Field(default_factory=dict)

    @cached_property
    def n_nodes(self) -> int:
        """Number of neurons."""
        return sum(range_.size for range_ in self.ranges)

    def firsts(self) -> list[int]:
        """First node of each range."""
        first, firsts = 0, []
        for range_ in self.ranges:
            firsts.append(first)
            first += range_.size
        return firsts

    @model_validator(mode="after")
    def _consistent(self) -> ExplicitWiring:
        twice = [name for name, count in Counter(range_.name for range_ in self.ranges).items() if count > 1]
        if twice:
            raise ValueError(f"range {twice[0]!r} is listed more than once")
        links = 0
        for number, block in enumerate(self.blocks):
            if problem := block.problem():
                raise ValueError(f"block {number} {problem}")
            end = max(block.source + block.n_sources, block.target + block.n_targets)
            if end > self.n_nodes:
                raise ValueError(f"block {number} reaches node {end - 1}, the ranges have {self.n_nodes} nodes")
            if block.parameter is None:
                links += block.n_edges
            elif block.parameter in self.left:
                raise ValueError(f"parameter {block.parameter!r} is in block {number} and in left")
        if links > MAX_USES * self.n_nodes:
            raise ValueError(f"{links} links without weights between {self.n_nodes} nodes; the cap is {MAX_USES} each")
        return self

    def fits(self, numels: Mapping[str, int]) -> None:
        """See that the wiring belongs to a network with these parameters.

        Args:
            numels: Name -> number of elements.

        Raises:
            ValueError: A parameter is unknown, has no place, is left twice over or smaller than its blocks reach; or
                the graph is out of proportion to the network.
        """
        most = MAX_NODES_PER_ELEMENT * sum(numels.values()) + _SPARE
        if self.n_nodes > most:
            raise ValueError(f"{self.n_nodes} neurons for {sum(numels.values())} elements; the cap is {most}")
        edges = dict.fromkeys(self.left, 0)
        for number, block in enumerate(self.blocks):
            name = block.parameter
            if name is None:
                continue
            if name not in numels:
                raise ValueError(f"block {number} is of parameter {name!r}, which is not listed")
            if block.last() >= numels[name]:
                raise ValueError(f"block {number} reaches element {block.last()} of the {numels[name]} of {name!r}")
            edges[name] = edges.get(name, 0) + block.n_edges * block.features
        for name in self.left:
            if name not in numels:
                raise ValueError(f"left names {name!r}, which is not listed")
        for name, numel in numels.items():
            if name not in edges:
                raise ValueError(f"parameter {name!r} is in no block and not in left")
            if edges[name] > MAX_USES * numel:
                raise ValueError(
                    f"{edges[name]} edges for the {numel} elements of {name!r}; the cap is {MAX_USES} each"
                )
