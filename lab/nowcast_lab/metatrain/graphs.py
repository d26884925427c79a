"""Neural graphs prepared for training on many slices of trajectories at once.

All slices of a batch item share one architecture, so edges are listed once: index arrays are (edges,), values are
(edges, slices, …). Edges with equally many kernel positions form one group, so that a linear layer does not pay for
nine positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from nowcast_proto.spec import ArchitectureSpec, ParameterSpec
from nowcast_service.graph.blocks import EdgeType, NeuralGraph
from nowcast_service.graph.positional import positional_encoding
from nowcast_service.graph.wiring.build import build_graph
from torch import Tensor

ENCODING = 8
"""Columns of the positional encoding."""
_SAME = 1e-5
"""Eigenvalues closer than this are one repeated eigenvalue."""


@dataclass(frozen=True)
class EdgeGroup:
    """Edges with the same number of kernel positions.

    Attributes:
        features: Kernel positions.
        source: (edges,) source nodes.
        target: (edges,) target nodes.
        edge_type: (edges,).
        gather: (edges, features) where the values lie in the flattened parameters; the two elements after the last
            parameter hold the fixed features 1 (residual, head) and 2 (self-loop).
        weighted: (edges,) whether the edge is a parameter, not an auxiliary link.
    """

    features: int
    source: Tensor
    target: Tensor
    edge_type: Tensor
    gather: Tensor
    weighted: Tensor

    def to(self, device: torch.device) -> EdgeGroup:
        tensors = (self.source, self.target, self.edge_type, self.gather, self.weighted)
        return EdgeGroup(self.features, *(t.to(device) for t in tensors))


@dataclass(frozen=True)
class Eigenspace:
    """One eigenvalue of the graph Laplacian with all of its eigenvectors, ``columns`` of which are in the encoding."""

    basis: Tensor
    columns: int


@dataclass(frozen=True)
class TrainingGraph:
    """A neural graph ready for training.

    Attributes:
        spec: The architecture (of the sampled vocabulary, where it was cut).
        n_nodes: Number of neurons.
        groups: Edges by number of kernel positions.
        in_degree: (nodes, 1, 1) incoming edges of each node.
        segments: (parameters,) elements of every parameter, in order.
        spaces: Eigenspaces that make up the positional encoding.
        encoding: (nodes, 8) the encoding inference uses.
        vocabulary: Rows of the full vocabulary, where this graph holds only a sample of them.
    """

    spec: ArchitectureSpec
    n_nodes: int
    groups: tuple[EdgeGroup, ...]
    in_degree: Tensor
    segments: tuple[int, ...]
    spaces: tuple[Eigenspace, ...]
    encoding: Tensor
    vocabulary: int | None = None

    @property
    def n_edges(self) -> int:
        return sum(len(group.source) for group in self.groups)

    def random_encoding(self, generator: torch.Generator) -> Tensor:
        """A random basis of every eigenspace: random signs, random rotations where an eigenvalue repeats.

        Eigenvectors are defined only up to this choice, so the network must not depend on it (NiNo paper, section
        3.2, on the sign; rotations are ours).

        Returns:
            (nodes, 8) float32.
        """
        columns = []
        for space in self.spaces:
            size = space.basis.shape[1]
            mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
            rotation = torch.linalg.qr(mix)[0][:, : space.columns].to(space.basis.device)
            columns.append(space.basis @ rotation)
        return _padded(torch.cat(columns, 1))

    def signed_encoding(self, generator: torch.Generator) -> Tensor:
        """Inference's own encoding under random signs, (nodes, 8) float32."""
        signs = torch.randint(2, (ENCODING,), generator=generator) * 2 - 1
        return self.encoding * signs.to(self.encoding)

    def to(self, device: torch.device) -> TrainingGraph:
        """The same graph on another device."""
        return TrainingGraph(
            self.spec,
            self.n_nodes,
            tuple(group.to(device) for group in self.groups),
            self.in_degree.to(device),
            self.segments,
            tuple(Eigenspace(space.basis.to(device), space.columns) for space in self.spaces),
            self.encoding.to(device),
            self.vocabulary,
        )


