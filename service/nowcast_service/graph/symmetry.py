"""What a neural graph claims: the permutations of neurons that, by its structure, change nothing.

A graph network sees no difference between a network and the same network with its neurons permuted wherever the
permutation maps every edge to an edge of the same tensor or link. Faithful wiring promises that then the function does
not change either. `claims` finds such permutations from the blocks alone: neurons of equal neighbours, moved together
with all they are paired with one to one, and whole heads, groups and whatever else is cut alike.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from nowcast_service.graph.blocks import Block, EdgeType, NeuralGraph, Range, View

_READ_ONLY = re.compile(r"(embed_tokens|shared|wte|word_embeddings|tok_embeddings)\.weight$")
"""Aliases of an embedding that read it again as an embedding, not to score tokens."""


@dataclass(frozen=True)
class Claim:
    """One permutation of neurons that keeps the graph.

    Attributes:
        what: What moves, in words.
        ranges: The ranges it moves neurons of, in order.
        order: (n_nodes,) neuron i goes to place ``order[i]``.
    """

    what: str
    ranges: tuple[str, ...]
    order: Tensor


@dataclass(frozen=True)
class _Cell:
    """Neurons side by side that every block takes together."""

    first: int
    size: int
    range: Range


def claims(graph: NeuralGraph, *, seed: int = 0) -> list[Claim]:
    """Permutations that keep the graph.

    Neurons the outside knows by their place (tokens, positions, channels, outputs) stay where they are, as do ordered
    ones inside their head.

    Args:
        graph: The graph; small, as its edges are written out.
        seed: Of the permutations drawn.
    """
    cells = _cells(graph)
    fixed = _fixed(graph)
    generator = np.random.default_rng(seed)
    edges = _edges(graph)
    found: dict[tuple[int, ...], Claim] = {}
    for kind, order in (
        *(("neurons", order) for order in _within(graph, cells, fixed, generator)),
        *(("heads or groups", order) for order in _between(graph, cells, fixed)),
    ):
        moved = {place for place, to in enumerate(order) if place != to}
        if moved and not moved & fixed and edges == _moved_edges(edges, order):
            ranges = tuple(r.name for r in graph.ranges if not moved.isdisjoint(range(r.first, r.first + r.size)))
            shown = ", ".join(name for name in ranges if not name.startswith("#"))
            found.setdefault(tuple(order), Claim(f"{kind} of {shown}", ranges, torch.tensor(order)))
    return list(found.values())


def moved_tensors(graph: NeuralGraph, tensors: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """The tensors whose elements change places when the neurons do.

    Args:
        graph: The graph.
        tensors: Name -> tensor, for every parameter of the spec.
        order: (n_nodes,) neuron i goes to place ``order[i]``, keeping the graph.
    """
    sources: dict[str, list[Tensor]] = defaultdict(list)
    for block, view in graph.weighted():
        flat = torch.arange(tensors[view.parameter].numel())
        elements = view.of(flat, block.n_sources, block.n_targets, diagonal=block.diagonal)
        ends = block.edge_index()
        columns = torch.cat([ends, elements.reshape(ends.shape[1], -1).t()])  # source, target, element per position
        sources[view.parameter].append(columns)
    moved = {}
    for name, parts in sources.items():
        columns = torch.cat(parts, dim=1)
        key = columns[0] * graph.n_nodes + columns[1]
        to = order[columns[0]] * graph.n_nodes + order[columns[1]]
        if torch.equal(key, to):
            continue
        by_key = key.argsort()
        place = by_key[torch.searchsorted(key[by_key], to)]
        flat = tensors[name].reshape(-1)
        new = flat.clone()
        new[columns[2:, place].reshape(-1)] = flat[columns[2:].reshape(-1)]
        moved[name] = new.view_as(tensors[name])
    return moved


def together(graph: NeuralGraph, claim: Claim, other: Range) -> Tensor | None:
    """A claim's permutation, done to another range of the same size as well; None where that breaks the graph."""
    if other.name in claim.ranges:
        return None
    for range_ in graph.ranges:
        local = claim.order[range_.first : range_.first + range_.size] - range_.first
        inside = bool(((local >= 0) & (local < range_.size)).all())
        if range_.name in claim.ranges and range_.size == other.size > 1 and inside:
            order = claim.order.clone()
            order[other.first : other.first + other.size] = other.first + local
            edges = _edges(graph)
            if _moved_edges(edges, order.tolist()) == edges:
                return order
    return None


