"""The ledger of a trace: all neurons seen, and everything that keeps them from changing places freely.

An *atom* is one neuron, a number. Whatever an operation demands of permutations is written down here as one of five
kinds of entry, and nothing else is ever demanded:

* ``same``: two atoms are one neuron (an input axis of a weight is the output axis of what feeds it).
* ``link``: two atoms move together, place by place (``residual`` where they are added, ``tie`` elsewhere).
* ``head``: an atom stands for a set of atoms, which can only move as a whole when it moves.
* ``cut``: a set of atoms keeps apart from all others.
* ``fix``: atoms stay where they are.

Every entry only takes freedom away; what no operation restricts is claimed to be exchangeable, and proven later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from nowcast_proto.wiring import WeightKind
from numpy.typing import NDArray

Ints = NDArray[np.int64]
NONE = -1
"""Stands in a grid where there is no neuron: a constant, as padding puts it."""


@dataclass(frozen=True)
class Origin:
    """Where a run of atoms comes from.

    Attributes:
        first: First atom.
        size: How many.
        name: The parameter and axis, or what they are.
        parameter: Number of the parameter, or -1.
    """

    first: int
    size: int
    name: str
    parameter: int = -1


class Ledger:
    """All atoms and all entries; see the module."""

    def __init__(self) -> None:
        self.origins: list[Origin] = []
        self.links: list[tuple[str, Ints, Ints]] = []
        self.heads: list[tuple[int, Ints]] = []
        self.cuts: list[Ints] = []
        self.fixed: list[tuple[Ints, str]] = []
        self.roles: list[tuple[Ints, WeightKind]] = []
        self.bound: list[tuple[Ints, Ints]] = []
        self.groups: dict[int, tuple[Ints, Ints]] = {}
        self.parameter_of: dict[int, int] = {}
        self._fresh = np.zeros(0, dtype=bool)
        self._born = np.zeros(0, dtype=np.int64)
        self._group = np.zeros(0, dtype=bool)
        self._n = 0
        self._head_of: dict[bytes, int] = {}
        self._derived: dict[tuple[int, int, int], int] = {}
        self._parent: dict[int, tuple[int, int, int]] = {}
        self._seen: set[tuple[str, bytes, bytes]] = set()
        self.now = 0

    @property
    def n(self) -> int:
        """Number of atoms."""
        return self._n

    def new(self, size: int, name: str, *, parameter: int = -1, fresh: bool = False, group: bool = False) -> Ints:
        """``size`` new atoms, one after another."""
        first, self._n = self._n, self._n + size
        if self._n > len(self._fresh):
            room = max(1024, 2 * self._n)
            self._fresh = np.concatenate([self._fresh, np.zeros(room - len(self._fresh), dtype=bool)])
            self._born = np.concatenate([self._born, np.zeros(room - len(self._born), dtype=np.int64)])
            self._group = np.concatenate([self._group, np.zeros(room - len(self._group), dtype=bool)])
        self._fresh[first : self._n] = fresh
        self._group[first : self._n] = group
        self._born[first : self._n] = self.now
        self.origins.append(Origin(first, size, name, parameter))
        return np.arange(first, self._n, dtype=np.int64)

    def is_fresh(self, atoms: Ints) -> bool:
        """Whether all of them are axes of parameters that nothing has met yet."""
        real = atoms[atoms >= 0]
        return bool(real.size) and bool(self._fresh[real].all())

    def is_group(self, atoms: Ints) -> bool:
        """Whether all of them stand for sets of other atoms."""
        real = atoms[atoms >= 0]
        return bool(real.size) and bool(self._group[real].all())

    def settle(self, atoms: Ints) -> None:
        """These are neurons of their own now: an operation gave them out as its result."""
        real = atoms[atoms >= 0]
        young = real[self._fresh[real]]
        self._fresh[young] = False
        self._born[young] = self.now

    def join(self, x: Ints, y: Ints, kind: str) -> Ints:
        """The values at equal places meet: they belong to one neuron, or to two that move together.

        Args:
            x: Atoms.
            y: As many, in the same order.
            kind: ``residual`` or ``tie``.

        Returns:
            The atoms the result is known by.
        """
        if x is y or np.array_equal(x, y):
            return x
        both = (x >= 0) & (y >= 0) & (x != y)
        a, b = x[both], y[both]
        if self.is_fresh(x) and not self.is_fresh(y):
            self._link("same", a, b)
            self._fresh[x[x >= 0]] = False
            return np.where(y >= 0, y, x)
        if self.is_fresh(y):
            self._link("same", b, a)
            self._fresh[y[y >= 0]] = False
            return np.where(x >= 0, x, y)
        self._link(kind, a, b)
        newer = not a.size or self._born[b].max() >= self._born[a].max()
        return np.where(y >= 0, y, x) if newer else np.where(x >= 0, x, y)

    def _link(self, kind: str, a: Ints, b: Ints) -> None:
        if not a.size:
            return
        key = (kind, a.tobytes(), b.tobytes())
        if key not in self._seen:
            self._seen.add(key)
            self.links.append((kind, a.ravel().copy(), b.ravel().copy()))

    def head(self, members: Ints) -> Ints:
        """One atom for each row of members, which it stands for.

        Args:
            members: (heads, members of each)

        Returns:
            (heads,)
        """
        found = np.full(len(members), NONE, dtype=np.int64)
        missing: list[tuple[int, bytes, Ints]] = []
        for row, atoms in enumerate(members):
            inside = np.unique(atoms[atoms >= 0])
            if inside.size == 0:
                continue
            if inside.size == 1:
                found[row] = inside[0]
                continue
            key = inside.tobytes()
            known = self._head_of.get(key)
            if known is None:
                known = self._common(inside)
            if known is None:
                missing.append((row, key, inside))
            else:
                found[row] = known
        if missing:
            fresh = self.new(len(missing), "head", group=True)
            for atom, (row, key, inside) in zip(fresh.tolist(), missing, strict=True):
                found[row] = self._head_of.setdefault(key, atom)
                self._stands(int(found[row]), inside)
        return found

    def _common(self, inside: Ints) -> int | None:
        """The head of atoms that all came, in one slot, from the members of one head."""
        parents = [self._parent.get(atom) for atom in inside.tolist()]
        if any(parent is None for parent in parents):
            return None
        slots = {parent[1:] for parent in parents if parent is not None}
        if len(slots) != 1:
            return None
        head = self.head(np.array([[parent[0] for parent in parents if parent is not None]], dtype=np.int64))
        slot, slots_of = next(iter(slots))
        return int(self.derive(head, slots_of)[0, slot])

    def assign_head(self, heads: Ints, members: Ints) -> None:
        """These atoms stand for these rows of members."""
        for atom, row in zip(heads.tolist(), members, strict=True):
            inside = np.unique(row[row >= 0])
            if atom < 0 or inside.size == 0 or (inside.size == 1 and inside[0] == atom):
                continue
            known = self._head_of.setdefault(inside.tobytes(), atom)
            if known == atom:
                self._stands(atom, inside)
            else:
                self._link("tie", np.array([known]), np.array([atom]))

    def _stands(self, atom: int, members: Ints) -> None:
        key = (f"head{atom}", members.tobytes(), b"")
        if key not in self._seen:
            self._seen.add(key)
            self.heads.append((atom, members))

    def derive(self, atoms: Ints, slots: int) -> Ints:
        """Atoms for each of ``slots`` values of a neuron (its pixels, say), which move with it.

        Args:
            atoms: (n,) neurons.
            slots: Values each.

        Returns:
            (n, slots)
        """
        out = np.full((len(atoms), slots), NONE, dtype=np.int64)
        for row, atom in enumerate(atoms.tolist()):
            if atom < 0:
                continue
            known = [self._derived.get((atom, slot, slots)) for slot in range(slots)]
            if known[0] is None:
                made = self.new(slots, "values")
                for slot, one in enumerate(made.tolist()):
                    self._derived[atom, slot, slots] = one
                    self._parent[one] = (atom, slot, slots)
                if slots > 1:
                    self._head_of[made.tobytes()] = atom
                    self._stands(atom, made)
                out[row] = made
            else:
                out[row] = np.array(known, dtype=np.int64)
        return out

    def parents(self, atoms: Ints) -> tuple[Ints, Ints, int] | None:
        """(neurons, slots, number of slots) that these atoms were derived from; None where one was not."""
        found = [self._parent.get(atom) for atom in atoms.ravel().tolist()]
        if not found or any(entry is None for entry in found):
            return None
        table = np.array(found, dtype=np.int64)
        if (table[:, 2] != table[0, 2]).any():
            return None
        return table[:, 0].reshape(atoms.shape), table[:, 1].reshape(atoms.shape), int(table[0, 2])

    def cut(self, atoms: Ints, whole: Ints | None = None) -> None:
        """These keep apart from all others; nothing to write down where they are all there is."""
        inside = np.unique(atoms[atoms >= 0])
        if whole is not None and inside.size == np.unique(whole[whole >= 0]).size:
            return
        if inside.size == 1:
            self.fix(inside, "one of several neurons is taken by its place")
            return
        key = ("cut", inside.tobytes(), b"")
        if inside.size and key not in self._seen:
            self._seen.add(key)
            self.cuts.append(inside)

    def fix(self, atoms: Ints, why: str) -> None:
        """These stay where they are."""
        inside = np.unique(atoms[atoms >= 0])
        key = ("fix", inside.tobytes(), b"")
        if inside.size and key not in self._seen:
            self._seen.add(key)
            self.fixed.append((inside, why))

    def move_together(self, a: Ints, b: Ints) -> None:
        """Joined one to one by the weights of a depthwise layer."""
        self.bound.append((a.copy(), b.copy()))

    def grouped(self, value: int, sources: Ints, targets: Ints) -> bool:
        """A grouped weight joins row by row of its sources and targets.

        Args:
            value: Number of the weight in the recording; only a parameter itself will do.
            sources: (groups, sources of each)
            targets: (groups, targets of each)

        Returns:
            Whether that could be written down.
        """
        number = self.parameter_of.get(value)
        if number is None:
            return False
        known = self.groups.get(number)
        if known is None:
            self.groups[number] = (sources.copy(), targets.copy())
            return True
        if known[0].shape != sources.shape or known[1].shape != targets.shape:
            return False
        self.join(known[0], sources, "tie")
        return True

    def role(self, atoms: Ints, role: WeightKind) -> None:
        """What part these neurons play in attention."""
        self.roles.append((np.unique(atoms[atoms >= 0]), role))


def components(n: int, pairs: Iterable[tuple[Ints, Ints]]) -> Ints:
    """The smallest member of the connected component of each of n nodes.

    Args:
        n: Number of nodes.
        pairs: Nodes joined one to one.
    """
    label = np.arange(n, dtype=np.int64)
    ends = list(pairs)
    if not ends:
        return label
    a = np.concatenate([one for one, _ in ends])
    b = np.concatenate([other for _, other in ends])
    while True:
        low = np.minimum(label[a], label[b])
        before = label.copy()
        np.minimum.at(label, label[a], low)
        np.minimum.at(label, label[b], low)
        label = label[label]
        label = label[label]
        if np.array_equal(before, label):
            return label
