"""Which optimizers nowcasts have been shown to gain on; on the others they are watched until told otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_SHOWN: Final = ("adam", "sgd")
"""Families of optimizers, by their classes' names, on which nowcasts gained or did no harm."""
_UNKNOWN: Final = "no gain has been measured on it"
_NOT_SHOWN: Final = {
    "muon": "the shipped weights did harm on Muon, 1.5 points of accuracy in the mean of three trainings",
    "schedulefree": _UNKNOWN,
}


def unproven(optimizers: Iterable[object]) -> str:
    """Why nowcasts should only be watched on these optimizers; empty where they have been shown to gain.

    Args:
        optimizers: The real ones, without wrappers.
    """
    for optimizer in optimizers:
        # A class derived from a known one, as libraries and users make them, counts as that.
        names = [cls.__name__.lower() for cls in type(optimizer).__mro__]
        reason = next((why for part, why in _NOT_SHOWN.items() if any(part in name for name in names)), "")
        if not reason and not any(part in name for part in _SHOWN for name in names):
            reason = _UNKNOWN
        if reason:
            return (
                f"the optimizer is {type(optimizer).__name__}: its nowcasts are watched, not patched (mode 'shadow'), "
                f"because {reason}; mode='on' patches them, on trial"
            )
    return ""
