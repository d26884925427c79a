"""The corners where weights have copies: masters, averages and statistics follow a patch, or it is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from nowcast_client.errors import AttachError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from .loops import Watched, backwards, digits, equal, network, small, step, steps, weights


def test_half_precision_with_float32_masters_beside_it_is_refused() -> None:
    model = network().bfloat16()
    masters = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
    with pytest.raises(AttachError, match="half-precision"):
        Watched(model, torch.optim.AdamW([*masters, *model.parameters()], lr=1e-3))
    with pytest.raises(AttachError, match="holds none"):
        Watched(model, torch.optim.AdamW(masters, lr=1e-3))


class Masters(torch.optim.SGD):
    """Steps float32 copies that it keeps in its state, as optimizers for half-precision models do."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    master = state.setdefault("whatever_it_is_called", parameter.float().clone())
                    master -= group["lr"] * parameter.grad.float()
                    parameter.copy_(master)


def test_masters_in_an_optimizer_s_state_are_noticed() -> None:
    model = network().bfloat16()
    optimizer = Masters(model.parameters(), lr=1e-2)
    watched = Watched(model, optimizer)
    data = ((x.bfloat16(), y) for x, y in digits())
    with pytest.warns(RuntimeWarning, match="nowcasting is off"):
        steps(20, model, optimizer, data)
    assert watched.handle.mode == "off"
    assert "second copy of the weights (state 'whatever_it_is_called')" in watched.reasons("off")
    assert not watched.steps("patched")


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta"])
def test_moments_are_not_taken_for_weights(name: str) -> None:
    model = network()
    extra = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3, **extra)
    watched = Watched(model, optimizer, mode="on")
    data = digits()
    for _ in range(21):
        step(model, optimizer, data)
    assert watched.steps("patched") == [20]


@pytest.mark.parametrize("predict", [small, backwards])
def test_schedule_free_moves_as_a_whole(predict: Any) -> None:
    """Both of its sequences and their average move by the change of the visible one; a rollback brings all back."""
    from schedulefree import AdamWScheduleFree

    model = network()
    optimizer = AdamWScheduleFree(model.parameters(), lr=1e-3)
    optimizer.train()
    watched = Watched(model, optimizer, predict, mode="on", acts="when_told", trial=predict is backwards, period=30)
    data = digits()

    def average() -> dict[str, Tensor]:
        optimizer.eval()
        found = weights(model)
        optimizer.train()
        return found

    for number in range(1, 31):
        loss = step(model, optimizer, data)
        watched.handle.observe(loss, step=number - 1)
        if number < 30:
            watched.handle.act()
    visible, averaged = weights(model), average()
    watched.handle.act()
    assert watched.steps("patched") == [30]
    for name, weight in weights(model).items():
        change = weight - visible[name]
        assert change.abs().max() > 1e-4
        torch.testing.assert_close(average()[name] - averaged[name], change, atol=1e-5, rtol=1e-3)
    if predict is backwards:
        for number in range(31, 41):
            watched.handle.observe(step(model, optimizer, data), step=number - 1)
            watched.handle.act()
        assert watched.steps("rolled_back") == [40]
        torch.testing.assert_close(average(), averaged, atol=1e-5, rtol=1e-3)


def test_an_averaging_optimizer_s_average_follows() -> None:
    model = network()
    optimizer = torch.optim.ASGD(model.parameters(), lr=1e-2)
    watched = Watched(model, optimizer, acts="when_told")
    data = digits()
    for _ in range(19):
        step(model, optimizer, data)
        watched.handle.act()
    step(model, optimizer, data)
    visible = weights(model)
    averaged = {name: optimizer.state[p]["ax"].clone() for name, p in model.named_parameters()}
    watched.handle.act()
    assert watched.steps("patched") == [20]
    for name, parameter in model.named_parameters():
        change = parameter.detach() - visible[name]
        torch.testing.assert_close(optimizer.state[parameter]["ax"] - averaged[name], change, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("predict", [small, backwards])
def test_a_moving_average_follows_a_patch_and_a_rollback(predict: Any) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    watched = Watched(model, optimizer, predict, copies=[ema], acts="when_told", trial=predict is backwards, period=30)
    data = digits()
    for number in range(1, 31):
        watched.handle.observe(step(model, optimizer, data), step=number - 1)
        ema.update_parameters(model)
        if number < 30:
            watched.handle.act()
    visible, averaged = weights(model), weights(ema.module)
    watched.handle.act()
    assert watched.steps("patched") == [30]
    for name, weight in weights(model).items():
        torch.testing.assert_close(
            weights(ema.module)[name] - averaged[name], weight - visible[name], atol=1e-6, rtol=1e-3
        )
    if predict is backwards:
        for number in range(31, 41):
            watched.handle.observe(step(model, optimizer, data), step=number - 1)
            watched.handle.act()
        assert watched.steps("rolled_back") == [40]
        assert equal(weights(ema.module), averaged)


def test_a_copy_of_another_network_is_refused() -> None:
    model = network()
    with pytest.raises(AttachError, match="the copy"):
        Watched(model, torch.optim.SGD(model.parameters(), lr=1e-2), copies=[nn.Linear(3, 3)])


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))


def test_statistics_are_refreshed_after_a_patch() -> None:
    """The running mean after the patch is that of the patched weights, not of the older ones."""
    model = normalised()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = [x for x, _ in itertools.islice(digits(), 4)]
    wanted: list[Tensor] = []

    def refresh() -> None:
        update_bn(loader, model)
        with torch.no_grad():
            wanted.append(torch.stack([model[0](x).mean(0) for x in loader]).mean(0))

    watched = Watched(model, optimizer, refresh=refresh)
    data = digits()
    for _ in range(20):
        step(model, optimizer, data)
    assert watched.steps("patched") == [20]
    torch.testing.assert_close(model[1].running_mean, wanted[0])


def test_statistics_come_back_with_the_weights() -> None:
    model = normalised()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watched = Watched(model, optimizer, backwards, trial=True, period=30, acts="when_told")
    data = digits()
    kept: dict[int, dict[str, Tensor]] = {}
    for number in range(1, 41):
        watched.handle.observe(step(model, optimizer, data), step=number - 1)
        kept[number] = {name: buffer.clone() for name, buffer in model.named_buffers()}
        watched.handle.act()
    assert watched.steps("rolled_back") == [40]
    assert equal(dict(model.named_buffers()), kept[30])
    assert not equal(dict(model.named_buffers()), kept[40])
