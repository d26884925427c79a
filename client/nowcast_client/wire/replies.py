"""What a reply must be before anything in it is believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from nowcast_proto.errors import MalformedFrame, MissingSnapshots, NowcastError
from nowcast_proto.messages import (
    NowcastJob,
    NowcastReplyHeader,
    SessionState,
    SnapshotState,
    VerdictReply,
    WireDType,
    read_json,
)
from nowcast_proto.stream import Decoder, Header, Sink, allocate
from nowcast_proto.tensors import Limits, TensorFrame
from nowcast_proto.version import MEDIA_TYPE

from nowcast_client.errors import BadReply
from nowcast_client.wire.transport import Reply

M = TypeVar("M", SessionState, SnapshotState, VerdictReply)


def parsed(model: type[M], reply: Reply) -> M:
    """A JSON reply.

    Raises:
        BadReply: It is not the document that was asked for.
    """
    text = reply.text()
    try:
        return read_json(model, text)
    except NowcastError as exc:
        raise BadReply(f"a reply that is no {model.__name__}: {exc.message[:120]}") from exc


def missing_steps(exc: MissingSnapshots, job: NowcastJob) -> list[int]:
    """The job's steps the service says it lacks; all of them where it does not say."""
    listed = exc.detail.get("missing")
    steps = [s for s in listed if s in job.steps] if isinstance(listed, list) else []
    return sorted(steps) or list(job.steps)


def read_stream(reply: Reply, check: Callable[[Header], None], limits: Limits) -> tuple[Header, list[TensorFrame]]:
    """Read a reply that is a tensor stream; its header is checked before memory is taken for its tensors.

    Raises:
        BadReply: It is of another media type.
        NowcastError: What the decoder or ``check`` finds.
    """
    kind = reply.headers.get("content-type", "")
    if not kind.startswith(MEDIA_TYPE):
        raise BadReply(f"a reply of type {kind[:80]!r}", expected=MEDIA_TYPE)

    def open_sink(header: Header) -> Sink:
        check(header)
        return allocate

    decoder = Decoder(open_sink, limits)
    for chunk in reply.chunks:
        decoder.feed(chunk)
    return decoder.finish(), decoder.frames


def check_reply(
    message: NowcastReplyHeader,
    header: Header,
    job: NowcastJob,
    expected: Sequence[tuple[str, tuple[int, ...]]],
    spec_digest: str,
) -> None:
    """Hold a nowcast's header against what was asked for.

    The header has no checksum of its own, so every field that matters is compared.

    Raises:
        MalformedFrame: A field is not the one that was asked for; asking again may help.
    """
    pairs: dict[str, tuple[object, object]] = {
        "nowcast id": (message.nowcast, job.nowcast),
        "horizon": (message.k, job.k),
        "kind of reply": (message.reply, job.reply),
        "update scale": (message.update_scale, job.update_scale),
        "steps": (tuple(message.steps), tuple(job.steps)),
        "spec digest": (message.spec_digest, spec_digest),
    }
    if job.predictor is not None:
        pairs["predictor"] = (message.predictor, job.predictor)
    for what, (got, wanted) in pairs.items():
        if got != wanted:
            raise MalformedFrame(f"the reply's {what} is {str(got)[:80]!r}", expected=f"{str(wanted)[:80]!r}")
    wire: WireDType = job.reply_dtype
    if [(e.name, e.shape) for e in header.tensors] != list(expected):
        raise MalformedFrame("the reply lists other tensors than the spec", expected="the spec's, in its order")
    strange = [e for e in header.tensors if e.dtype != wire or e.snapshot]
    if strange:
        raise MalformedFrame(f"tensor {strange[0].name!r} comes as {strange[0].dtype}", expected=wire)
