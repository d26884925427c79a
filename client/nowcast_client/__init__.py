"""The training side of Nowcast: stream snapshots out, patch future weights in.

``attach`` and what belongs to it need torch and are loaded on first use; the plain API does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nowcast_proto.rules.verdict import TrialSettings

from nowcast_client.settings import Cadence, Connection, Patching
from nowcast_client.wire.api import AsyncNowcastClient, NowcastClient

if TYPE_CHECKING:
    from nowcast_client.attaching import attach
    from nowcast_client.handle import Event, Handle
    from nowcast_client.network.derive import derive_spec

__all__ = [
    "AsyncNowcastClient",
    "Cadence",
    "Connection",
    "Event",
    "Handle",
    "NowcastClient",
    "Patching",
    "TrialSettings",
    "attach",
    "derive_spec",
]

_LAZY = {"Event": "handle", "Handle": "handle", "attach": "attaching", "derive_spec": "network.derive"}
"""What is loaded on first use, and the module it is in."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"nowcast_client.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
