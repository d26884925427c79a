"""Laplacian positional encodings without an adjacency matrix.

NiNo paper, section 3.2: node features are the eigenvectors of the symmetric normalised Laplacian of the undirected
graph, without self-loops, that follow the first (parallel edges count once). On an explicit graph this is an
eigenproblem with one row per neuron and one entry per weight. On blocks it is exact and small:

* Cut the ranges where any block begins or ends, and carry the cuts along the diagonals. Within such a *cell* all
  neurons have the same neighbours (up to the pairing of diagonals), so the same degree.
* Every eigenvector then belongs to one of two kinds. Those *constant on cells* are eigenvectors of the quotient matrix,
  with one row per cell. Those that *sum to zero on every cell* do not see complete blocks at all: on them the
  adjacency is only the diagonals, which act on cells of equal size joined by diagonals as one small matrix, each
  eigenvalue of which is repeated (cell size - 1) times.

So the whole spectrum, repetitions included, comes from matrices of some hundred to some thousand rows, whatever the
number of edges or neurons.

Convention (the encoding is defined up to it): columns in ascending order of eigenvalue. Where an eigenvalue is
repeated, column j of its eigenspace is the projection of a fixed start vector, made orthogonal to the columns before
it; start vector j has entry ``frac((node + 1) * sqrt(p_j)) - 1/2`` with p_j the j-th prime, so the basis is spread over
the whole eigenspace as an iterative solver's would be. Each column has length 1, and its first entry of largest
magnitude (to within one part in a million) is positive.

An eigenvalue may be repeated thousands of times (a thousand equal parts, joined or not). Its eigenspace is then never
written out: a Krylov space grown from a start vector holds, of every eigenspace, exactly the projection of that vector,
which is all the convention asks for. So a column costs one such run, whatever the number of repetitions. Networks whose
ranges are cut into more than a hundred thousand cells are refused.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csc_array, diags_array, identity
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator

from nowcast_service.graph.blocks import NeuralGraph
from nowcast_service.graph.cells import cells_of, joined_pairs, symmetric
from nowcast_service.graph.spectrum import EQUAL, smallest, start_vector

if TYPE_CHECKING:  # the process that works on specs does without
    from torch import Tensor

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
_ZeroSum = tuple[NDArray[np.intp], Array, Array]
"""Cells, eigenvalues and eigenvectors."""

_REVISION = 1
"""Part of the cache key; raise it with any change of the convention."""


def positional_encoding(graph: NeuralGraph, dim: int = 8) -> Tensor:
    """As `encode`, as a tensor."""
    import torch

    return torch.from_numpy(encode(graph, dim))


def encode(graph: NeuralGraph, dim: int = 8) -> NDArray[np.float32]:
    """Laplacian eigenvectors of a neural graph, cached by the graph's layout in memory and on disk.

    The disk cache is in ``$NOWCAST_CACHE`` (``~/.cache/nowcast`` by default; empty turns it off). It is only a cache:
    what cannot be read is computed again, what cannot be written is dropped.

    Args:
        graph: The neural graph.
        dim: Columns; graphs with fewer than dim + 1 nodes get columns of zeros at the end.

    Returns:
        (n_nodes, dim) float32. Do not write to it, it is shared.
    """
    key = f"{layout_digest(graph)}-{dim}-v{_REVISION}"
    with _lock:
        if key in _memory:
            _memory.move_to_end(key)
            return _memory[key]
    positions = _read(key, (graph.n_nodes, dim))
    if positions is None:
        vectors = NormalisedLaplacian(graph).eigenvectors(dim + 1)[:, 1:]
        encoded = np.zeros((graph.n_nodes, dim), dtype=np.float32)
        encoded[:, : vectors.shape[1]] = vectors
        _write(key, encoded)
        positions = encoded
    with _lock:
        _memory[key] = positions
        while len(_memory) > _MEMORY_ENTRIES:
            _memory.popitem(last=False)
    return positions


def laplacian_eigenvalues(graph: NeuralGraph, n: int = 12) -> Array:
    """The n smallest eigenvalues of the symmetric normalised Laplacian, repetitions included, ascending."""
    return NormalisedLaplacian(graph).eigenvalues(n)


def layout_digest(graph: NeuralGraph) -> str:
    """BLAKE2b-128 of everything the encoding depends on: the ranges that blocks join, not their weights or names."""
    layout = hashlib.blake2b(str(graph.n_nodes).encode(), digest_size=16)
    for block in graph.blocks:
        layout.update(
            f";{block.source},{block.n_sources},{block.target},{block.n_targets},{int(block.diagonal)}".encode()
        )
    return layout.hexdigest()


@dataclass(frozen=True)
class _Eigenspace:
    """The eigenvectors of one eigenvalue, as what projects onto them.

    Attributes:
        value: The eigenvalue.
        quotient: (cells, m) orthonormal, in the scaled coordinates of the quotient.
        zero_sum: Per set of cells joined by diagonals: the cells, and (cells in the set, m) orthonormal weights.
        dimension: Number of eigenvectors.
    """

    value: float
    quotient: Array
    zero_sum: tuple[tuple[NDArray[np.intp], Array], ...]
    dimension: int


class NormalisedLaplacian(LinearOperator):  # type: ignore[misc]  # scipy has no types
    """L = I - D^(-1/2) A D^(-1/2) of a neural graph, with A the binary undirected adjacency without self-loops.

    As a linear operator a product costs O(nodes + pairs of cells).

    Args:
        graph: The neural graph.
    """

    def __init__(self, graph: NeuralGraph) -> None:
        super().__init__(dtype=np.dtype(np.float64), shape=(graph.n_nodes, graph.n_nodes))
        cuts = cells_of(graph)
        self.starts = np.array(cuts[:-1])
        self.sizes = np.diff(cuts)
        self.cell_of = np.repeat(np.arange(len(self.sizes)), self.sizes)
        dense, diagonal = joined_pairs(graph, cuts)
        self._dense, self._diagonal = symmetric(dense, self.sizes), symmetric(diagonal, self.sizes)
        n = self.sizes.astype(np.float64)
        loops = np.zeros(len(n))  # cells joined to themselves: everyone but oneself
        loops[dense[dense[:, 0] == dense[:, 1], 0]] = 1
        degree = self._dense @ n - loops + np.asarray(self._diagonal.sum(axis=1)).ravel()
        self._scale = np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
        self._loops = loops

    def _matmat(self, X: Array) -> Array:
        scaled = X * self._scale[self.cell_of, None]
        sums = np.add.reduceat(scaled, self.starts, axis=0)
        joined = (self._dense @ sums)[self.cell_of] - self._loops[self.cell_of, None] * scaled
        pairs = self._diagonal.tocoo()
        for a, b in zip(*pairs.coords, strict=True):
            size = self.sizes[a]
            joined[self.starts[a] : self.starts[a] + size] += scaled[self.starts[b] : self.starts[b] + size]
        product: Array = X - joined * self._scale[self.cell_of, None]
        return product

    def _matvec(self, x: Array) -> Array:
        return self._matmat(x.reshape(-1, 1))

    def _adjoint(self) -> NormalisedLaplacian:
        return self

    def eigenvalues(self, n: int) -> Array:
        """The n smallest, repetitions included (fewer where the graph has fewer nodes)."""
        spaces = self._eigenspaces(n)
        values = np.concatenate([np.full(min(space.dimension, n), space.value) for space in spaces])
        return values[:n]

    def eigenvectors(self, n: int) -> Array:
        """(nodes, n) eigenvectors of the n smallest eigenvalues, under the convention of this module."""
        columns: list[Array] = []
        for space in self._eigenspaces(n):
            columns.extend(self._basis(space, min(space.dimension, n - len(columns))).T)
        return np.stack([_signed(column) for column in columns], axis=1)

    # The two kinds of eigenvectors ----------------------------------------------------------------------------------

    @cached_property
    def _quotient(self) -> csc_array:
        """I - the adjacency on cell-constant vectors; coordinates are scaled to keep lengths."""
        root = np.sqrt(self.sizes)
        dense = self._dense.multiply(root[:, None] * self._scale[:, None]).multiply(root[None] * self._scale[None])
        diagonal = self._diagonal.multiply(self._scale[:, None]).multiply(self._scale[None])
        loops = coo_array((self._loops * self._scale**2, (np.arange(len(root)),) * 2), shape=dense.shape)
        return csc_array(identity(len(root)) - dense - diagonal + loops)

    def _zero_sum(self, n: int) -> list[_ZeroSum]:
        """Cells, eigenvalues and eigenvectors of every set of cells joined by diagonals, for vectors of zero sum."""
        count, label = connected_components(self._diagonal, directed=False)
        order = np.argsort(label, kind="stable")
        bounds = np.searchsorted(label[order], np.arange(count + 1))
        sets: list[_ZeroSum] = []
        for first, last in pairwise(bounds):
            cells = order[first:last]
            if self.sizes[cells[0]] < 2:
                continue
            scale = self._scale[cells]
            own = 1 + self._loops[cells] * scale**2
            if len(cells) == 1:
                sets.append((cells, own, np.ones((1, 1))))
                continue
            joined = self._diagonal[cells][:, cells].multiply(scale[:, None]).multiply(scale[None])
            matrix = csc_array(diags_array(own) - joined)
            sets.append((cells, *smallest(matrix, n, partial(start_vector, len(cells)))))
        return sets

    def _eigenspaces(self, n: int) -> list[_Eigenspace]:
        """Eigenspaces in ascending order until they hold n eigenvectors.

        Each holds all of its eigenvectors or, where there are more than n, those that the first start vectors see.
        """
        wanted = min(n, self.shape[0])
        values, vectors = smallest(self._quotient, n, self._start_on_cells)
        total, needed = 0, []
        for space in self._merge(values, vectors, self._zero_sum(n)):
            needed.append(space)
            total += space.dimension
            if total >= wanted:
                break
        return needed

    def _merge(self, values: Array, vectors: Array, sets: list[_ZeroSum]) -> list[_Eigenspace]:
        known = np.sort(np.concatenate([values, *(set_values for _, set_values, _ in sets)]))
        first = known[np.concatenate([[True], np.diff(known) > EQUAL])]
        spaces = []
        for low, high in zip(first, [*first[1:], np.inf], strict=True):
            quotient = vectors[:, (values >= low) & (values < high)]
            zero_sum = []
            dimension = quotient.shape[1]
            for cells, set_values, weights in sets:
                inside = weights[:, (set_values >= low) & (set_values < high)]
                if inside.shape[1]:
                    zero_sum.append((cells, inside))
                    dimension += inside.shape[1] * int(self.sizes[cells[0]] - 1)
            spaces.append(_Eigenspace(float(low), quotient, tuple(zero_sum), dimension))
        return spaces

    def _start_on_cells(self, index: int) -> Array:
        """A start vector's part that is constant on cells, in the scaled coordinates of the quotient."""
        part: Array = np.add.reduceat(start_vector(self.shape[0], index), self.starts) / np.sqrt(self.sizes)
        return part

    def _project(self, space: _Eigenspace, vector: Array) -> Array:
        """The part of a vector that lies in an eigenspace."""
        root = np.sqrt(self.sizes)
        means = np.add.reduceat(vector, self.starts) / root
        result: Array = (space.quotient @ (space.quotient.T @ means) / root)[self.cell_of]
        for cells, weights in space.zero_sum:
            span = self.starts[cells][:, None] + np.arange(self.sizes[cells[0]])
            part = vector[span]
            part = part - part.mean(axis=1, keepdims=True)
            result[span] += weights @ (weights.T @ part)
        return result

    def _basis(self, space: _Eigenspace, n: int) -> Array:
        """(nodes, n) orthonormal vectors of an eigenspace."""
        basis = np.empty((self.shape[0], 0))
        start = 0
        while basis.shape[1] < n:
            vector = self._project(space, start_vector(self.shape[0], start))
            start += 1
            for _ in range(2):  # twice is enough for orthogonality to rounding
                vector -= basis @ (basis.T @ vector)
                vector = self._project(space, vector)
            length = np.linalg.norm(vector)
            if length > 1e-6:
                basis = np.column_stack([basis, vector / length])
        return basis


