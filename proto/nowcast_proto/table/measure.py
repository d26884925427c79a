"""How many neurons each range has: every tensor says it of the ranges it joins, and all must agree."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nowcast_proto.errors import InvalidSpec
from nowcast_proto.table.elements import Cut, Diagonal, Heads, Vector, Weight
from nowcast_proto.table.expand import Link, Network, strides


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a link's tensor: where its elements lie, part of a fused axis allowed for.

    Attributes:
        size: Neurons.
        stride: Elements from one neuron to the next.
        offset: Element of the first neuron.
        run: Neurons side by side before a jump (fused head by head); 0 where there is no jump.
        jump: Places on the axis from the start of one run to the next.
    """

    size: int
    stride: int
    offset: int = 0
    run: int = 0
    jump: int = 0

    def runs(self, label: str) -> list[tuple[str, int, int, int]]:
        """Label, first neuron, neurons and element offset of each stretch of the axis without a jump."""
        if not self.run:
            return [(label, 0, self.size, self.offset)]
        return [
            (f"{label}[{n}]", n * self.run, self.run, self.offset + n * self.jump * self.stride)
            for n in range(self.size // self.run)
        ]


class Sizes:
    """Neurons of every range of one network, as its tensors say.

    Args:
        network: The network.
        unplaced: Tensors that are to have no place, and why; tensors that find none are added.
        max_features: Kernel positions that are let in; None for all.
    """

    def __init__(self, network: Network, unplaced: dict[str, str], max_features: int | None) -> None:
        self.network = network
        self.unplaced = unplaced
        self.max_features = max_features
        self._known: dict[str, tuple[int, str]] = {}  # range -> neurons, tensor that said so

    def of(self, range_: str) -> int:
        """Neurons of a range; 0 where no tensor reaches it."""
        return self._known.get(range_, (0, ""))[0]

    def origin(self, range_: str) -> str:
        """The tensor that said how many neurons a range has."""
        return self._known[range_][1]

    def measure(self, link: Link) -> None:
        """Take the sizes of ranges from a link's tensor.

        Raises:
            InvalidSpec: The tensor has another shape than its place asks for, or contradicts another.
        """
        element = link.element
        if isinstance(element, Heads):
            self._bind(link.ends[0], self.network.count(element.count), link.label)
        elif isinstance(element, Vector):
            axis = self.vector_axis(link, element)
            if axis is not None:
                self._bind(link.ends[0], 1, link.label)
                self._bind(link.ends[1], axis.size, link.label)
        elif isinstance(element, Weight):
            self._measure_weight(link, element)

    def _measure_weight(self, link: Link, element: Weight) -> None:
        if len(matrix(link.shape, element)) < 2:
            self.wrong_shape(link, "two or more axes")
        source, target, features = self.axes(link, element)
        self._bind(link.ends[1], target.size, link.label)
        width = self.of(link.ends[0]) or source.size
        grouped = element.grouped and width != source.size and width % source.size == 0
        pixels = element.flattened and width != source.size and source.size % width == 0
        if grouped and target.size % (width // source.size):
            self.wrong_shape(link, f"a multiple of {width // source.size} groups of outputs")
        if not grouped and not pixels:
            self._bind(link.ends[0], source.size, link.label)
        positions = source.size // width if pixels else features
        if self.max_features is not None and positions > self.max_features:
            self.unplace(link, f"{positions} kernel positions, the checkpoint takes {self.max_features}")

    def _bind(self, end: str, size: int, label: str) -> None:
        range_, _, part = end.partition(":")
        if part:
            return
        known, origin = self._known.setdefault(range_, (size, label))
        if known != size:
            raise InvalidSpec(
                f"tensor {label!r} has {size} neurons on the side it shares with {origin!r}",
                expected=f"{known}, as {origin!r} has",
                remedy="check the shapes, and num_heads, num_kv_heads and head_dim, against the network",
            )

    def keep(self, link: Link) -> bool:
        """Whether a link stays: its tensor has a place, and the parts of ranges it joins exist."""
        if link.parameter in self.unplaced:
            return False
        if isinstance(link.element, Diagonal):
            size = math.prod(link.shape)
            for end in link.ends:
                range_, _, part = end.partition(":")
                known = self.of(range_)
                needed = 2 * size if part == "next" else size
                if len(_squeeze(link.shape)) != 1 or needed > known or (not part and size != known):
                    self.unplace(link, f"{size} elements do not fit the {known} neurons it would join")
                    return False
        return True

    def unplace(self, link: Link, reason: str) -> None:
        """Leave a link's tensor out of the graph."""
        if link.parameter is not None:
            self.unplaced.setdefault(link.parameter, reason)

    def vector_axis(self, link: Link, element: Vector) -> Axis | None:
        """The axis of a 1-D tensor; None of a scalar, which has no place."""
        shape = _squeeze(link.shape)
        if len(shape) > 1 or (link.shape == () and element.required):
            self.wrong_shape(link, "one axis")
        if link.shape == ():
            self.unplace(link, "a scalar belongs to no neuron")
            return None
        return self._cut(Axis(math.prod(shape), 1), element.cut, link)

    def axes(self, link: Link, element: Weight) -> tuple[Axis, Axis, int]:
        """Source axis, target axis and kernel positions of a weight."""
        shape = matrix(link.shape, element)
        steps = strides(shape)
        axes = [Axis(shape[0], steps[0]), Axis(shape[1], steps[1])]
        if element.cut is not None:
            axes[element.cut.axis] = self._cut(axes[element.cut.axis], element.cut, link)
        target, source = axes if element.stored == "ts" else reversed(axes)
        return source, target, math.prod(shape[2:])

    def _cut(self, axis: Axis, cut: Cut | None, link: Link) -> Axis:
        if cut is None:
            return axis
        ratio = [self.network.count(part) for part in cut.ratio]
        heads = self.network.num_heads
        parts = sum(ratio) * (heads if cut.per_head else 1)
        if axis.size % parts:
            self.wrong_shape(link, f"an axis of {axis.size} that is a multiple of {parts} parts")
        unit = axis.size // parts
        before, size = sum(ratio[: cut.index]) * unit, ratio[cut.index] * unit
        if cut.per_head:
            return Axis(size * heads, axis.stride, before * axis.stride, size, sum(ratio) * unit)
        return Axis(size, axis.stride, before * axis.stride)

    def wrong_shape(self, link: Link, expected: str) -> None:
        """Refuse a tensor's shape."""
        raise InvalidSpec(
            f"tensor {link.parameter!r} has shape {list(link.shape)}",
            expected=expected,
            remedy=f"check the shape against a network of {self.network.kind}",
        )


def matrix(shape: tuple[int, ...], element: Weight) -> tuple[int, ...]:
    """A batch axis of size one before an embedding dropped: positions are often (1, positions, width).

    Embeddings alone are stored by source; a 1-D convolution with one output is (1, inputs, positions) too.
    """
    return shape[1:] if element.stored == "st" and len(shape) == 3 and shape[0] == 1 else shape


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without leading axes of size one, but never without any axis."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
