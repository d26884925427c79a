"""The history of one training job: snapshots, uploads that can be resumed, nowcasts and their verdicts."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nowcast_proto.errors import Busy, Conflict, InvalidSnapshot, MissingSnapshots, NotFound
from nowcast_proto.messages import NowcastJob, SnapshotHeader, SnapshotState, Verdict, read_message
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.stream import Decoder, Header, Sink
from nowcast_proto.tensors import DTYPES, Limits
from torch import Tensor

from nowcast_service.runtime.arrival import check_finite, check_tensors, packed_sink, spec_bytes, tensor_of
from nowcast_service.runtime.budget import Reservation
from nowcast_service.runtime.catalogue import Key
from nowcast_service.runtime.device_queue import Job
from nowcast_service.runtime.states import States

_REMEMBERED = 1_000
"""Nowcasts, and verdicts on them, that a session remembers."""


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
    states: States = field(default_factory=States)
    sending: int = 0
    asked: OrderedDict[str, None] = field(default_factory=OrderedDict)
    verdicts: OrderedDict[tuple[str, str], None] = field(default_factory=OrderedDict)
    dropped: bool = False

    @property
    def idle(self) -> bool:
        """Whether nothing is arriving, being computed or being sent for it."""
        return (
            not self.sending
            and not any(u.busy for u in self.uploads.values())
            and not any(n.job.state in ("queued", "running") for n in self.nowcasts.values())
        )

    def leave(self) -> bool:
        """Drop all it holds; whether that is done, and its reservation given back.

        What a request is still filling or sending or the device still reads stays, and paid for, until they end.
        """
        self.dropped = True
        for nowcast in self.nowcasts.values():
            nowcast.job.unwanted = True  # ends it where it asks next
        self.snapshots.clear()
        self.states.close()
        for step in [step for step, upload in self.uploads.items() if not upload.busy]:
            del self.uploads[step]
        for name in [name for name, nowcast in self.nowcasts.items() if nowcast.job.state in ("done", "failed")]:
            del self.nowcasts[name]
        if self.idle:
            self.reservation.release()
        return self.idle

    def lapse(self, since: float) -> None:
        """Give back the memory set aside where nothing has come by then: a claim is not a history.

        It is set aside anew when a snapshot comes. What of one has arrived is dropped; it begins again.
        """
        if self.snapshots or not self.idle or self.touched > since or self.nowcasts:
            return
        self.uploads.clear()
        self.reservation.release()

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
        self.asked[nowcast.request.nowcast] = None
        while len(self.asked) > _REMEMBERED:
            self.asked.popitem(last=False)
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

        Raises:
            NotFound: The session had no such nowcast.
        """
        if verdict.nowcast not in self.asked:
            raise NotFound(
                f"session {self.name} had no nowcast {verdict.nowcast}",
                expected=f"one of the last {_REMEMBERED} it was asked for",
                remedy="send verdicts to the session that the nowcast came from",
            )
        key = (verdict.nowcast, verdict.outcome)
        if key in self.verdicts:
            return False
        self.verdicts[key] = None
        while len(self.verdicts) > _REMEMBERED:
            self.verdicts.popitem(last=False)
        found = self.nowcasts.get(verdict.nowcast)
        if found is not None and found.undo and verdict.outcome in ("rejected", "rolled_back", "shadow"):
            of, before = found.undo.pop()
            self.states.put(of, before)
        return True


def job_digest(request: NowcastJob) -> str:
    """Digest of a nowcast's question."""
    return hashlib.blake2b(request.model_dump_json().encode(), digest_size=16).hexdigest()
