"""What a client's spec makes the service compute: real processes, real limits, hostile specs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from nowcast_proto.errors import Busy, NowcastError, TooLarge, UnsupportedArchitecture
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.predictors.graphs import Needs, prepare
from nowcast_service.runtime import spec_work
from nowcast_service.runtime.budget import Budget
from nowcast_service.runtime.spec_work import SpecWork

from ..graph.specs import gpt2, llama
from ..graph.test_explicit import written_out
from ..nino.made import mlp

NEEDS = Needs(9, positions=True)


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoding from an earlier run would make every spec an easy one."""
    monkeypatch.setenv("NOWCAST_CACHE", "")


@pytest.fixture
def work() -> Iterator[SpecWork]:
    made = SpecWork(Budget(1 << 30), seconds=60.0, memory=1 << 30)
    yield made
    made.stop()


def slow(number: int = 0) -> ArchitectureSpec:
    """A spec of two tensors whose positional encoding takes a second or so."""
    return mlp(600_000 + number, 1)


def children(work: SpecWork) -> list[int]:
    """Processes that compute something now."""
    assert work.nursery._process is not None
    pid = work.nursery._process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def held(work: SpecWork, count: int = 1) -> list[int]:
    """Stop so many computations in their tracks."""
    assert eventually(lambda: len(children(work)) == count and all(map(_computes, children(work))))
    for pid in children(work):
        os.kill(pid, signal.SIGSTOP)
    return children(work)


