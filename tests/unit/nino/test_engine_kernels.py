"""The compiled kernel against PyTorch, and the engine where there is none."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numba
import pytest
import torch
from nowcast_service.nino.exact import network
from nowcast_service.nino.exact.engine import ExactEngine
from numba.core.caching import CacheImpl
from torch.nn.functional import silu

from .random_graphs import by_twin, random_checkpoint, random_graph, random_history, random_positions, relative_error

KERNELS = "nowcast_service.nino.exact.kernels"


def test_silu_over_all_its_range() -> None:
    from nowcast_service.nino.exact.kernels import add_silu

    x = torch.cat(
        [torch.linspace(-80, 80, 1_000_001), torch.logspace(-30, 30, 10_000), -torch.logspace(-30, 1.9, 10_000)]
    )
    nothing = torch.zeros(1, len(x)).numpy()
    got = x.clone()
    add_silu(got.numpy()[None, None], nothing, nothing)
    exact = silu(x.double())
    # exp(-x) of a large -x is as wrong as its rounded argument; the activation is all but zero there.
    bound = 2e-7 * (1 + x.double().clamp(max=0).abs()) * exact.abs()
    assert bool(((got - exact).abs() <= bound + 1e-37).all())


def test_silu_of_what_is_not_a_number_or_out_of_range() -> None:
    from nowcast_service.nino.exact.kernels import add_silu

    x = torch.tensor([float("nan"), float("inf"), 1e38, 500.0, 0.0, -0.0, -90.0, -500.0, -1e30])
    nothing = torch.zeros(1, len(x)).numpy()
    got = x.clone()
    add_silu(got.numpy()[None, None], nothing, nothing)
    torch.testing.assert_close(got, silu(x), rtol=1e-6, atol=1e-7, equal_nan=True)
    low = torch.tensor([[[float("-inf")]]])  # PyTorch: not a number
    add_silu(low.numpy(), nothing[:, :1].copy(), nothing[:, :1].copy())
    assert not bool(low.isfinite().any())


@pytest.mark.parametrize("width", [1, 2, 7, 8, 33, 128])
@pytest.mark.parametrize(("sources", "targets"), [(5, 3), (1, 3), (5, 1), (1, 1)])
def test_adds_the_terms_of_both_ends(width: int, sources: int, targets: int) -> None:
    from nowcast_service.nino.exact.kernels import add_silu

    draw = torch.Generator().manual_seed(width)
    f, s, t = (torch.randn(shape, generator=draw) for shape in ((5, 3, width), (sources, width), (targets, width)))
    expected = silu(f + s[:, None] + t)
    add_silu(f.numpy(), s.numpy(), t.numpy())
    torch.testing.assert_close(f, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("act", ["silu", "relu"])
def test_engine_with_and_without_the_kernel(monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    graph = random_graph(2, blocks=2, largest=200)
    history, positions = random_history(graph.spec), random_positions(graph)
    checkpoint = random_checkpoint(hidden=24, act=act)
    expected = by_twin(checkpoint, graph, history, [3], positions)[0]
    used = 0

    def counted(f: object, s: object, t: object) -> None:
        nonlocal used
        used += 1
        kernel(f, s, t)

    kernel = network.compiled_kernel()
    assert kernel is not None
    for replacement in (counted, None):
        monkeypatch.setattr(network, "compiled_kernel", lambda replacement=replacement: replacement)
        result = ExactEngine(checkpoint, threads=2).predict(graph, history, [3], positions=positions)[0]
        assert relative_error(result, expected, history) < 1e-4
    assert (used > 0) == (act == "silu")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The kernel is loaded anew, keeping what it compiles in a folder of its own."""
    network.compiled_kernel()  # the real one, to be put back
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, KERNELS)
    network.compiled_kernel.cache_clear()
    yield tmp_path / "cache"
    monkeypatch.undo()
    network.compiled_kernel.cache_clear()


def works() -> bool:
    kernel = network.compiled_kernel()
    f, one = torch.ones(1, 1, 4), torch.ones(1, 4).numpy()
    assert kernel is not None
    kernel(f.numpy(), one, one)
    return bool(torch.allclose(f, silu(torch.full((4,), 3.0))))


@pytest.mark.parametrize("reason", ["not installed", "told not to compile"])
def test_without_numba_it_says_so_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fresh: Path, reason: str
) -> None:
    if reason == "not installed":
        monkeypatch.setitem(sys.modules, "numba", None)
    else:
        monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with caplog.at_level(logging.DEBUG, logger=network.__name__):
        for _ in range(2):
            assert ExactEngine(random_checkpoint()).network.add_silu is None
    assert caplog.text.count("no compiled kernel") == 1


def test_what_was_compiled_is_kept_and_a_broken_copy_does_no_harm(fresh: Path) -> None:
    assert works()
    kept = list(fresh.rglob("*add_silu*.nb?"))
    assert {path.suffix for path in kept} == {".nbi", ".nbc"}
    for path in kept:
        path.write_bytes(path.read_bytes()[:100])
    del sys.modules[KERNELS]
    network.compiled_kernel.cache_clear()
    assert works()


def test_compiles_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    fresh.write_text("")  # a file: no folder can be made below it, by nobody
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(fresh / "below"))
    monkeypatch.setattr(CacheImpl, "_locator_classes", CacheImpl._locator_classes[:1])  # nor beside the module
    assert works()
