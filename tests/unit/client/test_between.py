"""What a patch may touch, when it may be written, and what breaks a history: the same network, trained in odd ways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nowcast_client import TrialSettings, attach
from nowcast_client.errors import AttachError, PatchRefused
from nowcast_client.tensors.layout import Layout, innermost
from nowcast_client.tensors.patch import verify
from torch import nn

from .service import FakeService, linear
from .training import QUICK, Training

Act = Callable[[Training], None]


def shaken(history: Any, k: int) -> Any:
    """A forecast that moves every element, the ones that lie still too."""
    return {name: change + 1e-3 for name, change in linear(history, k).items()}


# ------------------------------------------------------------------ what does not move


def test_elements_that_agree_in_all_snapshots_are_not_moved() -> None:
    training = Training(FakeService(shaken), trial=False)
    keep = torch.zeros(8, 4)
    keep[::2] = 1.0
    weight = training.model[0].weight
    with torch.no_grad():
        weight.mul_(keep)
    weight.register_hook(lambda gradient: gradient * keep)
    training.optimizer.param_groups[0]["weight_decay"] = 0.0
    training.run(50)
    assert training.handle.summary()["patched"] == 1
    assert bool((weight[1::2] == 0).all())
    assert bool((weight[::2] != 0).all())


@pytest.mark.parametrize("how", ["frozen", "rate 0", "unused"])
def test_a_tensor_at_rest_is_not_written_and_refuses_nothing(how: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(64, 4)
    rest = model[0]
    if how == "frozen":
        rest.requires_grad_(False)
    groups = [
        {"params": list(rest.parameters()), "lr": 0.0 if how == "rate 0" else 1e-2},
        {"params": model[2].parameters()},
    ]
    optimizer = torch.optim.AdamW(groups, 1e-2)
    before = copy.deepcopy(rest.state_dict())
    handle = attach(
        model,
        optimizer,
        transport=FakeService(shaken).transport,
        period=50,
        trial=False,
        wait=60,
        include_frozen=True,
        retry=QUICK,
    )
    for _ in range(50):
        optimizer.zero_grad()
        hidden = rest(x).detach() if how == "unused" else rest(x)
        model[2](hidden.relu()).square().mean().backward()
        optimizer.step()
    assert handle.summary()["patched"] == 1
    assert all(torch.equal(value, before[name]) for name, value in rest.state_dict().items())


def test_what_hardly_moves_against_its_size_is_left_alone_beyond_the_bound() -> None:
    large, small = nn.Parameter(torch.full((100,), 10.0)), nn.Parameter(torch.full((100,), 0.1))
    layout = Layout({"large": large, "small": small}, frozenset({"large", "small"}))
    newest = {name: p.detach() for name, p in layout.parameters.items()}
    far, near = torch.full((100,), 2.0), torch.full((100,), 0.01)
    moved = {"large": 0.1, "small": 0.01}  # 0.1 % and 1 % of their size
    found = verify({"large": far, "small": near}, layout, newest, moved, 20, 4.0)
    assert found.left_alone == ("large",)
    assert not bool(found.deltas["large"].any())
    assert torch.equal(found.deltas["small"], near)
    with pytest.raises(PatchRefused, match="small"):
        verify({"large": near, "small": far}, layout, newest, moved, 20, 4.0)
    with pytest.raises(PatchRefused, match="every tensor"):
        verify({"large": far, "small": far}, layout, newest, {"large": 0.1, "small": 1e-4}, 20, 4.0)


# ------------------------------------------------------------------ short periods


@pytest.mark.parametrize("period", [15, 16, 19, 20, 23, 24, 29])
def test_every_period_taken_is_judged_by_losses(period: int) -> None:
    training = Training(FakeService(linear), period=period, lr=1e-3)
    training.run(6 * period)
    judged = [event for event in training.events if event.kind in ("kept", "rolled_back")]
    assert judged
    assert all(event.detail["level"] == event.detail["level"] for event in judged)


@pytest.mark.parametrize(
    ("trial", "named"),
    [
        (TrialSettings(window=3), "window=3"),
        (TrialSettings(min_tail=40), "min_tail=40"),
        (TrialSettings(min_reference=51), "min_reference=51"),
        (TrialSettings(tail=0.0), "tail=0"),
        (TrialSettings(min_reference=45), "min_reference=45"),
    ],
)
def test_a_trial_that_can_never_be_judged_is_refused_by_name(trial: TrialSettings, named: str) -> None:
    with pytest.raises(AttachError, match=named):
        Training(FakeService(linear), trial=trial)


# ------------------------------------------------------------------ between steps


def stepping_inside_backward(model: nn.Module) -> list[torch.optim.Optimizer]:
    """One optimizer a parameter, stepped as soon as its gradient is there."""
    optimizers = {p: torch.optim.AdamW([p], 1e-2) for p in model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()  # type: ignore[index]
        optimizers[parameter].zero_grad()  # type: ignore[index]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    return list(optimizers.values())


@pytest.mark.parametrize("backwards", [False, True])
def test_no_patch_inside_a_backward_pass(backwards: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizers = stepping_inside_backward(model)
    service = FakeService(linear)
    x = torch.randn(64, 4)
    handle = attach(
        model,
        optimizers[::-1] if backwards else optimizers,
        transport=service.transport,
        period=50,
        trial=False,
        wait=60,
        retry=QUICK,
    )
    for _ in range(100):
        model(x).square().mean().backward()
    assert (handle.step, handle.summary()["patched"]) == (100, 2)


def test_an_optimizer_that_never_steps_is_not_waited_for() -> None:
    training = Training(FakeService(linear), mode="off")
    unused = torch.optim.SGD([nn.Parameter(torch.zeros(2))], 1e-2)
    handle = attach(
        training.model,
        [unused, training.optimizer],
        transport=training.service.transport,
        period=50,
        trial=False,
        wait=60,
    )
    training.run(101)
    assert (handle.step, handle.summary()["patched"]) == (101, 2)


def test_optimizers_that_take_turns_unevenly_are_counted_by_the_busier() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    often, seldom = (torch.optim.SGD(part.parameters(), 1e-2) for part in (model[0], model[2]))
    handle = attach(model, [seldom, often], transport=FakeService(linear).transport, period=50, trial=False)
    for step in range(60):
        model(torch.randn(8, 4)).square().mean().backward()
        often.step()
        if step % 5 == 4:
            seldom.step()
    assert handle.step == 60


# ------------------------------------------------------------------ one trajectory


def put_back(training: Training) -> None:
    training.model.load_state_dict({name: w * 0.5 for name, w in training.model.state_dict().items()})


def put_back_through_data(training: Training) -> None:
    for p in training.model.parameters():
        p.data.mul_(0.5)


def swapped_for_good(training: Training) -> None:
    for p in training.model.parameters():
        p.data = p.data * 0.5


def one_layer(training: Training) -> None:
    with torch.no_grad():
        training.model[2].weight.mul_(0.5)


def moments(training: Training) -> None:
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))


@pytest.mark.parametrize("write", [put_back, put_back_through_data, swapped_for_good, one_layer, moments])
def test_a_window_starts_again_after_a_jump(write: Act, caplog: pytest.LogCaptureFixture) -> None:
    training = Training(FakeService(linear), trial=False)
    training.run(75)
    write(training)
    training.run(76)
    assert [event.step for event in training.events if event.kind == "patched"] == [50, 120]
    assert sum("the window starts again" in record.message for record in caplog.records) == 1


def test_weights_put_back_while_a_patch_is_on_trial_stay() -> None:
    training = Training(FakeService(linear), lr=1e-3)
    training.run(55)
    assert training.handle.summary()["patched"] == 1
    put_back(training)
    training.run(20, loss_of=lambda step, loss: 100.0)
    assert training.handle.summary()["unjudged"] == 1
    assert training.handle.summary()["rolled_back"] == 0


def undone_swap(training: Training) -> None:
    kept = copy.deepcopy(training.model.state_dict())
    put_back(training)
    training.model.load_state_dict(kept)


def undone_swap_of_storage(training: Training) -> None:
    kept = [p.data for p in training.model.parameters()]
    swapped_for_good(training)
    for p, data in zip(training.model.parameters(), kept, strict=True):
        p.data = data


@pytest.mark.parametrize("write", [undone_swap, undone_swap_of_storage])
def test_a_swap_that_is_undone_costs_nothing(write: Act) -> None:
    training = Training(FakeService(linear), trial=False)
    for _ in range(5):
        training.run(25)
        write(training)
    assert [event.step for event in training.events if event.kind == "patched"] == [50, 100]
    assert training.handle.summary()["skipped"] == {}


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("through_data", [False, True])
def test_writes_that_belong_to_the_training_do_not_hold_it_up(every: int, through_data: bool) -> None:
    training = Training(FakeService(linear), trial=False)
    for step in range(101):
        training.run(1)
        if step % every == 0:
            for p in training.model.parameters():
                (p.data if through_data else p.detach()).mul_(0.9999)
    assert [event.step for event in training.events if event.kind == "patched"] == [50, 100]


def test_a_bound_that_some_weights_run_into_is_no_jump() -> None:
    training = Training(FakeService(linear), trial=False)
    bound = 1.02 * training.model[0].weight.abs().max().item()
    for _ in range(101):
        training.run(1)
        training.model[0].weight.data.clamp_(-bound, bound)
    assert [event.step for event in training.events if event.kind == "patched"] == [50, 100]


class Sam:
    """Sharpness-aware minimisation: the gradient is taken elsewhere, and the weights are back before the step."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base_optimizer = base

    def climb(self) -> None:
        self.old = {}
        for p in self.base_optimizer.param_groups[0]["params"]:
            self.old[p] = p.data.clone()
            p.data = p.data + 0.05 * p.grad / p.grad.norm()

    def step(self) -> None:
        for p, old in self.old.items():
            p.data = old
        self.base_optimizer.step()


