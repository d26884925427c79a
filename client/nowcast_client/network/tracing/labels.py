"""Labels: what each axis of a tensor runs over, and how views, slices and permutations carry that along.

The axes of a tensor are made of *fine axes*: ``view(b, t, 3 * h * d)`` of something labelled (b, t, 3, h, d) keeps the
fine axes and only says which of them lie in one axis. A `Part` says what some fine axes run over together: a *grid* of
atoms (one neuron for each coordinate), *classes* of equal slices of a constant, or *data* (positions, samples, tokens:
known by their place). Fine axes in no part are constant along themselves. Axes of size one have no fine axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from nowcast_client.network.tracing.atoms import NONE, Ints, Ledger


@dataclass(frozen=True)
class Part:
    """What some fine axes run over.

    Attributes:
        fines: The fine axes, in the order of the axes of ``values``.
        values: Atoms, or classes of equal slices; None for data.
        kind: ``grid``, ``class`` or ``data``.
    """

    fines: tuple[int, ...]
    values: Ints | None
    kind: str

    @property
    def grid(self) -> Ints:
        """The values of a grid or of classes."""
        if self.values is None:
            raise TypeError("data has no values")
        return self.values

    def over(self, fines: Sequence[int]) -> Part:
        """The same, its fine axes in another order."""
        if self.values is None or tuple(fines) == self.fines:
            return self
        return Part(tuple(fines), self.grid.transpose([self.fines.index(fine) for fine in fines]), self.kind)


@dataclass(frozen=True)
class Label:
    """What the axes of a tensor run over.

    Attributes:
        axes: Fine axes of each axis.
        parts: What they run over; no fine axis is in two parts.
        param: It depends on parameters and constants alone.
        tag: What is known of its place in an attention: scores, or probabilities.
    """

    axes: tuple[tuple[int, ...], ...]
    parts: tuple[Part, ...] = ()
    param: bool = False
    tag: tuple[str, Ints, Ints] | None = field(default=None, compare=False)

    def fines(self) -> list[int]:
        """All fine axes in order."""
        return [fine for axis in self.axes for fine in axis]

    def part_of(self, fine: int) -> Part | None:
        """The part a fine axis belongs to."""
        return next((part for part in self.parts if fine in part.fines), None)

    def on(self, fines: Sequence[int]) -> list[Part]:
        """Parts that have one of these fine axes."""
        wanted = set(fines)
        return [part for part in self.parts if wanted.intersection(part.fines)]


class Axes:
    """Makes and cuts fine axes; knows their sizes."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.sizes: list[int] = []

    def new(self, size: int) -> int:
        """A new fine axis."""
        self.sizes.append(size)
        return len(self.sizes) - 1

    def blank(self, shape: Sequence[int]) -> Label:
        """A label of a constant: one fine axis for each axis, in no part."""
        return Label(tuple((self.new(size),) if size != 1 else () for size in shape))

    def data(self, shape: Sequence[int]) -> Label:
        """A label all of whose axes are data."""
        label = self.blank(shape)
        return replace(label, parts=tuple(Part((fine,), None, "data") for fine in label.fines()))

    def split(self, label: Label, fine: int, sizes: Sequence[int]) -> Label:
        """The label with a fine axis cut into several, slowest first."""
        made = tuple(self.new(size) for size in sizes)
        axes = tuple(tuple(new for old in axis for new in (made if old == fine else (old,))) for axis in label.axes)
        return replace(label, axes=axes, parts=self.split_parts(label.parts, fine, made))

    def split_parts(self, parts: Sequence[Part], fine: int, made: tuple[int, ...]) -> tuple[Part, ...]:
        """Parts with a fine axis replaced by several."""
        sizes = [self.sizes[new] for new in made]
        out: list[Part] = []
        for part in parts:
            if fine not in part.fines:
                out.append(part)
                continue
            place = part.fines.index(fine)
            fines = part.fines[:place] + made + part.fines[place + 1 :]
            if part.kind == "grid":
                shape = part.grid.shape
                out.append(Part(fines, part.grid.reshape(*shape[:place], *sizes, *shape[place + 1 :]), "grid"))
            else:  # classes of a merged axis are no product of classes: keep to what is certain
                out += [Part((new,), None, "data") for new in made]
        return tuple(out)

    def align(self, label: Label, boundaries: Sequence[Sequence[int]]) -> Label:
        """Cut fine axes so that each axis is made of fine axes of the given sizes."""
        for axis, wanted in enumerate(boundaries):
            sizes = list(wanted)
            for fine in label.axes[axis]:
                size = self.sizes[fine]
                taken: list[int] = []
                while math.prod(taken) < size:
                    taken.append(sizes.pop(0))
                if len(taken) > 1:
                    label = self.split(label, fine, taken)
        return label

    def rename(self, label: Label, names: dict[int, int]) -> Label:
        """The label with other numbers for its fine axes."""
        return replace(
            label,
            axes=tuple(tuple(names.get(fine, fine) for fine in axis) for axis in label.axes),
            parts=tuple(replace(p, fines=tuple(names.get(fine, fine) for fine in p.fines)) for p in label.parts),
        )

    def view(self, label: Label, shape: Sequence[int]) -> Label:
        """The label of the tensor viewed in another shape."""
        fines = label.fines()
        refined = refine([[self.sizes[fine] for fine in fines], [size for size in shape if size != 1]])
        if refined is None:
            label = self.collapse(label, list(range(len(label.axes))))
            fines = label.fines()
            refined = [size for size in shape if size != 1]
        label = self.align(replace(label, axes=(tuple(fines),)), [refined])
        queue, axes = label.fines(), []
        for size in shape:
            axis: list[int] = []
            while math.prod(self.sizes[fine] for fine in axis) < size:
                axis.append(queue.pop(0))
            axes.append(tuple(axis))
        return self.tidy(replace(label, axes=tuple(axes)))

    def tidy(self, label: Label) -> Label:
        """Join neighbouring fine axes that run over one thing in one piece, and undo what flattening derived."""
        parts = [simple for part in label.parts for simple in self._simpler(part)]
        axes: list[tuple[int, ...]] = []
        for axis in label.axes:
            out: list[int] = []
            for fine in axis:
                a = next((p for p in parts if out and out[-1] in p.fines), None)
                b = next((p for p in parts if fine in p.fines), None)
                plain = (
                    out
                    and (a is None) == (b is None)
                    and (a is None or a.kind == "data")
                    and (b is None or b.kind == "data")
                )
                if plain:
                    joined = self.new(self.sizes[out[-1]] * self.sizes[fine])
                    parts = [p for p in parts if p is not a and p is not b]
                    parts += [Part((joined,), None, "data")] if a is not None else []
                    out[-1] = joined
                elif a is not None and a is b and a.kind == "grid":
                    rest = [other for other in a.fines if other not in (out[-1], fine)]
                    moved = a.over([*rest, out[-1], fine]).grid
                    joined = self.new(moved.shape[-1] * moved.shape[-2])
                    grid = moved.reshape(*moved.shape[:-2], -1)
                    parts = [p for p in parts if p is not a] + [Part((*rest, joined), grid, "grid")]
                    out[-1] = joined
                else:
                    out.append(fine)
            axes.append(tuple(out))
        return replace(label, axes=tuple(axes), parts=tuple(parts))

    def _simpler(self, part: Part) -> list[Part]:
        """A grid without the fine axes that tell no neurons apart."""
        if part.kind != "grid" or len(part.fines) < 2:
            return [part]
        found = self.ledger.parents(part.grid) if (part.grid >= 0).all() else None
        if found is not None:
            atoms, slots, n_slots = found
            along = [np.take(atoms, [0], axis=k) for k in range(atoms.ndim)]
            still = [k for k in range(atoms.ndim) if (atoms == along[k]).all()]
            keep = [k for k in range(atoms.ndim) if k not in still]
            n_still = math.prod(atoms.shape[k] for k in still)
            first = slots[tuple(slice(None) if k in still else slice(0, 1) for k in range(atoms.ndim))]
            if still and n_still == n_slots and (slots == first).all() and np.unique(first).size == n_slots:
                grid = atoms[tuple(0 if k in still else slice(None) for k in range(atoms.ndim))]
                data = [Part((part.fines[k],), None, "data") for k in still]
                return [*self._simpler(Part(tuple(part.fines[k] for k in keep), grid, "grid")), *data] if keep else data
        return [part]

    def collapse(self, label: Label, axes: Sequence[int], *, together: bool = True) -> Label:
        """The label with all fine axes of some neighbouring axes merged into one, neurons and their values derived."""
        fines = [fine for axis in axes for fine in label.axes[axis]]
        if len(fines) < 2:
            return self._regroup(label, axes, tuple(fines)) if together and len(axes) > 1 else label
        parts = label.on(fines)
        size = math.prod(self.sizes[fine] for fine in fines)
        joined = self.new(size)
        grids = [part for part in parts if part.kind == "grid"]
        rest = [part for part in label.parts if part not in parts]
        if not grids:
            new = [Part((joined,), None, "data")] if parts else []
            return self._regroup(replace(label, parts=(*rest, *new)), axes, (joined,))
        if len(grids) > 1 or any(part.kind == "class" for part in parts):
            for part in grids:
                self.ledger.fix(part.grid, "several axes of neurons are merged into one")
            outside = {fine for part in parts for fine in part.fines} - set(fines)
            new = [Part((joined,), None, "data"), *(Part((fine,), None, "data") for fine in outside)]
            return self._regroup(replace(label, parts=(*rest, *new)), axes, (joined,))
        grid, data = grids[0], [fine for part in parts if part.kind == "data" for fine in part.fines]
        outside_fines = [fine for fine in grid.fines if fine not in fines]
        inside = [fine for fine in fines if fine in grid.fines]
        values = grid.over([*outside_fines, *inside]).grid
        slots = math.prod(self.sizes[fine] for fine in data)
        if slots > 1:
            unique, inverse = np.unique(values, return_inverse=True)
            derived = self.ledger.derive(unique, slots)[inverse.reshape(-1)]
            values = derived.reshape(*values.shape, *(self.sizes[fine] for fine in data))
        order = [*outside_fines, *inside, *data]
        for fine in fines:
            if fine not in order:
                values = np.repeat(values[..., None], self.sizes[fine], axis=-1)
                order.append(fine)
        values = values.transpose([order.index(fine) for fine in (*outside_fines, *fines)])
        values = values.reshape(*values.shape[: len(outside_fines)], size)
        part = Part((*outside_fines, joined), values, "grid")
        return self._regroup(replace(label, parts=(*rest, part)), axes, (joined,))

    @staticmethod
    def _regroup(label: Label, axes: Sequence[int], fines: tuple[int, ...]) -> Label:
        first = min(axes)
        new = [axis for number, axis in enumerate(label.axes) if number not in axes]
        return replace(label, axes=(*new[:first], fines, *new[first:]))

    def single(self, label: Label, axis: int) -> Label:
        """The label with at most one fine axis in this axis."""
        return self.collapse(label, [axis]) if len(label.axes[axis]) > 1 else label

    def along(self, label: Label, axis: int, change: Callable[[Ints], Ints], size: int) -> Label:
        """Entries of one axis taken, doubled or reordered.

        Args:
            label: Of the tensor.
            axis: Which axis.
            change: Takes the old places (0, 1, …) and gives the ones that are taken, -1 where a constant stands.
            size: Entries afterwards.
        """
        label = self.single(label, axis)
        if not label.axes[axis]:
            fines = (self.new(size),) if size != 1 else ()
            return replace(label, axes=(*label.axes[:axis], fines, *label.axes[axis + 1 :]))
        fine = label.axes[axis][0]
        places = change(np.arange(self.sizes[fine], dtype=np.int64))
        if size == self.sizes[fine] and np.array_equal(places, np.arange(size)):
            return label
        made = self.new(size) if size != 1 else None
        parts: list[Part] = []
        for part in label.parts:
            if fine not in part.fines:
                parts.append(part)
                continue
            k = part.fines.index(fine)
            if part.values is None:
                parts += [Part((made,), None, "data")] if made is not None else []
                continue
            values = np.where(
                (places >= 0).reshape([-1 if axis_ == k else 1 for axis_ in range(part.values.ndim)]),
                part.values.take(np.maximum(places, 0), axis=k),
                NONE if part.kind == "grid" else part.values.max() + 1,
            )
            if part.kind == "grid":
                self.ledger.cut(values, part.grid)
            if made is not None:
                parts.append(Part((*part.fines[:k], made, *part.fines[k + 1 :]), values, part.kind))
            elif part.kind == "grid" and len(part.fines) > 1:
                parts.append(Part((*part.fines[:k], *part.fines[k + 1 :]), values.squeeze(k), "grid"))
        fines = (made,) if made is not None else ()
        return replace(label, axes=(*label.axes[:axis], fines, *label.axes[axis + 1 :]), parts=tuple(parts))

    def drop(self, label: Label, fines: Sequence[int]) -> Label:
        """The label without some fine axes, which must be in no part any more."""
        gone = set(fines)
        axes = tuple(tuple(fine for fine in axis if fine not in gone) for axis in label.axes)
        return replace(label, axes=axes)


def refine(pieces: Sequence[Sequence[int]]) -> list[int] | None:
    """Sizes that all of these factorisations of one number can be merged from; None where there are none."""
    marks = {1}
    for sizes in pieces:
        product = 1
        for size in reversed(sizes):
            product *= size
            marks.add(product)
    chain = sorted(marks)
    out: list[int] = []
    for low, high in pairwise(chain):
        if high % low:
            return None
        out.append(high // low)
    return out[::-1]
