"""How the exact engine cuts a neural graph into tiles, and what that takes in memory.

Dense blocks are cut into regions, one worker each: a panel of targets times a run of sources. A region is walked chunk
by chunk of sources, a chunk tile by tile of targets. Terms of the targets live for a region, terms of the sources for a
chunk, edges for a tile. Blocks too small or too thin for that are gathered into edge lists, one per type and kernel
size, so that thousands of biases and norms cost a few products and not a few thousand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from nowcast_proto.errors import TooLarge

from nowcast_service.graph.blocks import Block, NeuralGraph, View

THIN = 8
"""Blocks with fewer sources or targets than this are listed edge by edge."""
SMALL = 1024
"""So are blocks with fewer edges than this."""
READ = 4
"""Tiles read and written together: that takes many small operations, whose fixed costs are shared so."""
AHEAD = 4
"""Tasks per worker handed out before the oldest of them is done."""
_PAGE = 4096
OUTER = 128
"""From this many sources on the cross term is cheaper by outer products (one d x d matrix per target, summed over
sources by the product itself) than by a d-wide product per edge."""
STRIP = 16
"""Columns of a transposed matrix read together: one cache line of float32."""
_FLOAT = 4
_LISTED = 16
"""Bytes per listed edge for its source and target (int64)."""


@dataclass(frozen=True)
class Tiling:
    """Sizes that run fastest on a kind of device, before the memory budget is looked at.

    Attributes:
        rows: Edges per tile at most.
        chunk: Sources per chunk at most: the inner dimension of the cross term's product, long enough to run at full
            speed.
        panel: Targets per panel at most: enough to spread the terms of a chunk's sources over.
        row: Targets per tile of the output pass, where there is no such product and long rows are read fastest.
        paged: Whether sources a whole number of pages apart contend for the same lines of a cache.
    """

    rows: int
    chunk: int
    panel: int
    row: int
    paged: bool


ON_CPU = Tiling(rows=2048, chunk=192, panel=192, row=64, paged=True)
"""At d = 128 a vector per edge takes 1 MiB a tile, a few of which stay in a cache, and the matrices of the cross term
12 MB, which stay in a shared one."""
ON_DEVICE = Tiling(rows=1 << 19, chunk=512, panel=1024, row=1024, paged=False)
"""A GPU wants few launches with much in each."""


class Part(NamedTuple):
    """Sources i0 … i1 and targets j0 … j1 of a block."""

    i0: int
    i1: int
    j0: int
    j1: int

    @property
    def edges(self) -> int:
        return (self.i1 - self.i0) * (self.j1 - self.j0)


def spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive pieces of at most ``step``."""
    for start in range(0, total, step):
        yield start, min(total, start + step)


def is_listed(block: Block) -> bool:
    """Whether a block is handled edge by edge instead of by tiles."""
    return block.diagonal or min(block.n_sources, block.n_targets) < THIN or block.n_edges < SMALL


