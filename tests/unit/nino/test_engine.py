"""The exact engine against the reference twin, and what it promises about memory, threads and precision."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nowcast_proto.errors import (
    HorizonOutOfRange,
    InvalidCheckpoint,
    InvalidRequest,
    InvalidSnapshot,
    TooLarge,
)
from nowcast_service.graph.blocks import NeuralGraph
from nowcast_service.history import History
from nowcast_service.nino.checkpoint import Checkpoint
from nowcast_service.nino.exact import plan as engine_plan
from nowcast_service.nino.exact.engine import ExactEngine
from nowcast_service.nino.model import NiNoTwin
from torch import Tensor

from .random_graphs import (
    by_twin,
    random_checkpoint,
    random_graph,
    random_history,
    random_positions,
    relative_error,
)

PARITY = 1e-4
VARIANTS: dict[str, dict[str, object]] = {
    "three layers": {},
    "one layer": {"layers": 1},
    "one layer, edges updated last": {"layers": 1, "final_edge_update": True},
    "two layers": {"layers": 2},
    "four layers": {"layers": 4},
    "four layers, edges updated last": {"layers": 4, "final_edge_update": True},
    "towers": {"towers": 4},
    "two input maps": {"input_layer": "mlp"},
    "no token positions": {"token_positions": False},
    "token positions only": {"lpe": 0},
    "no edge types": {"edge_types": 0},
    "relu": {"act": "relu"},
    "gelu": {"act": "gelu"},
    "tanh": {"act": "tanh"},
    "not residual": {"residual": False},
    "narrower than its inputs": {"hidden": 8, "layers": 4},
    "half the update": {"update_scale": 0.5},
}


def smallest_budget(checkpoint: Checkpoint, graph: NeuralGraph, horizons: int = 1) -> int:
    with pytest.raises(TooLarge) as caught:
        ExactEngine(checkpoint, memory_budget=1).plan(graph, horizons)
    return int(caught.value.detail["needed"])


def update_difference(a: dict[str, Tensor], b: dict[str, Tensor], history: History) -> float:
    """Norm of the difference of two predictions against the norm of the update, all parameters together."""
    difference = torch.cat([(a[n] - b[n]).flatten() for n in a]).norm()
    return float(difference / torch.cat([(a[n] - history.newest(n)).flatten() for n in a]).norm())


@pytest.fixture
def refuse_twin(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, falling back to the reference twin is a failure."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the engine fell back to the twin")

    return lambda: monkeypatch.setattr(NiNoTwin, "forward", refuse)


@pytest.mark.parametrize(("seed", "variant"), list(enumerate(VARIANTS)))
def test_agrees_with_the_twin_under_a_memory_cap(seed: int, variant: str, refuse_twin: Callable[[], None]) -> None:
    graph = random_graph(seed)
    history = random_history(graph.spec, seed)
    positions = random_positions(graph)
    checkpoint = random_checkpoint(seed, **VARIANTS[variant])
    expected = by_twin(checkpoint, graph, history, [1, 7], positions)
    refuse_twin()
    for budget in (1 << 30, smallest_budget(checkpoint, graph, 2)):
        engine = ExactEngine(checkpoint, memory_budget=budget, threads=2)
        result = engine.predict(graph, history, [1, 7], positions=positions)
        assert engine.plan(graph, 2).bytes <= budget
        for got, want in zip(result, expected, strict=True):
            assert relative_error(got, want, history) < PARITY


def test_agrees_with_the_twin_at_full_width(refuse_twin: Callable[[], None]) -> None:
    graph = random_graph(5, nodes=700, largest=300, blocks=4)
    history, positions = random_history(graph.spec), random_positions(graph)
    checkpoint = random_checkpoint(3, hidden=128)
    expected = by_twin(checkpoint, graph, history, [12], positions)
    refuse_twin()
    result = ExactEngine(checkpoint, threads=2).predict(graph, history, [12], positions=positions)
    assert relative_error(result[0], expected[0], history) < PARITY


def test_random_graphs_hold_what_they_are_for() -> None:
    graph = random_graph(0)
    plan = ExactEngine(random_checkpoint()).plan(graph)
    assert graph.features == 9
    assert plan.dense
    assert plan.groups
    assert any(block.features == 9 for block in plan.dense)
    assert any(block.name == "embedding" for block in plan.dense)
    assert any(block.name.endswith(".back") for block in graph.blocks)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_result_does_not_depend_on_tiles_threads_or_budget(threads: int, share: float) -> None:
    graph = random_graph(2, blocks=2, largest=200)
    history, positions = random_history(graph.spec), random_positions(graph)
    checkpoint = random_checkpoint(hidden=32)
    reference = ExactEngine(checkpoint, threads=1).predict(graph, history, [3], positions=positions)[0]
    least = smallest_budget(checkpoint, graph)
    most = ExactEngine(checkpoint, threads=threads).plan(graph).bytes
    engine = ExactEngine(checkpoint, threads=threads, memory_budget=int(least + share * (most - least)))
    result = engine.predict(graph, history, [3], positions=positions)[0]
    assert update_difference(reference, result, history) < 1e-5


def test_repeats_to_the_bit() -> None:
    graph = random_graph(3, blocks=2, largest=300)
    history, positions = random_history(graph.spec), random_positions(graph)
    engine = ExactEngine(random_checkpoint(hidden=32), threads=3)
    first, second = (engine.predict(graph, history, [3], positions=positions)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("region", [1 << 8, 1 << 12])
def test_regions_cover_every_edge_once(monkeypatch: pytest.MonkeyPatch, region: int) -> None:
    monkeypatch.setattr(engine_plan, "_REGION", region)
    monkeypatch.setattr(engine_plan, "_RUN", 16)
    graph = random_graph(4, blocks=3, largest=300)
    checkpoint = random_checkpoint()
    plan = ExactEngine(checkpoint, threads=3).plan(graph)
    cut = 0
    for block in plan.dense:
        seen = torch.zeros(block.n_sources, block.n_targets)
        for part in plan.regions(block):
            seen[part.i0 : part.i1, part.j0 : part.j1] += 1
            cut += 1
        assert bool((seen == 1).all())
    assert cut > len(plan.dense)
    history, positions = random_history(graph.spec), random_positions(graph)
    expected = by_twin(checkpoint, graph, history, [2], positions)[0]
    result = ExactEngine(checkpoint, threads=3).predict(graph, history, [2], positions=positions)[0]
    assert relative_error(result, expected, history) < PARITY


def test_many_horizons_equal_single_ones() -> None:
    graph = random_graph(1)
    history, positions = random_history(graph.spec), random_positions(graph)
    engine = ExactEngine(random_checkpoint())
    many = engine.predict(graph, history, [12, 1, 5], positions=positions)
    for k, result in zip([12, 1, 5], many, strict=True):
        single = engine.predict(graph, history, [k], positions=positions)[0]
        assert update_difference(single, result, history) < 1e-6


def test_results_are_parameters_of_the_spec() -> None:
    graph = random_graph(1)
    history = random_history(graph.spec)
    result = ExactEngine(random_checkpoint()).predict(graph, history, [2], positions=random_positions(graph))[0]
    assert {name: tuple(t.shape) for name, t in result.items()} == graph.spec.shapes()
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in result.values())
    assert torch.equal(result["left"], history.newest("left"))  # no block carries it
    assert result["left"].data_ptr() != history.newest("left").data_ptr()
    assert torch.equal(result["still"], history.newest("still"))  # no variance
    assert not torch.equal(result["norm"], history.newest("norm"))
    assert all(bool(t.isfinite().all()) for t in result.values())


def test_snapshots_are_left_alone() -> None:
    graph = random_graph(1)
    history = random_history(graph.spec)
    before = [{name: t.clone() for name, t in s.items()} for s in history.snapshots]
    ExactEngine(random_checkpoint()).predict(graph, history, [2], positions=random_positions(graph))
    for kept, snapshot in zip(before, history.snapshots, strict=True):
        assert all(torch.equal(kept[name], snapshot[name]) for name in kept)


def test_history_in_a_memory_map(tmp_path: Path) -> None:
    graph = random_graph(1)
    history, positions = random_history(graph.spec), random_positions(graph)
    mapped = []
    for number, snapshot in enumerate(history.snapshots):
        flat = torch.cat([t.flatten() for t in snapshot.values()])
        path = tmp_path / f"{number}.bin"
        path.write_bytes(flat.numpy().tobytes())
        whole = torch.from_file(str(path), shared=False, size=flat.numel(), dtype=torch.float32)
        parts = whole.split([t.numel() for t in snapshot.values()])
        mapped.append({name: p.view(t.shape) for (name, t), p in zip(snapshot.items(), parts, strict=True)})
    engine = ExactEngine(random_checkpoint())
    expected = engine.predict(graph, history, [2], positions=positions)[0]
    result = engine.predict(graph, History.of(graph.spec, mapped), [2], positions=positions)[0]
    assert all(torch.equal(expected[name], result[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_snapshots_are_read_as_they_are(dtype: torch.dtype) -> None:
    graph = random_graph(1)
    history, positions = random_history(graph.spec), random_positions(graph)
    half = [{name: t.to(dtype) for name, t in s.items()} for s in history.snapshots]
    full = [{name: t.float() for name, t in s.items()} for s in half]
    engine = ExactEngine(random_checkpoint())
    expected = engine.predict(graph, History.of(graph.spec, full), [2], positions=positions)[0]
    result = engine.predict(graph, History.of(graph.spec, half), [2], positions=positions)[0]
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-6, atol=1e-7)


def test_bf16_products_cost_accuracy_and_no_more_than_that() -> None:
    graph = random_graph(1)
    history, positions = random_history(graph.spec), random_positions(graph)
    checkpoint = random_checkpoint(hidden=64)
    full = ExactEngine(checkpoint).predict(graph, history, [2], positions=positions)[0]
    half = ExactEngine(checkpoint, precision="bf16").predict(graph, history, [2], positions=positions)[0]
    assert 1e-5 < update_difference(full, half, history) < 3e-2


def test_tf32_is_float32_on_a_cpu() -> None:
    graph = random_graph(1)
    history, positions = random_history(graph.spec), random_positions(graph)
    checkpoint = random_checkpoint()
    full = ExactEngine(checkpoint).predict(graph, history, [2], positions=positions)[0]
    tf32 = ExactEngine(checkpoint, precision="tf32").predict(graph, history, [2], positions=positions)[0]
    assert all(torch.equal(full[name], tf32[name]) for name in full)


def test_update_scale_scales_the_update() -> None:
    graph = random_graph(1)
    history, positions = random_history(graph.spec), random_positions(graph)
    engine = ExactEngine(random_checkpoint())
    whole = engine.predict(graph, history, [2], positions=positions)[0]
    half = engine.predict(graph, history, [2], positions=positions, update_scale=0.5)[0]
    halved = {name: history.newest(name) + 0.5 * (t - history.newest(name)) for name, t in whole.items()}
    assert update_difference(halved, half, history) < 1e-4  # the epsilon of the scaling is not scaled


def test_progress_and_timings() -> None:
    graph = random_graph(1)
    calls: list[tuple[int, int]] = []
    timings: dict[str, float] = {}
    ExactEngine(random_checkpoint(), threads=2).predict(
        graph,
        random_history(graph.spec),
        [2],
        positions=random_positions(graph),
        progress=lambda done, total: calls.append((done, total)),
        timings=timings,
    )
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert calls[-1] == (3 * graph.n_edges, 3 * graph.n_edges)
    assert {"scale", "nodes", "convolution 1", "convolution 2", "output"} <= set(timings)


def test_threads_of_the_process_are_put_back() -> None:
    graph = random_graph(1)
    history, positions = random_history(graph.spec), random_positions(graph)
    before = torch.get_num_threads()
    engine = ExactEngine(random_checkpoint(), threads=2)
    engine.predict(graph, history, [2], positions=positions)
    assert torch.get_num_threads() == before

    def fail(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        engine.predict(graph, history, [2], positions=positions, progress=fail)
    assert torch.get_num_threads() == before


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ks", [[], [0], [3, 13], [-1]])
def test_refuses_horizons_it_was_not_trained_for(ks: list[int]) -> None:
    graph = random_graph(0)
    with pytest.raises(HorizonOutOfRange) as caught:
        ExactEngine(random_checkpoint()).predict(graph, random_history(graph.spec), ks)
    assert "1 to 12" in str(caught.value)


def test_refuses_another_number_of_snapshots() -> None:
    graph = random_graph(0)
    with pytest.raises(InvalidSnapshot, match="4 snapshots; expected 5"):
        ExactEngine(random_checkpoint()).predict(graph, random_history(graph.spec, length=4), [1])


def test_refuses_another_architecture() -> None:
    with pytest.raises(InvalidSnapshot, match="not of the architecture"):
        ExactEngine(random_checkpoint()).predict(random_graph(0), random_history(random_graph(1).spec), [1])


def test_refuses_kernels_the_checkpoint_has_no_inputs_for() -> None:
    graph = random_graph(0)
    with pytest.raises(InvalidCheckpoint, match="9 kernel positions; expected at most 4"):
        ExactEngine(random_checkpoint(max_features=4)).predict(graph, random_history(graph.spec), [1])


def test_refuses_a_vocabulary_larger_than_its_embedding() -> None:
    graph = random_graph(0)
    with pytest.raises(InvalidCheckpoint, match=f"5 tokens; expected at least {graph.n_tokens}"):
        ExactEngine(random_checkpoint(vocab_size=5)).predict(graph, random_history(graph.spec), [1])


@pytest.mark.parametrize("shape", [(399, 8), (400, 7), (400,)])
def test_refuses_positions_of_another_shape(shape: tuple[int, ...]) -> None:
    graph = random_graph(0)
    with pytest.raises(InvalidRequest, match="positions have shape"):
        ExactEngine(random_checkpoint()).predict(graph, random_history(graph.spec), [1], positions=torch.zeros(shape))


def test_refuses_edgewise_networks() -> None:
    checkpoint = random_checkpoint(gnn=False)
    assert ExactEngine.supports(checkpoint.config) is not None
    with pytest.raises(InvalidCheckpoint, match="edge-wise"):
        ExactEngine(checkpoint)


@pytest.mark.parametrize("options", [{"precision": "int4"}, {"threads": 0}, {"memory_budget": 0}])
def test_refuses_options_without_meaning(options: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        ExactEngine(random_checkpoint(), **options)  # type: ignore[arg-type]


def test_a_budget_that_is_too_small_says_what_is_needed() -> None:
    graph = random_graph(0)
    history, positions = random_history(graph.spec), random_positions(graph)
    checkpoint = random_checkpoint()
    needed = smallest_budget(checkpoint, graph)
    with pytest.raises(TooLarge, match=f"at least {needed} bytes"):
        ExactEngine(checkpoint, memory_budget=needed - 1).predict(graph, history, [1], positions=positions)
    ExactEngine(checkpoint, memory_budget=needed).predict(graph, history, [1], positions=positions)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("budget", [8 << 20, 64 << 20])
def test_memory_stays_within_the_budget(budget: int) -> None:
    """In a process of its own, by the kernel's count of its peak; a vector per edge would take 480 MB here."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.nino.engine_memory", str(budget)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown, results = map(int, done.stdout.split())
    slack = 6 << 20  # allocator and matrix library: buffers for packing, freed memory not yet returned
    assert grown < budget + results + slack


# -- a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("snapshots", ["cpu", "cuda"])
@pytest.mark.parametrize(("precision", "bound"), [("float32", PARITY), ("tf32", 1e-2), ("bf16", 5e-2)])
def test_a_gpu_agrees_with_the_twin(snapshots: str, precision: str, bound: float) -> None:
    graph = random_graph(2, nodes=900, largest=400)
    history, positions = random_history(graph.spec), random_positions(graph)
    checkpoint = random_checkpoint(hidden=64)
    expected = by_twin(checkpoint, graph, history, [1, 9], positions)
    moved = History(graph.spec, tuple({n: t.to(snapshots) for n, t in s.items()} for s in history.snapshots))
    engine = ExactEngine(checkpoint, device="cuda", precision=precision)  # type: ignore[arg-type]
    for got, want in zip(engine.predict(graph, moved, [1, 9], positions=positions), expected, strict=True):
        assert all(t.device.type == snapshots for t in got.values())
        assert (
            update_difference({n: t.cpu() for n, t in got.items()}, {n: t.float() for n, t in want.items()}, history)
            < bound
        )
