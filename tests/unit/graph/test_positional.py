from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nowcast_proto.errors import TooLarge
from nowcast_service.graph import positional, spectrum
from nowcast_service.graph.blocks import Block, EdgeType, NeuralGraph, View
from nowcast_service.graph.positional import (
    NormalisedLaplacian,
    laplacian_eigenvalues,
    layout_digest,
    positional_encoding,
)
from nowcast_service.graph.wiring.build import build_graph

from .golden import GOLDEN, load
from .specs import gpt2, llama, spec_of


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NOWCAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(positional, "_memory", type(positional._memory)())


def explicit(graph: NeuralGraph) -> np.ndarray:
    """The Laplacian as a matrix, edge by edge."""
    adjacency = np.zeros((graph.n_nodes, graph.n_nodes))
    for block in graph.blocks:
        source, target = block.edge_index().numpy()
        adjacency[source, target] = adjacency[target, source] = 1
    np.fill_diagonal(adjacency, 0)
    degree = adjacency.sum(1)
    scale = np.divide(1, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    return np.eye(graph.n_nodes) - scale[:, None] * adjacency * scale


@pytest.mark.skipif(
    not GOLDEN, reason="recorded graphs of the published implementation are in ../shared/golden, which is absent"
)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_eigenvalues_equal_the_published_ones(path):
    case = load(path)
    graph = build_graph(case.spec)
    assert np.abs(laplacian_eigenvalues(graph) - case.arrays["laplacian_eigenvalues"]).max() < 1e-6
    encoding = positional_encoding(graph).double().numpy()
    values = laplacian_eigenvalues(graph, 9)[1:]
    assert np.linalg.norm(explicit(graph) @ encoding - encoding * values, axis=0).max() < 1e-5


@st.composite
def graphs(draw) -> NeuralGraph:
    """Any blocks at all: reversed, overlapping, joined to themselves, parallel, shifted diagonals, loose nodes."""
    n_nodes = draw(st.integers(2, 24))
    blocks = []
    for _ in range(draw(st.integers(1, 6))):
        source, target = draw(st.integers(0, n_nodes - 1)), draw(st.integers(0, n_nodes - 1))
        sources = draw(st.integers(1, n_nodes - source))
        targets = draw(st.integers(1, n_nodes - target))
        diagonal = draw(st.booleans())
        if diagonal:
            sources = targets = min(sources, targets)
        blocks.append(Block("b", EdgeType.LINEAR, source, sources, target, targets, 1.0, diagonal))
    return NeuralGraph(spec_of("sequential", {"w": (1,)}), n_nodes, tuple(blocks))


@given(graphs())
@settings(max_examples=150, deadline=None)
def test_whole_spectrum_and_products_equal_the_explicit_laplacian(graph):
    matrix = explicit(graph)
    laplacian = NormalisedLaplacian(graph)
    vectors = laplacian.eigenvectors(graph.n_nodes)
    values = laplacian.eigenvalues(graph.n_nodes)
    assert np.allclose(values, np.linalg.eigvalsh(matrix), atol=1e-9)
    assert np.allclose(matrix @ vectors, vectors * values, atol=1e-7)
    assert np.allclose(vectors.T @ vectors, np.eye(graph.n_nodes), atol=1e-7)
    probe = np.linspace(-1, 1, 2 * graph.n_nodes).reshape(-1, 2)
    assert np.allclose(laplacian @ probe, matrix @ probe)


def test_large_quotients_are_solved_without_a_dense_matrix_and_miss_no_copy(monkeypatch):
    graph = build_graph(llama(layers=3, width=32, heads=16, kv_heads=4, hidden=40))
    expected = np.linalg.eigvalsh(explicit(graph))[:60]
    assert (np.diff(expected) < 1e-9).sum() > 10  # many repeated ones
    monkeypatch.setattr(spectrum, "_DENSE_ROWS", 0)
    assert np.allclose(laplacian_eigenvalues(graph, 60), expected, atol=1e-9)


def test_a_billion_parameter_llama_without_anything_per_edge():
    graph = build_graph(llama(16, 2048, 32, 8, 8192, 128_256))
    assert graph.n_edges > 1_400_000_000
    encoding = positional_encoding(graph).double().numpy()
    values = laplacian_eigenvalues(graph, 9)[1:]
    residual = NormalisedLaplacian(graph) @ encoding - encoding * values
    assert np.linalg.norm(residual, axis=0).max() < 1e-5
    assert np.allclose(np.linalg.norm(encoding, axis=0), 1, atol=1e-5)


def test_signs_follow_the_convention_and_nothing_is_random():
    graph = build_graph(gpt2())
    first = NormalisedLaplacian(graph).eigenvectors(9)
    assert np.array_equal(first, NormalisedLaplacian(graph).eigenvectors(9))
    for column in first.T:
        leading = np.argmax(np.abs(column) >= np.abs(column).max() * (1 - 1e-6))
        assert column[leading] > 0


def test_columns_of_a_repeated_eigenvalue_reach_every_layer():
    """Nearly all of a small MLP's columns belong to eigenvalue 1; no layer may be left without."""
    spec = spec_of("sequential", {"a.weight": (8, 16), "b.weight": (6, 8), "c.weight": (10, 6)})
    encoding = positional_encoding(build_graph(spec))
    for start, end in ((0, 16), (16, 24), (24, 30), (30, 40)):
        assert bool((encoding[start:end].std(0) > 1e-3).sum() >= 5)


def test_graphs_with_few_nodes_get_columns_of_zeros():
    graph = build_graph(spec_of("sequential", {"a.weight": (2, 2)}))
    encoding = positional_encoding(graph)
    assert encoding.shape == (4, 8)
    assert encoding.dtype == torch.float32
    assert bool((encoding[:, 3:] == 0).all())
    assert bool((encoding[:, :3].norm(dim=0) > 0.99).all())


def test_the_disk_cache_is_used_and_never_trusted(tmp_path, monkeypatch):
    graph = build_graph(gpt2())
    computed = positional_encoding(graph).clone()
    (file,) = (tmp_path / "cache").glob("positions-*.npy")
    positional._memory.clear()
    monkeypatch.setattr(NormalisedLaplacian, "eigenvectors", None)  # computing would fail
    assert torch.equal(positional_encoding(graph), computed)
    monkeypatch.undo()
    monkeypatch.setenv("NOWCAST_CACHE", str(tmp_path / "cache"))
    for damage in (b"", b"not numpy", file.read_bytes()[:200]):
        positional._memory.clear()
        file.write_bytes(damage)
        assert torch.equal(positional_encoding(graph), computed)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NOWCAST_CACHE", str(tmp_path / "file" / "below"))
    positional._memory.clear()
    assert torch.equal(positional_encoding(graph), computed)


def test_the_cache_key_is_the_layout():
    assert layout_digest(build_graph(gpt2())) == layout_digest(build_graph(gpt2()))
    assert layout_digest(build_graph(gpt2(heads=2))) != layout_digest(build_graph(gpt2(heads=3)))
    assert layout_digest(build_graph(gpt2())) != layout_digest(build_graph(gpt2(wiring="faithful")))


def _equal_parts(count: int, arms: int, size: int, *, hub: bool) -> NeuralGraph:
    """``count`` stars, each with arms to ranges of neurons, apart or joined at one node."""
    blocks, node = [], int(hub)
    for number in range(count):
        blocks += [
            Block(f"{number}.{arm}", EdgeType.HEAD, node, 1, node + 1 + arm * size, size, 1.0) for arm in range(arms)
        ]
        if hub:
            blocks.append(Block(f"{number}", EdgeType.HEAD, 0, 1, node, 1, 1.0))
        node += 1 + arms * size
    return NeuralGraph(spec_of("none", {"a": (1,)}), node, tuple(blocks))


@pytest.mark.parametrize(
    ("arms", "size", "hub"), [(1, 1, False), (3, 1, False), (2, 3, False), (2, 1, True)],
    ids=["pairs", "stars", "stars of ranges", "stars at a hub"],
)  # fmt: skip
def test_an_eigenvalue_repeated_a_thousand_times_gives_the_convention_of_the_whole_eigenspace(arms, size, hub):
    laplacian = NormalisedLaplacian(_equal_parts(1000, arms, size, hub=hub))
    vectors = laplacian.eigenvectors(9)
    values = (vectors * (laplacian @ vectors)).sum(0)
    assert np.abs(laplacian @ vectors - vectors * values).max() < 1e-8
    assert np.abs(vectors.T @ vectors - np.eye(9)).max() < 1e-8
    assert np.array_equal(vectors, NormalisedLaplacian(_equal_parts(1000, arms, size, hub=hub)).eigenvectors(9))
    # A graph small enough to be solved whole has the same convention; and it is the same with the bound out of the way.
    small = _equal_parts(250 // (1 + arms), arms, size, hub=hub)
    whole = NormalisedLaplacian(small).eigenvectors(9)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(spectrum, "_DENSE_ROWS", 10)
        grown = NormalisedLaplacian(small).eigenvectors(9)
    assert np.abs(whole - grown).max() < 1e-7


def test_neurons_cut_into_too_many_kinds_are_refused():
    shift = Block("shift", EdgeType.RESIDUAL, 0, 10**9, 1, 10**9, 1.0, diagonal=True)
    with pytest.raises(TooLarge, match="kinds"):
        positional_encoding(NeuralGraph(spec_of("none", {"a": (1,)}), 10**9 + 1, (shift,)))
    singles = tuple(Block(str(n), EdgeType.HEAD, n, 1, 10_000, 1, 1.0) for n in range(10_000))
    everyone = Block("all", EdgeType.LINEAR, 0, 10_000, 0, 10_000, View("a", 0, 10_000, 1))
    with pytest.raises(TooLarge, match="pairs"):
        positional_encoding(NeuralGraph(spec_of("none", {"a": (10**8,)}), 10_001, (*singles, everyone)))
