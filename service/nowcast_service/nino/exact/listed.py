"""Edges of small and thin blocks, one by one: thousands of biases and norms cost a few products so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nowcast_service.graph.blocks import Block
from nowcast_service.nino.exact.network import Network, of_type
from nowcast_service.nino.exact.plan import Part, endpoints
from nowcast_service.nino.exact.stream import Reader
from nowcast_service.nino.exact.weights import Convolution, Level


class Listed:
    """Edges of small and thin blocks of one type and kernel size, held with their endpoints and inputs.

    Args:
        network: The network.
        blocks: The blocks.
        reader: Of the snapshots.
        x: Node vectors after each convolution so far, (N, d); it grows while the passes run.
    """

    def __init__(self, network: Network, blocks: tuple[Block, ...], reader: Reader, x: Sequence[Tensor]) -> None:
        device = network.device
        self.network = network
        self.blocks = blocks
        self.x = x
        self.loops = all(block.diagonal and block.source == block.target for block in blocks)
        self.source, self.target = endpoints(blocks, device)
        width = blocks[0].features * network.config.context
        self.inputs = torch.empty(len(self.source), width, device=device)  # (E, C)
        for block, part, edges in self.pieces():
            shape = (part.i1, part.j1, width)
            reader.read(reader.open(block), part, self.inputs[edges].view(1, *shape))

    def _add_terms(self, out: Tensor, x: Tensor, source: Tensor, target: Tensor, a: int, b: int) -> None:
        """out += x_i @ source + x_j @ target for edges a … b, out (E, d); a self-loop has i = j."""
        if self.loops:
            out.addmm_(x[self.source[a:b]], source + target)
        else:
            out.addmm_(x[self.source[a:b]], source).addmm_(x[self.target[a:b]], target)

    def pieces(self) -> Iterator[tuple[Block, Part, slice]]:
        """Every block, all of it as a part, and the edges it owns here."""
        start = 0
        for block in self.blocks:
            end = start + block.n_edges
            yield block, Part(0, block.n_sources, 0, 1 if block.diagonal else block.n_targets), slice(start, end)
            start = end

    def messages(self, a: int, b: int, conv: Convolution, x: Tensor) -> tuple[int, Tensor, Tensor]:
        """Messages of edges a … b: (edges, target rows (E,), (E, d))."""
        block = self.blocks[0]
        f = self.climb(self.network.weights.levels[: conv.level + 1], a, b)
        y = conv.bias.repeat(b - a, 1)
        self._add_terms(y, x, conv.source, conv.target, a, b)
        y.mul_(torch.addmm(of_type(conv.scale_const, block), f, conv.scale[: f.shape[1]]))
        y.addmm_(f, conv.shift[: f.shape[1]]).add_(of_type(conv.shift_const, block))
        return b - a, self.target[a:b], y

    def climb(self, levels: Sequence[Level], a: int, b: int) -> Tensor:
        """(E, d) feature of edges a … b at the last of some levels, or their (E, C) raw inputs."""
        f = self.inputs[a:b]
        for level in levels:
            f = torch.addmm(of_type(level.const, self.blocks[0]), f, level.weight[: f.shape[1]])
            if level.source is not None and level.target is not None:
                self._add_terms(f, self.x[level.nodes], level.source, level.target, a, b)
            self.network.activate(f)
        return f


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add each row to the one it belongs to: the same to the bit every time, on every device.

    Args:
        total: (N, d), changed in place.
        index: (E,) row of ``total`` for each of ``rows``; any of them may come several times.
        rows: (E, d).
    """
    if total.device.type == "cpu":
        total.scatter_add_(0, index[:, None].expand_as(rows), rows)
    else:
        add_sorted(total, index, rows)


def add_sorted(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """`add_rows` where a scatter adds in the order its threads arrive: rows of one target are summed first."""
    order = torch.argsort(index, stable=True)
    wanted, lengths = torch.unique_consecutive(index[order], return_counts=True)
    total[wanted] += torch.segment_reduce(rows[order], "sum", lengths=lengths, axis=0)