def test_a_second_copy_that_lives_within_a_step_is_supported() -> None:
    training = Training(FakeService(linear), mode="off")
    sam = Sam(training.optimizer)
    handle = attach(training.model, sam, transport=training.service.transport, period=50, trial=False, wait=60)
    for _ in range(100):
        for move in (sam.climb, sam.step):
            training.optimizer.zero_grad()
            nn.functional.mse_loss(training.model(training.x), training.y).backward()
            move()
    assert (handle.step, handle.summary()["patched"], handle.summary()["skipped"]) == (100, 2, {})


def test_an_optimizer_of_positions_is_refused() -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(AttachError, match="LBFGS"):
        attach(model, torch.optim.LBFGS(model.parameters()), mode="off")


def test_an_optimizer_under_another_name_is_found() -> None:
    base = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    assert innermost(Sam(base)) is base


def test_parameters_that_start_to_train_later_join_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    training = Training(FakeService(linear), mode="off")
    training.model[0].requires_grad_(False)
    handle = attach(
        training.model,
        training.optimizer,
        transport=training.service.transport,
        period=50,
        trial=False,
        wait=60,
        include_frozen=True,
    )
    training.run(55)
    training.model[0].requires_grad_(True)
    still = training.model[0].weight.detach().clone()
    training.run(44)
    assert not torch.equal(still, training.model[0].weight)
    assert handle.summary()["patched"] == 1
    training.run(1)
    assert handle.summary()["patched"] == 2
    assert any("'0.weight'" in record.message and "'0.bias'" in record.message for record in caplog.records)


