"""The training side of Nowcast: stream snapshots out, patch future weights in.

``attach`` and what belongs to it need torch and are loaded on first use; the plain API does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nowcast_proto.rules.verdict import TrialSettings

from nowcast_client.wire.api import AsyncNowcastClient, NowcastClient

if TYPE_CHECKING:
    from nowcast_client.handle import Event, Handle, attach
    from nowcast_client.network.derive import derive_spec

__all__ = ["AsyncNowcastClient", "Event", "Handle", "NowcastClient", "TrialSettings", "attach", "derive_spec"]

_LAZY = ("Event", "Handle", "attach")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from nowcast_client import handle as hook

        return getattr(hook, name)
    if name == "derive_spec":
        from nowcast_client.network import derive

        return derive.derive_spec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
