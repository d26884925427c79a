"""The neural graph as blocks: neurons are nodes, every weight is a directed edge, edges come in blocks.

A dense layer is a complete bipartite block between two ranges of neurons, so no per-edge index is ever stored: a graph
of a billion edges is a few hundred `Block` objects. Everything else (the exact engine, the PyG twin, the positional
encoding, drawings, the round trip) is derived from this one description.

NiNo paper, section 3 and appendix A: nodes, edges, edge types and the auxiliary residual, head and self-loop edges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING

from nowcast_proto.spec import ArchitectureSpec

if TYPE_CHECKING:  # the process that works on specs does without
    from torch import Tensor


class EdgeType(IntEnum):
    """Edge types the published weights know (table of 15; 12 and 14 are unused)."""

    PADDING = 0
    LINEAR = 1
    OTHER = 2  # biases and everything without a type of its own
    CONV = 3
    NORM = 4
    TOKEN_EMBEDDING = 5
    POSITION_EMBEDDING = 6
    QUERY = 7
    KEY = 8
    VALUE = 9
    RESIDUAL = 10
    HEAD = 11
    SELF_LOOP = 13


@dataclass(frozen=True, slots=True)
class View:
    """Where the values of a block's edges lie in one flattened parameter.

    The value of edge (source i, target j) at kernel position q is element
    ``offset + i * source_stride + j * target_stride + q * feature_stride`` of the parameter, so transposes, fused
    tensors and kernels are all strides. A diagonal block has i == j and uses ``source_stride`` alone.

    One layout is not strided. The published graphs of all transformers but GPT-2 fill the edges of an embedding, which
    run over its rows, with the values of its transpose, and trained weights know it so. ``transposed`` gives the rows
    and columns of such a tensor: edge number ``p = i * n_targets + j`` holds element
    ``(p % rows) * columns + p // rows``, and the strides are not used.
    """

    parameter: str
    offset: int
    source_stride: int
    target_stride: int
    feature_stride: int = 1
    features: int = 1
    transposed: tuple[int, int] | None = None

    def of(self, flat: Tensor, n_sources: int, n_targets: int, *, diagonal: bool = False) -> Tensor:
        """The edge values as a strided view; nothing is copied, except where the layout is ``transposed``.

        Args:
            flat: (numel,) contiguous flattened parameter.
            n_sources: Sources of the block.
            n_targets: Targets of the block.
            diagonal: Pair source i with target i only.

        Returns:
            (n_sources, n_targets, features), or (n_sources, features) for a diagonal block.
        """
        if self.transposed is not None:
            rows, columns = self.transposed
            matrix = flat[self.offset : self.offset + rows * columns].view(rows, columns)
            return matrix.t().reshape(n_sources, n_targets, 1)
        base = flat.storage_offset() + self.offset
        if diagonal:
            return flat.as_strided((n_sources, self.features), (self.source_stride, self.feature_stride), base)
        return flat.as_strided(
            (n_sources, n_targets, self.features), (self.source_stride, self.target_stride, self.feature_stride), base
        )


@dataclass(frozen=True, slots=True)
class Block:
    """Edges of one type between two ranges of neurons.

    Attributes:
        name: The parameter, a part of it (``attn.c_attn.q.weight``) or an auxiliary link (``attn.c_attn.v.res``).
        edge_type: Type of every edge in the block.
        source: First source node.
        n_sources: Number of source nodes.
        target: First target node.
        n_targets: Number of target nodes; equals ``n_sources`` for a diagonal block.
        values: Where the weights lie, or the fixed feature of an auxiliary link (residual and head 1, self-loop 2).
        diagonal: Connect source i to target i only, instead of every pair.
        writes: The prediction of these edges is the one that counts; False where a tensor that the network uses more
            than once has been predicted at its first use.
    """

    name: str
    edge_type: EdgeType
    source: int
    n_sources: int
    target: int
    n_targets: int
    values: View | float
    diagonal: bool = False
    writes: bool = True

    @property
    def n_edges(self) -> int:
        return self.n_sources if self.diagonal else self.n_sources * self.n_targets

    @property
    def features(self) -> int:
        """Kernel positions per edge."""
        return self.values.features if isinstance(self.values, View) else 1

    def edge_index(self) -> Tensor:
        """(2, n_edges) source and target of every edge, source-major. For twins, drawings and tests only."""
        import torch

        s = torch.arange(self.source, self.source + self.n_sources)
        t = torch.arange(self.target, self.target + self.n_targets)
        if self.diagonal:
            return torch.stack((s, t))
        return torch.stack((s.repeat_interleave(self.n_targets), t.repeat(self.n_sources)))


@dataclass(frozen=True, slots=True)
class Range:
    """A named stretch of neurons that play one part, for drawings and explanations.

    Attributes:
        name: Its name in the family's table (``x0`` is the residual stream before layer 0), or, for the single node
            that a 1-D tensor adds, ``#`` and the tensor's name.
        first: First node.
        size: Number of nodes.
        group: Ranges of one group belong to one step of the network.
        feeds: It feeds the group, rather than being one of its results.
        ordered: Its neurons have places of their own inside a head (rotary pairs).
        fixed: The outside knows its neurons by their place (inputs, outputs, tokens, positions).
    """

    name: str
    first: int
    size: int
    group: int
    feeds: bool
    ordered: bool = False
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class Coverage:
    """What became of one parameter.

    Attributes:
        parameter: Name in the spec.
        rule: ``graph`` (its weights are edges), ``edgewise`` (for the edge-wise predictor) or ``left`` (kept as is).
        role: Role in the family's table, or None where no rule matched.
        reason: Why it is not in the graph; empty where it is.
    """

    parameter: str
    rule: str
    role: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class NeuralGraph:
    """The neural graph of one architecture.

    Attributes:
        spec: The architecture it was built from.
        n_nodes: Number of neurons.
        blocks: All blocks, parameters and auxiliary links; self-loops last.
        vocabularies: (first node, rows) of every vocabulary: row r has token-position index r + 1, every node that is
            no vocabulary row index 0.
        coverage: One entry per parameter of the spec, in order.
        wiring: ``published`` or ``faithful``.
        ranges: All nodes, in order, as named ranges.
        beside: Blocks whose elements are known to move with these neurons, and are no edges.
    """

    spec: ArchitectureSpec
    n_nodes: int
    blocks: tuple[Block, ...]
    vocabularies: tuple[tuple[int, int], ...] = ()
    coverage: tuple[Coverage, ...] = field(default=())
    wiring: str = "published"
    ranges: tuple[Range, ...] = field(default=())
    beside: tuple[Block, ...] = field(default=())

    @property
    def n_tokens(self) -> int:
        """Rows of the largest vocabulary; 0 where the network has no token embedding."""
        return max((rows for _, rows in self.vocabularies), default=0)

    @property
    def n_edges(self) -> int:
        return sum(block.n_edges for block in self.blocks)

    @property
    def features(self) -> int:
        """Kernel positions of the widest block."""
        return max(block.features for block in self.blocks)

    @cached_property
    def in_degree(self) -> Tensor:
        """(n_nodes,) float32: incoming edges of each node over all blocks, self-loops included."""
        import torch

        degree = torch.zeros(self.n_nodes, dtype=torch.float64)
        for block in self.blocks:
            degree[block.target : block.target + block.n_targets] += 1 if block.diagonal else block.n_sources
        return degree.float()

    def weighted(self) -> Iterator[tuple[Block, View]]:
        """Blocks that carry weights, with their views."""
        for block in self.blocks:
            if isinstance(block.values, View):
                yield block, block.values
