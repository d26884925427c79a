"""Error codes, the one error body, and the exception tree everything else raises from.

The tree (a leaf per code, so callers can catch what they can handle)::

    NowcastError
    ├── InvalidSpec            a spec that is malformed or contradicts itself
    ├── UnsupportedArchitecture  a family or layout no graph can be built for
    ├── InvalidSnapshot        wrong tensors, shapes, counts, or values that are not finite
    ├── InvalidCheckpoint      a file that is not a checkpoint, or one that does not fit the request
    ├── HorizonOutOfRange      a horizon k the checkpoint was not trained for
    ├── UnreadableFile         a file that is missing, truncated or in no known format
    ├── MalformedFrame         bytes that break the wire format
    ├── ChecksumMismatch       bytes that changed on the way; sending them again helps
    ├── InvalidRequest         a field that is missing, unknown or has a wrong value
    ├── UnsupportedVersion     a protocol version that is not served
    ├── TooLarge               a size over its cap
    ├── Unauthorized           no key, or a wrong one
    ├── NotFound               no such session, nowcast or route for this key
    ├── MethodNotAllowed       the route exists, but not for this method
    ├── Conflict               the same step or id with a different body
    ├── MissingSnapshots       the service no longer holds steps it needs; ``detail["missing"]`` lists them
    ├── Expired                a session that was idle for too long
    ├── Busy                   admission refused; ``retry_after`` says when to come back
    ├── Unavailable            not serving: shutting down or not ready; ``retry_after`` says when to come back
    ├── DeadlineExceeded       the answer would come too late
    └── InternalError          a bug on our side; nothing internal is disclosed
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field


class ErrorBody(BaseModel):
    """The body of every error reply, whatever the route."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    code: str = Field(description="Stable machine-readable code.", examples=["invalid_snapshot"])
    message: str = Field(
        description="What was wrong, naming the thing.", examples=["tensor 'fc.weight' has shape [3, 4]"]
    )
    expected: str | None = Field(default=None, description="What was expected instead.", examples=["shape [4, 4]"])
    remedy: str | None = Field(
        default=None, description="What to do about it.", examples=["send the spec of this model"]
    )
    detail: dict[str, Any] = Field(default_factory=dict, description="Machine-readable particulars.")


class NowcastError(Exception):
    """Base of every error this project raises on purpose.

    Args:
        message: What came, naming the thing.
        expected: What was expected.
        remedy: What the caller can do.
        detail: Machine-readable particulars; must be JSON-serialisable.
        retry_after: Seconds after which trying again makes sense, if ever.
    """

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 400

    def __init__(
        self,
        message: str,
        *,
        expected: str | None = None,
        remedy: str | None = None,
        detail: dict[str, Any] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.expected = expected
        self.remedy = remedy
        self.detail = detail or {}
        self.retry_after = retry_after

    def __str__(self) -> str:
        parts = [self.message]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.remedy:
            parts.append(self.remedy)
        return "; ".join(parts)

    def body(self) -> ErrorBody:
        """The wire form of this error."""
        return ErrorBody(
            code=self.code, message=self.message, expected=self.expected, remedy=self.remedy, detail=self.detail
        )

    @staticmethod
    def from_body(body: ErrorBody, *, retry_after: float | None = None) -> NowcastError:
        """Rebuild the typed error a peer sent; an unknown code becomes the base class."""
        cls = _BY_CODE.get(body.code, NowcastError)
        return cls(
            body.message, expected=body.expected, remedy=body.remedy, detail=dict(body.detail), retry_after=retry_after
        )


class InvalidSpec(NowcastError):
    code = "invalid_spec"
    http_status = 422


class UnsupportedArchitecture(NowcastError):
    code = "unsupported_architecture"
    http_status = 422


class InvalidSnapshot(NowcastError):
    code = "invalid_snapshot"
    http_status = 422


class InvalidCheckpoint(NowcastError):
    code = "invalid_checkpoint"
    http_status = 422


class HorizonOutOfRange(NowcastError):
    code = "horizon_out_of_range"
    http_status = 422


class UnreadableFile(NowcastError):
    code = "unreadable_file"
    http_status = 422


class MalformedFrame(NowcastError):
    code = "malformed_frame"
    http_status = 400


class ChecksumMismatch(NowcastError):
    code = "checksum_mismatch"
    http_status = 400


class InvalidRequest(NowcastError):
    code = "invalid_request"
    http_status = 422


class UnsupportedVersion(NowcastError):
    code = "unsupported_version"
    http_status = 400


class TooLarge(NowcastError):
    code = "too_large"
    http_status = 413


class Unauthorized(NowcastError):
    code = "unauthorized"
    http_status = 401


class NotFound(NowcastError):
    code = "not_found"
    http_status = 404


class MethodNotAllowed(NowcastError):
    code = "method_not_allowed"
    http_status = 405


class Conflict(NowcastError):
    code = "conflict"
    http_status = 409


class MissingSnapshots(NowcastError):
    code = "missing_snapshots"
    http_status = 409


class Expired(NowcastError):
    code = "expired"
    http_status = 410


class Busy(NowcastError):
    code = "busy"
    http_status = 429


class Unavailable(NowcastError):
    code = "unavailable"
    http_status = 503


class DeadlineExceeded(NowcastError):
    code = "deadline_exceeded"
    http_status = 504


class InternalError(NowcastError):
    code = "internal"
    http_status = 500


_BY_CODE: dict[str, type[NowcastError]] = {cls.code: cls for cls in NowcastError.__subclasses__()}
