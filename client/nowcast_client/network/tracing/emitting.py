"""What a trace found, written as an explicit wiring: ranges of neurons, blocks of elements, links."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from nowcast_proto.wiring import ExplicitWiring, WeightKind, WiringBlock, WiringRange

from nowcast_client.network.tracing.atoms import Ints, components
from nowcast_client.network.tracing.labels import Label, Part

if TYPE_CHECKING:
    from nowcast_client.network.tracing.following import Followed


@dataclass(frozen=True)
class _Run:
    """Nodes side by side whose elements lie at equal distances."""

    node: int
    count: int
    offset: int
    stride: int


class Emitter:
    """Writes one wiring; see the module."""

    def __init__(self, followed: Followed) -> None:
        self.found = followed
        self.ledger = followed.ledger
        self.blocks: list[WiringBlock] = []
        self.left: dict[str, str] = {}
        self.extra: list[str] = []  # nodes of their own, after all others

    def wiring(self) -> ExplicitWiring:
        """The wiring of all that was found."""
        labels = self.found.parameters.labels
        touched = self._fix_third_axes(labels)
        self._nodes(touched)
        for number, name in enumerate(self.found.names):
            if number in touched:
                self._parameter(number, labels[number])
            else:
                self.left[name] = "the forward pass does not use it"
        self._links()
        self._keep_apart()
        ranges = [*self.ranges]
        for name in self.extra:
            ranges.append(WiringRange(name=name, size=1, fixed=True))
        return ExplicitWiring(ranges=tuple(ranges), blocks=tuple(dict.fromkeys(self.blocks)), left=self.left)

    def _fix_third_axes(self, labels: list[Label]) -> set[int]:
        """Edges have two ends: where a parameter has more axes of neurons, the smallest stay where they are."""
        for number in self.found.uses:
            grids = sorted((p for p in labels[number].parts if p.kind == "grid"), key=lambda p: -p.grid.size)
            for part in grids[2:]:
                self.ledger.fix(part.grid, "a third axis of neurons of one tensor")
        return set(self.found.uses)

    def _nodes(self, touched: set[int]) -> None:
        """Number the neurons: those of one origin and one part side by side, in order."""
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
            for part in self.found.parameters.labels[number].parts:
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
        unused = {number for number in range(len(self.found.names)) if number not in touched}
        self.node = np.full(n, -1, dtype=np.int64)
        self.ranges: list[WiringRange] = []
        names: dict[str, int] = defaultdict(int)
        count = 0
        self.range_of: list[Ints] = []
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
                self.range_of.append(np.full(inside.size, len(self.ranges) - 1, dtype=np.int64))
                count += inside.size
        self.range_of_node = np.concatenate(self.range_of) if self.range_of else np.zeros(0, np.int64)
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

    def _parameter(self, number: int, label: Label) -> None:
        name, shape = self.found.names[number], self.found.shapes[number]
        strides: dict[int, int] = {}
        sizes: dict[int, int] = {}
        stride = 1
        flat = self.found.parameters.structures[number].flat()
        fines = label.fines()
        for fine, size in zip(reversed(fines), reversed(flat), strict=True):
            strides[fine], sizes[fine] = stride, size
            stride *= size
        grids = sorted((p for p in label.parts if p.kind == "grid"), key=lambda p: -p.grid.size)
        offsets = {part.fines: _offsets(part, strides) for part in grids}
        kernel = [fine for fine in fines if not any(fine in part.fines for part in grids)]
        kind = self._kind(number)
        if number in self.ledger.groups:
            self._grouped(number, name, shape, kernel, sizes, strides)
            return
        inner: list[int] = []
        for fine in sorted(kernel, key=lambda fine: strides[fine]):
            if not inner or strides[inner[-1]] * sizes[inner[-1]] == strides[fine]:
                inner.append(fine)
        features = int(np.prod([sizes[fine] for fine in inner])) if inner else 1
        step = strides[inner[0]] if inner else 1
        bases = np.zeros(1, dtype=np.int64)
        for fine in kernel:
            if fine not in inner:
                bases = (bases[:, None] + np.arange(sizes[fine]) * strides[fine]).ravel()
        for part in grids[2:]:
            bases = (bases[:, None] + offsets[part.fines].ravel()).ravel()
        if not grids:
            ends = self._own(name), self._own(f"{name}.value")
            for base in bases.tolist():
                self.blocks.append(
                    WiringBlock(
                        type="other",
                        parameter=name,
                        source=ends[0],
                        n_sources=1,
                        target=ends[1],
                        n_targets=1,
                        features=features,
                        offset=base,
                        feature_stride=step,
                    )
                )
            return
        if len(grids) == 1:
            source = self._own(name)
            for base in bases.tolist():
                for run in self._runs(self.node[grids[0].grid.ravel()], offsets[grids[0].fines].ravel() + base):
                    self.blocks.append(
                        WiringBlock(
                            type=self._role(kind, run.node),
                            parameter=name,
                            source=source,
                            n_sources=1,
                            target=run.node,
                            n_targets=run.count,
                            features=features,
                            offset=run.offset,
                            target_stride=run.stride,
                            feature_stride=step,
                        )
                    )
            return
        sources, targets = self._ends(number, grids[0], grids[1])
        source_runs = self._runs(self.node[sources.grid.ravel()], offsets[sources.fines].ravel())
        target_runs = self._runs(self.node[targets.grid.ravel()], offsets[targets.fines].ravel())
        for base in bases.tolist():
            for a in source_runs:
                for b in target_runs:
                    self.blocks.append(
                        WiringBlock(
                            type=self._role(kind, b.node),
                            parameter=name,
                            source=a.node,
                            n_sources=a.count,
                            target=b.node,
                            n_targets=b.count,
                            features=features,
                            offset=base + a.offset + b.offset,
                            source_stride=a.stride,
                            target_stride=b.stride,
                            feature_stride=step,
                        )
                    )

    def _grouped(
        self,
        number: int,
        name: str,
        shape: tuple[int, ...],
        kernel: list[int],
        sizes: dict[int, int],
        strides: dict[int, int],
    ) -> None:
        """A block for each group; one diagonal block where groups have one neuron on each side."""
        sources, targets = self.ledger.groups[number]
        per_out = int(np.prod(shape[1:]))
        per_in = int(np.prod(shape[2:]))
        groups, n_in = sources.shape
        n_out = targets.shape[1]
        if n_in == n_out == 1:
            a, b = self.node[sources.ravel()], self.node[targets.ravel()]
            offset = np.arange(groups) * per_out
            for first, last in _steps(a, b, self.range_of_node):
                self.blocks.append(
                    WiringBlock(
                        type="conv",
                        parameter=name,
                        source=int(a[first]),
                        n_sources=last - first,
                        target=int(b[first]),
                        n_targets=last - first,
                        diagonal=True,
                        features=per_in,
                        offset=int(offset[first]),
                        source_stride=per_out,
                    )
                )
            return
        for group in range(groups):
            runs_in = self._runs(self.node[sources[group]], np.arange(n_in) * per_in)
            runs_out = self._runs(self.node[targets[group]], (group * n_out + np.arange(n_out)) * per_out)
            for a_run in runs_in:
                for b_run in runs_out:
                    self.blocks.append(
                        WiringBlock(
                            type="conv",
                            parameter=name,
                            source=a_run.node,
                            n_sources=a_run.count,
                            target=b_run.node,
                            n_targets=b_run.count,
                            features=per_in,
                            offset=a_run.offset + b_run.offset,
                            source_stride=a_run.stride,
                            target_stride=b_run.stride,
                        )
                    )

    def _ends(self, number: int, a: Part, b: Part) -> tuple[Part, Part]:
        """(source, target): the neurons that the tensor makes are its targets."""
        own = [bool((self.leader[part.grid.ravel()] == part.grid.ravel()).all()) for part in (a, b)]
        if own[0] != own[1]:
            return (b, a) if own[0] else (a, b)
        embeds = any("embedding" in use for use in self.found.uses.get(number, ()))
        first = a if min(a.fines) < min(b.fines) else b
        other = b if first is a else a
        return (first, other) if embeds else (other, first)

    def _kind(self, number: int) -> WeightKind:
        uses = self.found.uses.get(number)
        if not uses:
            return "other"
        kinds: tuple[WeightKind, ...] = ("conv", "token_embedding", "position_embedding", "linear", "norm")
        return next((kind for kind in kinds if uses.get(kind, 0) > 0), "other")

    def _role(self, kind: WeightKind, target: int) -> WeightKind:
        if kind != "linear":
            return kind
        return self.roles.get(target, kind)

    def _own(self, name: str) -> int:
        self.extra.append(f"{name} from")
        return self.count + len(self.extra) - 1

    def _runs(self, nodes: Ints, offsets: Ints) -> list[_Run]:
        """Maximal runs of neighbouring nodes of one range with elements at one distance."""
        order = np.argsort(nodes, kind="stable")
        nodes, offsets = nodes[order], offsets[order]
        again = np.arange(len(nodes)) - np.searchsorted(nodes, nodes)  # a neuron may have several elements
        if again.any():
            return [
                run
                for time in range(int(again.max()) + 1)
                for run in self._runs(nodes[again == time], offsets[again == time])
            ]
        runs: list[_Run] = []
        start = 0
        while start < len(nodes):
            end, stride = start + 1, 0
            if end < len(nodes) and self._next(nodes, start) and offsets[end] > offsets[start]:
                stride = int(offsets[end] - offsets[start])
                steps = (np.diff(nodes[start:]) == 1) & (np.diff(offsets[start:]) == stride)
                steps &= np.diff(self.range_of_node[nodes[start:]]) == 0
                wrong = np.flatnonzero(~steps)
                end = start + (int(wrong[0]) if wrong.size else len(steps)) + 1
            runs.append(_Run(int(nodes[start]), end - start, int(offsets[start]), stride))
            start = end
        return runs

    def _next(self, nodes: Ints, place: int) -> bool:
        a, b = nodes[place], nodes[place + 1]
        return bool(b == a + 1 and self.range_of_node[a] == self.range_of_node[b])

    def _links(self) -> None:
        for kind, a, b in self.ledger.links:
            if kind == "same":
                continue
            x, y = self.node[a], self.node[b]
            different = x != y
            x, y = x[different], y[different]
            for first, last in _steps(x, y, self.range_of_node):
                self.blocks.append(
                    WiringBlock(
                        type="residual" if kind == "residual" else "tie",
                        source=int(x[first]),
                        n_sources=last - first,
                        target=int(y[first]),
                        n_targets=last - first,
                        diagonal=True,
                    )
                )
        for head, members in self.heads:
            source = int(self.node[head])
            nodes = np.unique(self.node[members])
            nodes = nodes[nodes != source]
            for run in self._runs(nodes, np.arange(len(nodes))):
                self.blocks.append(
                    WiringBlock(type="head", source=source, n_sources=1, target=run.node, n_targets=run.count)
                )

    def _keep_apart(self) -> None:
        """Ranges that no block tells apart, though the network does, get a node of their own each."""
        from nowcast_client.network.symmetries import confusable

        firsts = np.concatenate([[0], np.cumsum([r.size for r in self.ranges])])
        n = self.count + len(self.extra)
        for index in sorted(confusable(self.blocks, self.ranges, n)):
            if index < len(self.ranges):
                source = self._own(f"{self.ranges[index].name} alone")
                self.blocks.append(
                    WiringBlock(
                        type="head",
                        source=source,
                        n_sources=1,
                        target=int(firsts[index]),
                        n_targets=self.ranges[index].size,
                    )
                )

    @property
    def roles(self) -> dict[int, WeightKind]:
        """Node -> its part in an attention."""
        if not hasattr(self, "_roles"):
            self._roles: dict[int, WeightKind] = {}
            for atoms, role in self.ledger.roles:
                for node in np.unique(self.node[atoms]).tolist():
                    self._roles.setdefault(node, role)
        return self._roles


def _offsets(part: Part, strides: dict[int, int]) -> Ints:
    """Element of each coordinate of a part."""
    out = np.zeros((), dtype=np.int64)
    for fine, size in zip(part.fines, part.grid.shape, strict=True):
        out = out[..., None] + np.arange(size, dtype=np.int64) * strides[fine]
    return out


def _steps(x: Ints, y: Ints, ranges: Ints) -> list[tuple[int, int]]:
    """Runs in which both go up by one inside their ranges."""
    if not len(x):
        return []
    follow = (np.diff(x) == 1) & (np.diff(y) == 1)
    follow &= (np.diff(ranges[x]) == 0) & (np.diff(ranges[y]) == 0)
    ends = np.concatenate([np.flatnonzero(~follow) + 1, [len(x)]]).tolist()
    starts = [0, *ends[:-1]]
    return list(zip(starts, ends, strict=True))
