"""`attach`: what a user writes. It settles the settings, builds the parts and hands them to a `Handle`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack, cast, get_args

import torch
from nowcast_proto.errors import UnsupportedArchitecture
from nowcast_proto.messages import NowcastJob
from nowcast_proto.rules.verdict import TrialSettings
from nowcast_proto.spec import ArchitectureSpec
from torch import nn
from torch.optim import Optimizer

from nowcast_client.errors import AttachError
from nowcast_client.handle import Handle
from nowcast_client.loop.alone import Alone
from nowcast_client.loop.cadence import MANY_NOWCASTS, Timetable, default_period
from nowcast_client.loop.evidence import unproven
from nowcast_client.loop.gate import Gate
from nowcast_client.loop.nowcasting import Nowcasting
from nowcast_client.loop.patching import Patcher
from nowcast_client.loop.report import Event, Reporter
from nowcast_client.loop.reports import About, Reports
from nowcast_client.loop.steps import Steps
from nowcast_client.loop.trial import Trials, fitted
from nowcast_client.loop.windows import Windows
from nowcast_client.loop.wiring import Wirer, whole
from nowcast_client.network.adapters import ADAPTER_PREDICTOR, ADAPTERS_WATCHED, adapter_spec
from nowcast_client.network.derive import derive_spec
from nowcast_client.network.named import UNKNOWN_FAMILY
from nowcast_client.network.wired import PUBLISHED
from nowcast_client.settings import ByName, Cadence, Connection, Mode, Patching, merged, refuse_unknown
from nowcast_client.tensors.layout import WIRE_DTYPES, Layout, innermost
from nowcast_client.tensors.snapshot import Ring
from nowcast_client.tensors.watch import Watch
from nowcast_client.wire.address import given_url
from nowcast_client.wire.http import HttpTransport
from nowcast_client.wire.session import Session
from nowcast_client.wire.transport import Transport
from nowcast_client.wire.uploader import Uploader

if TYPE_CHECKING:
    from nowcast_client.ranks.channel import Ranks

log = logging.getLogger("nowcast")


class _Network(NamedTuple):
    """What is told to the service about the model, and how it is found out anew (None where the caller said it).

    ``traced``: it is wired from its first forward pass. Of an unknown network ``spec`` says no more than its tensors.
    """

    spec: ArchitectureSpec
    predictor: str | None
    mode: Mode
    derive: Callable[[], ArchitectureSpec] | None = None
    traced: bool = False

    @property
    def known(self) -> bool:
        """Whether more than the tensors is known."""
        return self.spec.family != UNKNOWN_FAMILY


def attach(
    model: nn.Module,
    optimizer: object,
    service: str | Connection | Transport | None = None,
    *,
    period: int | None = None,
    total_steps: int | None = None,
    mode: Mode | None = None,
    trial: bool | TrialSettings = True,
    predictor: str | None = None,
    checkpoint: str | None = None,
    on_event: Callable[[Event], object] | None = None,
    metrics: Callable[[Mapping[str, float], int], object] | None = None,
    schedule: Cadence | None = None,
    patching: Patching | None = None,
    spec: ArchitectureSpec | None = None,
    **settings: Unpack[ByName],
) -> Handle:
    """Nowcast a training: one line before the loop, and ``handle.observe(loss)`` in it.

    Args:
        model: The network, as it is trained.
        optimizer: Its optimizer, or a sequence of optimizers that step it; wrappers that hold the real one are looked
            through.
        service: The service: its url (``embedded`` starts one in a child process), a `Connection`, or a transport.
        period: Optimizer steps between nowcasts; ``context`` snapshots are taken in each. Default: a tenth of
            ``total_steps``, at least 100 and at most 1,000; 1,000 where the length is not known.
        total_steps: Steps of the whole training; sets how fast the horizon shrinks. Without it a schedule
            of ten periods is used and stays at one stride afterwards.
        mode: ``on``, ``shadow`` (predict and log, never patch) or ``off``. Default: ``NOWCAST_MODE``, then ``on``,
            or ``shadow`` where adapters (LoRA and its kin) train beside frozen weights, and on optimizers that no gain
            has been shown on (see `nowcast_client.loop.evidence`).
        trial: Judge every patch by the reported loss and undo it where it did harm. ``False`` patches unconditionally;
            a `TrialSettings` sets the judge. The recovery window is at most a third of the period.
        predictor: The service's predictor; None takes what the checkpoint is for.
        checkpoint: Name of a checkpoint the service has; None takes its default.
        on_event: Called with every `Event`, on the trainer's thread.
        metrics: Called with numbers and the step, for a logger of your choice (see `nowcast_client.loggers`).
        schedule: When snapshots are taken and nowcasts made.
        patching: How a nowcast is taken.
        spec: The architecture, where it is not to be found out from the model: by default the first forward pass of
            the training is traced, and the wiring proven on the live weights before anything is patched.
        settings: Single fields of `Connection`, `Cadence` and `Patching` by name (``wait=60``), and what
            `nowcast_client.network.derive.derive_spec` takes (``include_frozen=True``, ``table="network.json"``).

    Returns:
        The handle; close it, or use it as a context manager.

    Raises:
        AttachError: Something here can never work; nothing has been attached.
        UnsupportedArchitecture: The model has no parameters, or its weights are sharded and its names tell no family.
        InvalidSpec: The table is malformed.
        UnreadableFile: The table cannot be read.
    """
    refuse_unknown(settings)
    chosen = cast(Mode, mode or os.environ.get("NOWCAST_MODE", "on"))
    if chosen not in get_args(Mode):
        raise AttachError(f"mode {chosen!r}", expected="on, shadow or off", remedy="check mode= or NOWCAST_MODE")
    connection = merged(_connection(service), settings)
    cadence, patching = merged(schedule or Cadence(), settings), merged(patching or Patching(), settings)
    ranks = _ranks(model, connection.group, cadence.wait) if chosen != "off" else None

    def nowcasting() -> tuple[Nowcasting, Transport | None]:
        optimizers = _optimizers(optimizer)
        every = default_period(total_steps, cadence.context) if period is None else period
        timetable = Timetable(every, cadence.context, total_steps, cadence.max_horizon)
        if checkpoint is predictor is None:
            _warn_of_many(every, total_steps)
        judged = fitted(trial, every)
        free = mode is None and not os.environ.get("NOWCAST_MODE")
        network = _network(model, optimizers, spec, settings, "shadow" if free and chosen == "on" else chosen, chosen)
        patcher = Patcher(
            model,
            optimizers,
            network.spec,
            patching.copies,
            _given(optimizer),
            Watch(timetable.stride),
            sharded=ranks is not None or chosen == "off",
            average=patching.average,
            derive=network.derive if ranks is None else None,
        )
        job = NowcastJob(
            nowcast="unset",
            steps=(0,),
            k=1,
            predictor=predictor or network.predictor,
            checkpoint=checkpoint,
            reply="delta",
            reply_dtype=connection.reply_dtype,
            update_scale=patching.update_scale,
        )
        speaks = ranks is None or ranks.speaks
        way = _transport(connection) if chosen != "off" and speaks else None
        open_ = partial(_open, way, connection, job, patching.patch_bound, cadence.context) if way is not None else None
        steps = Steps(optimizers, at_once=ranks is not None)
        windows = Windows(
            open_,
            network.spec,
            patcher.layout,
            cadence.context,
            at_once=not network.traced or network.spec.family in PUBLISHED,
        )
        people = None
        if way is not None and connection.report:
            about = About.of(model, optimizers[-1], connection.name, every, total_steps)
            people = Reports(about, lambda *report: windows.uploader is not None and windows.uploader.tell(*report))
        work = Nowcasting(
            network.mode,
            timetable,
            steps,
            Reporter(steps, on_event, metrics if speaks else None, patching.strict, people),
            windows,
            patcher,
            Trials(judged, every),
            Gate(cadence.lr_gate, total_steps, every, judged, judging=network.mode == "on"),
            cadence,
            patching,
            job,
        )
        if network.traced and speaks:
            frozen = settings.get("include_frozen", False)
            named = job.predictor is not None
            work.wirer = Wirer(model, known=network.known, alone=ranks is None, graphless=named, include_frozen=frozen)
        return work, way

    if ranks is None:
        work, way = nowcasting()
        work.agreement = Alone(work)
        return Handle(work, way)
    from nowcast_client.ranks.shards import Shards
    from nowcast_client.ranks.together import Together, on_all

    def build() -> tuple[Handle, Together]:
        work, way = nowcasting()
        dtype = WIRE_DTYPES[connection.wire_dtype] if connection.wire_dtype else None
        shards = Shards(ranks, dtype, WIRE_DTYPES[connection.reply_dtype])
        alike = work.mode, work.trials.settings, cadence, connection.wire_dtype, patching.strict
        work.agreement = together = Together(ranks, work, shards, repr(alike))
        return Handle(work, way), together

    return on_all(ranks, build)


def _connection(service: str | Connection | Transport | None) -> Connection:
    if isinstance(service, Connection):
        return service
    return Connection(url=service) if service is None or isinstance(service, str) else Connection(transport=service)


def _optimizers(optimizer: object) -> list[Optimizer]:
    if optimizer is None:
        raise AttachError(
            "there is no optimizer yet",
            expected="the optimizer that steps this model",
            remedy="attach after it has been created; a later one is taken up with handle.follow(optimizer)",
        )
    if not _given(optimizer):
        raise AttachError("no optimizer was given", expected="at least one")
    return [innermost(one) for one in _given(optimizer)]


def _given(optimizer: object) -> list[object]:
    return list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]


def _warn_of_many(period: int, total_steps: int | None) -> None:
    if total_steps is not None and total_steps // period > MANY_NOWCASTS:
        log.warning(
            "period=%d makes %d nowcasts in %d steps; the shipped weights gained with up to %d and gained nothing "
            "with 50: a longer period, or a checkpoint that is meant for more, is safer",
            *(period, total_steps // period, total_steps, MANY_NOWCASTS),
        )


def _network(
    model: nn.Module,
    optimizers: list[Optimizer],
    spec: ArchitectureSpec | None,
    settings: ByName,
    doubtful: Mode,
    mode: Mode,
) -> _Network:
    """What the model is; ``doubtful`` is the mode where no gain has been shown."""
    table, frozen = settings.get("table"), settings.get("include_frozen", False)
    if spec is not None and table is not None:
        raise AttachError("both spec and table are given", expected="one of them: a spec holds its table")
    adapters = adapter_spec(model)
    doubt = ADAPTERS_WATCHED if adapters is not None else unproven(optimizers)
    if doubt and doubtful != mode:
        log.warning("%s", doubt)
    mode = doubtful if doubt else mode
    if spec is not None:
        return _Network(spec, None, mode)
    if adapters is not None and table is None and not frozen:
        return _Network(adapters, ADAPTER_PREDICTOR, mode)
    derive = partial(derive_spec, model, include_frozen=frozen, table=table)
    traced = table is None and mode != "off" and whole(model)
    try:
        return _Network(derive(), None, mode, derive, traced)
    except UnsupportedArchitecture:
        if not traced:
            raise
    return _Network(derive_spec(model, include_frozen=True, unknown="edgewise"), None, mode, None, traced)


def _open(
    transport: Transport,
    connection: Connection,
    job: NowcastJob,
    patch_bound: float,
    context: int,
    spec: ArchitectureSpec,
    layout: Layout,
) -> tuple[Ring, Uploader]:
    """A session for a network, and room for its snapshots."""
    ring = Ring(layout, context + 1, WIRE_DTYPES[connection.wire_dtype] if connection.wire_dtype else None)
    log.info(
        "a snapshot copies and sends %.1f MB; host memory holds up to %d of them, and from the first patch on the "
        "%.1f MB that train and their optimizer's state",
        *(ring.snapshot_bytes / 1e6, context + 1),
        sum(layout.parameters[name].nbytes for name in layout.movable) / 1e6,
    )
    session = Session(
        transport,
        spec,
        keep=context + 1,
        timeout=connection.timeout,
        retry=connection.retry,
        predictor=job.predictor,
        checkpoint=job.checkpoint,
    )
    uploader = Uploader(
        session,
        ring,
        layout,
        upload_seconds=connection.nowcast_timeout,
        nowcast_seconds=connection.nowcast_timeout,
        patch_bound=patch_bound,
    )
    uploader.open()
    return ring, uploader


def _transport(connection: Connection) -> Transport:
    """The way to a service; ``embedded`` starts one of this process's own.

    Raises:
        AttachError: The url is none, or no service can be started here.
    """
    if connection.transport is not None:
        return connection.transport
    if given_url(connection.url) == "embedded":
        from nowcast_client.wire.embedded import EmbeddedTransport

        return EmbeddedTransport()
    return HttpTransport(connection.url, api_key=connection.api_key, ca_file=connection.ca_file)


def _ranks(model: nn.Module, group: Any, wait: float) -> Ranks | None:
    """The ranks that train together; None where this process trains alone and holds its parameters whole."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    if distributed.get_world_size(group) == 1 and not any(hasattr(p, "to_local") for p in model.parameters()):
        return None
    from nowcast_client.ranks.channel import Ranks

    return Ranks(group, wait)
