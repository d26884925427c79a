"""Predictors without a network, against their textbook definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nowcast_proto.errors import HorizonOutOfRange, InvalidCheckpoint, InvalidRequest, InvalidSnapshot
from nowcast_service.history import History
from nowcast_service.predictors import make_predictor
from nowcast_service.predictors.base import ahead

from ..nino.made import history, mlp

SPEC = mlp(3, 4, 2)
BASELINES = ("linear", "lawa", "snoo", "identity")


def _stacked(past, name):
    return torch.stack([snapshot[name].float() for snapshot in past.snapshots])


@pytest.mark.parametrize("n", [2, 3, 5, 8])
@pytest.mark.parametrize("k", [1, 40])
def test_linear_is_the_least_squares_line(n, k):
    past = history(SPEC, n)
    future, state = ahead(make_predictor("linear"), past, k)
    assert state == {}
    for name, found in future.items():
        values = _stacked(past, name).double()
        slope, start = np.polyfit(np.arange(n), values.flatten(1).numpy(), 1)
        wanted = torch.from_numpy(slope * (n - 1 + k) + start).reshape(found.shape)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_lawa_is_the_average_and_identity_the_newest():
    past = history(SPEC)
    for name in SPEC.shapes():
        torch.testing.assert_close(ahead(make_predictor("lawa"), past, 7)[0][name], _stacked(past, name).mean(0))
        assert torch.equal(ahead(make_predictor("identity"), past, 7)[0][name], past.newest(name))


def test_snoo_is_sgd_with_nesterov_momentum_on_displacements():
    snoo = make_predictor("snoo")
    slow = {name: tensor.clone().requires_grad_() for name, tensor in history(SPEC).snapshots[0].items()}
    optimizer = torch.optim.SGD(slow.values(), lr=snoo.lr, momentum=snoo.momentum, nesterov=True)
    state = None
    for turn in range(3):
        past = history(SPEC, seed=turn)
        if turn == 0:
            past = History.of(SPEC, [{n: t.detach().clone() for n, t in slow.items()}, *past.snapshots[1:]])
        for name, tensor in slow.items():
            tensor.grad = tensor.detach() - past.newest(name)
        optimizer.step()
        future, state = ahead(snoo, past, 3, state)
        for name, found in future.items():
            torch.testing.assert_close(found, slow[name].detach(), rtol=1e-5, atol=1e-5)


def test_snoo_does_not_change_the_state_it_was_given():
    snoo, past = make_predictor("snoo"), history(SPEC)
    future, state = snoo.predict(past, 3)
    kept = {part: {name: tensor.clone() for name, tensor in state[part].items()} for part in state}
    future["0.weight"] += 1
    snoo.predict(past, 3, state)
    assert all(torch.equal(state[part][name], kept[part][name]) for part in kept for name in kept[part])


def test_snoo_refuses_the_state_of_another_network():
    snoo = make_predictor("snoo")
    _, state = snoo.predict(history(SPEC), 3)
    with pytest.raises(InvalidSnapshot, match=r"anchor of tensor '0.weight' is of shape \[4, 3\]"):
        snoo.predict(history(mlp(5, 4)), 3, state)
    with pytest.raises(InvalidSnapshot, match=r"velocity of tensor '0.weight' is missing"):
        snoo.predict(history(SPEC), 3, {"anchor": state["anchor"]})


@pytest.mark.parametrize("name", BASELINES)
def test_the_update_scale_scales_the_update(name):
    past = history(SPEC)
    whole, _ = ahead(make_predictor(name), past, 5)
    half, _ = ahead(make_predictor(name), past, 5, update_scale=0.5)
    none, _ = ahead(make_predictor(name), past, 5, update_scale=0.0)
    for tensor in SPEC.shapes():
        newest = past.newest(tensor)
        torch.testing.assert_close(half[tensor] - newest, 0.5 * (whole[tensor] - newest), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(none[tensor], newest)


@pytest.mark.parametrize("name", BASELINES)
def test_contract(name):
    past = history(SPEC, dtype=torch.bfloat16)
    predictor = make_predictor(name)
    assert predictor.name == name
    future, _ = predictor.predict(past, 1)
    assert {n: tuple(t.shape) for n, t in future.items()} == SPEC.shapes()
    assert {tensor.dtype for tensor in future.values()} == {torch.float32}
    for k in (0, -1, 10**7):
        with pytest.raises(HorizonOutOfRange, match=f"k={k}"):
            predictor.predict(past, k)
    with pytest.raises(InvalidSnapshot, match="1 snapshots were given; expected at least 2"):
        predictor.predict(history(SPEC, 1), 1)


@pytest.mark.parametrize("name", BASELINES)
def test_a_tensor_that_never_moved_stays_exactly(name):
    frozen = torch.full((4,), 0.1)
    past = History.of(SPEC, [{**snapshot, "0.bias": frozen} for snapshot in history(SPEC).snapshots])
    assert torch.equal(ahead(make_predictor(name), past, 40)[0]["0.bias"], frozen)


def test_an_update_beyond_float32_is_refused():
    big = [{n: torch.full(s, sign * 3e38) for n, s in SPEC.shapes().items()} for sign in (-1, 1)]
    with pytest.raises(InvalidSnapshot, match=r"'0.weight' is not finite"):
        ahead(make_predictor("linear"), History.of(SPEC, big), 40)


def test_what_cannot_be_made():
    with pytest.raises(InvalidRequest, match="'oracle' is not known"):
        make_predictor("oracle")
    with pytest.raises(InvalidCheckpoint, match="neither a predictor nor a checkpoint"):
        make_predictor()
    with pytest.raises(InvalidRequest, match="update scale nan"):
        ahead(make_predictor("linear"), history(SPEC), 1, update_scale=float("nan"))
    for name in ("nino", "wnn"):
        with pytest.raises(InvalidCheckpoint, match="needs a checkpoint"):
            make_predictor(name)
