"""A small service behind a `FakeTransport`: keeps snapshots, answers nowcasts with changes a test chooses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from nowcast_client.testing import FakeTransport
from nowcast_client.wire.transport import Request
from nowcast_proto.arrays import array_of, float32_of, frame_of
from nowcast_proto.errors import Conflict, MissingSnapshots, NotFound, NowcastError
from nowcast_proto.messages import NowcastJob, NowcastReplyHeader, SessionCreate
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.stream import Decoder, Encoder
from nowcast_proto.version import JSON_TYPE, MEDIA_TYPE

Arrays = Mapping[str, np.ndarray]
Answer = tuple[int, Mapping[str, str], bytes]


class FakeService:
    """Args:
    predict: Given the history, oldest first, the change of every tensor.
    """

    def __init__(self, predict: Callable[[Sequence[Arrays], int], Arrays]) -> None:
        self.predict = predict
        self.sessions: dict[str, tuple[ArchitectureSpec, dict[int, tuple[str, Arrays]]]] = {}
        self.jobs: dict[str, NowcastJob] = {}
        self.verdicts: list[tuple[str, str]] = []
        self.served = 0
        self.gate = threading.Event()  # nowcasts wait for it
        self.gate.set()
        self.spoil: Callable[[bytes], bytes] = lambda body: body
        self.transport = FakeTransport(self._handle)

    def forget(self) -> None:
        """What a restart does."""
        self.sessions.clear()
        self.jobs.clear()

    def _handle(self, request: Request) -> Answer:
        body = b"".join(bytes(c) for c in request.body()) if request.body else b""
        try:
            return self._serve(request, body)
        except NowcastError as exc:
            return exc.http_status, {}, exc.body().model_dump_json().encode()

    def _serve(self, request: Request, body: bytes) -> Answer:
        parts = request.path.partition("?")[0].strip("/").split("/")
        session = parts[2]
        if len(parts) == 3 and request.method == "PUT":
            spec = SessionCreate.model_validate_json(body).spec
            self.sessions.setdefault(session, (spec, {}))
            return self._state(session)
        if session not in self.sessions:
            raise NotFound(f"no session {session}")
        spec, held = self.sessions[session]
        if len(parts) == 3:
            if request.method == "DELETE":
                del self.sessions[session]
                return 204, {}, b""
            return self._state(session)
        if parts[3] == "snapshots":
            decoder = Decoder()
            decoder.feed(body)
            digest, step = decoder.finish().content_digest(), int(parts[4])
            if step in held and held[step][0] != digest:
                raise Conflict(f"another snapshot of step {step}")
            held[step] = (digest, {f.name: float32_of(f).copy() for f in decoder.frames})
            return 200, {}, _json({"step": step, "state": "complete", "digest": digest})
        if parts[3] == "verdicts":
            verdict = json.loads(body)
            self.verdicts.append((verdict["nowcast"], verdict["outcome"]))
            return 200, {}, _json({**verdict, "counted": True})
        if parts[3] == "reports":
            return 200, {}, _json({})
        if request.method == "POST":
            job = NowcastJob.model_validate_json(body)
            missing = [s for s in job.steps if s not in held]
            if missing:
                raise MissingSnapshots("missing", detail={"missing": missing})
            self.jobs[job.nowcast] = job
            return 202, {}, _json({"nowcast": job.nowcast, "state": "queued", "location": "here"})
        if parts[4] not in self.jobs:
            raise NotFound("no such nowcast")
        job = self.jobs[parts[4]]
        if not self.gate.wait(0.02):
            return 202, {}, _json({"nowcast": job.nowcast, "state": "running", "location": "here"})
        self.served += 1
        deltas = self.predict([held[s][1] for s in job.steps], job.k)
        header = NowcastReplyHeader(
            nowcast=job.nowcast,
            k=job.k,
            predictor=job.predictor or "nino",
            reply="delta",
            update_scale=job.update_scale,
            steps=job.steps,
            spec_digest=spec.digest(),
        )
        frames = [frame_of(name, deltas[name].astype(np.float32), dtype=job.reply_dtype) for name in deltas]
        stream = b"".join(Encoder(NowcastReplyHeader.KIND, header, frames).chunks())
        return 200, {"Content-Type": MEDIA_TYPE}, self.spoil(stream)

    def _state(self, session: str) -> Answer:
        spec, held = self.sessions[session]
        snapshots = [{"step": s, "state": "complete", "digest": d} for s, (d, _) in held.items()]
        fields = {"session": session, "spec_digest": spec.digest(), "keep": 6, "snapshots": snapshots}
        return 200, {}, _json({**fields, "expires_in": 100.0})


def _json(fields: Mapping[str, object]) -> bytes:
    return json.dumps(fields).encode()


def linear(history: Sequence[Arrays], k: int) -> Arrays:
    """Half the last stride's movement, ``k`` times: a change any check lets pass."""
    return {name: 0.5 * k * (history[-1][name] - history[-2][name]) for name in history[-1]}


def nothing(history: Sequence[Arrays], k: int) -> Arrays:
    """No change."""
    return {name: np.zeros_like(value) for name, value in history[-1].items()}


__all__ = ["JSON_TYPE", "FakeService", "array_of", "linear", "nothing"]
