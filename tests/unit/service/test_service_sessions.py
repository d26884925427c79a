"""The budget and what a session keeps, without HTTP."""

from __future__ import annotations

import gc
import time
import weakref
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from nowcast_proto.arrays import frame_of
from nowcast_proto.errors import Busy, Conflict, DeadlineExceeded, Expired, InvalidSnapshot, NotFound, TooLarge
from nowcast_proto.messages import NowcastJob, SessionCreate
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.stream import Encoder
from nowcast_proto.tensors import Limits, TensorFrame
from nowcast_service.runtime.arrival import check_finite, packed_sink, tensor_of
from nowcast_service.runtime.budget import Budget, Shares
from nowcast_service.runtime.device_queue import Job, Place
from nowcast_service.runtime.session import Nowcast, Session
from nowcast_service.runtime.store import SessionStore

SPEC = ArchitectureSpec.model_validate(
    {"family": "sequential", "parameters": [{"name": "w", "shape": [3, 5]}, {"name": "b", "shape": [3]}]}
)
NEED = 6 * (64 + 64) + 2 * (64 + 64) + 2 * 1024
"""keep + 1 snapshots and two answers of two tensors, padded to 64 bytes each, and a spec of two parameters."""


def make(total: int = 10 * NEED, **options: object) -> SessionStore:
    settings = {
        "tenant_bytes": total,
        "session_bytes": total,
        "max_sessions": 100,
        "max_sessions_per_tenant": 100,
        "expiry": 60.0,
        "evict_after": 0.0,
        "lapse_after": 60.0,
        "results": 2,
    }
    return SessionStore(Budget(total), **{**settings, **options})


def stream(step: int, value: float = 1.0) -> bytes:
    frames = [frame_of(p.name, np.full(p.shape, value, dtype=np.float32)) for p in SPEC.parameters]
    return b"".join(bytes(c) for c in Encoder("snapshot", {"step": step}, frames).chunks())


def put(session: Session, step: int, value: float = 1.0) -> bool:
    upload = session.open_upload(step, 0, None, Limits())
    try:
        upload.decoder.feed(stream(step, value))
    finally:
        upload.busy = False
    return session.complete(upload)[1]


def test_a_session_reserves_all_it_will_need():
    store = make()
    session, new = store.create("t", "s", SessionCreate(spec=SPEC))
    assert new
    assert store.budget.used == session.reservation.nbytes == NEED
    for step in range(7):
        put(session, step)
    assert store.budget.used == NEED
    assert sorted(session.snapshots) == [2, 3, 4, 5, 6]
    store.delete("t", "s")
    store.delete("t", "s")
    assert store.budget.used == 0
    wide = ArchitectureSpec.model_validate({"family": "sequential", "parameters": [{"name": "w", "shape": [64]}]})
    half, _ = store.create("t", "s", SessionCreate(spec=wide, dtype="bfloat16"))
    assert half.reservation.nbytes == 6 * 128 + 2 * 256 + 1024


def test_what_never_fits_and_what_does_not_fit_now():
    with pytest.raises(TooLarge):
        make(NEED - 1).create("t", "s", SessionCreate(spec=SPEC))
    store = make(NEED, evict_after=60.0)
    store.create("t", "s", SessionCreate(spec=SPEC))
    with pytest.raises(Busy) as caught:
        store.create("t", "other", SessionCreate(spec=SPEC))
    assert caught.value.retry_after
    with pytest.raises(TooLarge):
        store.reserve("t", NEED + 1, "it")
    assert store.budget.used == NEED


def test_quotas_of_a_tenant_touch_only_its_own_sessions():
    store = make(max_sessions_per_tenant=2)
    store.create("other", "x", SessionCreate(spec=SPEC))
    for name in "abc":
        store.create("t", name, SessionCreate(spec=SPEC))
    assert len(store) == 3
    with pytest.raises(Expired, match="make room"):
        store.get("t", "a")
    store.get("other", "x")
    with pytest.raises(NotFound):
        store.get("other", "b")
    bytes_quota = make(tenant_bytes=NEED)
    bytes_quota.create("t", "a", SessionCreate(spec=SPEC))
    bytes_quota.create("t", "b", SessionCreate(spec=SPEC))
    assert len(bytes_quota) == 1


def test_room_is_made_within_a_tenant_only():
    store = make(4 * NEED, tenants=2)
    store.create("a", "1", SessionCreate(spec=SPEC))
    store.create("a", "2", SessionCreate(spec=SPEC))
    store.create("b", "1", SessionCreate(spec=SPEC))
    store.create("a", "3", SessionCreate(spec=SPEC))  # its own and the common ones
    store.create("a", "4", SessionCreate(spec=SPEC))
    assert set(store._sessions) == {("b", "1"), ("a", "2"), ("a", "3"), ("a", "4")}
    reservation = store.reserve("a", NEED, "the nowcast")
    assert ("a", "2") not in store._sessions
    reservation.release()


