"""The agreement of a process that trains alone: whatever is due is done."""

from __future__ import annotations

from collections.abc import Callable

from nowcast_client.loop.nowcasting import Nowcasting
from nowcast_client.tensors.snapshot import Slot


class Alone:
    """See `nowcast_client.loop.agreement.Agreement`.

    Args:
        nowcasting: What is done.
    """

    speaks = True
    waited = 0.0

    def __init__(self, nowcasting: Nowcasting) -> None:
        self._nowcasting = nowcasting

    def advance(self) -> None:
        """Take what arrived, look at the patch on trial, write, take a snapshot: in this order."""
        nowcasting = self._nowcasting
        nowcasting.collect()
        nowcasting.judge()
        nowcasting.consider()
        if nowcasting.snapshot_due(nowcasting.steps.step) and nowcasting.is_on:
            nowcasting.rebind()
            if nowcasting.is_on:
                nowcasting.snapshot()

    def forget(self) -> None:
        """Nothing is planned."""

    def fill(self) -> Callable[[Slot], None] | None:
        """The parameters are here."""
        return None

    def asked(self) -> None:
        """Wait, then take it."""
        self._nowcasting.wait()
        self._nowcasting.consider()

    def may_restart(self, reason: str) -> bool:
        """Always."""
        return True

    def may_end(self, reason: str) -> bool:
        """Always."""
        return True
