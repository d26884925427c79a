"""One model per request and reply. What carries tensors names the kind of stream it heads; the rest is JSON."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from nowcast_proto.errors import InvalidRequest, InvalidSpec, MalformedFrame
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.stream import Header
from nowcast_proto.version import ID_PATTERN

Reply = Literal["parameters", "delta"]
WireDType = Literal["float32", "bfloat16", "float16"]
Outcome = Literal["applied", "kept", "rejected", "rolled_back", "shadow"]
Identifier = Annotated[str, Field(pattern=ID_PATTERN)]
Step = Annotated[int, Field(ge=0, le=2**53 - 1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Request(BaseModel):
    """Base of what a client sends: an unknown field is an error, not a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Answer(BaseModel):
    """Base of what the service sends: a newer service may add fields."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class PredictionFields(Request):
    """What to predict and how to answer."""

    k: Annotated[int, Field(ge=1, le=10_000, description="Horizon in strides, counted from the newest snapshot.")]
    predictor: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_+-]{0,31}$")] | None = Field(
        default=None, description="Name of the predictor; what the checkpoint is for when absent.", examples=["nino"]
    )
    checkpoint: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        default=None, description="Registered name of a checkpoint; the service's default when absent."
    )
    reply: Reply = Field(
        default="parameters", description="Future parameters, or their change since the newest snapshot."
    )
    reply_dtype: WireDType = Field(default="float32", description="Wire dtype of the answer.")
    update_scale: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] = Field(
        default=1.0, description="Factor on the predicted change."
    )
    deadline: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = Field(
        default=None, description="Seconds from receipt after which the answer is of no use."
    )


class NowcastRequest(PredictionFields):
    """Header message of a one-shot ``POST /nowcast``; the snapshots follow as tensors, oldest first."""

    KIND: ClassVar[str] = "nowcast.request"

    spec: ArchitectureSpec


class Timings(Answer):
    """Where the time went, in seconds."""

    queue: Seconds = Field(default=0.0, description="Waiting for the device.")
    input: Seconds = Field(default=0.0, description="Receiving and checking the snapshots.")
    compute: Seconds = Field(default=0.0, description="Predicting.")
    output: Seconds = Field(default=0.0, description="Casting and digesting the answer.")


class OutsideGraph(Answer):
    """One parameter that is not in the neural graph."""

    parameter: str
    rule: str = Field(description="`left` as it is, or `edgewise`.")
    reason: str


class CoverageReport(Answer):
    """What became of the network's parameters."""

    parameters: dict[str, int] = Field(description="Rule (`graph`, `edgewise`, `left`) -> parameters.")
    elements: dict[str, int] = Field(description="Rule -> elements of these parameters.")
    outside: tuple[OutsideGraph, ...] = Field(default=(), description="The first of those outside the graph.")


class NowcastReplyHeader(Answer):
    """Header message of a nowcast's answer; one tensor per parameter of the spec follows, in its order."""

    KIND: ClassVar[str] = "nowcast.reply"

    nowcast: str = Field(description="Id of the nowcast.")
    k: PositiveInt
    predictor: str
    checkpoint: str | None = None
    reply: Reply
    update_scale: float
    steps: tuple[Step, ...] = Field(default=(), description="Steps it was computed from; empty for a one-shot call.")
    spec_digest: str
    timings: Timings = Timings()
    coverage: CoverageReport | None = Field(
        default=None, description="What the predictor did with each parameter; absent where it needs no graph."
    )


class SnapshotHeader(Request):
    """Header message of ``PUT …/snapshots/{step}``; the tensors of one snapshot follow."""

    KIND: ClassVar[str] = "snapshot"

    step: Step = Field(description="Optimizer step the parameters were read after.")


class SessionCreate(Request):
    """Body of ``PUT /v1/sessions/{id}``."""

    spec: ArchitectureSpec
    keep: Annotated[int, Field(ge=2, le=64)] = Field(
        default=5, description="Newest snapshots the service keeps; older ones are dropped as new ones complete."
    )
    dtype: WireDType = Field(
        default="float32",
        description="Widest wire dtype its snapshots will have; the service sets memory aside for it.",
    )


class SnapshotState(Answer):
    """What the service holds of one snapshot."""

    step: Step
    state: Literal["missing", "partial", "complete"]
    received: int = Field(default=0, description="Bytes of the stream received; a resumed upload continues here.")
    total: int | None = Field(default=None, description="Bytes of the whole stream, once its header has arrived.")
    digest: str | None = Field(default=None, description="Content digest of the stream, once its header has arrived.")
    dtype: str | None = None
    age: Seconds | None = Field(default=None, description="Seconds since it was complete.")


