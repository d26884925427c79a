"""The smallest eigenpairs of sparse matrices, repeated ones by what fixed start vectors see of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh, eigh_tridiagonal
from scipy.sparse import csc_array, identity
from scipy.sparse.linalg import splu

Array = NDArray[np.float64]

EQUAL = 1e-9
"""Eigenvalues this close are one repeated eigenvalue."""
_DENSE_ROWS = 600
"""Up to this many rows a matrix is solved whole; beyond, by shift-invert Lanczos."""
_STEPS = 400
"""Steps of one Lanczos run at most."""
_SPARE = 4
"""Start vectors more than columns, should some have no part in an eigenspace."""
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71)


def start_vector(size: int, index: int) -> Array:
    """Start vector number ``index`` of the convention."""
    vector: Array = np.modf(np.arange(1, size + 1) * np.sqrt(_prime(index)))[0] - 0.5
    return vector


def smallest(matrix: csc_array, n: int, start: Callable[[int], Array]) -> tuple[Array, Array]:
    """The smallest eigenpairs of a sparse symmetric positive semi-definite matrix, ascending, n of them or more.

    Small matrices are solved whole. In large ones a Krylov space is grown from one start vector after the other, each
    freed from what was found before; it sees one vector of every eigenspace, the projection of its start. So of an
    eigenvalue that is repeated more than n times as many are found as there are start vectors.

    Args:
        matrix: The matrix.
        n: Eigenpairs wanted.
        start: Start vectors by number.
    """
    rows = matrix.shape[0]
    if rows <= _DENSE_ROWS:
        values, vectors = eigh(matrix.toarray())
        return values, vectors
    shift = -1e-4  # the matrix is singular; a little below zero it is not
    solve = splu(csc_array(matrix - shift * identity(rows))).solve
    values, vectors = np.empty(0), np.empty((rows, 0))
    for index in range(n + _SPARE):
        inverse, found = _krylov(solve, start(index), vectors, n)
        more = 1 / inverse + shift
        if len(values) >= n and not (more <= np.sort(values)[n - 1] + EQUAL).any():
            break
        values, vectors = np.concatenate([values, more]), np.column_stack([vectors, found])
    order = np.argsort(values, kind="stable")
    return values[order], vectors[:, order]


def _krylov(solve: Callable[[Array], Array], start: Array, known: Array, n: int) -> tuple[Array, Array]:
    """Lanczos: the largest eigenvalues that a start vector has a part in, once each, with the parts, on the complement
    of known eigenvectors.

    Returns:
        At most n values, descending, and their orthonormal vectors (rows, values).
    """

    def free(vector: Array, basis: Array) -> Array:
        for _ in range(2):  # twice is enough for orthogonality to rounding
            vector = vector - known @ (known.T @ vector)
            vector = vector - basis @ (basis.T @ vector)
        return vector

    basis = np.empty((len(start), min(_STEPS, len(start))), order="F")
    before = np.linalg.norm(start)
    vector = free(start, basis[:, :0])
    norm = np.linalg.norm(vector)
    if norm <= 1e-9 * before:
        return np.empty(0), basis[:, :0]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        step = len(diagonal)
        basis[:, step] = vector / norm
        image = solve(basis[:, step])
        diagonal.append(float(basis[:, step] @ image))
        vector = free(image, basis[:, : step + 1])
        norm = np.linalg.norm(vector)
        ended = norm <= 1e-12 * max(diagonal) or step + 1 == basis.shape[1]
        if ended or step % 8 == 7:
            values, turn = eigh_tridiagonal(np.array(diagonal), np.array(beside))
            best = slice(None, -n - 1, -1)
            if ended or (step >= n and (norm * np.abs(turn[-1, best]) <= 1e-13 * values[best]).all()):
                good = norm * np.abs(turn[-1, best]) <= 1e-9 * values[best]
                return values[best][good], (basis[:, : step + 1] @ turn[:, best])[:, good]
        beside.append(float(norm))


def _prime(index: int) -> float:
    if index < len(_PRIMES):
        return float(_PRIMES[index])
    candidate = _PRIMES[-1]
    found = len(_PRIMES) - 1
    while found < index:
        candidate += 2
        found += all(candidate % divisor for divisor in range(3, int(candidate**0.5) + 1, 2))
    return float(candidate)
