"""Judges a wiring by its JSON alone: permutes the neurons it says are alike in the weights of the live network.

Knows nothing of families, traces or modules, and shares no code with what makes wirings or proves them.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

TOLERANCE = 1e-8


@dataclass
class Verdict:
    """What a wiring is worth.

    Attributes:
        share: Of the elements, how many change places under permutations that are claimed.
        false: Claims that are wrong, in words.
        blind: Tensors whose order the output does not see.
    """

    share: float = 0.0
    false: list[str] = field(default_factory=list)
    blind: list[str] = field(default_factory=list)


class Judge:
    """One wiring and one network.

    Args:
        wiring: The JSON document.
        tensors: Name -> values, in the network's precision; altered by nobody.
        outputs: The network as a function of its tensors.
        tolerance: Relative change of the output that is rounding.
    """

    def __init__(
        self,
        wiring: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        outputs: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
        tolerance: float = TOLERANCE,
        seed: int = 0,
    ) -> None:
        self.wiring, self.tensors, self.outputs, self.tolerance = wiring, dict(tensors), outputs, tolerance
        self.random = np.random.default_rng(seed)
        self.n = wiring["n_nodes"]
        unsaid = {
            "features": 1,
            "offset": 0,
            "source_stride": 0,
            "target_stride": 0,
            "feature_stride": 1,
            "diagonal": False,
        }
        self.blocks = [{**unsaid, **block} for block in wiring["blocks"]]
        self.role = np.full(self.n, -1)
        self.fixed = np.zeros(self.n, bool)
        self.ordered = np.zeros(self.n, bool)
        for number, one in enumerate(wiring["ranges"]):
            inside = slice(one["first"], one["first"] + one["size"])
            if (self.role[inside] >= 0).any():
                raise ValueError(f"range {one['name']} overlaps another")
            self.role[inside], self.fixed[inside], self.ordered[inside] = number, one["fixed"], one["ordered"]
        if (self.role < 0).any():
            raise ValueError("ranges do not cover all nodes")
        self.verdict = Verdict()
        self.moved = {name: np.zeros(tensor.numel(), bool) for name, tensor in self.tensors.items()}

    def judge(self) -> Verdict:
        """Structure, then truth, then worth and discrimination."""
        self.structure()
        self.reference = self.outputs(self.tensors)
        self.alike()
        self.heads()
        total = sum(one.size for one in self.moved.values())
        self.verdict.share = sum(int(one.sum()) for one in self.moved.values()) / max(1, total)
        return self.verdict

    def structure(self) -> None:
        """Elements inside their parameter, every parameter somewhere."""
        seen = set(self.wiring["left"])
        for block in self.blocks:
            name = block["parameter"]
            if name is None:
                continue
            seen.add(name)
            elements = self.elements(block)
            if elements.max() >= self.tensors[name].numel() or np.unique(elements).size != elements.size:
                raise ValueError(f"elements of a block of {name} are outside it or taken twice")
        missing = set(self.tensors) - seen
        if missing:
            raise ValueError(f"{sorted(missing)[0]} is nowhere")

    def elements(self, block: Mapping[str, Any]) -> np.ndarray:
        """(sources, targets, features) or (sources, features) elements."""
        features = np.arange(block["features"]) * block["feature_stride"]
        sources = np.arange(block["n_sources"]) * block["source_stride"]
        if block["diagonal"]:
            return block["offset"] + sources[:, None] + features
        targets = np.arange(block["n_targets"]) * block["target_stride"]
        return block["offset"] + sources[:, None, None] + targets[:, None] + features

    def change(self, tensors: Mapping[str, torch.Tensor]) -> float:
        """Largest change of the output, relative to its largest element."""
        new = self.outputs({**self.tensors, **tensors})
        if new.shape != self.reference.shape or not bool(torch.isfinite(new).all()):
            return float("inf")
        return float((new - self.reference).abs().max() / self.reference.abs().max())

    def rewired(self, order: np.ndarray) -> dict[str, torch.Tensor] | str:
        """The tensors after neuron i went to place ``order[i]``; a message where edges would fall beside edges."""
        edges: dict[str, list[np.ndarray]] = defaultdict(list)
        parallel: dict[tuple[Any, ...], int] = defaultdict(int)
        kinds: dict[str, int] = {}
        for block in self.blocks:
            name = block["parameter"]
            kind = kinds.setdefault(block["type"], len(kinds))
            if name is None:
                if block["type"] != "self_loop":
                    name = f"\0{block['type']}"
                    elements = np.zeros(self.elements({**block, "offset": 0}).shape, int)
                else:
                    continue
            else:
                elements = self.elements(block)
            key = (name, block["source"], block["n_sources"], block["target"], block["n_targets"], block["diagonal"])
            rank = parallel[key]
            if block["parameter"] is not None:
                parallel[key] += 1
            i = np.arange(block["source"], block["source"] + block["n_sources"])
            j = np.arange(block["target"], block["target"] + block["n_targets"])
            if block["diagonal"]:
                u, v = i[:, None], j[:, None]
            else:
                u, v = i[:, None, None], j[None, :, None]
            f = np.arange(block["features"])
            columns = np.broadcast_arrays(u, v, f, elements, np.array(kind * 1000 + rank))
            edges[name].append(np.stack([column.ravel() for column in columns]))
        out: dict[str, torch.Tensor] = {}
        for name, pieces in edges.items():
            u, v, f, element, kind = np.concatenate(pieces, axis=1)
            if (order[u] == u).all() and (order[v] == v).all():
                continue
            width = int(f.max()) + 1

            def key(
                a: np.ndarray, b: np.ndarray, f: np.ndarray = f, k: np.ndarray = kind, w: int = width
            ) -> np.ndarray:
                return ((k * self.n + a) * self.n + b) * w + f

            old, new = key(u, v), key(order[u], order[v])
            sort = np.argsort(old, kind="stable")
            place = np.searchsorted(old[sort], new)
            if (place >= len(old)).any() or (old[sort][np.minimum(place, len(old) - 1)] != new).any():
                return f"an edge of {name.strip(chr(0))} falls beside all edges"
            if name.startswith("\0"):
                continue
            target = element[sort][place]
            flat = self.tensors[name].reshape(-1)
            goes = np.full(flat.numel(), -1)
            for_each = np.argsort(element, kind="stable")
            same = np.flatnonzero(np.diff(element[for_each]) == 0)
            if (target[for_each][same] != target[for_each][same + 1]).any():
                return f"an element of {name} is to move in two ways"
            goes[element] = target
            used = np.flatnonzero(goes >= 0)
            if np.unique(goes[used]).size != used.size:
                return f"two elements of {name} are to move to one place"
            changed = flat.clone()
            changed[torch.as_tensor(goes[used])] = flat[torch.as_tensor(used)]
            out[name] = changed.view_as(self.tensors[name])
            self._goes[name] = used[goes[used] != used]
        return out

    _goes: dict[str, np.ndarray]

    def test(self, order: np.ndarray, what: str) -> bool:
        """Whether a permutation keeps the function; what it moves counts if so."""
        self._goes = {}
        changed = self.rewired(order)
        if isinstance(changed, str):
            self.verdict.false.append(f"{what}: {changed}")
            return False
        difference = self.change(changed)
        if difference > self.tolerance:
            self.verdict.false.append(f"{what}: changes the output by {difference:.1e}")
            return False
        for name, places in self._goes.items():
            self.moved[name][places] = True
        return True

    def sets(self) -> list[list[list[int]]]:
        """Classes of sets of neurons that move together."""
        parent = list(range(self.n))

        def find(x: int) -> int:
            while parent[x] != x:
                parent[x] = parent[parent[x]]
                x = parent[x]
            return x

        marks: list[list[tuple[int, int]]] = [[] for _ in range(self.n)]
        for number, block in enumerate(self.blocks):
            if block["type"] == "self_loop":
                continue
            for node in range(block["source"], block["source"] + block["n_sources"]):
                marks[node].append((number, 0))
            for node in range(block["target"], block["target"] + block["n_targets"]):
                marks[node].append((number, 1))
            if block["diagonal"]:
                for i in range(block["n_sources"]):
                    parent[find(block["source"] + i)] = find(block["target"] + i)
        members: dict[int, list[int]] = defaultdict(list)
        for node in range(self.n):
            members[find(node)].append(node)
        alike: dict[Any, list[list[int]]] = defaultdict(list)
        for nodes in members.values():
            if any(self.fixed[node] or self.ordered[node] for node in nodes):
                continue
            nodes = sorted(nodes, key=lambda node: (tuple(marks[node]), node))
            alike[tuple(tuple(marks[node]) for node in nodes)].append(nodes)
        return [found for found in alike.values() if len(found) > 1]

    def alike(self) -> None:
        """Claim one: alike neurons at random, all at once; by halves where that fails."""
        found = self.sets()

        def order_of(some: list[list[list[int]]]) -> np.ndarray:
            order = np.arange(self.n)
            for members in some:
                while True:
                    places = self.random.permutation(len(members))
                    if (places != np.arange(len(members))).any():
                        break
                for a, b in enumerate(places):
                    order[members[a]] = members[b]
            return order

        def bisect(some: list[list[list[int]]]) -> None:
            if not some:
                return
            before = len(self.verdict.false)
            nodes = [node for members in some for node in members[0]]
            names = sorted({self.wiring["ranges"][self.role[node]]["name"] for node in nodes})
            if self.test(order_of(some), "neurons of " + ", ".join(names[:4])):
                return
            if len(some) > 1:
                del self.verdict.false[before:]
                bisect(some[: len(some) // 2])
                bisect(some[len(some) // 2 :])
                if len(self.verdict.false) == before:
                    self.verdict.false.append("neurons of several ranges together")

        bisect(found)
        if found:
            bisect(found)  # another draw

    def heads(self) -> None:
        """Claim two: whole heads and groups change places, each in its own inner order."""
        out: dict[int, list[tuple[int, int]]] = defaultdict(list)
        pairs: list[list[tuple[str, int, int, int]]] = [[] for _ in range(self.n)]
        head_of: list[list[int]] = [[] for _ in range(self.n)]
        for block in self.blocks:
            if block["type"] == "head":
                out[block["source"]].append((block["target"], block["n_targets"]))
                for node in range(block["target"], block["target"] + block["n_targets"]):
                    head_of[node].append(block["source"])
            elif block["diagonal"]:
                tag = block["type"] + (block["parameter"] or "")
                for i in range(block["n_sources"]):
                    a, b = block["source"] + i, block["target"] + i
                    pairs[a].append((tag, 0, int(self.role[b]), b))
                    pairs[b].append((tag, 1, int(self.role[a]), a))
        by_range: dict[int, list[int]] = defaultdict(list)
        for head in out:
            if not self.fixed[head]:
                by_range[int(self.role[head])].append(head)
        for heads in by_range.values():
            for a, b in list(itertools.pairwise(sorted(heads)))[:3]:
                order = self._swapped(a, b, out, pairs, head_of)
                if order is None:
                    continue
                before = len(self.verdict.false)
                holds = self.test(order, f"heads {a} and {b} of {self.wiring['ranges'][self.role[a]]['name']}")
                if not holds and "beside" in self.verdict.false[-1]:  # no edge there: not a claim
                    del self.verdict.false[before:]

    def _swapped(self, a: int, b: int, out: Any, pairs: Any, head_of: Any) -> np.ndarray | None:
        to: dict[int, int] = {}
        queue = [(a, b)]
        while queue:
            x, y = queue.pop()
            if to.get(x, y) != y or to.get(y, x) != x:
                return None
            if x in to:
                continue
            if self.role[x] != self.role[y] or (x != y and (self.fixed[x] or self.fixed[y])):
                return None
            to[x], to[y] = y, x
            inside = [sorted((int(self.role[t + k]), t + k) for t, size in out[h] for k in range(size)) for h in (x, y)]
            if len(inside[0]) != len(inside[1]):
                return None
            queue += [(p, q) for (_, p), (_, q) in zip(*inside, strict=True)]
            one, other = sorted(pairs[x]), sorted(pairs[y])
            if [entry[:3] for entry in one] != [entry[:3] for entry in other]:
                return None
            queue += [(p[3], q[3]) for p, q in zip(one, other, strict=True)]
            if len(head_of[x]) != len(head_of[y]):
                return None
            queue += [
                (p, q)
                for p, q in zip(
                    sorted(head_of[x], key=lambda h: (self.role[h], h)),
                    sorted(head_of[y], key=lambda h: (self.role[h], h)),
                    strict=True,
                )
                if not self.fixed[p] and not self.fixed[q]
            ]
        order = np.arange(self.n)
        for x, y in to.items():
            order[x] = y
        return order if (order != np.arange(self.n)).any() else None
