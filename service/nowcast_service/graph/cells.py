"""Cells: stretches of neurons that every block takes together, and how they are joined."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import accumulate

import numpy as np
from nowcast_proto.errors import TooLarge
from numpy.typing import NDArray
from scipy.sparse import csc_array

from nowcast_service.graph.blocks import NeuralGraph

Pairs = NDArray[np.int64]

MAX_CELLS = 100_000
"""Cap on cells; a transformer of a hundred layers with sixty-four heads has some ten thousand."""
MAX_PAIRS = 20_000_000
"""Cap on pairs of cells that blocks join."""


def cells_of(graph: NeuralGraph) -> list[int]:
    """Bounds of the cells: where any block begins or ends, carried along the diagonals.

    Raises:
        TooLarge: There are too many.
    """
    cuts = {0, graph.n_nodes}
    joins = [block for block in graph.blocks if block.source != block.target or not block.diagonal]
    for block in joins:
        cuts.update((block.source, block.source + block.n_sources, block.target, block.target + block.n_targets))
    # Every cut inside one side of a diagonal is one of the other side too; each is carried on once.
    sides = sorted(
        side
        for block in joins
        if block.diagonal
        for side in (
            (block.source, block.source + block.n_sources, block.target - block.source),
            (block.target, block.target + block.n_targets, block.source - block.target),
        )
    )
    firsts = [side[0] for side in sides]
    reach = list(accumulate((side[1] for side in sides), max))  # the farthest end of any side that starts so far
    waiting = list(cuts)
    while waiting:
        cut = waiting.pop()
        for number in range(bisect_right(firsts, cut) - 1, -1, -1):
            if reach[number] <= cut:
                break
            first, end, shift = sides[number]
            if first < cut < end and cut + shift not in cuts:
                cuts.add(cut + shift)
                waiting.append(cut + shift)
        if len(cuts) > MAX_CELLS:
            raise TooLarge(
                f"the neurons fall into more than {MAX_CELLS} kinds, too many for a positional encoding",
                expected=f"at most {MAX_CELLS} stretches of neurons that all blocks take together",
                remedy="use a predictor that needs no graph",
            )
    return sorted(cuts)


def joined_pairs(graph: NeuralGraph, cuts: list[int]) -> tuple[Pairs, Pairs]:
    """(pairs, 2) cells a <= b joined completely, and those joined one to one and not completely as well.

    Raises:
        TooLarge: There are too many.
    """
    count = len(cuts) - 1
    dense, diagonal, total = [], [], 0
    for block in graph.blocks:
        sources = np.arange(bisect_left(cuts, block.source), bisect_left(cuts, block.source + block.n_sources))
        targets = np.arange(bisect_left(cuts, block.target), bisect_left(cuts, block.target + block.n_targets))
        total += len(sources) if block.diagonal else len(sources) * len(targets)
        if total > MAX_PAIRS:
            raise TooLarge(
                f"more than {MAX_PAIRS} pairs of kinds of neurons are joined, too many for a positional encoding",
                expected=f"at most {MAX_PAIRS}",
                remedy="use a predictor that needs no graph",
            )
        if not block.diagonal:
            a, b = np.repeat(sources, len(targets)), np.tile(targets, len(sources))
            dense.append(np.minimum(a, b) * count + np.maximum(a, b))
        elif block.source != block.target:
            diagonal.append(np.minimum(sources, targets) * count + np.maximum(sources, targets))
    empty = np.empty(0, dtype=np.int64)
    complete, paired = (np.unique(np.concatenate([empty, *keys])) for keys in (dense, diagonal))
    # A neuron is not its own neighbour, and one pair of single neurons is complete already.
    alone = np.diff(cuts)[paired // count] == 1
    complete = np.union1d(complete, paired[alone])
    paired = np.setdiff1d(paired[~alone], complete)
    return np.stack(np.divmod(complete, count), axis=1), np.stack(np.divmod(paired, count), axis=1)


def symmetric(pairs: Pairs, sizes: NDArray[np.int64]) -> csc_array:
    """(cells, cells) indicator of unordered pairs."""
    count = len(sizes)
    other = pairs[pairs[:, 0] != pairs[:, 1]][:, ::-1]
    rows, columns = np.concatenate([pairs, other]).T
    return csc_array((np.ones(len(rows)), (rows, columns)), shape=(count, count))
