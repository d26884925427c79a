"""Which neurons a wiring says may change places, and what becomes of the parameters when they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from nowcast_proto.wiring import ExplicitWiring, WiringBlock, WiringRange
from numpy.typing import NDArray

from nowcast_client.network.tracing.atoms import Ints, components

Marks = NDArray[np.uint64]


def signatures(blocks: Sequence[WiringBlock], n: int) -> Marks:
    """A number for each node that says which blocks take it, and at which end."""
    generator = np.random.default_rng(7)
    out = np.zeros(n + 1, dtype=np.uint64)
    marks = generator.integers(1, 2**63, size=(max(1, len(blocks)), 2), dtype=np.uint64)
    kept = [number for number, block in enumerate(blocks) if block.source != block.target or not block.diagonal]
    for ends, mark in (
        ([(blocks[k].source, blocks[k].n_sources) for k in kept], marks[kept, 0]),
        ([(blocks[k].target, blocks[k].n_targets) for k in kept], marks[kept, 1]),
    ):
        if ends:
            firsts, sizes = np.array(ends, dtype=np.int64).T
            np.add.at(out, firsts, mark)
            np.subtract.at(out, firsts + sizes, mark)
    return np.asarray(np.cumsum(out[:-1], dtype=np.uint64))


def diagonals(blocks: Sequence[WiringBlock]) -> list[tuple[Ints, Ints]]:
    """Ends of the blocks that join neurons one to one."""
    return [
        (
            np.arange(block.source, block.source + block.n_sources),
            np.arange(block.target, block.target + block.n_targets),
        )
        for block in blocks
        if block.diagonal
    ]


def mixed(values: Marks) -> Marks:
    """Numbers whose sums tell sets apart."""
    x = values.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def movers(blocks: Sequence[WiringBlock], n: int) -> tuple[Ints, Marks, Marks]:
    """(set of neurons that move together, signature of the node, signature of its set) for each node."""
    label = components(n, diagonals(blocks))
    own = signatures(blocks, n)
    total = np.zeros(n, dtype=np.uint64)
    np.add.at(total, label, mixed(own))
    return label, own, total[label]


def confusable(blocks: Sequence[WiringBlock], ranges: Sequence[WiringRange], n: int) -> set[int]:
    """Ranges with neurons that nothing but their range tells from neurons of another."""
    _, own, whole = movers(blocks, n)
    range_of = np.full(n, -1, dtype=np.int64)
    first = 0
    free = np.zeros(n, dtype=bool)
    for number, one in enumerate(ranges):
        range_of[first : first + one.size] = number
        free[first : first + one.size] = not (one.fixed or one.ordered)
        first += one.size
    nodes = np.flatnonzero(free)
    order = nodes[np.lexsort((own[nodes], whole[nodes]))]
    same = (whole[order][1:] == whole[order][:-1]) & (own[order][1:] == own[order][:-1])
    differ = same & (range_of[order][1:] != range_of[order][:-1])
    found = set(range_of[order][1:][differ].tolist()) | set(range_of[order][:-1][differ].tolist())
    return {number for number in found if number >= 0}


@dataclass(frozen=True)
class Classes:
    """Sets of neurons that may change places.

    Attributes:
        members: One array (sets, neurons of each) for each class; equal columns play equal parts.
    """

    members: tuple[Ints, ...]


def classes(wiring: ExplicitWiring) -> Classes:
    """Neurons that every block and link takes alike, in sets that move together, classes of two sets and more."""
    n = wiring.n_nodes
    label, own, _ = movers(wiring.blocks, n)
    stays = np.zeros(n, dtype=bool)
    range_of = np.zeros(n, dtype=np.int64)
    first = 0
    for number, one in enumerate(wiring.ranges):
        range_of[first : first + one.size] = number
        if one.fixed or one.ordered:
            stays[label[first : first + one.size]] = True
        first += one.size
    key = mixed(own + mixed(range_of.astype(np.uint64) + np.uint64(1)))
    total = np.zeros(n, dtype=np.uint64)
    np.add.at(total, label, mixed(key))
    nodes = np.flatnonzero(~stays[label])
    order = nodes[np.lexsort((nodes, key[nodes], label[nodes], total[label[nodes]]))]
    out: list[Ints] = []
    if not order.size:
        return Classes(())
    cuts = np.flatnonzero(np.diff(total[label[order]].astype(np.int64)) != 0) + 1
    for inside in np.split(order, cuts):
        sets = int(np.unique(label[inside]).size)
        if sets > 1 and inside.size % sets == 0:
            out.append(inside.reshape(sets, -1))
    return Classes(tuple(out))


def shuffled(members: Sequence[Ints], n: int, generator: np.random.Generator) -> Ints:
    """Neuron i goes to place ``order[i]``: the sets of each class in a random order, never the old one.

    Args:
        members: Classes, as in `Classes`.
        n: Number of neurons.
        generator: Draws the permutations.
    """
    order = np.arange(n)
    for sets in members:
        places = np.arange(len(sets))
        while (places == np.arange(len(sets))).all():
            places = generator.permutation(len(sets))
        order[sets] = sets[places]
    return order


class Heads:
    """Whole heads and groups that may change places, with all that must then.

    Args:
        wiring: Of the network.
    """

    def __init__(self, wiring: ExplicitWiring) -> None:
        n = wiring.n_nodes
        self._n = n
        self._range = np.zeros(n, dtype=np.int64)
        self._fixed = np.zeros(n, dtype=bool)
        first = 0
        for number, one in enumerate(wiring.ranges):
            self._range[first : first + one.size] = number
            self._fixed[first : first + one.size] = one.fixed
            first += one.size
        self._members: dict[int, list[int]] = {}
        self._of: dict[int, list[int]] = {}
        touched = np.zeros(n, dtype=bool)
        for block in wiring.blocks:
            if block.type == "head":
                inside = range(block.target, block.target + block.n_targets)
                self._members.setdefault(block.source, []).extend(inside)
                for node in inside:
                    self._of.setdefault(node, []).append(block.source)
                touched[block.source] = touched[block.target : block.target + block.n_targets] = True
        joined = [block for block in wiring.blocks if block.diagonal]
        self._pairs: dict[int, list[tuple[str, int, int]]] = {}
        while True:
            more = [
                block
                for block in joined
                if touched[block.source : block.source + block.n_sources].any()
                or touched[block.target : block.target + block.n_targets].any()
            ]
            joined = [block for block in joined if block not in more] if more else joined
            for block in more:
                tag = f"{block.type}:{block.parameter}"
                for i in range(block.n_sources):
                    a, b = block.source + i, block.target + i
                    self._pairs.setdefault(a, []).append((tag + ">", int(self._range[b]), b))
                    self._pairs.setdefault(b, []).append((tag + "<", int(self._range[a]), a))
                touched[block.source : block.source + block.n_sources] = True
                touched[block.target : block.target + block.n_targets] = True
            if not more:
                break

    def swaps(self) -> list[dict[int, int]]:
        """Neighbouring heads of each range changing places; only the neurons that move are listed."""
        by_range: dict[int, list[int]] = {}
        for head in sorted(self._members):
            if not self._fixed[head]:
                by_range.setdefault(int(self._range[head]), []).append(head)
        found: list[dict[int, int]] = []
        seen: set[frozenset[tuple[int, int]]] = set()
        for heads in by_range.values():
            for a, b in pairwise(heads):
                mapping = self._closed(a, b)
                key = frozenset(mapping.items()) if mapping else None
                if mapping and key not in seen and key is not None:
                    seen.add(key)
                    found.append(mapping)
        return found

    def _closed(self, a: int, b: int) -> dict[int, int] | None:
        """All that must change places when two heads do; None where that is impossible."""
        to: dict[int, int] = {}
        queue = [(a, b)]
        while queue:
            x, y = queue.pop()
            if x in to or y in to:
                if to.get(x) != y or to.get(y) != x:
                    return None
                continue
            if self._range[x] != self._range[y] or (x != y and (self._fixed[x] or self._fixed[y])):
                return None
            to[x], to[y] = y, x
            for table in (self._members, self._of):
                one, other = (sorted(table.get(node, ()), key=self._place) for node in (x, y))
                if len(one) != len(other):
                    return None
                queue += list(zip(one, other, strict=True))
            mine, theirs = sorted(self._pairs.get(x, ())), sorted(self._pairs.get(y, ()))
            if [entry[:2] for entry in mine] != [entry[:2] for entry in theirs]:
                return None
            queue += [(p[2], q[2]) for p, q in zip(mine, theirs, strict=True)]
        return {x: y for x, y in to.items() if x != y}

    def _place(self, node: int) -> tuple[int, int]:
        return int(self._range[node]), node
