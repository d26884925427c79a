"""What a training tells the service about itself, and what people who watch trainings are told.

None of it is needed to nowcast: a client may leave its reports out, and a service that lost them predicts the same.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nowcast_proto.messages import Answer, Identifier, Request, Step

MAX_LOSSES = 5_000
"""Losses in one report at most; a training that makes more steps between two reports sends means."""
MAX_EVENTS = 500

Label = Annotated[str, Field(max_length=128)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
TrainingState = Literal["live", "silent", "ended"]


class TrainingEvent(Request):
    """Something that happened to a nowcast, or to nowcasting, after one optimizer step."""

    kind: Annotated[str, Field(pattern=r"^[a-z_]{1,24}$")]
    step: Step
    reason: Annotated[str, Field(max_length=300)] | None = None
    horizon: Annotated[int, Field(ge=1, le=10_000)] | None = Field(default=None, description="In strides.")


class Report(Request):
    """Body of ``POST /v1/sessions/{id}/reports``: what a training did since its last report."""

    step: Step
    mode: Literal["on", "shadow", "off"] = "on"
    name: Label | None = Field(default=None, description="What people call this training.")
    device: Label | None = None
    optimizer: Label | None = None
    period: Annotated[int, Field(ge=1)] | None = None
    total_steps: Annotated[int, Field(ge=1)] | None = None
    loss_steps: Annotated[tuple[Step, ...], Field(max_length=MAX_LOSSES)] = ()
    losses: Annotated[tuple[Finite, ...], Field(max_length=MAX_LOSSES)] = ()
    events: Annotated[tuple[TrainingEvent, ...], Field(max_length=MAX_EVENTS)] = ()
    continues: Identifier | None = Field(default=None, description="The session this one goes on from.")
    ended: bool = False

    @model_validator(mode="after")
    def _paired(self) -> Report:
        if len(self.loss_steps) != len(self.losses):
            raise ValueError(f"{len(self.losses)} losses of {len(self.loss_steps)} steps")
        return self


class ReportReply(Answer):
    """Answer to a report."""

    training: str


class TrainingRow(Answer):
    """One line of the list of trainings.

    Attributes:
        training: Id: the session's.
        state: ``live``; ``silent``, when nothing was heard for a while; ``ended``.
        seen: Seconds since something was last heard of it.
        recent: Some of its latest losses, oldest first, for a small picture.
        last: The newest event.
    """

    training: str
    name: str
    state: TrainingState
    network: str
    parameters: int
    step: int
    total_steps: int | None = None
    period: int | None = None
    mode: str = "on"
    device: str | None = None
    optimizer: str | None = None
    loss: float | None = None
    recent: tuple[float, ...] = ()
    last: TrainingEvent | None = None
    counts: dict[str, int] = Field(default_factory=dict, description="Events by kind.")
    seen: float = 0.0
    started: float = Field(default=0.0, description="Unix time.")


class Movement(Answer):
    """How far each tensor moved over one stride: the norm of its change over the norm of its weights."""

    step: Step
    moved: tuple[float, ...] = Field(description="One number per name of `Training.layers`.")


class Training(TrainingRow):
    """All that is known of one training.

    Attributes:
        loss_steps: Last step of each mean of ``losses``.
        losses: Mean losses; neighbours are merged where there are many.
        width: Steps that one of ``losses`` spans.
        layers: Names of the tensors whose movement is kept, largest first in the network's order.
    """

    loss_steps: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    width: int = 1
    events: tuple[TrainingEvent, ...] = ()
    layers: tuple[str, ...] = ()
    movements: tuple[Movement, ...] = ()


class TrainingsReply(Answer):
    """Answer to ``GET /v1/trainings``."""

    trainings: tuple[TrainingRow, ...] = ()


class StatusReply(Answer):
    """Answer to ``GET /v1/status``: what an operator asks first."""

    version: str
    device: str
    uptime: float
    queue: int = Field(description="Nowcasts that wait.")
    queue_limit: int
    running: float = Field(description="Seconds the running nowcast has taken so far; 0 while none runs.")
    uploads: int
    uploads_limit: int
    sessions: int
    sessions_limit: int
    held: int = Field(description="Bytes reserved for histories, uploads and answers.")
    budget: int
    resident: int = Field(description="Bytes of memory the process takes.")
    draining: bool = False


class GraphRange(Answer):
    """A range of neurons, for a drawing."""

    name: str
    size: int
    group: int


class GraphLink(Answer):
    """Blocks between two ranges, for a drawing."""

    source: int
    target: int
    type: str
    edges: int


class GraphReply(Answer):
    """Answer to ``GET /v1/trainings/{id}/graph``: the neural graph by ranges of neurons."""

    ranges: tuple[GraphRange, ...]
    links: tuple[GraphLink, ...]
    nodes: int
    edges: int