def prepare(spec: ArchitectureSpec, *, max_vocabulary: int | None = None) -> TrainingGraph:
    """Build the graph of an architecture and list its edges.

    Args:
        spec: The architecture.
        max_vocabulary: Most vocabulary rows to keep; a larger vocabulary is cut to this many, which rows being the
            sampler's choice (NiNo paper, appendix A.2: 1,000 rows of 50,257).

    Raises:
        UnsupportedArchitecture, InvalidSpec: As `build_graph`.
    """
    graph = build_graph(spec)
    vocabulary = None
    if max_vocabulary is not None and graph.n_tokens > max_vocabulary:
        vocabulary = graph.n_tokens
        spec = cut_vocabulary(spec, vocabulary, max_vocabulary)
        graph = build_graph(spec)
    segments = tuple(p.numel for p in spec.parameters)
    return TrainingGraph(
        spec=spec,
        n_nodes=graph.n_nodes,
        groups=_groups(graph),
        in_degree=graph.in_degree.clamp(min=1).view(-1, 1, 1),
        segments=segments,
        spaces=_eigenspaces(graph),
        encoding=positional_encoding(graph, ENCODING),
        vocabulary=vocabulary,
    )


def cut_vocabulary(spec: ArchitectureSpec, vocabulary: int, rows: int) -> ArchitectureSpec:
    """The spec with every (vocabulary, width) matrix cut to so many rows."""
    cut = tuple(
        ParameterSpec(name=p.name, shape=(rows, *p.shape[1:])) if len(p.shape) == 2 and p.shape[0] == vocabulary else p
        for p in spec.parameters
    )
    return spec.model_copy(update={"parameters": cut})


def _groups(graph: NeuralGraph) -> tuple[EdgeGroup, ...]:
    starts: dict[str, int] = {}
    end = 0
    for parameter in graph.spec.parameters:
        starts[parameter.name] = end
        end += parameter.numel
    fixed = {1.0: end, 2.0: end + 1}
    parts: dict[int, list[tuple[Tensor, ...]]] = {}
    for block in graph.blocks:
        source, target = block.edge_index()
        if isinstance(block.values, float):
            gather = torch.full((block.n_edges, 1), fixed[block.values])
            weighted = torch.zeros(block.n_edges, dtype=torch.bool)
        else:
            start = starts[block.values.parameter]
            numel = _numel(graph.spec, block.values.parameter)
            where = block.values.of(
                torch.arange(start, start + numel), block.n_sources, block.n_targets, diagonal=block.diagonal
            )
            gather = where.reshape(-1, block.features)
            weighted = torch.ones(block.n_edges, dtype=torch.bool)
        kind = torch.full((block.n_edges,), int(block.edge_type))
        parts.setdefault(block.features, []).append((source, target, kind, gather, weighted))
    return tuple(
        EdgeGroup(features, *(torch.cat(column).contiguous() for column in zip(*parts[features], strict=True)))
        for features in sorted(parts)
    )


def _numel(spec: ArchitectureSpec, name: str) -> int:
    return next(p.numel for p in spec.parameters if p.name == name)


def _eigenspaces(graph: NeuralGraph) -> tuple[Eigenspace, ...]:
    """All eigenvectors of the eigenvalues that the encoding reaches into, from a dense decomposition.

    The encoding is the 8 eigenvectors after the first of the symmetric normalised Laplacian of the undirected graph
    without self-loops. Training graphs have a few thousand nodes, where dense is quick and gives whole eigenspaces.
    """
    adjacency = torch.zeros(graph.n_nodes, graph.n_nodes, dtype=torch.float64)
    for block in graph.blocks:
        if block.edge_type == EdgeType.SELF_LOOP:
            continue
        source, target = block.edge_index()
        adjacency[source, target] = 1
        adjacency[target, source] = 1
    adjacency.fill_diagonal_(0)
    degree = adjacency.sum(1)
    inverse = torch.where(degree > 0, degree.clamp(min=1).rsqrt(), 0.0)
    laplacian = torch.diag((degree > 0).double()) - inverse[:, None] * adjacency * inverse
    values, vectors = torch.linalg.eigh(laplacian)
    last = min(ENCODING, graph.n_nodes - 1)
    spaces = []
    column = 1
    while column <= last:
        first, stop = column, column + 1
        while first > 0 and values[column] - values[first - 1] < _SAME:
            first -= 1
        while stop < len(values) and values[stop] - values[column] < _SAME:
            stop += 1
        # Where the eigenvalue zero repeats, the vector the encoding drops is part of the space all the same.
        spaces.append(Eigenspace(vectors[:, first:stop].clone(), min(stop, last + 1) - column))
        column = stop
    return tuple(spaces)


def _padded(encoding: Tensor) -> Tensor:
    """(nodes, columns) to (nodes, 8) float32, zeros where a tiny graph has fewer eigenvectors."""
    return torch.nn.functional.pad(encoding, (0, ENCODING - encoding.shape[1])).float()
