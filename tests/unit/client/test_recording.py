"""Recording a forward pass leaves the process it runs in as it was."""

from __future__ import annotations

import warnings

import torch
from nowcast_client.network.tracing.restoring import untouched
from nowcast_client.network.wired import wire
from torch import nn


def test_no_object_of_the_process_is_asked_anything() -> None:
    """Looking for cached functions must not run what other objects do when they are asked for their class."""

    class Loud:
        @property  # type: ignore[misc]
        def __class__(self) -> type:
            raise RuntimeError("asked")

    loud = [Loud()]
    with untouched(nn.Linear(1, 1)):
        pass
    assert loud


def test_tracing_warns_of_nothing() -> None:
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert wire(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (torch.ones(2, 3),)).spec.parameters
    finally:
        torch.set_warn_always(always)
