"""Histories of training jobs: a byte budget, uploads that can be resumed, idempotent writes, expiry.

The service is a cache of the history; the client keeps the truth until it is used. So dropping a session is always
allowed, and always said: the next call on it is answered ``expired`` or ``missing_snapshots``.

A session reserves all it will ever need when it is created. Otherwise many half-full sessions could fill the budget and
wait for each other for ever.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from nowcast_proto.errors import Busy, Conflict, Expired, InvalidSnapshot, MissingSnapshots, NotFound, TooLarge
from nowcast_proto.messages import NowcastJob, SessionCreate, SnapshotHeader, SnapshotState, Verdict, read_message
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.stream import Decoder, Header, Sink
from nowcast_proto.tensors import DTYPES, Limits, TensorEntry, TensorFrame
from torch import Tensor

from nowcast_service.runtime.device_queue import Job

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ALIGN = 64
_OWN_PAGES = 1 << 18
_TILE = 1 << 20
_REMEMBERED = 10_000
_VERDICTS = 1_000

Key = tuple[str, str | None]
"""Predictor and checkpoint, both by name."""


class Budget:
    """Bytes that may be reserved, in all. Thread-safe."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes reserved now."""
        return self._used

    def reserve(self, nbytes: int) -> Reservation | None:
        """Reserve bytes; None when there are not that many left."""
        return Reservation(self, nbytes) if self._take(nbytes) else None

    def _take(self, nbytes: int) -> bool:
        with self._lock:
            if nbytes > 0 and self._used + nbytes > self.total:
                return False
            self._used += nbytes
        return True


class Reservation:
    """A share of a `Budget`, given back once."""

    def __init__(self, budget: Budget, nbytes: int) -> None:
        self._budget = budget
        self.nbytes = nbytes
        self._lock = threading.Lock()

    def resize(self, nbytes: int) -> bool:
        """Make it this large; False, and nothing changed, when there is not that much left."""
        with self._lock:
            if not self._budget._take(nbytes - self.nbytes):
                return False
            self.nbytes = nbytes
        return True

    def release(self) -> None:
        """Give the bytes back; safe to call more than once."""
        self.resize(0)


def anonymous_memory(nbytes: int) -> memoryview:
    """Zeroed writable memory that goes back to the system as soon as nobody uses it.

    Large blocks get pages of their own: the heap would keep them, and a long-running service would grow.

    Raises:
        TooLarge: The system has no such block.
    """
    try:
        return memoryview(mmap.mmap(-1, nbytes) if nbytes >= _OWN_PAGES else bytearray(nbytes))
    except (MemoryError, OSError) as exc:
        raise TooLarge(f"there is no memory for {nbytes} bytes", remedy="lower NOWCAST_BUDGET") from exc


def check_tensors(spec: ArchitectureSpec, header: Header) -> None:
    """Hold what a stream is about to send to the spec, before a byte of it is read.

    Raises:
        InvalidSnapshot: A tensor is missing, unknown, or of another shape.
    """
    shapes = spec.shapes()
    seen = {entry.name for entry in header.tensors}
    for entry in header.tensors:
        if entry.name not in shapes:
            tied = entry.name in spec.ties
            raise InvalidSnapshot(
                f"the stream has tensor {entry.name[:100]!r}, which the spec {'ties' if tied else 'does not list'}",
                expected=f"the {len(shapes)} tensors of the spec",
                remedy="send tied tensors once, under their first name"
                if tied
                else "add it to the spec or leave it out of the snapshot",
            )
        if entry.shape != shapes[entry.name]:
            raise InvalidSnapshot(
                f"tensor {entry.name[:100]!r} has shape {list(entry.shape)}",
                expected=f"shape {list(shapes[entry.name])}",
                remedy="send the spec of the model you train",
            )
    if missing := [name for name in shapes if name not in seen]:
        raise InvalidSnapshot(
            f"the stream lacks tensor {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            expected=f"all {len(shapes)} tensors of the spec",
            remedy="save the whole model, or send the spec of what you save",
        )