def test_parameters_outside_the_spec_join_with_a_session_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    """A frozen beginning stays at home; once it trains, the whole chain is nowcast."""
    training = Training(FakeService(linear), mode="off")
    training.model[0].requires_grad_(False)
    handle = attach(
        training.model, training.optimizer, transport=training.service.transport, period=50, trial=False, wait=60
    )
    training.run(55)
    assert set(handle.spec.shapes()) == {"2.weight", "2.bias"}
    training.model[0].requires_grad_(True)
    training.run(45)
    assert handle.summary()["patched"] == 2
    assert set(handle.spec.shapes()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert any("'0.weight'" in record.message for record in caplog.records)
    assert len(training.service.sessions) <= 2


def test_a_second_attach_replaces_the_first(caplog: pytest.LogCaptureFixture) -> None:
    training = Training(FakeService(linear), trial=False)
    training.run(30)
    second = attach(
        training.model, training.optimizer, transport=training.service.transport, period=50, trial=False, wait=60
    )
    training.run(60)
    assert (training.handle.step, second.step) == (30, 60)
    assert second.summary()["patched"] == 1
    assert sum("attached to before" in record.message for record in caplog.records) == 1
    second.close()
    third = attach(training.model, training.optimizer, transport=training.service.transport, period=50, trial=False)
    assert sum("attached to before" in record.message for record in caplog.records) == 1
    third.close()


# ------------------------------------------------------------------ outages


def test_a_nowcast_that_can_only_be_rejected_is_called_off(caplog: pytest.LogCaptureFixture) -> None:
    """Its buffers fill the next window, which is taken one period later."""
    service = FakeService(linear)
    service.gate.clear()
    training = Training(service, trial=False, wait=0.0)
    training.run(61)
    assert any("it did not come within 10 steps" in record.message for record in caplog.records)
    service.gate.set()
    training.run(39)
    assert training.handle.wait(60)
    training.run(1)
    assert [event.step for event in training.events if event.kind == "patched"] == [101]
    assert training.handle.summary()["failed"] == {}


def test_what_a_snapshot_takes_is_said_and_made_when_it_is_needed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "nowcast"):
        training = Training(FakeService(linear), trial=False, wait=0.0)
    assert any("a snapshot copies and sends 0.0 MB; host memory holds up to 6" in r.message for r in caplog.records)
    one = sum(p.nbytes for p in training.model.parameters())
    assert training.handle.summary()["host_bytes"] == 0
    training.run(10)
    assert training.handle.summary()["host_bytes"] == one
