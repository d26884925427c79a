"""`attach` finds out by itself how a network is wired: from its first training forward, which notices nothing of it."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from nowcast_client import attach, derive_spec
from nowcast_client.handle import Handle
from nowcast_proto.errors import UnsupportedArchitecture
from torch import Tensor, nn

from tests.unit.client.service import Arrays, FakeService


def grows(history: Sequence[Arrays], k: int) -> Arrays:
    """Every tensor goes on as in its newest step."""
    return {name: (value - history[-2][name]) * k for name, value in history[-1].items()}


class Gated(nn.Module):
    """A network that no family is called like: batch norm, dropout, a gate and a counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 12), nn.BatchNorm1d(12)
        self.gate, self.last = nn.Linear(12, 12), nn.Linear(12, 1)
        self.drop, self.calls = nn.Dropout(0.2), 0
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(float(x.detach().sum()) if type(x) is Tensor else 0.0)
        h = torch.relu(self.norm(self.first(x)))
        out: Tensor = self.last(self.drop(h) * torch.sigmoid(self.gate(h)))
        return out + 0.01 * random.random() + 0.01 * np.random.rand()


def train(
    model: nn.Module,
    steps: int,
    *,
    call: Callable[[Tensor], Tensor] | None = None,
    handle: Callable[[torch.optim.Optimizer], Handle] | None = None,
) -> tuple[list[float], Handle | None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    attached = handle(optimizer) if handle else None
    data, losses = torch.Generator().manual_seed(5), []
    for _ in range(steps):
        x = torch.randn(16, 6, generator=data)
        loss = ((model if call is None else call)(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if attached is not None:
            attached.observe(loss)
        losses.append(float(loss.detach()))
    return losses, attached


def seeded() -> Gated:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    return Gated()


def attached(model: nn.Module, service: FakeService, **settings: Any) -> Callable[[torch.optim.Optimizer], Handle]:
    return lambda optimizer: attach(
        model, optimizer, service.transport, period=10, total_steps=40, wait=30.0, trial=False, **settings
    )


def test_an_unknown_network_is_attached_to_traced_and_patched() -> None:
    service, model = FakeService(grows), seeded()
    _, handle = train(model, 25, handle=attached(model, service))
    assert handle is not None
    with handle:
        assert handle.spec.graph is not None
        assert any(block.type == "tie" for block in handle.spec.graph.blocks)  # the gate
        assert handle.summary()["patched"] > 0
        (spec, _), *others = service.sessions.values()
        assert spec == handle.spec
        assert not others


def test_the_training_notices_nothing_of_it() -> None:
    plain, beside = seeded(), None
    alone, _ = train(plain, 8)
    after = torch.rand(3), random.random(), np.random.rand()
    beside = seeded()
    said: list[int] = []
    beside.first.register_forward_hook(lambda *_: said.append(1))
    traced, handle = train(beside, 8, handle=attached(beside, FakeService(grows), mode="shadow"))
    assert handle is not None
    with handle:
        assert handle.spec.graph is not None
        assert torch.equal(after[0], torch.rand(3))
        assert after[1:] == (random.random(), np.random.rand())
    assert traced == alone
    assert (beside.calls, len(beside.seen), len(said)) == (8, 8, 8)
    assert beside.seen == plain.seen
    assert all(module.training for module in beside.modules())
    assert not beside._forward_pre_hooks
    for one, other in zip(plain.state_dict().values(), beside.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for one_, other_ in zip(plain.parameters(), beside.parameters(), strict=True):
        assert torch.equal(one_.grad, other_.grad)  # type: ignore[arg-type]


def test_copies_made_before_the_first_step_are_whole_and_keep_nothing() -> None:
    model = seeded()
    optimizer = torch.optim.AdamW(model.parameters())
    with attached(model, FakeService(grows))(optimizer) as handle:
        copied, file = copy.deepcopy(model), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for other in (copied, loaded):
            assert torch.equal(other.eval()(torch.ones(2, 6)).isfinite(), torch.ones(2, 1, dtype=torch.bool))
        assert handle.spec.graph is None  # a copy's forward pass is none of the model's
        with torch.no_grad():
            model(torch.ones(4, 6))
        model(torch.ones(4, 6)).sum().backward()
        optimizer.step()
        assert handle.spec.graph is not None


def test_compiled_and_wrapped_modules_are_traced_inside() -> None:
    for compiles in (True, False):
        model = seeded()
        outer: Any = torch.compile(model, backend="eager") if compiles else nn.DataParallel(model)
        _, handle = train(model, 2, call=outer, handle=attached(outer, FakeService(grows)))
        assert handle is not None
        with handle:
            assert handle.spec.graph is not None
            assert set(handle.spec.shapes()) == {name for name, _ in model.named_parameters()}


class PreNorm(nn.Sequential):
    """Layers of a plain chain that its forward pass uses in another way."""

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self[0](x)
        out: Tensor = self[2](h.cumsum(1) + h)
        return out


def test_where_names_and_trace_disagree_the_trace_is_right() -> None:
    torch.manual_seed(0)
    service, model = FakeService(grows), PreNorm(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    _, handle = train(model, 3, handle=attached(model, service))
    assert handle is not None
    with handle:
        assert handle.spec.graph is not None
        assert all(one.fixed for one in handle.spec.graph.ranges if one.size > 1)


def test_a_known_network_keeps_its_family_and_its_session() -> None:
    torch.manual_seed(0)
    service, model = FakeService(grows), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    _, handle = train(model, 25, handle=attached(model, service))
    assert handle is not None
    with handle:
        assert handle.spec.family == "sequential"
        assert len(service.sessions) == 1


def test_a_network_that_cannot_be_traced_costs_a_warning_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    class Moody(Gated):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise RuntimeError("only in training")
            return super().forward(x)

    model = Moody()
    with pytest.warns(RuntimeWarning, match="only in training"):
        losses, handle = train(model, 3, handle=attached(model, FakeService(grows)))
    assert handle is not None
    assert handle.mode == "off"
    assert len(losses) == 3
    assert "derive_spec(model, example=(args, kwargs))" in caplog.text


def test_a_predictor_that_needs_no_graph_goes_on_without_a_wiring() -> None:
    class Moody(Gated):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise RuntimeError("only in training")
            return super().forward(x)

    service, model = FakeService(grows), Moody()
    _, handle = train(model, 15, handle=attached(model, service, predictor="linear"))
    assert handle is not None
    with handle:
        assert handle.mode == "on"
        assert handle.spec.family == "unknown"
        assert handle.summary()["snapshots"] > 0


def test_a_state_saved_after_the_trace_is_taken_up_before_it() -> None:
    service, model = FakeService(grows), seeded()
    _, handle = train(model, 12, handle=attached(model, service))
    assert handle is not None
    with handle:
        state = handle.state_dict()
    again = seeded()
    optimizer = torch.optim.AdamW(again.parameters())
    with attached(again, service)(optimizer) as resumed:
        resumed.load_state_dict(state)
        assert resumed.step == 12


def test_no_forward_pass_of_the_attached_module_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = seeded()
    outer = nn.ModuleDict({"inner": model})
    _, handle = train(model, 3, handle=attached(outer, FakeService(grows)))
    assert handle is not None
    with handle:
        assert handle.mode == "on"
        assert "no forward pass of the attached ModuleDict was seen" in caplog.text
        assert "no nowcasts until one is" in caplog.text


def test_a_network_without_parameters_is_refused_at_once() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(UnsupportedArchitecture, match="no parameters"):
        attach(nn.ReLU(), optimizer, FakeService(grows).transport)


def test_the_spec_of_an_example_is_what_attach_finds() -> None:
    model = seeded()
    _, handle = train(model, 1, handle=attached(model, FakeService(grows)))
    assert handle is not None
    with handle:
        assert derive_spec(seeded(), example=((torch.randn(16, 6),), {})) == handle.spec