def check_finite(frame: TensorFrame) -> None:
    """Refuse NaN and infinity; one pass, no copy of the tensor.

    Raises:
        InvalidSnapshot: A value is not finite.
    """
    for tile in tensor_of(frame).reshape(-1).split(_TILE):
        # The sum of finite values may itself overflow, so only a sum that is not finite is looked into.
        if not bool(tile.sum(dtype=torch.float32).isfinite()) and not bool(tile.isfinite().all()):
            raise InvalidSnapshot(
                f"tensor {frame.name[:100]!r} has NaN or infinity",
                expected="finite weights",
                remedy="nowcast from before the training diverged",
            )


def tensor_of(frame: TensorFrame) -> Tensor:
    """The frame's bytes as a torch tensor of its shape, without a copy."""
    return torch.frombuffer(frame.view(), dtype=TORCH_DTYPES[frame.dtype]).reshape(frame.shape)


def packed_sink(header: Header) -> Sink:
    """One block of memory for all tensors of a stream, each aligned for vector loads."""
    offsets, end = [], 0
    for entry in header.tensors:
        offsets.append(end)
        end += -(-entry.nbytes // _ALIGN) * _ALIGN
    block = anonymous_memory(max(end, 1))
    return lambda number, entry: block[offsets[number] : offsets[number] + entry.nbytes]


def packed_bytes(entries: tuple[TensorEntry, ...]) -> int:
    """Bytes `packed_sink` takes for these tensors."""
    return sum(-(-entry.nbytes // _ALIGN) * _ALIGN for entry in entries)


def spec_bytes(spec: ArchitectureSpec, itemsize: int = 4) -> int:
    """Bytes one snapshot of a spec takes, padding included."""
    return sum(-(-p.numel * itemsize // _ALIGN) * _ALIGN for p in spec.parameters)


@dataclass(eq=False)
class Upload:
    """A snapshot on its way in. Its decoder is all the state a resumed upload needs."""

    step: int
    decoder: Decoder
    busy: bool = False
    _digest: str | None = None

    @property
    def digest(self) -> str | None:
        """Content digest, once the header has arrived."""
        if self._digest is None and self.decoder.header is not None:
            self._digest = self.decoder.header.content_digest()
        return self._digest

    def state(self) -> SnapshotState:
        """What has arrived."""
        return SnapshotState(
            step=self.step,
            state="partial",
            received=self.decoder.position,
            total=self.decoder.content_length,
            digest=self.digest,
        )


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One snapshot, whole and checked."""

    step: int
    digest: str
    dtype: str
    nbytes: int
    tensors: Mapping[str, Tensor]
    completed: float = field(default_factory=time.monotonic)

    def state(self) -> SnapshotState:
        """How it is described to the client."""
        return SnapshotState(
            step=self.step,
            state="complete",
            received=self.nbytes,
            total=self.nbytes,
            digest=self.digest,
            dtype=self.dtype,
            age=time.monotonic() - self.completed,
        )


@dataclass(eq=False)
class Nowcast:
    """One nowcast of a session, from its request to its verdict.

    The job keeps the answer; dropping the record drops the answer's memory.
    """

    request: NowcastJob
    digest: str
    job: Job[Any]
    key: Key
    undo: list[tuple[Key, Any]]
    """Once it is computed, the predictor's state from before it, to go back to if training refuses it."""
    fetched: bool = False


@dataclass(eq=False)
class Session:
    """One training job's history. Touched from the event loop only; uploads fill their own memory elsewhere."""

    tenant: str
    name: str
    spec: ArchitectureSpec
    spec_digest: str
    keep: int
    dtype: str
    need: int
    reservation: Reservation
    max_results: int
    touched: float = field(default_factory=time.monotonic)
    snapshots: OrderedDict[int, Snapshot] = field(default_factory=OrderedDict)
    uploads: dict[int, Upload] = field(default_factory=dict)
    nowcasts: OrderedDict[str, Nowcast] = field(default_factory=OrderedDict)
    states: dict[Key, Any] = field(default_factory=dict)
    verdicts: OrderedDict[tuple[str, str], None] = field(default_factory=OrderedDict)
    dropped: bool = False

    @property
    def idle(self) -> bool:
        """Whether nothing is arriving or being computed for it."""
        return not any(u.busy for u in self.uploads.values()) and not any(
            n.job.state in ("queued", "running") for n in self.nowcasts.values()
        )

    def leave(self) -> bool:
        """Drop all it holds; whether that is done, and its reservation given back.

        What a request is still filling or the device still reads stays where it is, and paid for, until they end.
        """
        self.dropped = True
        self.snapshots.clear()
        self.states.clear()
        for step in [step for step, upload in self.uploads.items() if not upload.busy]:
            del self.uploads[step]
        for name in [name for name, nowcast in self.nowcasts.items() if nowcast.job.state in ("done", "failed")]:
            del self.nowcasts[name]
        if self.idle:
            self.reservation.release()
        return self.idle

    def open_upload(self, step: int, offset: int, digest: str | None, limits: Limits) -> Upload:
        """The upload a body that begins at ``offset`` belongs to, marked busy.

        Args:
            step: The snapshot's step.
            offset: Byte of the stream the body begins at; 0 starts afresh.
            digest: Content digest the client says it continues, or None.
            limits: Caps of the stream.

        Raises:
            Conflict: Another request is sending this step, or the upload does not stand where the client thinks.
        """
        upload = self.uploads.get(step)
        if upload is not None and upload.busy:
            raise Conflict(
                f"snapshot {step} is being sent by another request",
                remedy="wait for it to end or break off, then ask for its state",
            )
        if offset:
            at = 0 if upload is None else upload.decoder.position
            if upload is None or at != offset or (digest is not None and digest != upload.digest):
                raise Conflict(
                    f"the upload of snapshot {step} cannot resume at byte {offset}",
                    expected=f"byte {at} of the same content" if at else "a new upload from byte 0",
                    remedy="ask for the snapshot's state and send the rest, or all of it",
                    detail={"offset": at if upload is not None and digest in (None, upload.digest) else 0},
                )
        else:
            # One broken upload at a time is kept: that much the session has reserved.
            for other in [s for s, u in self.uploads.items() if not u.busy]:
                del self.uploads[other]
            if self.uploads:
                raise Busy(
                    f"snapshot {next(iter(self.uploads))} of this session is being sent",
                    expected="one snapshot after the other",
                    retry_after=1.0,
                )
            self._make_room_for_pinned()
            # The decoder knows the session, not the upload: no cycle may keep a snapshot's memory alive.
            upload = Upload(step, Decoder(lambda header: self._open(step, header), limits, check_finite))
            self.uploads[step] = upload
        upload.busy = True
        return upload

    def _open(self, step: int, header: Header) -> Sink:
        message = read_message(SnapshotHeader, header)
        if message.step != step:
            raise Conflict(f"the stream is of step {message.step}", expected=f"step {step}, as in the path")
        if header.snapshots > 1:
            raise InvalidSnapshot(f"the stream has {header.snapshots} snapshots", expected="one per upload")
        check_tensors(self.spec, header)
        widest = max(header.tensors, key=lambda entry: DTYPES[entry.dtype])
        if DTYPES[widest.dtype] > DTYPES[self.dtype]:
            raise InvalidSnapshot(
                f"tensor {widest.name[:100]!r} is {widest.dtype}",
                expected=f"{self.dtype}, as the session was created with",
                remedy="create the session with the widest dtype you will send",
            )
        held = self.snapshots.get(step)
        if held is not None:
            self._same(held, header.content_digest())
        return packed_sink(header)

    def _make_room_for_pinned(self) -> None:
        """Reserve for snapshots that are no longer kept but still read by a nowcast.

        Raises:
            Busy: There is no room for them.
        """
        active = [n for n in self.nowcasts.values() if n.job.state in ("queued", "running")]
        pinned = {step for n in active for step in n.request.steps if step not in self.snapshots}
        if not self.reservation.resize(self.need + len(pinned) * spec_bytes(self.spec, DTYPES[self.dtype])):
            raise Busy(
                f"{len(pinned)} older snapshots of session {self.name} are still in use by a nowcast",
                remedy="try again after Retry-After",
                retry_after=2.0,
            )

    def _same(self, held: Snapshot, digest: str) -> None:
        if held.digest != digest:
            raise Conflict(
                f"snapshot {held.step} is held with other content",
                expected=f"content digest {held.digest}",
                remedy="use another step or session for other weights",
                detail={"digest": held.digest},
            )

    def complete(self, upload: Upload) -> tuple[Snapshot, bool]:
        """Turn a finished upload into a snapshot; whether it is new. The oldest ones over ``keep`` are dropped.

        Raises:
            MalformedFrame: The stream is not whole.
            Conflict: The step is held with other content.
        """
        upload.decoder.finish()
        self.uploads.pop(upload.step, None)
        digest = upload.digest or ""
        held = self.snapshots.get(upload.step)
        if held is not None:
            self._same(held, digest)
            return held, False
        frames = upload.decoder.frames
        snapshot = Snapshot(
            upload.step,
            digest,
            frames[0].dtype,
            upload.decoder.position,
            {frame.name: tensor_of(frame) for frame in frames},
        )
        self.snapshots[upload.step] = snapshot
        for step in sorted(self.snapshots)[: -self.keep]:
            del self.snapshots[step]
        return snapshot, True

    def history(self, steps: tuple[int, ...]) -> tuple[Snapshot, ...]:
        """The snapshots of these steps.

        Raises:
            MissingSnapshots: Some are not held; ``detail["missing"]`` lists them.
        """
        missing = [step for step in steps if step not in self.snapshots]
        if missing:
            raise MissingSnapshots(
                f"session {self.name} does not hold {len(missing)} of the {len(steps)} snapshots",
                expected=f"steps {list(steps)}",
                remedy="send the missing snapshots and ask again",
                detail={"missing": missing},
            )
        return tuple(self.snapshots[step] for step in steps)

    def earlier(self, request: NowcastJob) -> Nowcast | None:
        """The nowcast of this id, if it was asked for before.

        Raises:
            Conflict: It was asked for with another body.
        """
        found = self.nowcasts.get(request.nowcast)
        if found is not None and found.digest != job_digest(request):
            raise Conflict(
                f"nowcast {request.nowcast} was asked for with another body",
                expected="the same body for the same id",
                remedy="mint a new id for a new question",
            )
        return found

    def remember(self, nowcast: Nowcast) -> None:
        """Keep a nowcast, and drop the oldest finished ones over the number of answers kept."""
        self.nowcasts[nowcast.request.nowcast] = nowcast
        self.nowcasts.move_to_end(nowcast.request.nowcast)
        finished = [i for i, n in self.nowcasts.items() if n.job.state in ("done", "failed")]
        for name in finished[: max(0, len(self.nowcasts) - self.max_results)]:
            del self.nowcasts[name]

    def check_turn(self) -> None:
        """State that the session may ask for one more nowcast.

        Raises:
            Busy: As many as it may keep answers of are queued or running.
        """
        active = sum(n.job.state in ("queued", "running") for n in self.nowcasts.values())
        if active >= self.max_results:
            raise Busy(
                f"session {self.name} has {active} nowcasts under way",
                expected=f"at most {self.max_results}",
                remedy="wait for one to end",
                retry_after=2.0,
            )

    def nowcast(self, name: str) -> Nowcast:
        """The nowcast of this id.

        Raises:
            NotFound: There is none, or its answer was dropped for a newer one's.
        """
        found = self.nowcasts.get(name)
        if found is None:
            raise NotFound(
                f"session {self.name} has no nowcast {name}",
                remedy="ask for it again; the service keeps the newest answers only",
            )
        return found

    def judge(self, verdict: Verdict) -> bool:
        """Note a verdict; whether it is the first of its kind for this nowcast.

        A nowcast that training refused leaves no trace in the predictor's state.
        """
        key = (verdict.nowcast, verdict.outcome)
        if key in self.verdicts:
            return False
        self.verdicts[key] = None
        while len(self.verdicts) > _VERDICTS:
            self.verdicts.popitem(last=False)
        found = self.nowcasts.get(verdict.nowcast)
        if found is not None and found.undo and verdict.outcome in ("rejected", "rolled_back", "shadow"):
            of, before = found.undo.pop()
            self.states[of] = before
        return True


def job_digest(request: NowcastJob) -> str:
    """Digest of a nowcast's question."""
    return hashlib.blake2b(request.model_dump_json().encode(), digest_size=16).hexdigest()


class SessionStore:
    """All sessions of one service.

    Args:
        budget: What histories, uploads and answers may take together.
        tenant_bytes: What the sessions of one tenant may reserve.
        session_bytes: What one session may reserve.
        max_sessions: Sessions in all.
        max_sessions_per_tenant: Sessions of one tenant.
        expiry: Seconds of idleness after which a session is dropped.
        evict_after: Seconds of idleness after which it may be dropped to make room.
        results: Answers a session keeps.
        on_drop: Called with the reason for every session dropped.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        tenant_bytes: int,
        session_bytes: int,
        max_sessions: int,
        max_sessions_per_tenant: int,
        expiry: float,
        evict_after: float,
        results: int,
        on_drop: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.budget = budget
        self._tenant_bytes = tenant_bytes
        self._session_bytes = session_bytes
        self._max_sessions = max_sessions
        self._max_per_tenant = max_sessions_per_tenant
        self.expiry = expiry
        self._evict_after = evict_after
        self._results = results
        self._on_drop = on_drop
        self._sessions: dict[tuple[str, str], Session] = {}
        self._leaving: list[Session] = []
        self._expired: OrderedDict[tuple[str, str], str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def unfetched(self) -> int:
        """Nowcasts that are done and were not fetched yet."""
        found = (n for session in self._sessions.values() for n in session.nowcasts.values())
        return sum(n.job.state in ("done", "failed") and not n.fetched for n in found)

    def create(self, tenant: str, name: str, request: SessionCreate) -> tuple[Session, bool]:
        """Create a session, or find the same one; whether it is new.

        Raises:
            Conflict: It exists with another spec.
            TooLarge: It would never fit its quota.
            Busy: There is no room now.
        """
        digest = request.spec.digest()
        held = self._sessions.get((tenant, name))
        if held is not None:
            if (held.spec_digest, held.keep, held.dtype) != (digest, request.keep, request.dtype):
                raise Conflict(
                    f"session {name} exists with another spec, number of snapshots or dtype",
                    expected=f"spec digest {held.spec_digest}, keep {held.keep}, {held.dtype}",
                    remedy="use a new session id for another model",
                )
            held.touched = time.monotonic()
            return held, False
        # keep snapshots, one more on its way in, and the answers.
        one = spec_bytes(request.spec, DTYPES[request.dtype])
        need = (request.keep + 1) * one + self._results * spec_bytes(request.spec)
        cap = min(self._session_bytes, self._tenant_bytes, self.budget.total)
        if need > cap:
            raise TooLarge(
                f"session {name} would need {need} bytes",
                expected=f"at most {cap}",
                remedy="keep fewer snapshots, send them as bfloat16, or raise NOWCAST_BUDGET and its quotas",
            )
        session = Session(
            tenant,
            name,
            request.spec,
            digest,
            request.keep,
            request.dtype,
            need,
            self._room(tenant, need),
            self._results,
        )
        self._sessions[tenant, name] = session
        self._expired.pop((tenant, name), None)
        return session, True

    def get(self, tenant: str, name: str) -> Session:
        """A tenant's session; another tenant's does not exist for it.

        Raises:
            NotFound: There is none.
            Expired: There was one, and it was dropped.
        """
        self.sweep()
        session = self._sessions.get((tenant, name))
        if session is None:
            reason = self._expired.get((tenant, name))
            if reason is not None:
                raise Expired(
                    f"session {name} was dropped: {reason}",
                    remedy="create it again and send its snapshots again",
                    detail={"reason": reason},
                )
            raise NotFound(f"there is no session {name}", remedy="create it with PUT, then send its snapshots")
        session.touched = time.monotonic()
        return session

    def delete(self, tenant: str, name: str) -> None:
        """Drop a session at its owner's wish; one that does not exist is as good as dropped."""
        self._drop((tenant, name), None)

    def sweep(self) -> None:
        """Drop sessions that were idle for too long; give back what dropped ones still used when they were dropped."""
        self._leaving = [session for session in self._leaving if not session.leave()]
        now = time.monotonic()
        for key, session in list(self._sessions.items()):
            if now - session.touched > self.expiry and session.idle:
                self._drop(key, "expired")

    def reserve(self, nbytes: int, what: str) -> Reservation:
        """Reserve bytes outside any session, dropping the longest idle sessions where that makes room.

        Raises:
            TooLarge: It would never fit.
            Busy: There is no room now.
        """
        if nbytes > self.budget.total:
            raise TooLarge(
                f"{what} would need {nbytes} bytes",
                expected=f"at most {self.budget.total}",
                remedy="use a smaller model, or raise NOWCAST_BUDGET",
            )
        self.sweep()
        while (reservation := self.budget.reserve(nbytes)) is None:
            if not self._evict_one(lambda session: True):
                raise Busy(
                    f"there is no room for {what} now: {nbytes} bytes are needed",
                    expected=f"{self.budget.total - self.budget.used} bytes or fewer",
                    remedy="try again after Retry-After",
                    retry_after=2.0,
                )
        return reservation

    def _room(self, tenant: str, need: int) -> Reservation:
        mine = [s for (owner, _), s in self._sessions.items() if owner == tenant]
        while len(mine) >= self._max_per_tenant or sum(s.reservation.nbytes for s in mine) + need > self._tenant_bytes:
            if not self._evict_one(lambda session: session.tenant == tenant):
                raise Busy(
                    f"this key holds {len(mine)} sessions already",
                    expected=f"at most {self._max_per_tenant} sessions and {self._tenant_bytes} bytes",
                    remedy="delete sessions that are done, or try again after Retry-After",
                    retry_after=5.0,
                )
            mine = [s for s in mine if not s.dropped]
        while len(self._sessions) >= self._max_sessions:
            if not self._evict_one(lambda session: True):
                raise Busy(
                    f"{len(self._sessions)} sessions are held already",
                    expected=f"at most {self._max_sessions}",
                    remedy="try again after Retry-After",
                    retry_after=5.0,
                )
        return self.reserve(need, "the session")

    def _evict_one(self, may: Callable[[Session], bool]) -> bool:
        now = time.monotonic()
        idle = [
            (session.touched, key)
            for key, session in self._sessions.items()
            if may(session) and session.idle and now - session.touched >= self._evict_after
        ]
        if not idle:
            return False
        self._drop(min(idle)[1], "evicted to make room")
        return True

    def _drop(self, key: tuple[str, str], reason: str | None) -> None:
        session = self._sessions.pop(key, None)
        if session is None:
            return
        if not session.leave():
            self._leaving.append(session)
        self._on_drop(reason or "deleted")
        if reason is not None:
            self._expired[key] = reason
            while len(self._expired) > _REMEMBERED:
                self._expired.popitem(last=False)
