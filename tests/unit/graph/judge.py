"""A judge of wirings: reads what ``nowcast graph --json`` prints, permutes a live network by it, compares outputs.

It knows nothing of families, names or modules. Neurons are alike when every block takes both or neither, at the same
end; those joined one to one move together. Alike neurons are permuted at random, whole heads and groups change places,
the elements of all tensors with them as the blocks say. If the wiring is true the outputs stay.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

TOLERANCE = 1e-8
"""Change of the outputs, relative to their size, that is rounding in float64; wrong wirings make 1e-4 and more."""
IN_FLOAT32 = 2e-6
"""The same where a network computes something in float32 whatever its dtype, as many norms do."""
Inputs = Mapping[str, object] | tuple[object, ...]
Order = np.ndarray


@dataclass(frozen=True)
class Claim:
    """A permutation that a wiring claims to change nothing: node i goes to place ``order[i]``."""

    what: str
    order: Order


@dataclass(frozen=True)
class Verdict:
    """What came of all claims of a wiring.

    Attributes:
        broken: Claims that change the outputs, with the change.
        tried: Claims that were tried.
        moved: Share of the network's elements that some claim moves.
        ranges: Names of the ranges each claim moves.
        blind: Tensors that no claim shows to matter: moving one alone changes nothing.
    """

    broken: list[tuple[str, float]]
    tried: int
    moved: float
    ranges: list[frozenset[str]]
    blind: set[str]


class Wiring:
    """The contract's JSON document, with what can be read off it."""

    def __init__(self, document: Mapping) -> None:
        self.nodes = document["n_nodes"]
        self.ranges = document["ranges"]
        self.blocks = [block for block in document["blocks"] if block["type"] != "self_loop"]
        self.left = document["left"]
        self.stays = np.zeros(self.nodes, dtype=bool)  # known by their place
        self.ordered = np.zeros(self.nodes, dtype=bool)
        at = 0
        for range_ in self.ranges:
            assert range_["first"] == at, "ranges are not one after another"
            at += range_["size"]
            self.stays[range_["first"] : at] = range_["fixed"]
            self.ordered[range_["first"] : at] = range_["ordered"]
        assert at == self.nodes

    def claims(self, seed: int = 0) -> Iterator[Claim]:
        """Every class of alike neurons at random, all classes at once, then pairs of whole heads and groups."""
        generator = np.random.default_rng(seed)
        everything = np.arange(self.nodes)
        for sets in self.alike():
            order = np.arange(self.nodes)
            places = _generic(len(sets), generator)
            for members, place in zip(sets, places, strict=True):
                order[members] = sets[place]
            everything[np.concatenate(sets)] = order[np.concatenate(sets)]
            yield Claim("neurons", order)
        if (everything != np.arange(self.nodes)).any():
            yield Claim("all neurons at once", everything)
        yield from self._heads()

    def alike(self) -> list[list[list[int]]]:
        """Classes of two or more sets of neurons; the sets of one class list neurons of the same parts in one order."""
        parts: list[list[tuple[int, str]]] = [[] for _ in range(self.nodes)]
        root = list(range(self.nodes))

        def find(node: int) -> int:
            while root[node] != node:
                root[node] = root[root[node]]
                node = root[node]
            return node

        for number, block in enumerate(self.blocks):
            for node in _span(block, "source"):
                parts[node].append((number, "out"))
            for node in _span(block, "target"):
                parts[node].append((number, "in"))
            if block["diagonal"]:
                for one, other in zip(_span(block, "source"), _span(block, "target"), strict=True):
                    root[find(one)] = find(other)
        joined = defaultdict(list)
        for node in range(self.nodes):
            joined[find(node)].append(node)
        classes = defaultdict(list)
        for members in joined.values():
            if not self.stays[members].any() and not self.ordered[members].any():
                members.sort(key=lambda node: parts[node])
                signature = tuple(tuple(parts[node]) for node in members)
                if len(set(signature)) == len(signature):  # which of its neurons is which is clear
                    classes[signature].append(members)
        return [sets for sets in classes.values() if len(sets) > 1]

    def _heads(self) -> Iterator[Claim]:
        """Two nodes that head links of one range start from change places, with all that must then."""
        cells = self._cells()
        number_of = {first: number for number, (first, _) in enumerate(cells)}
        around: list[list[tuple[object, int]]] = [[] for _ in cells]
        for block in self.blocks:
            ends = [_covered(number_of, cells, block, side) for side in ("source", "target")]
            pairs = zip(*ends, strict=True) if block["diagonal"] else ((s, t) for s in ends[0] for t in ends[1])
            label = (block["type"], block["parameter"], block["diagonal"])
            for source, target in pairs:
                around[source].append(((*label, "out"), target))
                around[target].append(((*label, "in"), source))
        names: dict[object, int] = {}
        links = [[(names.setdefault(label, len(names)), cell) for label, cell in row] for row in around]
        start = []
        for first, size in cells:
            kind = next(i for i, r in enumerate(self.ranges) if r["first"] <= first < r["first"] + r["size"])
            start.append(names.setdefault((kind, size, first if self.stays[first] else -1), len(names)))
        heads = defaultdict(list)
        for block in self.blocks:
            number = number_of[block["source"]]
            if block["type"] == "head" and not self.stays[block["source"]] and number not in heads[start[number]]:
                heads[start[number]].append(number)
        for numbers in heads.values():
            for one, other in pairwise(numbers):
                mapping = _automorphism(links, start, [(one, other)])
                if mapping is not None:
                    order = np.arange(self.nodes)
                    for number, (first, size) in enumerate(cells):
                        order[first : first + size] = cells[mapping[number]][0] + np.arange(size)
                    yield Claim("heads or groups", order)

    def _cells(self) -> list[tuple[int, int]]:
        """(first, size) of ranges cut wherever a block begins or ends, cuts carried along one-to-one links."""
        cuts = {range_["first"] for range_ in self.ranges} | {self.nodes}
        for block in self.blocks:
            cuts |= {block["source"], block["source"] + block["n_sources"]}
            cuts |= {block["target"], block["target"] + block["n_targets"]}
        while True:
            before = len(cuts)
            for block in self.blocks:
                if block["diagonal"]:
                    shift = block["target"] - block["source"]
                    cuts |= {cut + shift for cut in cuts if cut in _span(block, "source")}
                    cuts |= {cut - shift for cut in cuts if cut in _span(block, "target")}
            if len(cuts) == before:
                return [(first, end - first) for first, end in pairwise(sorted(cuts))]

    def moved(self, tensors: Mapping[str, Tensor], order: Order) -> dict[str, Tensor]:
        """The tensors whose elements change places when the neurons do."""
        ends = defaultdict(list)
        for number, block in enumerate(self.blocks):
            ends[_ends(block)].append(number)
        new: dict[str, Tensor] = {}
        written: dict[str, Tensor] = {}
        for number, block in enumerate(self.blocks):
            name = block["parameter"]
            if name is None:
                continue
            source, target = order[list(_span(block, "source"))], order[list(_span(block, "target"))]
            key = _ends(block | {"source": int(source.min()), "target": int(target.min())})
            rank = ends[_ends(block)].index(number)  # of several blocks between the same neurons
            image = self.blocks[ends[key][rank]]
            assert image["features"] == block["features"]
            flat = tensors[name].reshape(-1)
            fresh = new.setdefault(name, flat.clone())
            at = _elements(block, np.arange(block["n_sources"]), np.arange(block["n_targets"]))
            to = _elements(image, source - image["source"], target - image["target"])
            done = written.setdefault(name, torch.full((len(flat),), -1))
            assert ((done[to] == -1) | (done[to] == at)).all(), f"{name} would move in two ways"
            done[to] = at
            fresh[to] = flat[at]
        return {
            name: flat.view_as(tensors[name])
            for name, flat in new.items()
            if not torch.equal(flat, tensors[name].reshape(-1))
        }


