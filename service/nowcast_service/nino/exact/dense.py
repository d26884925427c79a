"""Edges of dense blocks: they exist inside a tile and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nowcast_service.graph.blocks import Block
from nowcast_service.nino.exact.network import Network, of_type
from nowcast_service.nino.exact.plan import OUTER, READ, Part, Plan, spans
from nowcast_service.nino.exact.stream import Access, Reader, Writer
from nowcast_service.nino.exact.weights import Level


class Dense:
    """The passes over a region of a dense block.

    Args:
        network: The network.
        plan: Sizes of tiles.
        reader: Of the snapshots.
        x: Node vectors after each convolution so far, (N, d); it grows while the passes run.
    """

    def __init__(self, network: Network, plan: Plan, reader: Reader, x: Sequence[Tensor]) -> None:
        self.network = network
        self.plan = plan
        self.reader = reader
        self.x = x
        self.spaces = [_Space(network.device) for _ in range(plan.workers)]

    def messages(self, block: Block, region: Part, number: int, x: Tensor) -> tuple[int, slice, Tensor]:
        """Sums of the messages of a region's edges, by targets: (edges, targets, (J, d))."""
        conv = self.network.weights.convolutions[number]
        d = self.network.config.hidden
        width = block.features * self.network.config.context if conv.level < 0 else d
        scale, shift = conv.scale[:width], conv.shift[:width]
        scale_const, shift_const = of_type(conv.scale_const, block), of_type(conv.shift_const, block)
        levels = self.network.weights.levels[: conv.level + 1]
        n_sources, n_targets = region.i1 - region.i0, region.j1 - region.j0
        chunk, tile = self.plan.tile(block, region, wide=conv.level >= 0)
        single = chunk >= n_sources
        outer = conv.level < 0 or chunk >= OUTER
        values = self.reader.open(block)
        targets = slice(block.target + region.j0, block.target + region.j1)
        terms_t = self._target_terms(levels, block, targets)
        reads = list(_reads(n_targets, tile))
        cut = {j: _cut(terms_t, j, min(j + tile, n_targets)) for j in range(0, n_targets, tile)}
        cross = torch.zeros(n_targets, d, device=self.network.device)
        sums = torch.zeros(n_targets, width, device=self.network.device)
        source_sum = torch.zeros(d, device=self.network.device)
        with self._space() as space:
            # One (width, d) matrix per target; where one chunk is all there is, they live no longer than a tile.
            matrices = space.get("outer", tile if single else n_targets, width, d) if outer else None
            for i0, i1 in spans(n_sources, chunk):
                n = i1 - i0
                sources = slice(block.source + region.i0 + i0, block.source + region.i0 + i1)
                terms_s = self._source_terms(levels, sources)
                bx = x[sources] @ conv.source  # (I, d)
                source_sum += bx.sum(0)
                for r0, r1 in reads:
                    part = Part(region.i0 + i0, region.i0 + i1, region.j0 + r0, region.j0 + r1)
                    inputs = self._read(space, block, values, part, min(tile, r1 - r0))
                    for j0, h in zip(range(r0, r1, tile), inputs, strict=True):  # (I, J, C) each
                        j1 = min(j0 + tile, r1)
                        f = self._climb(space, levels, h, terms_s, cut[j0])
                        sums[j0:j1] += f.sum(0)
                        if matrices is None:
                            q = space.get(f"level {len(levels) % 2}", n * (j1 - j0), d)
                            self.network.products.into(f.view(-1, d), self.network.scale_weights[number], q)
                            cross[j0:j1] += q.view(f.shape).mul_(bx[:, None]).sum(0)
                            continue
                        m = matrices[: j1 - j0] if single else matrices[j0:j1]
                        self.network.products.transposed(
                            f.view(n, -1), bx, m.view(-1, d), accumulate=i0 > 0, exact=conv.level < 0
                        )
                        if i1 == n_sources:
                            cross[j0:j1] = m.mul_(scale).sum(1)
        own = torch.addmm(conv.bias, x[targets], conv.target)
        messages = torch.addmm(scale_const * n_sources, sums, scale).mul_(own)
        messages.add_(cross).add_(scale_const * source_sum).addmm_(sums, shift).add_(shift_const, alpha=n_sources)
        return n_sources * n_targets, targets, messages

    def outputs(self, block: Block, region: Part, results: Access, writer: Writer, out_w: Tensor, out_b: Tensor) -> int:
        """Predict the parameters on a region's edges; returns how many those are."""
        levels = self.network.weights.levels
        chunk, tile = self.plan.output_tile(region)
        values = self.reader.open(block)
        terms_t = self._target_terms(levels, block, slice(block.target + region.j0, block.target + region.j1))
        cut = {j: _cut(terms_t, j, min(j + tile, region.j1 - region.j0)) for j in range(0, region.j1 - region.j0, tile)}
        with self._space() as space:
            for i0, i1 in spans(region.i1 - region.i0, READ * chunk):
                sources = slice(block.source + region.i0 + i0, block.source + region.i0 + i1)
                terms_s = self._source_terms(levels, sources)
                for j0, j1 in spans(region.j1 - region.j0, tile):
                    part = Part(region.i0 + i0, region.i0 + i1, region.j0 + j0, region.j0 + j1)
                    inputs = self._read(space, block, values, part, j1 - j0)[0]  # (I, J, C)
                    y = space.get("outputs", part.edges, out_w.shape[1])
                    for a, b in spans(i1 - i0, chunk):
                        terms = [None if t is None else t[a:b] for t in terms_s]
                        z = self._climb(space, levels, inputs[a:b], terms, cut[j0])
                        rows = slice(a * (j1 - j0), b * (j1 - j0))
                        torch.addmm(out_b, z.view(-1, z.shape[-1]), out_w, out=y[rows])  # (I J, K f)
                    writer.write(results, block, part, inputs, y)
        return region.edges

    def _read(self, space: _Space, block: Block, values: Access | float, part: Part, tile: int) -> Tensor:
        """(tiles, I, J, features * context) standardised inputs of tiles side by side, of J = ``tile`` targets each."""
        width = block.features * self.network.config.context
        inputs = space.get("inputs", (part.j1 - part.j0) // tile, part.i1 - part.i0, tile, width)
        self.reader.read(values, part, inputs)
        return inputs

    def _climb(
        self,
        space: _Space,
        levels: Sequence[Level],
        f: Tensor,
        terms_s: Sequence[Tensor | None],
        terms_t: Sequence[Tensor],
    ) -> Tensor:
        """(I, J, d) feature at the last of some levels, from (I, J, C) raw inputs."""
        d, n = self.network.config.hidden, f.shape[0] * f.shape[1]
        for number in range(len(levels)):
            # The level below and the one above share the other buffer.
            out = space.get(f"level {number % 2}", n, d)
            if number == 0:
                torch.mm(f.view(n, -1), self.network.level_weights[0][: f.shape[-1]], out=out)
            else:
                self.network.products.into(f.view(n, d), self.network.level_weights[number], out)
            f = out.view(*f.shape[:2], d)
            term_s, term_t = terms_s[number], terms_t[number]
            if self.network.add_silu is not None:
                self.network.add_silu(
                    f.numpy(), (self.network.nothing if term_s is None else term_s).numpy(), term_t.numpy()
                )
                continue
            if term_s is not None:
                f.add_(term_s[:, None])
            f.add_(term_t)
            self.network.activate(out)
        return f

    def _target_terms(self, levels: Sequence[Level], block: Block, targets: slice) -> list[Tensor]:
        """Per level (J, d) or (1, d): what the target node and constants add before the activation."""
        terms: list[Tensor] = []
        for level in levels:
            const = of_type(level.const, block)
            if level.target is None:
                terms.append(const[None])
            else:
                terms.append(torch.addmm(const, self.x[level.nodes][targets], level.target))
        return terms

    def _source_terms(self, levels: Sequence[Level], sources: slice) -> list[Tensor | None]:
        """Per level (I, d): what the source node adds before the activation."""
        return [None if level.source is None else self.x[level.nodes][sources] @ level.source for level in levels]

    @contextmanager
    def _space(self) -> Iterator[_Space]:
        """Buffers for one task; there are as many as tasks at a time."""
        space = self.spaces.pop()
        try:
            yield space
        finally:
            self.spaces.append(space)


class _Space:
    """Buffers of one worker, kept from tile to tile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def get(self, name: str, *shape: int) -> Tensor:
        """A buffer by name; what it held is lost."""
        view = self._views.get((name, shape))
        if view is None:
            numel = math.prod(shape)
            held = self._held.get(name)
            if held is None or held.numel() < numel:
                self._views = {key: v for key, v in self._views.items() if key[0] != name}
                self._held.pop(name, None)
                del held  # free first
                held = self._held[name] = torch.empty(numel, dtype=torch.float32, device=self._device)
            view = self._views[name, shape] = held[:numel].view(shape)
        return view


def _reads(n_targets: int, tile: int) -> Iterator[tuple[int, int]]:
    """Runs of targets to read together: a few whole tiles each, what is left over by itself."""
    whole = n_targets - n_targets % tile
    yield from spans(whole, READ * tile)
    if whole < n_targets:
        yield whole, n_targets


def _cut(terms: Sequence[Tensor], j0: int, j1: int) -> list[Tensor]:
    """Terms of targets j0 … j1; those that are the same for all targets as they are."""
    return [term[j0:j1] if len(term) > 1 else term for term in terms]
