"""Admission, deadlines, draining: the engine on its own, with work that waits for the test."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future

import pytest
import torch
from nowcast_proto.errors import Busy, DeadlineExceeded, InternalError, InvalidSnapshot, TooLarge, Unavailable
from nowcast_service.runtime.device_queue import Engine


@pytest.fixture
def engine():
    made = Engine(max_jobs=3, max_jobs_per_tenant=2)
    made.start()
    yield made
    made.stop()


class Gate:
    """Work that holds the device until it is opened."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self, check=None) -> str:
        self.begun.set()
        assert self.open.wait(60)
        return "done"


def eventually(condition) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_jobs_run_one_after_the_other_in_order(engine: Engine):
    order, gate = [], Gate()
    first = engine.submit(engine.admit("b"), gate, seconds=60)
    jobs = [engine.submit(engine.admit("a"), lambda check, i=i: order.append(i), seconds=60) for i in range(2)]
    assert gate.begun.wait(30)
    assert (first.state, jobs[0].state) == ("running", "queued")
    assert [engine.before(job) for job in (first, *jobs)] == [0, 1, 2]
    assert order == []
    gate.open.set()
    assert first.result() == "done"
    for job in jobs:
        job.result()
    assert order == [0, 1]
    assert eventually(lambda: engine.idle)


def test_tenants_take_turns():
    engine = Engine(max_jobs=20, max_jobs_per_tenant=20)
    order, gate = [], Gate()
    engine.submit(engine.admit("a"), gate, seconds=60)
    jobs = [
        engine.submit(engine.admit(tenant), lambda check, name=f"{tenant}{n}": order.append(name), seconds=60)
        for tenant, count in (("a", 3), ("b", 2), ("c", 1))
        for n in range(count)
    ]
    engine.start()
    assert gate.begun.wait(30)
    said = [engine.before(job) for job in jobs]
    gate.open.set()
    for job in jobs:
        job.result()
    assert order == ["b0", "c0", "a0", "b1", "a1", "a2"]
    assert said == [1 + order.index(name) for name in ("a0", "a1", "a2", "b0", "b1", "c0")]
    engine.stop()


def test_a_job_waits_for_what_it_needs_and_lets_others_go_first(engine: Engine):
    needed: Future[int] = Future()
    order = []
    late = engine.submit(engine.admit("a"), lambda check: order.append("late"), seconds=60, after=(needed,))
    engine.submit(engine.admit("a"), lambda check: order.append("early"), seconds=60).result()
    needed.set_result(1)
    late.result()
    assert order == ["early", "late"]


def test_a_job_fails_with_what_it_needs(engine: Engine):
    needed: Future[int] = Future()
    job = engine.submit(engine.admit("a"), lambda check: pytest.fail("ran"), seconds=60, after=(needed,))
    needed.set_exception(TooLarge("the graph is too large"))
    with pytest.raises(TooLarge, match="the graph"):
        job.result()
    assert eventually(lambda: engine.idle)


@pytest.mark.parametrize("ends", ["abandoned", "late"])
def test_what_only_a_dropped_job_needed_is_ended(engine: Engine, ends: str):
    needed: Future[int] = Future()
    seconds = 60 if ends == "abandoned" else 0.01
    job = engine.submit(engine.admit("a"), lambda check: pytest.fail("ran"), seconds=seconds, after=(needed,))
    if ends == "abandoned":
        engine.abandon(job)
    else:
        time.sleep(0.05)
        engine.expire()
        with pytest.raises(DeadlineExceeded, match="waited"):
            job.result()
    assert needed.cancelled()
    assert engine.idle


@pytest.mark.parametrize("ends", ["abandoned", "late"])
def test_work_ends_where_it_asks_whether_it_is_wanted(engine: Engine, ends: str):
    begun = threading.Event()

    def work(check):
        begun.set()
        while True:
            check()
            time.sleep(0.001)

    job = engine.submit(engine.admit("a"), work, seconds=60 if ends == "abandoned" else 0.3)
    assert begun.wait(30)
    if ends == "abandoned":
        engine.abandon(job)
    with pytest.raises(DeadlineExceeded):
        job.result()
    assert eventually(lambda: engine.idle)


def test_an_answer_that_comes_late_is_none(engine: Engine):
    gate = Gate()
    job = engine.submit(engine.admit("a"), gate, seconds=0.2)
    assert gate.begun.wait(30)
    time.sleep(0.25)
    gate.open.set()
    with pytest.raises(DeadlineExceeded):
        job.result()


