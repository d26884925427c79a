"""Neurons get numbers: those of one origin and one part lie side by side, in order, and make a range."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
from nowcast_proto.wiring import WiringRange

from nowcast_client.network.tracing.atoms import Ints, components

if TYPE_CHECKING:
    from nowcast_client.network.tracing.following import Followed


class Numbering:
    """The nodes of a wiring.

    Args:
        followed: What became of all axes.
        touched: Numbers of the parameters that the forward pass uses.

    Attributes:
        leader: (atoms,) the atom that stands for all that are one neuron.
        fixed: (atoms,) whether it is known by its place.
        node: (atoms,) number of its node; -1 where it has none.
        ranges: Of nodes, in order.
        range_of_node: (count,) number of its range.
        heads: (atom of a head's own node, atoms of its members) for each head and group.
        count: How many nodes there are.
    """

    def __init__(self, followed: Followed, touched: set[int]) -> None:
        self.ledger = followed.ledger
        ledger, n = self.ledger, self.ledger.n
        same = [(a, b) for kind, a, b in ledger.links if kind == "same"]
        root = components(n, same)
        adopts = np.zeros(n, dtype=bool)
        for a, _ in same:
            adopts[a] = True
        # A neuron is called after the operation that made it, not after the weights that read it.
        order = np.lexsort((np.arange(n), adopts, root))
        first = np.ones(n, dtype=bool)
        first[1:] = root[order][1:] != root[order][:-1]
        leader = np.zeros(n, dtype=np.int64)
        leader[root[order][first]] = order[first]
        self.leader = leader[root]
        ties = [(a, b) for kind, a, b in ledger.links if kind != "same"] + ledger.bound
        moving = components(n, [(self.leader[a], self.leader[b]) for a, b in ties] + same)
        fixed = np.zeros(n, dtype=bool)
        for atoms, _ in ledger.fixed:
            fixed[moving[self.leader[atoms]]] = True
        self.fixed = fixed[moving][self.leader]
        generator = np.random.default_rng(0)
        cell = np.zeros(n, dtype=np.uint64)
        for atoms in ledger.cuts:
            cell[np.unique(self.leader[atoms])] ^= generator.integers(1, 2**63, dtype=np.uint64)
        ordered = self._ordered()
        used = np.zeros(n, dtype=bool)
        for number in touched:
            for part in followed.parameters.labels[number].parts:
                if part.kind == "grid":
                    used[self.leader[part.grid.ravel()]] = True
            if number in ledger.groups:
                used[self.leader[ledger.groups[number][0].ravel()]] = True
        for kind, a, b in ledger.links:
            if kind != "same":
                used[self.leader[a]] = used[self.leader[b]] = True
        for head, members in self.heads:
            used[self.leader[head]] = True
            used[self.leader[members]] = True
        unused = {number for number in range(len(followed.names)) if number not in touched}
        self.node = np.full(n, -1, dtype=np.int64)
        self.ranges: list[WiringRange] = []
        names: dict[str, int] = defaultdict(int)
        count = 0
        range_of: list[Ints] = []
        for origin in ledger.origins:
            if origin.parameter in unused:
                continue
            atoms = np.arange(origin.first, origin.first + origin.size)
            atoms = atoms[(self.leader[atoms] == atoms) & used[atoms]]
            if not atoms.size:
                continue
            keys = np.stack([cell[atoms], self.fixed[atoms].astype(np.uint64), ordered[atoms].astype(np.uint64)], 1)
            _, start, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
            for kind in np.argsort(start):
                inside = atoms[inverse.reshape(-1) == kind]
                self.node[inside] = np.arange(count, count + inside.size)
                names[origin.name] += 1
                name = origin.name if names[origin.name] == 1 else f"{origin.name}#{names[origin.name]}"
                self.ranges.append(
                    WiringRange(
                        name=name,
                        size=inside.size,
                        fixed=bool(self.fixed[inside[0]]),
                        ordered=bool(ordered[inside[0]]) and not bool(self.fixed[inside[0]]),
                    )
                )
                range_of.append(np.full(inside.size, len(self.ranges) - 1, dtype=np.int64))
                count += inside.size
        self.range_of_node = np.concatenate(range_of) if range_of else np.zeros(0, np.int64)
        self.node = self.node[self.leader]
        self.count = count

    def _ordered(self) -> Ints:
        """Neurons with places of their own inside heads that may move: told by fixed heads across free ones."""
        ledger = self.ledger
        ordered = np.zeros(ledger.n, dtype=bool)
        free: dict[int, list[int]] = defaultdict(list)
        rank: dict[tuple[int, int], int] = {}
        relations = [(head, np.unique(self.leader[members])) for head, members in ledger.heads]
        for head, members in relations:
            if not self.fixed[self.leader[head]]:
                for place, atom in enumerate(members.tolist()):
                    free[atom].append(head)
                    rank[head, atom] = place
        self.heads: list[tuple[int, Ints]] = []
        for head, members in relations:
            if not self.fixed[self.leader[head]]:
                self.heads.append((head, members))
                if all(ledger.parents(np.array([atom])) is not None for atom in members.tolist()[:1]):
                    ordered[members] = True
                continue
            inside = [atom for atom in members.tolist() if not self.fixed[atom]]
            if not inside:
                continue
            places = {rank[free[atom][0], atom] for atom in inside if free[atom]}
            heads = [free[atom][0] for atom in inside if free[atom]]
            if len(places) == 1 and len(heads) == len(inside) == len(set(heads)):
                ordered[np.array(inside)] = True
            else:
                self.heads.append((head, members))
        return ordered
