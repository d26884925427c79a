"""An average of the weights beside a training: for evaluation and saving, never for training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nowcast_client.errors import AttachError
from torch import nn

from ..ecosystem.loops import Watched, digits, equal, network, step, weights
from .service import linear


def averaging(span: int, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer, Watched]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return model, optimizer, Watched(model, optimizer, average=span, **settings)


def test_it_is_the_exponential_average_and_what_was_there_comes_back() -> None:
    model, optimizer, watched = averaging(5, mode="shadow")
    data, seen = digits(), []
    for _ in range(30):
        step(model, optimizer, data)
        seen.append(weights(model))
    expected = seen[0]
    for number, one in enumerate(seen[1:], 2):
        share = max(1 / 5, 1 / number)
        expected = {name: torch.lerp(mean, one[name], share) for name, mean in expected.items()}
    with watched.handle.averaged():
        inside = weights(model)
    assert all(torch.allclose(inside[name], expected[name], atol=1e-6) for name in inside)
    assert not equal(inside, seen[-1])
    assert equal(weights(model), seen[-1])


def test_an_exception_inside_leaves_the_live_weights() -> None:
    model, optimizer, watched = averaging(5)
    data = digits()
    for _ in range(7):
        step(model, optimizer, data)
    live = weights(model)
    inside: dict[str, torch.Tensor] = {}

    def evaluate() -> None:
        with watched.handle.averaged():
            inside.update(weights(model))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate()
    assert not equal(inside, live)
    assert equal(weights(model), live)


def test_training_goes_on_as_if_nobody_had_looked() -> None:
    """Snapshots, patches and verdicts too: a look is no write between two steps."""
    looked, alone = averaging(5), averaging(5)
    for model, optimizer, watched in (looked, alone):
        data = digits()
        for number in range(50):
            step(model, optimizer, data, watched.handle)
            if watched is looked[2] and number % 3 == 0:
                with watched.handle.averaged():
                    model(next(digits())[0])
    assert equal(weights(looked[0]), weights(alone[0]))
    assert looked[2].steps("patched") == alone[2].steps("patched") == [20, 40]


def test_it_goes_on_after_nowcasting_was_turned_off_and_begins_anew_after_a_rollback() -> None:
    model, optimizer, watched = averaging(1000, predict=linear)
    data = digits()
    for _ in range(10):
        step(model, optimizer, data)
    watched.handle._nowcasting.patcher.save(state=True)
    watched.handle._nowcasting.patcher.undo()
    with pytest.warns(RuntimeWarning, match="for this test"):
        watched.handle._nowcasting.turn_off("for this test")
    seen = []
    for _ in range(2):
        step(model, optimizer, data)
        seen.append(weights(model))
    with watched.handle.averaged():
        inside = weights(model)
    assert all(torch.allclose(inside[name], (seen[0][name] + seen[1][name]) / 2, atol=1e-7) for name in inside)


def test_buffers_are_averaged_and_half_precision_too() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)).to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer, average=10, mode="off")
    for x, y in (next(digits()) for _ in range(4)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.to(torch.bfloat16)), y).backward()
        optimizer.step()
    live = copy.deepcopy(model.state_dict())
    with watched.handle.averaged():
        assert not torch.equal(model[1].running_mean, live["1.running_mean"])
        assert model[1].num_batches_tracked == 4
        assert model[0].weight.dtype == torch.bfloat16
    assert all(torch.equal(tensor, live[name]) for name, tensor in model.state_dict().items())


def test_without_one_it_says_how_to_keep_it() -> None:
    model = network()
    watched = Watched(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(AttachError, match="average=STEPS"), watched.handle.averaged():
        pass
    with pytest.raises(AttachError, match="average"):
        Watched(model, torch.optim.AdamW(model.parameters()), average=0)
