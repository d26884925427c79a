"""The vocabulary tables are written in: which tensor connects which ranges of neurons.

A table is a tuple of the elements below and nothing else. Ranges are named by templates: inside a `Stack`, ``x{i}`` is
the residual stream before layer i and ``x{i+1}`` the one after it; ``{n}`` is the number of layers. In the published
families an end of a link may take a part of a range whose size the tensor decides: ``q{i}:first`` the first nodes,
``v{i}:last`` the nodes ending where the range ends (reaching back into what lies before it), ``q{i}:next`` the nodes
after the first as many.
"""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from nowcast_proto.wiring import WeightKind

MAX_ELEMENTS = 512
"""Cap on the elements of one table, those inside stacks included."""
MAX_COUNT = 65_536

Text = Annotated[str, Field(min_length=1, max_length=256)]
_RANGE = r"([A-Za-z0-9_.-]|\{[a-z][a-z0-9_]{0,15}#?([+-][0-9]{1,4})?\})+"
Range = Annotated[str, Field(pattern=f"^{_RANGE}$", max_length=128)]
End = Annotated[str, Field(pattern=f"^{_RANGE}(:(first|last|next))?$", max_length=128)]
Variable = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,15}$")]
Layers = Annotated[str, Field(pattern=r"^[^{}|*]*(\*[^{}|*]+){1,4}$", max_length=256)]
Count = Literal["H", "K"] | Annotated[int, Field(ge=1, le=MAX_COUNT)]
"""A count: ``H`` query heads, ``K`` key and value heads, or a number."""
Stored = Literal["ts", "st"]
"""Order of a tensor's first two axes, target and source."""

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, config=_STRICT)
class Cut:
    """The part of a fused tensor that one link takes.

    Attributes:
        axis: Tensor axis that is fused.
        index: Which part.
        ratio: Relative sizes of the parts, in order.
        per_head: The parts alternate head by head (``q0 k0 v0 q1 k1 v1 …``) instead of lying one after another.
    """

    axis: Literal[0, 1]
    index: Annotated[int, Field(ge=0, le=15)]
    ratio: Annotated[tuple[Count, ...], Field(min_length=1, max_length=16)] = (1, 1, 1)
    per_head: bool = False

    def __post_init__(self) -> None:
        if self.index >= len(self.ratio):
            raise ValueError(f"index {self.index} is none of the {len(self.ratio)} parts of ratio")


@dataclass(frozen=True, slots=True, config=_STRICT)
class Neurons:
    """Places ranges of neurons: first what feeds them, in order of first use, then the ranges themselves.

    Every 1-D tensor adds a node of its own, which is placed with the feeders of the range it belongs to.
    """

    ranges: Annotated[tuple[Range, ...], Field(min_length=1, max_length=16)]
    fed_by: Annotated[tuple[Range, ...], Field(max_length=16)] = ()
    kind: Literal["neurons"] = "neurons"


@dataclass(frozen=True, slots=True, config=_STRICT)
class Same:
    """``alias`` is another name of ``range``.

    With ``when="mha"`` only where every query head has its own key head, with ``unless`` only where the network lacks
    that tensor.
    """

    alias: Range
    range: Range
    when: Literal["always", "mha"] = "always"
    unless: Text | None = None
    kind: Literal["same"] = "same"


@dataclass(frozen=True, slots=True, config=_STRICT)
class Weight:
    """A tensor of two or more axes: every source neuron to every target neuron, kernel positions as features.

    Attributes:
        tensor: Name relative to the stack; alternatives are separated by ``|``.
        type: Type of its edges.
        source: Range of the source neurons.
        target: Range of the target neurons.
        stored: Order of the first two axes: ``ts`` (target, source) as in `torch.nn.Linear`, ``st`` (source, target)
            as in embeddings. Keys run from head space to the input, so their `Linear` weights are ``st``.
        label: Block name, where it is not the tensor's own.
        cut: The part of a fused tensor.
        required: A network of this kind cannot do without it.
        grouped: Allow grouped and depthwise kernels (exact blocks per group, a diagonal where groups have one channel).
        transposed: Fill the edges with the values of the transpose, as published embeddings are.
        flattened: Allow channels flattened with their pixels (source neuron-major); pixels become features.
    """

    tensor: Text
    type: WeightKind
    source: End
    target: End
    stored: Stored = "ts"
    label: Text | None = None
    cut: Cut | None = None
    required: bool = True
    grouped: bool = False
    transposed: bool = False
    flattened: bool = False
    kind: Literal["weight"] = "weight"


