"""A training that is resumed."""

from __future__ import annotations

import pytest
import torch
from nowcast_client.errors import AttachError

from .service import FakeService, linear
from .training import Training


def test_resume_goes_on_in_the_same_window() -> None:
    service = FakeService(linear)
    whole = Training(FakeService(linear), trial=False)
    whole.run(70)
    first = Training(service, trial=False)
    first.run(30)
    assert first.handle.wait(60)
    state = {
        "model": first.model.state_dict(),
        "optimizer": first.optimizer.state_dict(),
        "nowcast": first.handle.state_dict(),
    }
    # The first process dies: nobody says goodbye to the service.
    first.handle._hooks.remove()
    second = Training(service, trial=False, seed=1)
    second.x, second.y = first.x, first.y
    second.model.load_state_dict(state["model"])
    second.optimizer.load_state_dict(state["optimizer"])
    second.handle.load_state_dict(state["nowcast"])
    second.run(40)
    assert second.handle.step == 70
    assert next(iter(service.jobs.values())).steps == (10, 20, 30, 40, 50)
    assert all(torch.equal(a, b) for a, b in zip(second.weights().values(), whole.weights().values(), strict=True))


def test_resume_without_the_service_history_starts_the_window_again() -> None:
    service = FakeService(linear)
    first = Training(service, trial=False)
    first.run(30)
    first.handle.wait(60)
    state = first.handle.state_dict()
    service.forget()
    second = Training(service, trial=False)
    second.handle.load_state_dict(state)
    assert second.handle.wait(60)
    second.run(60)
    assert next(iter(service.jobs.values())).steps == (40, 50, 60, 70, 80)


def test_state_of_another_network_is_refused() -> None:
    training = Training(FakeService(linear))
    state = training.handle.state_dict() | {"network": "0" * 64}
    with pytest.raises(AttachError, match="another network"):
        training.handle.load_state_dict(state)
