"""The service as plain calls, for people without a training loop: snapshots in, future parameters out.

Arrays may be NumPy's or torch's; what goes in as torch tensors comes back as torch tensors. torch itself is only
touched where the caller already uses it.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, TypeVar, Unpack

import numpy as np
from nowcast_proto.arrays import float32_of, frame_of
from nowcast_proto.errors import InvalidSnapshot, MalformedFrame, NowcastError
from nowcast_proto.messages import (
    HealthReply,
    ModelsReply,
    NowcastReplyHeader,
    NowcastRequest,
    Reply,
    WireDType,
    explain,
    read_json,
    read_message,
)
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.stream import Decoder, Encoder, Header
from nowcast_proto.tensors import TensorFrame, seal
from nowcast_proto.trainings import StatusReply, TrainingsReply
from nowcast_proto.version import (
    MEDIA_TYPE,
    ROUTE_HEALTH,
    ROUTE_MODELS,
    ROUTE_NOWCAST_V1,
    ROUTE_READY,
    ROUTE_STATUS,
    ROUTE_TRAININGS,
)
from pydantic import ValidationError

from nowcast_client.errors import BadReply
from nowcast_client.wire.http import AsyncHttpTransport, HttpTransport
from nowcast_client.wire.transport import (
    MAX_JSON,
    NOT_AGAIN,
    RETRYABLE,
    WRITE_BYTES,
    Request,
    Retry,
    Transport,
    call,
    error_of,
)
from nowcast_client.wire.transport import Reply as HttpReply

Snapshot = Mapping[str, Any]
M = TypeVar("M", ModelsReply, HealthReply, TrainingsReply, StatusReply)
T = TypeVar("T")


def _frames(spec: ArchitectureSpec, snapshots: Sequence[Snapshot], dtype: WireDType) -> list[TensorFrame]:
    """Frames of all snapshots, in the spec's order.

    Raises:
        InvalidSnapshot: A tensor of the spec is missing, or has another shape or a dtype that is no float.
    """
    frames = []
    for number, snapshot in enumerate(snapshots):
        for name, shape in spec.shapes().items():
            if name not in snapshot:
                raise InvalidSnapshot(
                    f"snapshot {number + 1} of {len(snapshots)} lacks {name!r}", expected="every tensor of the spec"
                )
            array = _array(snapshot[name])
            if tuple(array.shape) != shape:
                raise InvalidSnapshot(
                    f"snapshot {number + 1}: {name!r} has shape {list(array.shape)}", expected=f"shape {list(shape)}"
                )
            frames.append(frame_of(name, array, dtype=dtype, snapshot=number))
    return frames


def _is_torch(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _array(value: Any) -> np.ndarray[Any, np.dtype[Any]]:
    if _is_torch(value):
        host = value.detach().cpu()
        return np.asarray(host.float() if str(host.dtype) == "torch.bfloat16" else host)
    return np.asarray(value)


class Asked(TypedDict, total=False):
    """How a nowcast is asked for, beside what from and how far.

    Attributes:
        predictor: The service's predictor; left out or None takes what the checkpoint is for.
        checkpoint: Name of a checkpoint; left out or None takes the default.
        reply: The future ``parameters``, as by default, or the ``delta`` from the newest snapshot to them.
        wire_dtype: What the snapshots travel as; float32 by default.
        reply_dtype: What the answer travels as; float32 by default.
        update_scale: Factor on the predicted change; 1 by default.
        deadline: Seconds the whole call may take; 600 by default.
    """

    predictor: str | None
    checkpoint: str | None
    reply: Reply
    wire_dtype: WireDType
    reply_dtype: WireDType
    update_scale: float
    deadline: float


@dataclass(frozen=True)
class _Question:
    """A one-shot request, and what its answer must be."""

    request: NowcastRequest
    seconds: float
    body: Encoder

    @classmethod
    def of(cls, spec: ArchitectureSpec, snapshots: Sequence[Snapshot], k: int, asked: Asked) -> _Question:
        seconds = asked.get("deadline", 600.0)
        told = {"spec": spec, "k": k, **asked, "deadline": seconds}
        told.pop("wire_dtype", None)
        try:
            request = NowcastRequest.model_validate(told)
        except ValidationError as exc:
            raise explain(exc, what="this nowcast") from exc
        frames = _frames(spec, snapshots, asked.get("wire_dtype", "float32"))
        seal(frames, os.cpu_count() or 1)
        return cls(request, seconds, Encoder(NowcastRequest.KIND, request, frames))

    def sent(self) -> Request:
        """What is sent, as often as it is tried."""
        headers = {"Content-Type": MEDIA_TYPE, "Accept": MEDIA_TYPE}
        return Request(
            "POST", ROUTE_NOWCAST_V1, headers, lambda: self.body.chunks(0, WRITE_BYTES), self.body.content_length
        )


class _Answer:
    """Takes the reply of a one-shot nowcast as it arrives."""

    def __init__(self, request: NowcastRequest) -> None:
        self._request = request
        self._decoder = Decoder()
        self._status = 200
        self._headers: Mapping[str, str] = {}
        self._other = bytearray()

    def begin(self, status: int, headers: Mapping[str, str]) -> Callable[[bytes], object]:
        self._status, self._headers = status, headers
        stream = status == 200 and headers.get("content-type", "").startswith(MEDIA_TYPE)
        return self._decoder.feed if stream else self._take

    def _take(self, chunk: bytes) -> None:
        self._other += chunk
        if len(self._other) > MAX_JSON:
            raise BadReply("a reply that is far too long for an error")

    def result(self) -> list[TensorFrame]:
        """The tensors.

        Raises:
            NowcastError: The error the reply carries, or what is wrong with it.
        """
        if self._decoder.position == 0:
            raise error_of(self._status, self._headers, bytes(self._other))
        header: Header = self._decoder.finish()
        message = read_message(NowcastReplyHeader, header)
        got = (message.k, message.reply, message.spec_digest)
        wanted = (self._request.k, self._request.reply, self._request.spec.digest())
        listed = [(entry.name, entry.shape) for entry in header.tensors]
        if got != wanted or listed != [(p.name, p.shape) for p in self._request.spec.parameters]:
            raise MalformedFrame("the reply answers another request", expected=f"horizon, kind and spec {wanted}")
        return self._decoder.frames


def _tensors(frames: Sequence[TensorFrame], like: Snapshot) -> dict[str, Any]:
    as_torch = any(_is_torch(value) for value in like.values())
    arrays = {frame.name: float32_of(frame) for frame in frames}
    return {name: sys.modules["torch"].from_numpy(a) for name, a in arrays.items()} if as_torch else arrays


class NowcastClient:
    """The service as blocking calls.

    Args:
        url: ``http(s)://host:port`` or ``unix:///path``. Default: ``NOWCAST_URL``, then ``http://127.0.0.1:8500``.
        api_key: Bearer token. Default: ``NOWCAST_API_KEY``.
        timeout: Seconds without progress after which a request is tried again.
        retry: How often.
        transport: Another way to the service than the url's.
        ca_file: PEM file of the certificate authorities to trust. Default: ``NOWCAST_CA_FILE``, then
            ``SSL_CERT_FILE`` and ``SSL_CERT_DIR``, then those of the certifi package.

    Raises:
        AttachError: The url, the key, a proxy variable or a file of certificates cannot work.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        retry: Retry | None = None,
        transport: Transport | None = None,
        ca_file: str | Path | None = None,
    ) -> None:
        self._transport = transport or HttpTransport(url, api_key=api_key, ca_file=ca_file)
        self._timeout = timeout
        self._retry = retry or Retry()

    def nowcast(
        self,
        spec: ArchitectureSpec,
        snapshots: Sequence[Snapshot],
        k: int,
        **asked: Unpack[Asked],
    ) -> dict[str, Any]:
        """Predict future parameters.

        Args:
            spec: Names and shapes of the network, and its family.
            snapshots: Oldest first, each name -> array; as many as the checkpoint reads (five).
            k: Horizon, in strides between the snapshots.
            **asked: See `Asked`.

        Returns:
            Name -> float32 array, torch tensors where the snapshots were.

        Raises:
            NowcastError: Refused, failed, unreachable, or too late.
        """
        question = _Question.of(spec, snapshots, k, asked)

        def read(got: HttpReply) -> list[TensorFrame]:
            answer = _Answer(question.request)
            take = answer.begin(got.status, got.headers)
            for chunk in got.chunks:
                take(chunk)
            return answer.result()

        frames = call(
            self._transport,
            question.sent(),
            read,
            # The service answers when it is done: silence until the deadline is not yet a fault.
            timeout=question.seconds,
            deadline=time.monotonic() + question.seconds,
            retry=self._retry,
            final=NOT_AGAIN,
        )
        return _tensors(frames, snapshots[-1])

    def models(self) -> ModelsReply:
        """Checkpoints, predictors and families the service offers."""
        return self._get(ROUTE_MODELS, ModelsReply)

    def health(self) -> HealthReply:
        """Whether the service's process lives; needs no key."""
        return self._get(ROUTE_HEALTH, HealthReply)

    def ready(self) -> HealthReply:
        """Whether the service can nowcast now; needs no key.

        Raises:
            Unavailable: It cannot.
        """
        return self._get(ROUTE_READY, HealthReply)

    def trainings(self) -> TrainingsReply:
        """The trainings of this key that the service shows, the newest first."""
        return self._get(ROUTE_TRAININGS, TrainingsReply)

    def status(self) -> StatusReply:
        """How the service is: queue, budgets and limits."""
        return self._get(ROUTE_STATUS, StatusReply)

    def _get(self, path: str, model: type[M]) -> M:
        return call(
            self._transport,
            Request("GET", path),
            lambda reply: read_json(model, reply.text()),
            timeout=self._timeout,
            deadline=time.monotonic() + self._timeout,
            retry=self._retry,
        )

    def close(self) -> None:
        """Drop all connections."""
        self._transport.close()

    def __enter__(self) -> NowcastClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncNowcastClient:
    """The same for asyncio; arguments as in `NowcastClient`."""

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        retry: Retry | None = None,
        ca_file: str | Path | None = None,
    ) -> None:
        self._transport = AsyncHttpTransport(url, api_key=api_key, ca_file=ca_file)
        self._timeout = timeout
        self._retry = retry or Retry()

    async def nowcast(
        self,
        spec: ArchitectureSpec,
        snapshots: Sequence[Snapshot],
        k: int,
        **asked: Unpack[Asked],
    ) -> dict[str, Any]:
        """See `NowcastClient.nowcast`. Snapshots are digested in a worker thread."""
        question = await asyncio.to_thread(_Question.of, spec, snapshots, k, asked)

        async def once() -> list[TensorFrame]:
            answer = _Answer(question.request)
            await self._transport.call(question.sent(), timeout=question.seconds, feed=answer.begin)
            return answer.result()

        frames = await self._tried(once, question.seconds, NOT_AGAIN)
        return _tensors(frames, snapshots[-1])

    async def models(self) -> ModelsReply:
        """See `NowcastClient.models`."""
        return await self._get(ROUTE_MODELS, ModelsReply)

    async def health(self) -> HealthReply:
        """See `NowcastClient.health`."""
        return await self._get(ROUTE_HEALTH, HealthReply)

    async def ready(self) -> HealthReply:
        """See `NowcastClient.ready`."""
        return await self._get(ROUTE_READY, HealthReply)

    async def _get(self, path: str, model: type[M]) -> M:
        async def once() -> M:
            body = bytearray()
            seen: list[tuple[int, Mapping[str, str]]] = []

            def begin(status: int, headers: Mapping[str, str]) -> Callable[[bytes], object]:
                seen.append((status, headers))
                return body.extend

            await self._transport.call(Request("GET", path), timeout=self._timeout, feed=begin)
            status, headers = seen[0]
            if status != 200:
                raise error_of(status, headers, bytes(body))
            return read_json(model, bytes(body))

        return await self._tried(once, self._timeout)

    async def _tried(
        self, once: Callable[[], Awaitable[T]], seconds: float, final: tuple[type[NowcastError], ...] = ()
    ) -> T:
        deadline = time.monotonic() + seconds
        attempt = 0
        while True:
            attempt += 1
            try:
                return await once()
            except RETRYABLE as exc:
                pause = self._retry.delay(attempt, exc)
                if isinstance(exc, final) or attempt >= self._retry.attempts or time.monotonic() + pause >= deadline:
                    raise
                await asyncio.sleep(pause)

    async def close(self) -> None:
        """Drop all connections."""
        await self._transport.close()

    async def __aenter__(self) -> AsyncNowcastClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
