"""Scaling against its definition in double precision."""

from __future__ import annotations

import pytest
import torch
from nowcast_service.nino.scaling import EPSILON, Scale, scale_of, scale_snapshots, scales_of

from .made import history, mlp


@pytest.mark.parametrize(
    ("mean", "spread"), [(0.0, 1.0), (1.0, 1e-5), (-300.0, 1e-3), (0.0, 1e-20), (1e30, 1e28), (2.0, 5.0)]
)
def test_mean_and_unbiased_std_over_elements_and_snapshots(mean, spread):
    draw = torch.Generator().manual_seed(0)
    snapshots = [mean + spread * torch.randn(70_000, 2, generator=draw) for _ in range(3)]
    everything = torch.stack(snapshots).double()
    scale = scale_of(snapshots)
    assert scale.std == pytest.approx(everything.std().item(), rel=1e-6)
    assert scale.mean == pytest.approx(everything.mean().item(), abs=max(1e-9 * spread, abs(mean) * 1e-7))


def test_an_outlying_first_value_costs_no_precision():
    values = torch.cat((torch.tensor([1e6]), torch.randn(100_000, generator=torch.Generator().manual_seed(1))))
    scale = scale_of([values])
    assert scale.std == pytest.approx(values.double().std().item(), rel=1e-6)


def test_there_and_back():
    weights = torch.tensor([1.0, 2.0, 4.0])
    scale = scale_of([weights])
    assert scale.std == pytest.approx((7 / 3) ** 0.5)
    x = scale.apply(weights)
    assert torch.allclose(x, (weights - 7 / 3) / (scale.std + EPSILON))
    # The epsilon is on the way in only: what comes back is short by its share, as the released weights expect.
    assert torch.allclose(scale.invert(x), (weights - 7 / 3) * scale.std / (scale.std + EPSILON) + 7 / 3)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3e7])
def test_a_constant_tensor_has_no_spread_and_an_exact_mean(value):
    scale = scale_of([torch.full((1000,), value)] * 5)
    assert scale.constant
    assert scale.mean == torch.tensor(value).item()


def test_a_single_number_is_constant():
    assert scale_of([torch.tensor(3.0)]) == Scale(3.0, 0.0)


def test_snapshots_of_half_precision_scale_in_float32():
    past = history(mlp(3, 4), dtype=torch.bfloat16)
    scales = scales_of(past)
    scaled = scale_snapshots(past, scales)
    together = torch.stack([snapshot["0.weight"] for snapshot in scaled])
    assert together.dtype == torch.float32
    assert together.mean().item() == pytest.approx(0, abs=1e-6)
    assert together.std().item() == pytest.approx(1, abs=1e-5)
