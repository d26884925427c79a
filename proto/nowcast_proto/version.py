"""Protocol version, media types, headers and routes: everything both sides must spell alike."""

from __future__ import annotations

import re

from nowcast_proto.errors import UnsupportedVersion

PROTOCOL_VERSION = 1
"""The version this package speaks; it stands in the media type, the stream header and the route prefix."""
SERVED_VERSIONS: tuple[int, ...] = (1,)
"""Every version this package can still read."""

MEDIA_TYPE = f"application/vnd.nowcast.v{PROTOCOL_VERSION}"
"""Media type of a tensor stream."""
JSON_TYPE = "application/json"

HEADER_SESSION = "Nowcast-Session"
"""Repeats the session id on every session call, so that a proxy can route by it without parsing the path."""
HEADER_OFFSET = "Nowcast-Offset"
"""Byte of the stream at which the body of a resumed upload begins; absent or 0 for a whole upload."""
HEADER_DIGEST = "Nowcast-Digest"
"""Content digest of a stream (32 hex digits): ties a resumed upload to the one it continues."""
HEADER_INSTANCE = "Nowcast-Instance"
"""On every answer: which process gave it. Answers of two in turn mean that a balancer splits a session."""

ROUTE_NOWCAST = "/nowcast"
ROUTE_NOWCAST_V1 = "/v1/nowcast"
ROUTE_SESSION = "/v1/sessions/{session}"
ROUTE_SNAPSHOT = "/v1/sessions/{session}/snapshots/{step}"
ROUTE_NOWCASTS = "/v1/sessions/{session}/nowcasts"
ROUTE_SESSION_NOWCAST = "/v1/sessions/{session}/nowcasts/{nowcast}"
ROUTE_VERDICTS = "/v1/sessions/{session}/verdicts"
ROUTE_REPORTS = "/v1/sessions/{session}/reports"
ROUTE_TRAININGS = "/v1/trainings"
ROUTE_TRAINING = "/v1/trainings/{training}"
ROUTE_TRAINING_GRAPH = "/v1/trainings/{training}/graph"
ROUTE_WATCH = "/v1/watch"
ROUTE_STATUS = "/v1/status"
ROUTE_MODELS = "/v1/models"
ROUTE_HEALTH = "/healthz"
ROUTE_READY = "/readyz"
ROUTE_METRICS = "/metrics"

ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What a session or nowcast id may look like; ids are minted by the client (a UUID's hex is a good one)."""

_MEDIA = re.compile(r"application/vnd\.nowcast\.v(\d{1,9})")


def check_version(version: object, *, where: str) -> int:
    """Accept a served protocol version.

    Args:
        version: What the peer sent.
        where: Where it stood, for the message.

    Raises:
        UnsupportedVersion: Not served; the error names the versions that are, also in ``detail["served"]``.
    """
    if isinstance(version, int) and not isinstance(version, bool) and version in SERVED_VERSIONS:
        return version
    served = ", ".join(str(v) for v in SERVED_VERSIONS)
    shown = repr(version)
    raise UnsupportedVersion(
        f"{where} asks for protocol version {shown if len(shown) <= 40 else shown[:40] + '…'}",
        expected=f"one of the versions served: {served}",
        remedy="speak a served version, or update the older side",
        detail={"served": list(SERVED_VERSIONS)},
    )


def version_of_media_type(value: str) -> int | None:
    """Protocol version a ``Content-Type`` or ``Accept`` value names; None where it is not this protocol's.

    Raises:
        UnsupportedVersion: It is this protocol's media type in a version that is not served.
    """
    match = _MEDIA.match(value.strip().lower())
    return None if match is None else check_version(int(match[1]), where="the media type")
