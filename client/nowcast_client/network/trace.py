"""Any network becomes an explicit wiring: a forward pass is recorded, its axes are followed, the findings written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nowcast_proto.errors import UnsupportedArchitecture
from nowcast_proto.wiring import ExplicitWiring

log = logging.getLogger("nowcast")


@dataclass(frozen=True)
class Trace:
    """What one forward pass says of a network.

    Attributes:
        wiring: Neurons and edges.
        unknown: Operations without a rule that met neurons -> how often; those neurons are fixed.
        faked: It ran on fake tensors, at no cost in memory.
        operations: How many were followed.
    """

    wiring: ExplicitWiring
    unknown: Mapping[str, int]
    faked: bool
    operations: int


def trace(model: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Trace:
    """The wiring of a network, from one forward pass.

    Args:
        model: A ``torch.nn.Module`` without wrappers.
        args: Positional inputs of one forward pass.
        kwargs: Keyword inputs.

    Raises:
        UnsupportedArchitecture: The forward pass fails on these inputs.
    """
    from nowcast_client.network.tracing.emitting import Emitter
    from nowcast_client.network.tracing.following import Follower
    from nowcast_client.network.tracing.recording import record

    tried: list[Exception] = []
    for fake, functional in ((True, True), (False, True), (False, False)):
        try:
            recording = record(model, args, kwargs or {}, fake=fake, functional=functional)
            break
        except Exception as error:  # whatever a forward of somebody else's raises on tensors without values
            log.debug("trace (fake=%s, functional=%s): %s", fake, functional, error, exc_info=True)
            tried.append(error)
    else:
        raise UnsupportedArchitecture(
            f"the forward pass of {type(model).__name__} cannot be traced: {tried[-1]}",
            expected="a forward pass that runs on the example inputs",
            remedy="pass example=(args, kwargs) with inputs that model(*args, **kwargs) takes",
        ) from tried[-1]
    followed = Follower(recording).follow()
    wiring = Emitter(followed).wiring()
    return Trace(wiring, dict(followed.unknown), recording.faked, len(recording.operations))
