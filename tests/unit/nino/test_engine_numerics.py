"""The exact engine's numbers, whatever the process has set and however large tiles are."""

from __future__ import annotations

import pytest
import torch
from nowcast_service.nino.exact import engine, products
from nowcast_service.nino.exact.engine import ExactEngine
from nowcast_service.nino.exact.listed import add_rows, add_sorted
from nowcast_service.nino.exact.plan import ON_CPU, ON_DEVICE, Plan
from nowcast_service.nino.exact.products import Precision
from nowcast_service.nino.exact.stream import staged
from torch import Tensor

from .random_graphs import (
    by_twin,
    random_checkpoint,
    random_graph,
    random_history,
    random_positions,
    relative_error,
)


@pytest.mark.parametrize("input_layer", ["linear", "mlp"])
def test_bf16_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch, input_layer: str) -> None:
    """Every weight that meets hidden vectors comes rounded; PyTorch multiplies bfloat16 on any CPU, if slowly."""
    monkeypatch.setattr(products, "multiplies_bf16", lambda: True)
    graph = random_graph(11, blocks=2, largest=60)
    history, positions = random_history(graph.spec), random_positions(graph)
    checkpoint = random_checkpoint(input_layer=input_layer)
    engine = ExactEngine(checkpoint, precision="bf16")
    assert [weight.dtype for weight in engine.network.level_weights[1:]] == [torch.bfloat16] * (
        len(engine.network.level_weights) - 1
    )
    half = engine.predict(graph, history, [2], positions=positions)[0]
    assert relative_error(half, by_twin(checkpoint, graph, history, [2], positions)[0], history) < 5e-2


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_callers_autocast_changes_nothing(precision: Precision) -> None:
    graph = random_graph(12, blocks=2, largest=60)
    history, positions = random_history(graph.spec), random_positions(graph)
    checkpoint = random_checkpoint()

    def predict() -> dict[str, Tensor]:
        engine = ExactEngine(checkpoint, precision=precision, threads=1)
        return engine.predict(graph, history, [2], positions=positions)[0]

    expected = predict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = predict()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_process_keeps_its_own_precision() -> None:
    """Products are in float32 while the engine works, whatever the process has set, and that is put back."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    graph = random_graph(13, blocks=2, largest=60)
    seen: list[str] = []
    try:
        setting.fp32_precision = "bf16"
        ExactEngine(random_checkpoint()).predict(
            graph,
            random_history(graph.spec),
            [1],
            positions=random_positions(graph),
            progress=lambda done, total: seen.append(setting.fp32_precision),
        )
        assert set(seen) == {"ieee"}
        assert setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = before


def test_snapshots_of_several_types_keep_their_digits_on_the_way_to_a_device() -> None:
    fine = torch.tensor([[1.0 + 2**-20, 3.0]])
    views = [fine.bfloat16(), fine, fine.half()]
    stage, host = staged(views, None, pinned=False)
    assert [torch.equal(held, view.float()) for held, view in zip(host, views, strict=True)] == [True] * 3
    again, _ = staged(views, stage, pinned=False)
    assert again is stage
    wider, _ = staged([fine.double()], stage, pinned=False)
    assert wider.dtype == torch.float64


def test_a_devices_tiles_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = random_graph(14, blocks=3, nodes=1500, largest=700)
    history, positions = random_history(graph.spec), random_positions(graph)
    checkpoint = random_checkpoint()

    def predict() -> tuple[Plan, dict[str, Tensor]]:
        made = ExactEngine(checkpoint, threads=1)
        return made.plan(graph), made.predict(graph, history, [2], positions=positions)[0]

    plan, expected = predict()
    assert plan.tiling == ON_CPU
    monkeypatch.setattr(engine, "ON_CPU", ON_DEVICE)
    wide, found = predict()
    assert max(part.edges for block in wide.dense for part in wide.regions(block)) > max(
        part.edges for block in plan.dense for part in plan.regions(block)
    )
    assert relative_error(found, expected, history) < 1e-5


def test_sums_in_a_fixed_order() -> None:
    """What devices do whose own scatter adds in another order every time."""
    torch.manual_seed(0)
    index, rows = torch.randint(0, 40, (3000,)), torch.randn(3000, 8)
    totals = [torch.ones(50, 8) for _ in range(3)]
    add_rows(totals[0], index, rows)
    for total in totals[1:]:
        add_sorted(total, index, rows)
    assert torch.equal(totals[1], totals[2])
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-5, atol=1e-4)
    assert torch.equal(totals[1][40:], torch.ones(10, 8))