def _computes(pid: int) -> bool:
    """Whether a process has used some processor time, and so has begun with its order."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]) >= 5  # ticks of 10 ms


def eventually(condition: Any) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


@pytest.mark.parametrize("spec", [llama(), mlp(3, 4, 2)], ids=["llama", "mlp"])
def test_a_graph_comes_back_as_it_was_computed(shared: SpecWork, spec: ArchitectureSpec):
    found, wanted = shared.prepare("t", spec, NEEDS).result(60), prepare(spec, NEEDS)
    assert found.graph == wanted.graph
    assert torch.equal(found.positions, wanted.positions)


@pytest.fixture(scope="module")
def shared() -> Iterator[SpecWork]:
    made = SpecWork(Budget(1 << 30), seconds=60.0, memory=1 << 30)
    yield made
    made.stop()


def test_the_process_that_works_on_specs_does_without_torch():
    """It is there sooner and a quarter as large: nothing it imports, early or late, is torch."""
    script = (
        "import json, sys\n"
        "sys.modules['torch'] = None\n"  # makes any import of it fail
        "from nowcast_service.runtime import spec_process\n"
        "for spec in json.loads(sys.argv[1]):\n"
        "    for whole in (False, True):\n"
        "        needs = {'max_features': 9, 'positions': whole}\n"
        "        head, body = spec_process._answer({'spec': spec, 'needs': needs, 'whole': whole})\n"
        "        print(len(head), len(body))\n"
    )
    specs = json.dumps([llama().canonical(), written_out(gpt2()).canonical()])
    done = subprocess.run(
        [sys.executable, "-c", script, specs], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 4


def test_the_report_comes_without_the_graph(shared: SpecWork):
    spec = mlp(3, 4)
    assert shared.coverage("t", spec, NEEDS).result(60).parameters == {"graph": 2}


def test_it_is_computed_once_and_held_against_the_budget(work: SpecWork):
    spec = mlp(3, 5)
    first, second = work.prepare("t", spec, NEEDS), work.prepare("u", mlp(3, 5), NEEDS)
    assert first.result(60) is second.result(60)
    assert work.prepared(spec, NEEDS) is first.result()
    assert work._budget.used >= first.result().positions.nbytes


def test_what_is_no_longer_used_is_forgotten_when_it_is_too_much(work: SpecWork, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spec_work, "_KEPT", 1)
    work.prepare("t", mlp(3, 5), NEEDS).result(60)
    assert eventually(lambda: work._budget.used == 0)


def test_errors_are_those_of_the_graph(shared: SpecWork):
    spec = mlp(3, 6).model_copy(update={"family": "nosuch"})
    with pytest.raises(UnsupportedArchitecture, match="'nosuch' is not known"):
        shared.coverage("t", ArchitectureSpec.model_validate(spec.model_dump()), NEEDS).result(60)


def test_processor_time_is_bounded():
    tight = SpecWork(Budget(1 << 30), seconds=0.1, memory=1 << 30)
    try:
        with pytest.raises(TooLarge, match=r"more than 0\.1 s"):
            tight.prepare("t", slow(), NEEDS).result(60)
        assert eventually(lambda: not children(tight))
        again = tight.prepare("t", slow(), NEEDS)
        assert again.done()  # a refusal is remembered
        with pytest.raises(TooLarge):
            again.result()
    finally:
        tight.stop()


def test_time_on_the_clock_is_bounded_and_others_go_on():
    tight = SpecWork(Budget(1 << 30), seconds=2.0, memory=1 << 30)
    try:
        hostile = tight.prepare("t", slow(), NEEDS)
        held(tight)
        assert tight.coverage("u", mlp(2, 3), NEEDS).result(60)
        with pytest.raises(TooLarge, match=r"more than 2\.0 s"):
            hostile.result(60)
        assert eventually(lambda: not children(tight))
    finally:
        tight.stop()


def test_memory_is_bounded():
    small = SpecWork(Budget(1 << 30), seconds=60.0, memory=16 << 20)
    try:
        with pytest.raises(TooLarge, match="bytes to compute"):
            small.prepare("t", slow(), NEEDS).result(60)
    finally:
        small.stop()


def test_the_last_to_leave_ends_the_process(work: SpecWork):
    futures = [work.prepare("t", slow(), NEEDS) for _ in range(2)]
    held(work)
    assert futures[0].cancel()
    time.sleep(0.1)
    assert children(work)
    assert futures[1].cancel()
    assert eventually(lambda: not children(work))


def test_a_computation_that_is_killed_is_refused_and_the_next_is_served(work: SpecWork):
    killed = work.prepare("t", slow(), NEEDS)
    os.kill(held(work)[0], signal.SIGKILL)
    with pytest.raises(TooLarge):
        killed.result(60)
    assert work.prepare("t", mlp(2, 3), NEEDS).result(60)


def test_the_process_that_forks_is_started_again(work: SpecWork):
    work.prepare("t", mlp(2, 3), NEEDS).result(60)
    assert work.nursery._process is not None
    work.nursery._process.kill()
    work.nursery._process.wait()
    assert work.prepare("t", mlp(2, 4), NEEDS).result(60)


def test_a_tenant_may_not_fill_the_queue_nor_take_all_places(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spec_work, "WAITING", 2)
    work = SpecWork(Budget(1 << 30), seconds=60.0, memory=1 << 30, several=True)
    try:
        futures = []
        for number in range(2):
            futures.append(work.prepare("t", slow(number), NEEDS))
            held(work, number + 1)
        futures += [work.prepare("t", slow(2 + number), NEEDS) for number in range(2)]
        with pytest.raises(Busy, match="specs of this key"):
            work.prepare("t", slow(4), NEEDS)
        assert work.prepare("u", mlp(2, 3), NEEDS).result(60)
        assert not any(future.done() for future in futures)
    finally:
        work.stop()


def test_nothing_is_left_when_it_stops():
    work = SpecWork(Budget(1 << 30), seconds=60.0, memory=1 << 30)
    future = work.prepare("t", slow(), NEEDS)
    pids = held(work)
    assert work.nursery._process is not None
    work.stop()
    with pytest.raises((CancelledError, NowcastError)):
        future.result(60)
    assert work.nursery._process.poll() is not None
    assert eventually(lambda: not any(map(psutil.pid_exists, pids)))
    assert eventually(lambda: not any(thread.is_alive() for thread in work._threads))
