"""The vocabulary families are written in: which tensor connects which ranges of neurons.

A family is a table of the elements below and nothing else; `build.py` holds the one piece of code that turns any table
into blocks. Ranges are named by templates: inside a `Stack`, ``x{i}`` is the residual stream before layer i and
``x{i+1}`` the one after it; ``{n}`` is the number of layers. An end of a link may take a part of a range whose size the
tensor decides: ``q{i}:first`` the first nodes, ``v{i}:last`` the nodes ending where the range ends (reaching back into
what lies before it), ``q{i}:next`` the nodes after the first as many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nowcast_proto.spec import ArchitectureSpec, Wiring

from nowcast_service.graph.blocks import EdgeType

Size = Literal["H", "K"] | int
"""A count: ``H`` query heads, ``K`` key and value heads, or a number."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a fused tensor that one link takes.

    Attributes:
        axis: Tensor axis that is fused.
        index: Which part.
        ratio: Relative sizes of the parts, in order.
        per_head: The parts alternate head by head (``q0 k0 v0 q1 k1 v1 …``) instead of lying one after another.
    """

    axis: int
    index: int
    ratio: tuple[Size, ...] = (1, 1, 1)
    per_head: bool = False


@dataclass(frozen=True, slots=True)
class Neurons:
    """Places ranges of neurons: first what feeds them, in order of first use, then the ranges themselves.

    Every 1-D tensor adds a node of its own, which is placed with the feeders of the range it belongs to.
    """

    ranges: tuple[str, ...]
    fed_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Same:
    """``alias`` is another name of ``range``.

    With ``when="mha"`` only where every query head has its own key head, with ``unless`` only where the network lacks
    that tensor.
    """

    alias: str
    range: str
    when: Literal["always", "mha"] = "always"
    unless: str | None = None


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of two or more axes: every source neuron to every target neuron, kernel positions as features.

    Attributes:
        tensor: Name relative to the stack; alternatives are separated by ``|``.
        edge_type: Type of its edges.
        source: Range of the source neurons.
        target: Range of the target neurons.
        stored: Order of the first two axes: ``ts`` (target, source) as in `torch.nn.Linear`, ``st`` (source, target)
            as in embeddings. Keys run from head space to the input, so their `Linear` weights are ``st``.
        label: Block name, where it is not the tensor's own.
        cut: The part of a fused tensor.
        required: A network of this family cannot do without it.
        grouped: Allow grouped and depthwise kernels (exact blocks per group, a diagonal where groups have one channel).
        transposed: Fill the edges with the values of the transpose, as published embeddings are (see `View`).
        flattened: Allow channels flattened with their pixels (source neuron-major); pixels become features.
    """

    tensor: str
    edge_type: EdgeType
    source: str
    target: str
    stored: Literal["ts", "st"] = "ts"
    label: str | None = None
    cut: Cut | None = None
    required: bool = True
    grouped: bool = False
    transposed: bool = False
    flattened: bool = False


@dataclass(frozen=True, slots=True)
class Vector:
    """A 1-D tensor (leading axes of size one are dropped): from a node of its own to every neuron of a range.

    Attributes:
        tensor: Name relative to the stack; alternatives are separated by ``|``.
        edge_type: Type of its edges.
        target: Range with one neuron per element.
        label: Block name, where it is not the tensor's own.
        cut: The part of a fused tensor.
        reverse: Edges run from the neurons to the node of its own.
        required: A network of this family cannot do without it.
    """

    tensor: str
    edge_type: EdgeType
    target: str
    label: str | None = None
    cut: Cut | None = None
    reverse: bool = False
    required: bool = False


@dataclass(frozen=True, slots=True)
class Diagonal:
    """A 1-D tensor between neurons paired one to one."""

    tensor: str
    edge_type: EdgeType
    source: str
    target: str
    label: str | None = None
    required: bool = False


@dataclass(frozen=True, slots=True)
class Heads:
    """One node per attention head, linked to the neurons of its head (auxiliary, feature 1).

    Layers that name the same range of ``heads`` share them. ``ordered`` neurons have places of their own inside a head,
    as rotary pairs have: heads may change places as a whole, neurons may not. The graph cannot tell; `check` must.
    """

    label: str
    heads: str
    target: str
    count: Size = "H"
    ordered: bool = False


@dataclass(frozen=True, slots=True)
class Residual:
    """Identity links between two ranges of equal size (auxiliary, feature 1).

    ``given``: only where the network has that tensor; ``unless``: only where it lacks that one.
    """

    label: str
    source: str
    target: str
    unless: str | None = None
    given: str | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """Identity links from each of ``few`` heads of ``source`` to the ``many`` heads of ``target`` that share it.

    ``fold`` turns the links around. Nothing is linked where both are the same neurons.
    """

    label: str
    source: str
    target: str
    few: Size = "K"
    many: Size = "H"
    fold: bool = False


@dataclass(frozen=True, slots=True)
class Stack:
    """Elements repeated for every layer found.

    Attributes:
        find: Regular expression for the start of a layer's tensor names, with one group per index.
        elements: What each layer holds.
        var: Template variable of the layer number, counted from 0 in order of the indices. ``{i#}`` is the index as
            written in the name.
        count: Template variable of the number of layers, known inside the stack and after it.
        relative: Tensor names inside start with what ``find`` matched.
        required: At least one layer must be there.
    """

    find: str
    elements: tuple[Element, ...]
    var: str = "i"
    count: str = "n"
    relative: bool = True
    required: bool = True


Element = Neurons | Same | Weight | Vector | Diagonal | Heads | Residual | Spread | Stack
Table = tuple[Element, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """How the tensors of one family connect neurons.

    Attributes:
        name: As in `ArchitectureSpec.family`.
        wirings: Wiring -> table, or a function that writes the table for one spec; the first is the default.
        roots: Optional name prefixes of the whole network.
        heads: The spec must say how many attention heads there are.
    """

    name: str
    wirings: dict[Wiring, Table | Callable[[ArchitectureSpec], Expansion]]
    roots: tuple[str, ...] = ()
    heads: bool = True


@dataclass(frozen=True, slots=True)
class Expansion:
    """A table written for one spec, with the tensors it could not place and why."""

    elements: Table
    unplaced: dict[str, str]