def test_a_queued_job_fails_at_its_deadline_while_the_device_is_busy(engine: Engine):
    gate = Gate()
    engine.submit(engine.admit("a"), gate, seconds=60)
    late = engine.submit(engine.admit("a"), lambda check: pytest.fail("ran"), seconds=0.01)
    assert gate.begun.wait(30)
    time.sleep(0.05)
    engine.expire()
    assert late.state == "failed"
    engine.admit("a").release()
    gate.open.set()


def test_places_are_bounded_in_all_and_per_tenant(engine: Engine):
    mine = [engine.admit("a"), engine.admit("a")]
    with pytest.raises(Busy, match="this key") as caught:
        engine.admit("a")
    assert caught.value.retry_after >= 1
    other = engine.admit("b")
    with pytest.raises(Busy, match="3 nowcasts"):
        engine.admit("c")
    other.release()
    other.release()  # only once
    engine.admit("c")
    with pytest.raises(Busy):
        engine.admit("d")
    for place in mine:
        place.release()


def test_an_abandoned_job_frees_its_place_only_when_the_device_is_done_with_it(engine: Engine):
    gate = Gate()
    running = engine.submit(engine.admit("a"), gate, seconds=60)
    queued = engine.submit(engine.admit("a"), lambda check: pytest.fail("ran"), seconds=60)
    assert gate.begun.wait(30)
    engine.abandon(queued)
    with pytest.raises(CancelledError):
        queued.result()
    engine.admit("a").release()  # the queued one's place is free at once
    engine.abandon(running)
    assert running.state == "running"  # it does not ask
    place = engine.admit("a")
    with pytest.raises(Busy):  # the running one's is not
        engine.admit("a")
    gate.open.set()
    assert eventually(lambda: running.state == "failed")
    engine.admit("a").release()
    place.release()


def test_a_job_past_its_deadline_never_runs(engine: Engine):
    gate = Gate()
    engine.submit(engine.admit("a"), gate, seconds=60)
    late = engine.submit(engine.admit("a"), lambda check: pytest.fail("ran"), seconds=0.01)
    time.sleep(0.05)
    gate.open.set()
    with pytest.raises(DeadlineExceeded):
        late.result()


def test_failures_are_typed_and_disclose_nothing(engine: Engine):
    def fails(error: Exception):
        def work(check):
            raise error

        return engine.submit(engine.admit("a"), work, seconds=60)

    with pytest.raises(InvalidSnapshot, match="named"):
        fails(InvalidSnapshot("named")).result()
    with pytest.raises(InternalError) as caught:
        fails(RuntimeError("secret path /x")).result()
    assert "secret" not in str(caught.value)
    with pytest.raises(Unavailable) as short:
        fails(MemoryError()).result()
    assert short.value.retry_after
    with pytest.raises(Unavailable):
        fails(torch.OutOfMemoryError("CUDA out of memory")).result()
    assert engine.submit(engine.admit("a"), lambda check: 1, seconds=60).result() == 1


def test_draining_refuses_new_work_and_finishes_the_old(engine: Engine):
    gate = Gate()
    job = engine.submit(engine.admit("a"), gate, seconds=60)
    engine.drain()
    with pytest.raises(Unavailable) as caught:
        engine.admit("a")
    assert caught.value.retry_after
    assert not engine.idle
    gate.open.set()
    assert job.result() == "done"
    assert eventually(lambda: engine.idle)


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_job_worked_on_is_freed_with_it(engine: Engine, fails: bool):
    """Without the cycle collector: a history may be gigabytes."""

    class History:
        pass

    history = History()
    gone = weakref.ref(history)

    def work(check, held=history):
        if fails:
            raise InvalidSnapshot("no")
        return held.__class__.__name__

    gc.disable()
    try:
        job = engine.submit(engine.admit("a"), work, seconds=60, ended=lambda job: None)
        del work, history
        assert eventually(job.future.done)
        for _ in range(2):
            if fails:
                with pytest.raises(InvalidSnapshot):
                    job.result()
            else:
                assert job.result() == "History"
        assert eventually(lambda: gone() is None)
    finally:
        gc.enable()


def test_an_observer_that_fails_does_not_end_the_worker(engine: Engine):
    def broken(job):
        raise RuntimeError("observer")

    engine.submit(engine.admit("a"), lambda check: 1, seconds=60, ended=broken).result()
    assert engine.submit(engine.admit("a"), lambda check: 2, seconds=60).result() == 2
    assert engine.alive
