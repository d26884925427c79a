"""What a trace found, written as an explicit wiring: ranges of neurons, blocks of elements, links."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from nowcast_proto.wiring import ExplicitWiring, WeightKind, WiringBlock, WiringRange

from nowcast_client.network.tracing.atoms import Ints
from nowcast_client.network.tracing.labels import Label, Part
from nowcast_client.network.tracing.numbering import Numbering

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
        numbering = Numbering(self.found, touched)
        self.leader, self.node, self.count = numbering.leader, numbering.node, numbering.count
        self.ranges, self.range_of_node = numbering.ranges, numbering.range_of_node
        self._heads = numbering.heads
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
        for head, members in self._heads:
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