@dataclass(frozen=True)
class Plan:
    """What is done in tiles, what edge by edge, and how large tiles may be.

    Attributes:
        dense: Blocks walked in tiles.
        groups: Listed blocks, grouped by edge type, kernel size and whether they carry weights.
        workers: Threads that each have a tile of their own under way.
        tiling: Sizes of tiles, within the budget.
        width: Hidden width d.
        bytes: What all of the engine's buffers take at most, beyond snapshots, weights and results.
    """

    dense: tuple[Block, ...]
    groups: tuple[tuple[Block, ...], ...]
    workers: int
    tiling: Tiling
    width: int
    bytes: int

    @classmethod
    def make(
        cls,
        graph: NeuralGraph,
        *,
        width: int,
        context: int,
        node_vectors: int,
        levels: int,
        horizons: int,
        workers: int,
        tiling: Tiling,
        budget: int,
    ) -> Plan:
        """Choose tile sizes that keep to the budget.

        Args:
            graph: The graph.
            width: Hidden width d.
            context: Snapshots.
            node_vectors: Vectors of size d kept for every node.
            levels: Activations along the edge chain.
            horizons: Horizons asked for.
            workers: Threads that work on tiles at the same time.
            tiling: Sizes that run fastest.
            budget: Bytes.

        Raises:
            TooLarge: Not even the smallest tiles keep to the budget.
        """
        dense = tuple(block for block in graph.blocks if not is_listed(block))
        groups: dict[tuple[int, int, bool], list[Block]] = {}
        for block in graph.blocks:
            if is_listed(block):
                groups.setdefault((block.edge_type, block.features, isinstance(block.values, View)), []).append(block)
        fixed = _FLOAT * graph.n_nodes * (node_vectors * width + 1)
        # While the output pass runs, the widest group's results are held too.
        results = 0
        for (_, features, weighted), blocks in groups.items():
            edges = sum(block.n_edges for block in blocks)
            fixed += edges * (_LISTED + _FLOAT * features * context)
            if weighted:
                results = max(results, edges * _FLOAT * features * horizons)
        fixed += results
        features = max((block.features for block in dense), default=1)
        per_row = _FLOAT * (READ * features * (context + 2 * horizons) + 6 * width)
        strips = max((strip_bytes(block, tiling.chunk, context) for block in dense), default=0)
        matrix = _FLOAT * width * max(width, features * context)

        def size(workers: int, rows: int, panel: int) -> int:
            terms = _FLOAT * (levels + 4) * width * (panel + tiling.chunk)
            waiting = (
                (AHEAD * workers + 1) * _FLOAT * max(panel, rows // 2) * width
            )  # results of regions, until it is their turn
            return fixed + workers * (rows * per_row + terms + 2 * panel * matrix + strips) + waiting

        smallest = size(1, _MIN_ROWS, 1)
        if smallest > budget:
            raise TooLarge(
                f"a memory budget of {budget} bytes is too small for this network",
                expected=f"at least {smallest} bytes for {graph.n_nodes} nodes",
                remedy="raise the memory budget",
                detail={"budget": budget, "needed": smallest},
            )
        rows, panel = tiling.rows, tiling.panel
        while size(workers, rows, panel) > budget:
            # Panels first, they cost speed last; then tiles; workers only where even the smallest tiles do not fit.
            # Where launches are what costs, tiles shrink while they are still long.
            if rows > _LONG:
                rows //= 2
            elif panel > 16:
                panel //= 2
            elif rows > 4 * _MIN_ROWS:
                rows //= 2
            elif workers > 1:
                workers -= 1
            elif panel > 1:
                panel //= 2
            else:
                rows = max(_MIN_ROWS, rows // 2)
        used = size(workers, rows, panel)
        return cls(
            dense, tuple(map(tuple, groups.values())), workers, replace(tiling, rows=rows, panel=panel), width, used
        )

    def regions(self, block: Block) -> Iterator[Part]:
        """A dense block cut into pieces for the workers, each complete in itself: a panel of targets, a run of sources.

        Few targets are cut along the sources instead, into runs long enough for what a run costs by itself.
        """
        wanted = max(min(3 * self.workers, block.n_edges // _REGION), block.n_edges // _LARGE)
        wanted = 1 if self.workers == 1 else max(1, wanted)
        panels = math.ceil(block.n_targets / self.tiling.panel)
        runs = max(1, min(math.ceil(wanted / panels), block.n_sources // _RUN))
        panels = max(panels, min(math.ceil(wanted / runs), block.n_targets // _NARROW))
        for i0, i1 in spans(block.n_sources, math.ceil(block.n_sources / runs)):
            for j0, j1 in spans(block.n_targets, math.ceil(block.n_targets / panels)):
                yield Part(i0, i1, j0, j1)

    def tile(self, block: Block, region: Part, *, wide: bool = True) -> tuple[int, int]:
        """Sources per chunk and targets per tile of a convolution within a region.

        Args:
            block: A dense block.
            region: What `regions` gave.
            wide: Whether the pass forms d-wide vectors; raw inputs alone allow longer tiles.
        """
        n_sources, n_targets = region.i1 - region.i0, region.j1 - region.j0
        sources = min(self.tiling.chunk, self.tiling.rows // 2, n_sources)
        sources = math.ceil(n_sources / math.ceil(n_sources / sources))  # even chunks
        rows = self.tiling.rows if wide else self.tiling.rows * max(1, self.width // (8 * block.features))
        targets = max(1, min(rows // sources, n_targets))
        if self.tiling.paged and wide and targets > 1 and targets * self.width * _FLOAT % _PAGE == 0:
            targets -= 1  # sources a whole number of pages apart would contend for the same lines of the cache
        return sources, targets

    def output_tile(self, region: Part) -> tuple[int, int]:
        """Sources per chunk and targets per tile of the output pass within a region."""
        targets = min(self.tiling.row, region.j1 - region.j0, self.tiling.rows)
        return max(1, min(self.tiling.rows // targets, region.i1 - region.i0)), targets


_MIN_ROWS = 64
_LONG = 1 << 16
"""Edges per tile that only a device is given."""
_REGION = 1 << 16
"""Edges from which on it pays to hand a region to a worker of its own."""
_LARGE = 1 << 20
"""Edges per region where it can be helped: workers finish a pass at about the same time."""
_RUN = 2048
"""Sources per region at least: contracting the cross term costs as much as a few sources do."""
_NARROW = 32
"""Targets per region at least, if regions are cut finer than panels: terms of the sources are formed per region."""


def strip_bytes(block: Block, sources: int, context: int) -> int:
    """What strips of a block's transposed matrix take (see `stream`), read in chunks of so many sources."""
    if not isinstance(block.values, View) or not block.values.transposed:
        return 0
    rows, columns = block.values.transposed
    return _FLOAT * context * rows * min(columns, max(STRIP, sources * block.n_targets // rows + 2))


def endpoints(blocks: Sequence[Block], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_edges,) source and target of every edge of some blocks, in order, source-major."""
    sources, targets = [], []
    for block in blocks:
        source = torch.arange(block.source, block.source + block.n_sources, device=device)
        target = torch.arange(block.target, block.target + block.n_targets, device=device)
        if not block.diagonal:
            source = source.repeat_interleave(block.n_targets)
            target = target.repeat(block.n_sources)
        sources.append(source)
        targets.append(target)
    return torch.cat(sources), torch.cat(targets)