def test_one_tenant_leaves_another_its_sessions():
    store = make(100 * NEED, max_sessions=4, tenants=2, evict_after=60.0)
    for number in range(3):
        store.create("a", str(number), SessionCreate(spec=SPEC))
    with pytest.raises(Busy, match="this key holds 3"):
        store.create("a", "3", SessionCreate(spec=SPEC))
    store.create("b", "0", SessionCreate(spec=SPEC))
    store.delete("a", "0")
    store.create("a", "3", SessionCreate(spec=SPEC))


def test_a_claim_without_bytes_lapses_and_is_made_again():
    store = make(NEED, lapse_after=0.0, evict_after=60.0)
    idle, _ = store.create("t", "idle", SessionCreate(spec=SPEC))
    broken = idle.open_upload(0, 0, None, Limits())
    broken.decoder.feed(stream(0)[:200])
    store.sweep()
    assert store.budget.used == NEED  # it is arriving
    broken.busy = False
    time.sleep(0.01)
    store.sweep()
    assert store.budget.used == 0
    other, _ = store.create("t", "other", SessionCreate(spec=SPEC))
    with pytest.raises(Busy):
        idle.open_upload(0, 0, None, Limits())
    assert put(other, 0)
    store.sweep()
    assert store.budget.used == NEED  # it has sent something
    store.delete("t", "other")
    assert put(idle, 0)
    assert store.budget.used == NEED


def test_the_device_hears_that_a_session_is_gone():
    store = make()
    session, _ = store.create("t", "s", SessionCreate(spec=SPEC))
    job = Job(None, Place("t", lambda place: None), time.monotonic() + 60, lambda job: None, future=Future())
    session.remember(Nowcast(NowcastJob(nowcast="n", steps=(0,), k=1), "d", job, ("linear", None), []))
    job.check()
    store.delete("t", "s")
    with pytest.raises(DeadlineExceeded):
        job.check()