@dataclass(frozen=True, slots=True, config=_STRICT)
class Vector:
    """A 1-D tensor (leading axes of size one are dropped): from a node of its own to every neuron of a range.

    Attributes:
        tensor: Name relative to the stack; alternatives are separated by ``|``.
        type: Type of its edges.
        target: Range with one neuron per element.
        label: Block name, where it is not the tensor's own.
        cut: The part of a fused tensor.
        reverse: Edges run from the neurons to the node of its own.
        required: A network of this kind cannot do without it.
    """

    tensor: Text
    type: WeightKind
    target: Range
    label: Text | None = None
    cut: Cut | None = None
    reverse: bool = False
    required: bool = False
    kind: Literal["vector"] = "vector"


@dataclass(frozen=True, slots=True, config=_STRICT)
class Diagonal:
    """A 1-D tensor between neurons paired one to one."""

    tensor: Text
    type: WeightKind
    source: End
    target: End
    label: Text | None = None
    required: bool = False
    kind: Literal["diagonal"] = "diagonal"


@dataclass(frozen=True, slots=True, config=_STRICT)
class Heads:
    """One node per attention head, linked to the neurons of its head.

    Layers that name the same range of ``heads`` share them. ``ordered`` neurons have places of their own inside a head,
    as rotary pairs have: heads may change places as a whole, neurons may not.
    """

    label: Text
    heads: End
    target: Range
    count: Count = "H"
    ordered: bool = False
    kind: Literal["heads"] = "heads"


@dataclass(frozen=True, slots=True, config=_STRICT)
class Residual:
    """Identity links between two ranges of equal size.

    ``given``: only where the network has that tensor; ``unless``: only where it lacks that one.
    """

    label: Text
    source: Range
    target: Range
    unless: Text | None = None
    given: Text | None = None
    kind: Literal["residual"] = "residual"


@dataclass(frozen=True, slots=True, config=_STRICT)
class Spread:
    """Identity links from each of ``few`` heads of ``source`` to the ``many`` heads of ``target`` that share it.

    ``fold`` turns the links around. Nothing is linked where both are the same neurons.
    """

    label: Text
    source: Range
    target: Range
    few: Count = "K"
    many: Count = "H"
    fold: bool = False
    kind: Literal["spread"] = "spread"


@dataclass(frozen=True, slots=True, config=_STRICT)
class Stack:
    """Elements repeated for every layer found.

    Attributes:
        find: Start of a layer's tensor names, ``*`` standing for a number.
        elements: What each layer holds.
        var: Template variable of the layer number, counted from 0 in order of the numbers. ``{i#}`` is the number as
            written in the name (several are joined by a dot).
        count: Template variable of the number of layers, known inside the stack and after it.
        relative: Tensor names inside start with what ``find`` matched.
        required: At least one layer must be there.
    """

    find: Layers
    elements: Annotated[tuple[Element, ...], Field(min_length=1, max_length=MAX_ELEMENTS)]
    var: Variable = "i"
    count: Variable = "n"
    relative: bool = True
    required: bool = True
    kind: Literal["stack"] = "stack"


Element = Annotated[
    Union[Neurons, Same, Weight, Vector, Diagonal, Heads, Residual, Spread, Stack],  # noqa: UP007 - a forward reference
    Field(discriminator="kind"),
]
Table = tuple[Element, ...]