class NowcastJob(PredictionFields):
    """Body of ``POST /v1/sessions/{id}/nowcasts``."""

    nowcast: Identifier = Field(description="Id minted by the client; the same id and body again changes nothing.")
    steps: Annotated[tuple[Step, ...], Field(min_length=1, max_length=64)] = Field(
        description="Steps of the snapshots to use, oldest first.", examples=[[200, 400, 600, 800, 1000]]
    )

    @model_validator(mode="after")
    def _ascending(self) -> NowcastJob:
        if any(a >= b for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"steps must ascend, got {list(self.steps)}")
        return self


JobState = Literal["queued", "running", "done", "failed"]


class NowcastStatus(Answer):
    """State of a nowcast that is not (yet) answered with tensors."""

    nowcast: str
    state: JobState
    location: str
    queued_before: int = Field(default=0, description="Nowcasts that will run before this one.")


class SessionState(Answer):
    """Answer to ``PUT`` and ``GET /v1/sessions/{id}``."""

    session: str
    spec_digest: str
    keep: int
    snapshots: tuple[SnapshotState, ...] = ()
    nowcasts: tuple[NowcastStatus, ...] = ()
    bytes_held: int = 0
    expires_in: Seconds = Field(description="Seconds of idleness after which the session is dropped.")
    coverage: CoverageReport | None = Field(
        default=None,
        description="In the answer to `PUT`: what the predictor will do with each parameter; absent where it needs no "
        "graph or there can be none.",
    )


class Verdict(Request):
    """Body of ``POST …/verdicts``: what became of a nowcast in training."""

    nowcast: Identifier
    outcome: Outcome
    reason: Annotated[str, Field(max_length=200)] | None = None
    step: Step | None = None


class VerdictReply(Answer):
    """Answer to a verdict; a repeated one is counted once."""

    nowcast: str
    outcome: Outcome
    counted: bool


class ModelInfo(Answer):
    """One checkpoint or weightless predictor the service can use."""

    name: str
    predictor: str
    context: int = Field(description="Snapshots it needs; 0 where any number from two on will do.")
    checkpoint: str | None = None
    default: bool = False


class ModelsReply(Answer):
    """Answer to ``GET /v1/models``."""

    models: tuple[ModelInfo, ...]
    families: tuple[str, ...] = ()
    protocol_versions: tuple[int, ...]
    limits: dict[str, int] = Field(default_factory=dict)


class HealthReply(Answer):
    """Answer to ``/healthz`` and ``/readyz``."""

    status: Literal["ok"] = "ok"
    version: str
    checks: dict[str, float] = Field(default_factory=dict, description="Check -> seconds it took or is old.")


M = TypeVar("M", bound=BaseModel)


def explain(exc: ValidationError, *, what: str) -> InvalidRequest | InvalidSpec:
    """A typed error from pydantic's; names the field, never repeats a long input.

    Args:
        exc: What validation raised.
        what: What was validated, for the message.
    """
    found = exc.errors(include_url=False, include_input=False, include_context=False)
    first = found[0]
    where = ".".join(str(part) for part in first["loc"])[:160] or "the body"
    cls = InvalidSpec if first["loc"][:1] == ("spec",) else InvalidRequest
    others: dict[str, Any] = {
        "errors": [{"field": ".".join(map(str, e["loc"]))[:160], "message": e["msg"][:300]} for e in found[:10]]
    }
    return cls(f"{what}: {where}: {first['msg'][:300]}", remedy="correct the field named first", detail=others)


def read_message(model: type[M], header: Header) -> M:
    """The message a stream's header carries.

    Args:
        model: A model with a ``KIND``.
        header: The decoded header.

    Raises:
        MalformedFrame: The stream is of another kind.
        InvalidSpec: Its spec is malformed.
        InvalidRequest: Another field is.
    """
    kind: str = model.KIND  # type: ignore[attr-defined]
    if header.kind != kind:
        raise MalformedFrame(f"the stream is of kind {header.kind[:64]!r}", expected=f"kind {kind!r}")
    try:
        return model.model_validate(header.message)
    except ValidationError as exc:
        raise explain(exc, what=kind) from exc


def read_json(model: type[M], text: str | bytes) -> M:
    """A message from JSON text.

    Raises:
        InvalidSpec: Its spec is malformed.
        InvalidRequest: Another field is, or it is not JSON.
    """
    try:
        return model.model_validate_json(text)
    except ValidationError as exc:
        raise explain(exc, what=model.__name__) from exc
