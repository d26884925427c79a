"""What goes wrong between a training and its service, and what it costs: a nowcast, never the training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nowcast_client.errors import TransportError
from nowcast_client.testing import FaultyTransport
from nowcast_client.wire.transport import Retry
from nowcast_proto.errors import InvalidSnapshot, NowcastError, UnsupportedArchitecture

from .service import FakeService, linear, nothing
from .training import Training


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda d: {n: v * np.nan for n, v in d.items()}, "NaN"),
        (lambda d: {n: v + 1e30 for n, v in d.items()}, "moves"),
        (lambda d: {n: v + 1e3 for n, v in d.items()}, "moves"),
        (lambda d: dict(list(d.items())[1:]), "other tensors"),
        (lambda d: {("x" if n == "0.bias" else n): v for n, v in d.items()}, "other tensors"),
        (lambda d: {n: v.T if v.ndim == 2 else v for n, v in d.items()}, "other tensors"),
        (lambda d: dict(reversed(d.items())), "other tensors"),
    ],
)
def test_absurd_replies_are_refused(spoil: Callable[[Any], Any], what: str) -> None:
    training = Training(FakeService(lambda h, k: spoil(linear(h, k))), trial=False)
    alone = Training(FakeService(linear), mode="off")
    training.run(60)
    alone.run(60)
    assert "patched" not in training.kinds()
    failed = [event for event in training.events if event.kind in ("failed", "rejected")]
    assert what in failed[0].detail["message"]
    assert all(torch.equal(a, b) for a, b in zip(training.weights().values(), alone.weights().values(), strict=True))


@pytest.mark.parametrize(("strides", "taken"), [(40, True), (400, False)])
def test_a_nowcast_of_a_short_horizon_may_reach_farther(strides: int, taken: bool) -> None:
    """A refined network moves what hardly moved by many strides even at the last horizon; not by any number of them."""
    service = FakeService(lambda history, k: {n: strides * (v - history[-2][n]) for n, v in history[-1].items()})
    training = Training(service, trial=False, max_horizon=1)
    training.run(60)
    assert ("patched" in training.kinds()) is taken
    refused = [event for event in training.events if event.kind in ("failed", "rejected")]
    assert all("4 x 20 strides" in event.detail["message"] for event in refused)
    assert bool(refused) is not taken


def test_corrupted_bytes_never_become_a_patch() -> None:
    """Every byte of a reply's header and 200 of its payload, one bit flipped at each try."""
    service = FakeService(nothing)
    alone = Training(FakeService(nothing), mode="off")
    alone.run(50)
    collected: list[bytes] = []
    service.spoil = lambda body: (collected.append(body), body)[1]
    training = Training(service, trial=False)
    training.run(50)
    body = collected[0]
    header = 4 + int.from_bytes(body[:4], "little")
    rng = np.random.default_rng(0)
    places = [*range(0, header, 3), *rng.integers(header, len(body), 60).tolist()]
    session = training.handle._nowcasting.windows.uploader.session  # type: ignore[union-attr]
    job = next(iter(service.jobs.values()))
    refused = 0
    harmless = 0
    for place in places:
        bit = 1 << int(rng.integers(8))

        def flip(body: bytes, place: int = place, bit: int = bit) -> bytes:
            return body[:place] + bytes([body[place] ^ bit]) + body[place + 1 :]

        service.spoil = flip
        session._retry = Retry(attempts=1)
        try:
            message, frames = session._fetch(job, time.monotonic() + 60)
        except NowcastError:  # any other exception would fail the test
            refused += 1
        else:
            # A flipped bit in a field nobody acts on (timings, the checkpoint's name) changes no weight.
            assert all(not np.frombuffer(f.view(), np.float32).any() for f in frames)
            assert message.k == job.k
            harmless += 1
    assert refused > 0.7 * len(places)


def test_service_that_forgets_gets_the_history_again() -> None:
    service = FakeService(linear)
    training = Training(service, trial=False)
    training.run(45)
    assert training.handle.wait(60)
    service.forget()
    training.run(15)
    assert "patched" in training.kinds()
    assert training.handle.summary()["resent"] >= 4


def test_faults_of_the_transport_are_ridden_out() -> None:
    """Requests of every kind fail once, in each of three ways; the weights are those without faults."""
    clean = Training(FakeService(linear), trial=False)
    clean.run(55)
    for fault in ("before", "after", "body"):
        for at in range(8):  # the session, five snapshots, the question, the answer
            service = FakeService(linear)
            transport = FaultyTransport(service.transport, {at: fault})
            training = Training(service, trial=False, transport=transport)
            training.run(55)
            pairs = zip(training.weights().values(), clean.weights().values(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), (fault, at, training.kinds())
            assert transport.count > at
            training.handle.close()


def test_a_dead_service_costs_nothing_but_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    alone = Training(FakeService(linear), mode="off")
    alone.run(160)
    dead = FaultyTransport(FakeService(linear).transport, dict.fromkeys(range(100_000), "before"))
    training = Training(FakeService(linear), transport=dead, wait=0.01, nowcast_timeout=0.2)
    with caplog.at_level(logging.WARNING, "nowcast"):
        training.run(160)
        training.handle.wait(60)
        training.run(0)
    assert all(torch.equal(a, b) for a, b in zip(training.weights().values(), alone.weights().values(), strict=True))
    assert training.handle.summary()["failed"]
    assert 1 <= len([r for r in caplog.records if "failed" in r.message]) <= 4


def test_strict_raises() -> None:
    dead = FaultyTransport(FakeService(linear).transport, dict.fromkeys(range(1000), "before"))
    training = Training(FakeService(linear), transport=dead, strict=True, nowcast_timeout=0.3)
    with pytest.raises(TransportError):
        training.run(200)


def test_a_callback_that_raises_is_survived() -> None:
    service = FakeService(linear)
    training = Training(service, trial=False)

    def bad(*args: object) -> None:
        raise RuntimeError("user code")

    training.handle._nowcasting.report.on_event = bad
    training.handle._nowcasting.report.metrics = bad
    training.run(60)
    assert training.handle.summary()["patched"] == 1
    assert training.handle.summary()["failed"] == {"metrics: RuntimeError": 2, "on_event: RuntimeError": 7}


def test_permanent_refusals_switch_off() -> None:
    service = FakeService(linear)

    def refuse(history: object, k: int) -> Any:
        raise UnsupportedArchitecture("no such family")

    service.predict = refuse
    training = Training(service, trial=False)
    with pytest.warns(RuntimeWarning, match="never accept"):
        training.run(60)
    assert training.handle.mode == "off"


def test_transient_refusals_do_not() -> None:
    service = FakeService(linear)

    def refuse(history: object, k: int) -> Any:
        raise InvalidSnapshot("NaN in a snapshot")

    service.predict = refuse
    training = Training(service, trial=False)
    training.run(120)
    assert training.handle.summary()["failed"] == {"nowcast: invalid_snapshot": 2}
