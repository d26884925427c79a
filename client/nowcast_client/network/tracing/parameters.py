"""How the axes of parameters are divided: found out when they first meet something, kept for the next pass.

A weight of a linear layer that reads flattened pixels has one axis of ``C * H * W``; what it meets says that this is C
neurons with H * W values each. A weight ``(d, heads, size)`` of an einsum may meet neurons that are numbered over both
of its last axes. Such a finding is written down, and the labels are worked out anew with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nowcast_client.network.tracing.atoms import Ints, Ledger
from nowcast_client.network.tracing.labels import Axes, Label, Part, refine


@dataclass(frozen=True)
class Structure:
    """Fine axes of a parameter.

    Attributes:
        sizes: Of the fine axes of each axis.
        groups: Fine axes (numbered through) that run over neurons together.
        features: Fine axes that run over values of one edge: kernel positions, pixels.
    """

    sizes: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    features: frozenset[int] = frozenset()

    def flat(self) -> list[int]:
        """Sizes of all fine axes."""
        return [size for axis in self.sizes for size in axis]


def plain(shape: Sequence[int]) -> Structure:
    """Every axis for itself."""
    sizes = tuple((size,) if size != 1 else () for size in shape)
    return Structure(sizes, tuple((number,) for number in range(sum(map(len, sizes)))))


class Parameters:
    """The parameters of a network: their structures, and which atoms are theirs.

    Args:
        shapes: Of the parameters, in order.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
        self.names = list(names)
        self.structures = [plain(shape) for shape in shapes]
        self._tried: set[tuple[int, Structure]] = set(enumerate(self.structures))
        self._next: dict[int, Structure] = {}
        self._bases: list[dict[int, tuple[int, int]]] = []  # first atom -> (group, atoms)
        self.labels: list[Label] = []
        self.closed = False

    def begin(self, axes: Axes, ledger: Ledger) -> None:
        """Label all parameters with atoms of their own."""
        self._bases, self.labels = [], []
        for number, structure in enumerate(self.structures):
            fines = [axes.new(size) for size in structure.flat()]
            bases: dict[int, tuple[int, int]] = {}
            parts: list[Part] = []
            for index, group in enumerate(structure.groups):
                sizes = [structure.flat()[place] for place in group]
                name = f"{self.names[number]}[{','.join(map(str, group))}]"
                atoms = ledger.new(math.prod(sizes), name, parameter=number, fresh=True)
                bases[int(atoms[0])] = (index, len(atoms))
                parts.append(Part(tuple(fines[place] for place in group), atoms.reshape(sizes), "grid"))
            parts += [Part((fines[place],), None, "data") for place in sorted(structure.features)]
            queue = list(fines)
            layout = tuple(tuple(queue.pop(0) for _ in axis) for axis in structure.sizes)
            self._bases.append(bases)
            self.labels.append(Label(layout, tuple(parts), param=True))

    def changed(self) -> bool:
        """Take over what was found in the last pass; whether there was anything."""
        for number, structure in self._next.items():
            self.structures[number] = structure
        found, self._next = bool(self._next), {}
        return found

    def adopt(self, ours: Sequence[Part], theirs: Sequence[Part], ledger: Ledger, sizes: Sequence[int]) -> bool:
        """Divide a parameter that nothing has met yet as what it meets is divided.

        Args:
            ours: Parts of the parameter.
            theirs: What is met, over the same fine axes.
            ledger: Says which atoms are met for the first time.
            sizes: Of fine axes.

        Returns:
            Whether that is possible; the labels are then worked out anew.
        """
        if self.closed or any(part.kind != "grid" or not ledger.is_fresh(part.grid) for part in ours):
            return False
        places: dict[int, int] = {}  # fine axis met -> fine axis of the new structure
        numbers = {self._owner(part.grid, ledger) for part in ours}
        number = numbers.pop()
        if number is None or numbers:
            return False
        structure = self.structures[number]
        pieces: dict[int, list[int]] = {}  # old fine axis -> sizes of its pieces
        named: dict[int, list[int]] = {}  # old fine axis -> fine axes met
        for part in ours:
            divided = self._divide(number, part)
            if divided is None:
                return False
            for old, entries in divided.items():
                pieces[old] = [size for size, _ in entries]
                named[old] = [fine for _, fine in entries]
        new_of: dict[int, list[int]] = {}
        new_sizes: list[tuple[int, ...]] = []
        old, count = 0, 0
        for axis in structure.sizes:
            out: list[int] = []
            for size in axis:
                made = pieces.get(old, [size])
                new_of[old] = list(range(count, count + len(made)))
                for fine, place in zip(named.get(old, []), new_of[old], strict=False):
                    places[fine] = place
                count += len(made)
                out += made
                old += 1
            new_sizes.append(tuple(out))
        groups = [tuple(new for one in group for new in new_of[one]) for group in structure.groups]
        groups = [group for group in groups if not set(group) & set(places.values())]
        features = {new for one in structure.features for new in new_of[one]}
        for part in theirs:
            if any(fine not in places for fine in part.fines):
                return False
            if part.kind == "grid":
                groups.append(tuple(sorted(places[fine] for fine in part.fines)))
            else:
                features |= {places[fine] for fine in part.fines}
        taken = {place for group in groups for place in group} | features
        groups += [(place,) for place in places.values() if place not in taken]
        result = Structure(tuple(new_sizes), tuple(sorted(groups)), frozenset(features))
        return self._propose(number, result)

    def as_features(self, part: Part, ledger: Ledger) -> bool:
        """Take a whole axis of a parameter for values of its edges."""
        number = self._owner(part.grid, ledger)
        if self.closed or number is None or not ledger.is_fresh(part.grid):
            return False
        index, count = self._bases[number][int(part.grid.min())]
        structure = self.structures[number]
        if count != part.grid.size:
            return False
        group = structure.groups[index]
        groups = tuple(other for other in structure.groups if other != group)
        return self._propose(number, Structure(structure.sizes, groups, structure.features | set(group)))

    def _propose(self, number: int, result: Structure) -> bool:
        if number in self._next:
            return True
        if (number, result) in self._tried:
            return False
        self._tried.add((number, result))
        self._next[number] = result
        return True

    def _owner(self, grid: Ints, ledger: Ledger) -> int | None:
        """The parameter that has exactly these atoms as one of its groups."""
        first = int(grid.min())
        for number, bases in enumerate(self._bases):
            if first in bases:
                return number if bases[first][1] == grid.size else None
        return None

    def _divide(self, number: int, part: Part) -> dict[int, list[tuple[int, int]]] | None:
        """(size, fine axis met) of the pieces of each old fine axis of the group that a part is of."""
        first = int(part.grid.min())
        index, count = self._bases[number][first]
        local = part.grid - first
        strides = [int(np.take(local, 1, axis=k).flat[0]) if size > 1 else 0 for k, size in enumerate(local.shape)]
        if local.flat[0] != 0:
            return None
        steps = sum(
            (np.arange(size) * stride).reshape([-1 if k == axis else 1 for k in range(local.ndim)])
            for axis, (size, stride) in enumerate(zip(local.shape, strides, strict=True))
        )
        if not np.array_equal(np.broadcast_to(steps, local.shape), local):
            return None
        order = sorted(range(local.ndim), key=lambda k: -strides[k])
        met = [local.shape[k] for k in order]
        old_fines = self.structures[number].groups[index]
        old_sizes = [self.structures[number].flat()[place] for place in old_fines]
        if refine([met, old_sizes]) != met or math.prod(met) != count:
            return None
        out: dict[int, list[tuple[int, int]]] = {}
        queue = [(local.shape[k], part.fines[k]) for k in order]
        for place, size in zip(old_fines, old_sizes, strict=True):
            taken: list[tuple[int, int]] = []
            while math.prod(one for one, _ in taken) < size:
                taken.append(queue.pop(0))
            out[place] = taken
        return out