def _links(graph: NeuralGraph) -> Iterator[tuple[object, Block]]:
    """Blocks without self-loops, with what tells them apart: the tensor, or the type of an auxiliary link."""
    for block in graph.blocks:
        if block.edge_type is not EdgeType.SELF_LOOP:
            yield (block.values.parameter if isinstance(block.values, View) else int(block.edge_type)), block


def _edges(graph: NeuralGraph) -> frozenset[tuple[object, int, int]]:
    return frozenset(
        (label, source, target)
        for label, block in _links(graph)
        for source, target in zip(*block.edge_index().tolist(), strict=True)
    )


def _moved_edges(edges: frozenset[tuple[object, int, int]], order: list[int]) -> frozenset[tuple[object, int, int]]:
    return frozenset((label, order[source], order[target]) for label, source, target in edges)


def _cells(graph: NeuralGraph) -> list[_Cell]:
    """Ranges cut wherever a block begins or ends, cuts carried along one-to-one links."""
    cuts = {range_.first for range_ in graph.ranges} | {graph.n_nodes}
    diagonals = []
    for _, block in _links(graph):
        cuts |= {block.source, block.source + block.n_sources, block.target, block.target + block.n_targets}
        if block.diagonal:
            diagonals.append(block)
    while True:
        before = len(cuts)
        for block in diagonals:
            shift = block.target - block.source
            inside = [cut - block.source for cut in cuts if block.source < cut < block.source + block.n_sources]
            inside += [cut - block.target for cut in cuts if block.target < cut < block.target + block.n_targets]
            cuts |= {block.source + cut for cut in inside} | {block.source + shift + cut for cut in inside}
        if len(cuts) == before:
            break
    borders = sorted(cuts)
    cells = []
    for first, end in pairwise(borders):
        range_ = next(r for r in graph.ranges if r.first <= first < r.first + r.size)
        cells.append(_Cell(first, end - first, range_))
    return cells


def _fixed(graph: NeuralGraph) -> set[int]:
    """Neurons that the outside knows by their place."""
    feeds, fed, embeds, read, onward, reached = (set[int]() for _ in range(6))
    tied = {name for alias, name in graph.spec.ties.items() if not _READ_ONLY.search(alias)}
    for label, block in _links(graph):
        sources = range(block.source, block.source + block.n_sources)
        targets = range(block.target, block.target + block.n_targets)
        if not isinstance(block.values, View):
            onward.update(sources)
            reached.update(targets)
            continue
        feeds.update(sources)
        fed.update(targets)
        if block.edge_type in (EdgeType.TOKEN_EMBEDDING, EdgeType.POSITION_EMBEDDING) and block.n_sources > 1:
            embeds.update(sources)
        if label in tied:
            read.update(targets)
    # Residual links make one stream of many ranges. Scores by a tied embedding read it, though no edge says so.
    linked = _components(graph)
    scored = {linked[node] for node in read}
    outputs = {node for node in fed - feeds - onward if linked[node] not in scored}
    return embeds | (feeds - fed - reached) | outputs


def _components(graph: NeuralGraph) -> list[int]:
    """Number of the set of neurons paired one to one, directly or not, that each neuron is in."""
    pairs = [block.edge_index() for _, block in _links(graph) if block.diagonal]
    ends = torch.cat(pairs, dim=1).numpy() if pairs else np.zeros((2, 0), dtype=np.int64)
    matrix = coo_matrix((np.ones(ends.shape[1]), (ends[0], ends[1])), shape=(graph.n_nodes, graph.n_nodes))
    labels: list[int] = connected_components(matrix, directed=False)[1].tolist()
    return labels