@pytest.mark.parametrize("tenants", [1, 2, 3, 7])
@pytest.mark.parametrize("total", [1, 4, 16, 1000])
def test_no_tenant_can_leave_another_without_any(total: int, tenants: int):
    shares = Shares(total, tenants)
    greedy = 0
    while shares.take("0"):
        greedy += 1
    assert greedy == shares.most
    for other in range(1, tenants):
        for _ in range(max(1, total // (2 * tenants))):
            assert shares.take(str(other))
        assert not shares.take(str(other))
    assert shares.used <= max(total, tenants)
    shares.give("0", greedy)
    assert shares.of("0") == 0
    assert shares.most == shares.own or tenants == 1 or shares.take("1")  # what was common is free again


def test_a_session_at_work_is_never_dropped():
    store = make(NEED, expiry=0.0)
    session, _ = store.create("t", "s", SessionCreate(spec=SPEC))
    upload = session.open_upload(0, 0, None, Limits())
    time.sleep(0.01)
    store.sweep()
    assert len(store) == 1
    with pytest.raises(Busy):
        store.create("t", "other", SessionCreate(spec=SPEC))
    upload.busy = False
    store.sweep()
    assert len(store) == 0


def test_one_upload_at_a_time_and_only_from_where_it_stands():
    session, _ = make().create("t", "s", SessionCreate(spec=SPEC))
    data = stream(1)
    upload = session.open_upload(1, 0, None, Limits())
    upload.decoder.feed(data[:150])
    with pytest.raises(Conflict, match="another request"):
        session.open_upload(1, 150, None, Limits())
    with pytest.raises(Busy):
        session.open_upload(2, 0, None, Limits())
    upload.busy = False
    for offset, digest in ((149, None), (151, None), (150, "0" * 32)):
        with pytest.raises(Conflict, match="resume"):
            session.open_upload(1, offset, digest, Limits())
    again = session.open_upload(1, 150, upload.digest, Limits())
    assert again is upload
    again.decoder.feed(data[150:])
    again.busy = False
    assert session.complete(again)[1]
    with pytest.raises(Conflict, match="from byte 0"):
        session.open_upload(3, 10, None, Limits())


def test_snapshots_still_read_by_a_nowcast_are_paid_for():
    store = make(NEED + 128, evict_after=60.0)
    session, _ = store.create("t", "s", SessionCreate(spec=SPEC))
    for step in range(5):
        put(session, step)
    question = NowcastJob(nowcast="n", steps=(0, 1, 2, 3, 4), k=1)
    job = Job(lambda: None, Place("t", lambda place: None), 0.0, lambda job: None, future=Future())
    session.remember(Nowcast(question, "d", job, ("linear", None), []))
    put(session, 5)  # 0 is dropped from the session, the job still reads it
    assert store.budget.used == NEED
    put(session, 6)  # and now 1
    assert store.budget.used == NEED + 128
    with pytest.raises(Busy, match="2 older snapshots"):
        put(session, 7)
    job.future.set_result(None)
    put(session, 7)
    assert store.budget.used == NEED


def test_what_a_dropped_session_still_uses_stays_paid_for():
    """An upload under way fills its memory, and the device reads the history, whoever deletes the session meanwhile."""
    store = make()
    session, _ = store.create("t", "s", SessionCreate(spec=SPEC))
    put(session, 0)
    job = Job(lambda: None, Place("t", lambda place: None), 0.0, lambda job: None, future=Future())
    session.remember(Nowcast(NowcastJob(nowcast="n", steps=(0,), k=1), "d", job, ("linear", None), []))
    upload = session.open_upload(1, 0, None, Limits())
    store.delete("t", "s")
    with pytest.raises(NotFound):
        store.get("t", "s")
    assert not session.snapshots
    upload.busy = False
    store.sweep()
    assert store.budget.used == NEED
    job.future.set_result(None)
    store.sweep()
    assert store.budget.used == 0
    assert not session.uploads
    assert not session.nowcasts


def test_dropped_snapshots_are_freed_without_the_cycle_collector():
    session, _ = make().create("t", "s", SessionCreate(spec=SPEC, keep=2))
    gc.disable()
    try:
        put(session, 0)
        held = weakref.ref(session.snapshots[0])
        broken = session.open_upload(9, 0, None, Limits())
        broken.decoder.feed(stream(9)[:200])
        broken.busy = False
        left = weakref.ref(broken.decoder)
        del broken
        put(session, 1)
        put(session, 2)
        assert held() is None
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_found_anywhere(dtype, bad):
    name = str(dtype).removeprefix("torch.")
    size = (1 << 20) + 17
    values = torch.zeros(size, dtype=dtype)
    frame = TensorFrame("w", name, (size,), memoryview(values.view(torch.uint8).numpy()))
    check_finite(frame)
    values.fill_(torch.finfo(dtype).max)  # whose sum is infinite in float32
    check_finite(frame)
    for at in (0, 1 << 20, size - 1):
        values.zero_()
        values[at] = bad
        with pytest.raises(InvalidSnapshot, match="'w'"):
            check_finite(frame)


def test_tensors_of_a_stream_share_one_aligned_block():
    frames = [frame_of(n, np.arange(i + 1, dtype=np.float32)) for i, n in enumerate("abc")]
    header = Encoder("snapshot", {"step": 0}, frames).header
    sink = packed_sink(header)
    for number, entry in enumerate(header.tensors):
        view = sink(number, entry)
        assert view.nbytes == entry.nbytes
        tensor = tensor_of(TensorFrame(entry.name, entry.dtype, entry.shape, view))
        assert tensor.data_ptr() % 16 == 0


def test_a_session_deleted_while_its_answer_is_sent_keeps_its_bytes_until_then():
    store = make()
    session, _ = store.create("t", "s", SessionCreate(spec=SPEC))
    session.sending = 1
    store.delete("t", "s")
    store.sweep()
    assert store.budget.used == NEED
    session.sending = 0
    store.sweep()
    assert store.budget.used == 0


def test_a_long_spec_is_paid_for():
    """Nine bytes of weights each, and a kilobyte of spec."""
    parameters = [{"name": f"layers.{n}.weight", "shape": [1]} for n in range(500)]
    spec = ArchitectureSpec.model_validate({"family": "sequential", "parameters": parameters})
    session, _ = make(1 << 30).create("t", "s", SessionCreate(spec=spec, keep=2))
    assert session.reservation.nbytes == (3 + 2) * 500 * 64 + 500 * 1024


def test_a_nowcast_of_a_dropped_session_leaves_no_state():
    store = make()
    session, _ = store.create("t", "s", SessionCreate(spec=SPEC))
    key = ("snoo", "")
    session.states.put(key, {"anchor": 1})
    assert session.states.get(key) == {"anchor": 1}
    store.delete("t", "s")
    session.states.put(key, {"anchor": 2})  # the device was still at it
    assert session.states.get(key) is None
