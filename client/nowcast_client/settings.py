"""What `nowcast_client.attach` may be told beyond the training itself: three objects that check themselves.

Each field may also be given to ``attach`` by its own name: ``attach(model, optimizer, url, wait=60)`` is
``attach(model, optimizer, url, schedule=Cadence(wait=60))``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, get_args

from nowcast_proto.messages import WireDType

from nowcast_client.errors import AttachError

if TYPE_CHECKING:
    from nowcast_proto.rules.verdict import TrialSettings
    from nowcast_proto.spec import ArchitectureSpec
    from nowcast_proto.table import DeclaredTable
    from torch import nn

    from nowcast_client.loop.report import Event
    from nowcast_client.wire.transport import Retry, Transport

Mode = Literal["on", "shadow", "off"]
Split = Literal["train", "validation"]
Acts = Literal["after_step", "when_told"]
MAX_HORIZON = 20
"""First horizon, in strides: in ``docs/results-h32.md`` our weights ended better with it on the text task for choosing
than with the published 40, and the same on the convolutional one."""
PATCH_BOUND = 4.0
T = TypeVar("T", "Connection", "Cadence", "Patching")


@dataclass(frozen=True)
class Connection:
    """The way to the service, and to the other ranks.

    Attributes:
        url: ``http(s)://host:port`` or ``unix:///path``; ``embedded`` starts a service in a child process that ends
            with this one. Default: ``NOWCAST_URL``, then ``http://127.0.0.1:8500``.
        api_key: Bearer token. Default: ``NOWCAST_API_KEY``.
        timeout: Seconds without progress after which a request is tried again.
        nowcast_timeout: Seconds a nowcast may take in all, lost snapshots sent again included.
        retry: How often requests are tried again.
        transport: Another way to the service than the url's.
        wire_dtype: Dtype of snapshots in host memory and on the wire; None keeps each parameter's own.
        reply_dtype: Dtype of the predicted change on the wire.
        ca_file: PEM file of the certificate authorities to trust. Default: ``NOWCAST_CA_FILE``, then the system's.
        name: What people who watch call this training; the model's class and the machine's name by default.
        report: Tell the service losses and events for people who watch (see ``docs/watching.md``).
        group: Process group of the ranks that train this model together; the default group where there is one.
    """

    url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 10.0
    nowcast_timeout: float = 300.0
    retry: Retry | None = None
    transport: Transport | None = None
    wire_dtype: WireDType | None = None
    reply_dtype: WireDType = "float32"
    ca_file: str | Path | None = None
    name: str | None = None
    report: bool = True
    group: Any = None

    def __post_init__(self) -> None:
        for name in ("timeout", "nowcast_timeout"):
            _must(name, getattr(self, name), getattr(self, name) > 0, "a positive number of seconds")
        dtypes = get_args(WireDType)
        _must("wire_dtype", self.wire_dtype, self.wire_dtype in (None, *dtypes), f"None or one of {dtypes}")
        _must("reply_dtype", self.reply_dtype, self.reply_dtype in dtypes, f"one of {dtypes}")


@dataclass(frozen=True)
class Cadence:
    """When snapshots are taken and nowcasts made, how far ahead, and how late they may come.

    Attributes:
        context: Snapshots per nowcast, as the checkpoint wants.
        max_horizon: First and longest horizon, in strides.
        lr_gate: Ask for no nowcast once the learning rate is below this part of the largest seen.
        wait: Seconds the hook may wait for a nowcast at the end of a period; 0 never waits.
        stale_steps: Most steps a nowcast may be late. Default: a fifth of the period.
        acts: ``after_step`` acts when a step is over; ``when_told`` only counts there and acts when
            `nowcast_client.handle.Handle.act` is called.
    """

    context: int = 5
    max_horizon: int = MAX_HORIZON
    lr_gate: float = 0.1
    wait: float = 0.0
    stale_steps: int | None = None
    acts: Acts = "after_step"

    def __post_init__(self) -> None:
        _must("context", self.context, self.context >= 2, "at least 2 snapshots per nowcast")
        _must("max_horizon", self.max_horizon, self.max_horizon >= 1, "at least 1 stride")
        _must("lr_gate", self.lr_gate, 0 <= self.lr_gate <= 1, "a part of the largest rate, from 0 to 1")
        _must("wait", self.wait, self.wait >= 0, "seconds, 0 or more")
        _must("stale_steps", self.stale_steps, (self.stale_steps or 0) >= 0, "steps, 0 or more; None for the default")
        _must("acts", self.acts, self.acts in get_args(Acts), "after_step or when_told")


@dataclass(frozen=True)
class Patching:
    """How a nowcast is taken.

    Attributes:
        update_scale: Factor on the predicted change.
        patch_bound: Refuse a nowcast that moves a tensor by more than this times its movement per stride times the
            horizon, or times 20 where that is more.
        copies: Models whose parameters follow the trained ones by name (an exponential moving average, say): a patch
            shifts them by the same change, a rollback puts them back.
        refresh: Called after every patch, on every rank, to gather anew what depends on the weights, such as batch-norm
            statistics: ``lambda: torch.optim.swa_utils.update_bn(loader, model)``. A rollback puts the old statistics
            back by itself.
        average: Steps that an average of the weights reaches back, for `nowcast_client.handle.Handle.averaged`; it
            takes the memory of one float32 copy where the weights are. None keeps none.
        strict: Raise what goes wrong instead of skipping it.
    """

    update_scale: float = 1.0
    patch_bound: float = PATCH_BOUND
    copies: Sequence[nn.Module] = ()
    refresh: Callable[[], object] | None = None
    average: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        _must("patch_bound", self.patch_bound, self.patch_bound > 0, "a positive factor")
        _must("average", self.average, self.average is None or self.average >= 1, "1 step or more; None keeps none")


class Shorthand(TypedDict, total=False):
    """Single fields of `Connection`, `Cadence` and `Patching`, and what `derive_spec` takes, by name."""

    api_key: str | None
    timeout: float
    nowcast_timeout: float
    retry: Retry | None
    transport: Transport | None
    wire_dtype: WireDType | None
    reply_dtype: WireDType
    ca_file: str | Path | None
    name: str | None
    report: bool
    group: Any
    context: int
    max_horizon: int
    lr_gate: float
    wait: float
    stale_steps: int | None
    acts: Acts
    update_scale: float
    patch_bound: float
    copies: Sequence[nn.Module]
    refresh: Callable[[], object] | None
    average: int | None
    strict: bool
    include_frozen: bool
    table: DeclaredTable | str | Path | None


class ByName(Shorthand, total=False):
    """`Shorthand`, and the url where the service is not given otherwise."""

    url: str | None


class AttachSettings(Shorthand, total=False):
    """All that ``attach`` takes besides model, optimizer and service, for those that hand it on."""

    period: int | None
    total_steps: int | None
    mode: Mode | None
    trial: bool | TrialSettings
    predictor: str | None
    checkpoint: str | None
    on_event: Callable[[Event], object] | None
    metrics: Callable[[Mapping[str, float], int], object] | None
    schedule: Cadence | None
    patching: Patching | None
    spec: ArchitectureSpec | None


def merged(kind: T, given: Mapping[str, Any]) -> T:
    """Settings with those that were given by name."""
    return replace(kind, **{f.name: given[f.name] for f in fields(kind) if f.name in given})


def refuse_unknown(given: Mapping[str, Any]) -> None:
    """Refuse what no setting is called.

    Raises:
        AttachError: With the nearest name.
    """
    known = AttachSettings.__annotations__ | ByName.__annotations__
    for name in given:
        if name not in ByName.__annotations__:
            longer = [other for other in known if other.startswith(name)]
            nearest = longer or difflib.get_close_matches(name, known, 1, 0.5)
            raise AttachError(
                f"there is no setting {name!r}",
                expected=f"perhaps {nearest[0]!r}" if nearest else "a field of Connection, Cadence or Patching",
                remedy="see the fields in nowcast_client.settings",
            )


def _must(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise AttachError(f"{name}={value!r}", expected=expected)