def judge(document: Mapping, network: Network, *, seed: int = 0, tolerance: float = TOLERANCE) -> Verdict:
    """Try every claim of a wiring on a live network."""
    wiring = Wiring(document)
    known = {block["parameter"] for block in wiring.blocks} - {None}
    assert known | set(wiring.left) == set(network.tensors), "a tensor is in no block and not in left"
    original = network.outputs()

    def change(moved: Mapping[str, Tensor]) -> float:
        pairs = zip(network.outputs(moved), original, strict=True)
        return max(float((new - old).abs().max() / old.abs().max().clamp_min(1e-30)) for new, old in pairs)

    broken, ranges, tried = [], [], 0
    touched = {name: torch.zeros(tensor.numel(), dtype=torch.bool) for name, tensor in network.tensors.items()}
    blind = set(known)
    for claim in wiring.claims(seed):
        places = np.flatnonzero(claim.order != np.arange(wiring.nodes))
        names = frozenset(
            r["name"] for r in wiring.ranges if ((places >= r["first"]) & (places < r["first"] + r["size"])).any()
        )
        moved = wiring.moved(network.tensors, claim.order)
        changed = change(moved)
        tried += 1
        ranges.append(names)
        if changed > tolerance:
            broken.append((f"{claim.what} of {', '.join(sorted(names))}", changed))
        for name, tensor in moved.items():
            touched[name] |= tensor.reshape(-1) != network.tensors[name].reshape(-1)
            if name in blind and change({name: tensor}) > tolerance:
                blind.discard(name)
    elements = sum(map(len, touched.values()))
    return Verdict(broken, tried, sum(int(t.sum()) for t in touched.values()) / elements, ranges, blind)


