"""The floor of the exact engine: its matrix products and activations, and nothing else, on the same tiles.

Every tile of the engine's own plan is replayed: the products of the three-layer network at the engine's shapes (raw
inputs x d, d x d, the cross term, the output column) and 4 d SiLU per edge, in buffers that stay in cache, by the same
workers. What the engine adds to that (reading and standardising snapshots, terms of nodes, sums, writing results) is
overhead. SiLU is PyTorch's, or the engine's own compiled kernel with nothing to add, which is faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from nowcast_service.graph.blocks import Block, NeuralGraph, View
from nowcast_service.nino.exact.engine import ExactEngine
from nowcast_service.nino.exact.plan import OUTER, Part, Plan, spans
from nowcast_service.nino.exact.workers import Workers
from torch import Tensor
from torch.nn.functional import silu


class Floor:
    """Replays the products and activations a three-layer network needs for one graph.

    Args:
        engine: The engine whose tiles are replayed.
        graph: The graph.
        share: Share of the regions of each dense block to replay, for graphs that would take minutes.
        compiled: SiLU by the engine's kernel, where it has one, and not by PyTorch.
    """

    def __init__(self, engine: ExactEngine, graph: NeuralGraph, *, share: float = 1.0, compiled: bool = False) -> None:
        self._plan: Plan = engine.plan(graph)
        self._d = engine.config.hidden
        self._context = engine.config.context
        self._share = share
        self._add_silu = engine.network.add_silu if compiled else None
        self._nothing = torch.zeros(1, self._d).numpy()
        self._random = torch.Generator().manual_seed(0)
        self._square = self._draw(self._d * self._d).view(self._d, self._d)
        self._column = self._draw(self._d).view(self._d, 1)
        self._inputs = self._draw(9 * self._context * self._d).view(-1, self._d)
        # Buffers outlive a run, so that making them is not part of it.
        self._spaces: list[dict[str, Tensor]] = [{} for _ in range(self._plan.workers)]

    def seconds(self) -> float:
        """Replay once; what the whole graph takes, dense blocks scaled by edges from the share that was replayed."""
        edges = sum(block.n_edges for block in self._plan.dense)
        with torch.no_grad(), Workers(self._plan.workers) as workers:
            for _ in workers.run(islice(self._dense(), 2 * self._plan.workers)):  # fill the buffers
                pass
            start = time.perf_counter()
            replayed = sum(workers.run(self._dense()))
            dense = time.perf_counter() - start
            start = time.perf_counter()
            sum(workers.run(self._listed()))
            listed = time.perf_counter() - start
        return dense * edges / max(1, replayed) + listed

    def _dense(self) -> Iterator[Callable[[], int]]:
        for block in self._plan.dense:
            regions = list(self._plan.regions(block))
            keep = max(1, round(len(regions) * self._share))
            for region in regions[:keep]:
                yield partial(self._region, block, region)

    def _listed(self) -> Iterator[Callable[[], int]]:
        for group in self._plan.groups:
            for a, b in spans(sum(block.n_edges for block in group), self._plan.tiling.rows // 2):
                yield partial(self._edges, group[0], b - a)

    def _draw(self, numel: int) -> Tensor:
        return torch.randn(numel, generator=self._random) / self._d

    def _buffer(self, space: dict[str, Tensor], name: str, rows: int, width: int) -> Tensor:
        held = space.get(name)
        if held is None or held.numel() < rows * width:
            held = space[name] = self._draw(rows * width)
        return held[: rows * width].view(rows, width)

    def _region(self, block: Block, region: Part) -> int:
        d, width = self._d, block.features * self._context
        n_sources, n_targets = region.i1 - region.i0, region.j1 - region.j0
        chunk, tile = self._plan.tile(block, region)
        _, long_tile = self._plan.tile(block, region, wide=False)
        space = self._spaces.pop()
        bx = self._buffer(space, "bx", chunk, d)
        single = chunk >= n_sources
        for i0, i1 in spans(n_sources, chunk):
            n = i1 - i0
            for j0, j1 in spans(n_targets, long_tile):  # first convolution: the cross term of raw inputs
                x = self._buffer(space, "x", n, (j1 - j0) * width)
                at = 0 if single else j0
                m = self._buffer(space, "m", (at + j1 - j0) * width, d)[at * width :]
                _cross(x, bx[:n], m, accumulate=i0 > 0)
            for j0, j1 in spans(n_targets, tile):  # second convolution
                u = self._first(space, n * (j1 - j0), width)
                if chunk < OUTER:
                    torch.mm(u, self._square, out=self._buffer(space, "v", len(u), d))
                    continue
                at = 0 if single else j0
                m = self._buffer(space, "m", (at + j1 - j0) * d, d)[at * d :]
                _cross(u.view(n, -1), bx[:n], m, accumulate=i0 > 0)
        out_chunk, out_tile = self._plan.output_tile(region)
        for i0, i1 in spans(n_sources, out_chunk):
            for j0, j1 in spans(n_targets, out_tile):
                self._output(space, block, (i1 - i0) * (j1 - j0))
        self._spaces.append(space)
        return region.edges

    def _edges(self, block: Block, edges: int) -> int:
        space = self._spaces.pop()
        u = self._first(space, edges, block.features * self._context)
        torch.mm(u, self._square, out=self._buffer(space, "v", edges, self._d))
        self._output(space, block, edges)
        self._spaces.append(space)
        return edges

    def _first(self, space: dict[str, Tensor], edges: int, width: int) -> Tensor:
        """u = silu(h U)."""
        u = self._buffer(space, "u", edges, self._d)
        torch.mm(self._buffer(space, "x", edges, width), self._inputs[:width], out=u)
        return self._silu(u)

    def _silu(self, u: Tensor) -> Tensor:
        """In place."""
        if self._add_silu is None:
            return silu(u, inplace=True)
        self._add_silu(u.numpy()[None], self._nothing, self._nothing)
        return u

    def _output(self, space: dict[str, Tensor], block: Block, edges: int) -> None:
        if not isinstance(block.values, View):  # auxiliary links have no output
            return
        u = self._first(space, edges, block.features * self._context)
        v = self._buffer(space, "v", edges, self._d)
        torch.mm(u, self._square, out=v)
        self._silu(v)
        torch.mm(v, self._square, out=u)
        self._silu(u)
        torch.mm(u, self._column)


def _cross(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """out = a.T @ b, or out += a.T @ b."""
    if accumulate:
        out.addmm_(a.t(), b)
    else:
        torch.mm(a.t(), b, out=out)