def _within(
    graph: NeuralGraph, cells: list[_Cell], fixed: set[int], generator: np.random.Generator
) -> Iterator[list[int]]:
    """Neurons with the same neighbours change places, each taking along all it is paired with."""
    cell_of = [number for number, cell in enumerate(cells) for _ in range(cell.size)]
    members: dict[int, list[int]] = defaultdict(list)
    for node, component in enumerate(_components(graph)):
        members[component].append(node)
    alike: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)
    for nodes in members.values():
        if fixed.isdisjoint(nodes) and not any(cells[cell_of[node]].range.ordered for node in nodes):
            alike[tuple(cell_of[node] for node in nodes)].append(nodes)
    for sets in alike.values():
        if len(sets) < 2:
            continue
        places = generator.permutation(len(sets))
        # A random permutation may be none; turning it by one place where it has fixed points keeps it generic.
        if (places == np.arange(len(sets))).any():
            places = np.roll(np.arange(len(sets)), 1 + len(sets) // 3)
        order = list(range(graph.n_nodes))
        for from_, to in zip(sets, (sets[place] for place in places), strict=True):
            for node, place in zip(from_, to, strict=True):
                order[node] = place
        yield order


def _between(graph: NeuralGraph, cells: list[_Cell], fixed: set[int]) -> Iterator[list[int]]:
    """Whole cells of one range change places, and other cells with them as far as the graph asks for it."""
    starts = {cell.first: number for number, cell in enumerate(cells)}
    around: list[list[tuple[object, int]]] = [[] for _ in cells]
    names: dict[object, int] = {}
    for label, block in _links(graph):
        sources = _covered(starts, cells, block.source, block.n_sources)
        targets = _covered(starts, cells, block.target, block.n_targets)
        pairs = zip(sources, targets, strict=True) if block.diagonal else ((s, t) for s in sources for t in targets)
        out, into = (names.setdefault((label, block.diagonal, way), len(names)) for way in ("out", "in"))
        for source, target in pairs:
            around[source].append((out, target))
            around[target].append((into, source))
    colours = {
        (cell.range.name, cell.size, cell.first if cell.first in fixed else -1): number
        for number, cell in enumerate(cells)
    }
    start = [colours[cell.range.name, cell.size, cell.first if cell.first in fixed else -1] for cell in cells]
    by_range: dict[str, list[int]] = defaultdict(list)
    for number, cell in enumerate(cells):
        if cell.first not in fixed:
            by_range[cell.range.name].append(number)
    for numbers in by_range.values():
        for other in numbers[1:]:
            if cells[other].size == cells[numbers[0]].size:
                mapping = _automorphism(around, start, [(numbers[0], other)])
                if mapping is not None:
                    yield [
                        cells[mapping[number]].first + place
                        for number, cell in enumerate(cells)
                        for place in range(cell.size)
                    ]


def _covered(starts: dict[int, int], cells: list[_Cell], first: int, size: int) -> list[int]:
    number = starts[first]
    found = []
    while number < len(cells) and cells[number].first < first + size:
        found.append(number)
        number += 1
    return found


def _automorphism(
    around: list[list[tuple[object, int]]], start: list[int], pairs: list[tuple[int, int]]
) -> list[int] | None:
    """A mapping of cells that keeps all links and sends the first of each pair to the second, moving little else.

    Individualisation and refinement: colours of both sides are refined together; where cells stay alike, each is tried
    on itself first.
    """
    left, right = list(start), list(start)
    for number, (a, b) in enumerate(pairs):
        left[a] = right[b] = len(start) + number
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
    classes: dict[int, list[int]] = defaultdict(list)
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
