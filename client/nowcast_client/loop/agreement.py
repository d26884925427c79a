"""Who decides: one process for itself, or several ranks together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nowcast_client.tensors.snapshot import Slot


class Agreement(Protocol):
    """How the ranks of a training come to do the same at the same step; see `nowcast_client.loop.alone.Alone` for one
    that is alone and `nowcast_client.ranks.together.Together` for several.

    Attributes:
        speaks: Whether this rank talks to the service, and logs.
    """

    speaks: bool

    @property
    def waited(self) -> float:
        """Seconds spent waiting for other ranks."""

    def advance(self) -> None:
        """Do everything that is due after a counted step."""

    def forget(self) -> None:
        """Forget what was planned."""

    def fill(self) -> Callable[[Slot], None] | None:
        """What fills a snapshot's buffers, where the parameters are not simply here."""

    def asked(self) -> None:
        """A nowcast was asked for: wait for it, where that was allowed."""

    def may_restart(self, reason: str) -> bool:
        """Whether the window may start again now; where it may not, the reason is kept until all can."""

    def may_end(self, reason: str) -> bool:
        """Whether nowcasting may be turned off now; where it may not, the reason is kept until all can."""
