"""At which steps the ranks meet."""

from __future__ import annotations

from nowcast_client.loop.nowcasting import Nowcasting

LOOKS = 2
"""Times the ranks look at a patch on trial before its window is over."""


class Times:
    """When the ranks meet: all of them come to the same answer.

    Args:
        nowcasting: What is done here.

    Attributes:
        asked_at: Step after which the ranks asked for a nowcast that none has yet.
    """

    def __init__(self, nowcasting: Nowcasting) -> None:
        self._work = nowcasting
        self.asked_at: int | None = None

    def due(self, step: int) -> bool:
        """Whether the ranks meet at a step."""
        return self._work.snapshot_due(step) or self._polls_at(step) or self._looks_at(step)

    @property
    def waits(self) -> bool:
        """Whether they wait for a nowcast where they asked for it."""
        return self._work.cadence.wait > 0

    @property
    def on_the_way(self) -> int:
        """Steps between the agreement on a patch and its writing."""
        return 0 if self.waits else 1

    def _polls_at(self, step: int) -> bool:
        """Whether the ranks ask for the nowcast at a step: 1, 2, 4, … steps after it was asked for."""
        if self.asked_at is None:
            return False
        late, last = step - self.asked_at, self._work.stale_steps - self.on_the_way
        return 0 < late <= last and (late & (late - 1) == 0 or late == last)

    def _looks_at(self, step: int) -> bool:
        """Whether the ranks look at the patch on trial at a step."""
        trials = self._work.trials
        if trials.open is None:
            return False
        age = step - trials.open.patched_at
        return age >= trials.window or age % max(1, trials.window // LOOKS) == 0
