"""One snapshot's way to the service: a broken upload goes on where it broke off."""

from __future__ import annotations

from functools import partial

from nowcast_proto.errors import ChecksumMismatch, Conflict, MalformedFrame, NowcastError
from nowcast_proto.messages import SnapshotState
from nowcast_proto.stream import Encoder
from nowcast_proto.version import HEADER_DIGEST, HEADER_OFFSET, MEDIA_TYPE

from nowcast_client.errors import BadReply, TransportError
from nowcast_client.wire.exchange import Exchange
from nowcast_client.wire.replies import parsed
from nowcast_client.wire.transport import WRITE_BYTES, Request, Retry


class Upload:
    """One snapshot on its way.

    Args:
        exchange: Makes the requests.
        session: The session's id.
        route: The snapshot's route.
        step: The snapshot's step.
        encoder: Its bytes.
        deadline: ``time.monotonic()`` after which to give up.
    """

    def __init__(
        self, exchange: Exchange, session: str, route: str, step: int, encoder: Encoder, deadline: float
    ) -> None:
        self._exchange = exchange
        self._session = session
        self._route = route
        self._step = step
        self._encoder = encoder
        self._digest = encoder.header.content_digest()
        self._deadline = deadline

    def run(self) -> None:
        """Send it until the service has all of it.

        Raises:
            Conflict: The service holds another snapshot of this step.
            NowcastError: It was refused, or the service cannot be reached in time.
        """
        total, attempts = self._encoder.content_length, self._exchange.retry.attempts
        start, attempt = 0, 0
        while True:
            attempt += 1
            try:
                state = self._send(start)
            except (TransportError, ChecksumMismatch, MalformedFrame, BadReply) as exc:
                self._exchange.trouble = str(exc)
                self._wait(attempt, exc)
                start = 0 if isinstance(exc, ChecksumMismatch | MalformedFrame) else self._received()
                if start == total:
                    return
            except Conflict as exc:
                if attempt >= attempts:
                    raise
                offset = exc.detail.get("offset")
                if isinstance(offset, int):  # the service has more or less of it than we thought
                    start = offset if 0 <= offset <= total else 0
                    continue
                # Other weights of this step are for the caller to sort out; a broken upload that the service has not
                # noticed yet is over in a moment.
                held = self._state()
                if held is None or (held.state == "complete" and held.digest != self._digest):
                    raise
                if held.state == "complete":
                    return
                self._wait(attempt, exc)
                start = 0
            except NowcastError as exc:
                if exc.retry_after is None:
                    raise
                self._wait(attempt, exc)
            else:
                if state.state == "complete" and state.digest in (None, self._digest):
                    return
                if attempt >= attempts:
                    raise BadReply(f"the snapshot of step {self._step} is {state.state}", expected="complete")
                start = 0

    def _send(self, start: int) -> SnapshotState:
        headers = {"Content-Type": MEDIA_TYPE, HEADER_DIGEST: self._digest}
        if start:
            headers[HEADER_OFFSET] = str(start)
        body = partial(self._encoder.chunks, start, WRITE_BYTES)
        request = Request("PUT", self._route, headers, body, self._encoder.content_length - start)
        return self._exchange.send(
            self._session, request, self._deadline, lambda reply: parsed(SnapshotState, reply), retry=Retry(attempts=1)
        )

    def _wait(self, attempt: int, error: NowcastError) -> None:
        if attempt >= self._exchange.retry.attempts:
            raise error
        self._exchange.pause(attempt, self._deadline, error)

    def _received(self) -> int:
        """Bytes of this very stream that the service already has; all of them when it is complete."""
        state = self._state()
        if state is None or state.digest != self._digest:
            return 0
        total = self._encoder.content_length
        return total if state.state == "complete" else min(max(state.received, 0), total - 1)

    def _state(self) -> SnapshotState | None:
        """What the service has of it; None where it cannot say."""
        try:
            return self._exchange.call(
                self._session, "GET", self._route, self._deadline, lambda reply: parsed(SnapshotState, reply)
            )
        except NowcastError:
            return None