def _signed(column: Array) -> Array:
    magnitude = np.abs(column)
    first = int(np.argmax(magnitude >= magnitude.max() * (1 - 1e-6)))
    return -column if column[first] < 0 else column


# The cache -----------------------------------------------------------------------------------------------------------

_MEMORY_ENTRIES = 8
_memory: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
_lock = Lock()


def _cache_folder() -> Path | None:
    named = os.environ.get("NOWCAST_CACHE")
    if named == "":
        return None
    if named is not None:
        return Path(named)
    try:
        return Path.home() / ".cache" / "nowcast"
    except RuntimeError:  # no home directory
        return None


def _read(key: str, shape: tuple[int, int]) -> NDArray[np.float32] | None:
    folder = _cache_folder()
    if folder is None:
        return None
    try:
        array: NDArray[np.float32] = np.load(folder / f"positions-{key}.npy", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as exc:
        logger.info("cached positional encoding %s is not readable, computing it again: %s", key, exc)
        return None
    if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
        logger.info("cached positional encoding %s is not what it should be, computing it again", key)
        return None
    return array


def _write(key: str, array: NDArray[np.float32]) -> None:
    folder = _cache_folder()
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".npy", delete=False) as file:
            np.save(file, array)
        os.replace(file.name, folder / f"positions-{key}.npy")
    except OSError as exc:
        logger.info("positional encoding %s is not cached on disk: %s", key, exc)