class Network:
    """A live model as a function of its parameters, in float64, with lively random weights."""

    def __init__(self, model: nn.Module, inputs: Inputs, seed: int = 0) -> None:
        self._model = model.double().eval()
        self._inputs = inputs
        self._live = dict(model.named_parameters())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.reset_running_stats()
            for parameter in self._live.values():
                fan_in = math.prod(parameter.shape[1:]) if parameter.dim() > 1 else 1
                spread = min(0.6, 2 / math.sqrt(fan_in))  # lively, but not so much that a softmax saturates
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread)
        self.tensors = {name: parameter.detach().clone() for name, parameter in self._live.items()}

    @torch.no_grad()
    def outputs(self, changed: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """The floating outputs (of a mapping with logits only these), with some of the parameters replaced."""
        for name, tensor in {**self.tensors, **(changed or {})}.items():
            self._live[name].copy_(tensor)
        if isinstance(self._inputs, Mapping):
            given = self._model(**{name: _double(value) for name, value in self._inputs.items()})
        else:
            given = self._model(*(_double(value) for value in self._inputs))
        # States of a network's inside, given out beside its answer, move with the neurons.
        return list(_floating(given["logits"] if isinstance(given, Mapping) and "logits" in given else given))


def _generic(size: int, generator: np.random.Generator) -> Order:
    """A random permutation that is not the identity."""
    while True:
        places = generator.permutation(size)
        if (places != np.arange(size)).any():
            return places


def _span(block: Mapping, side: str) -> range:
    return range(block[side], block[side] + block[f"n_{side}s"])


def _ends(block: Mapping) -> tuple[object, ...]:
    return tuple(block[key] for key in ("type", "parameter", "source", "n_sources", "target", "n_targets", "diagonal"))


def _elements(block: Mapping, i: Order, j: Order) -> Tensor:
    """Elements of the edges from source i to target j (of i to i in a diagonal block), kernel positions last."""
    at = block["offset"] + torch.as_tensor(i)[:, None] * block["source_stride"]
    if not block["diagonal"]:
        at = (at + torch.as_tensor(j)[None] * block["target_stride"]).reshape(-1, 1)
    return (at + torch.arange(block["features"]) * block["feature_stride"]).reshape(-1)


def _covered(number_of: Mapping[int, int], cells: list[tuple[int, int]], block: Mapping, side: str) -> list[int]:
    number, span = number_of[block[side]], _span(block, side)
    found = []
    while number < len(cells) and cells[number][0] in span:
        found.append(number)
        number += 1
    return found


def _automorphism(
    around: list[list[tuple[int, int]]], start: list[int], pairs: list[tuple[int, int]]
) -> list[int] | None:
    """A mapping of cells that keeps all links and sends the first of each pair to the second, moving little else.

    Colours of both sides are refined together; where cells stay alike, each is tried on itself first.
    """
    left, right = list(start), list(start)
    for number, (a, b) in enumerate(pairs):
        left[a] = right[b] = -1 - number
    while True:
        palette: dict[tuple[object, ...], int] = {}
        refined = [
            [
                palette.setdefault((side[v], *sorted((link, side[w]) for link, w in around[v])), len(palette))
                for v in range(len(side))
            ]
            for side in (left, right)
        ]
        if Counter(refined[0]) != Counter(refined[1]):
            return None
        stable = len(set(refined[0])) == len(set(left))
        left, right = refined
        if stable:
            break
    classes = defaultdict(list)
    for cell, colour in enumerate(right):
        classes[colour].append(cell)
    for cell, colour in enumerate(left):
        if len(classes[colour]) > 1:
            for other in sorted(classes[colour], key=lambda candidate: candidate != cell):
                mapping = _automorphism(around, start, [*pairs, (cell, other)])
                if mapping is not None:
                    return mapping
            return None
    return [classes[colour][0] for colour in left]


def _double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _floating(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _floating(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _floating(inner)
