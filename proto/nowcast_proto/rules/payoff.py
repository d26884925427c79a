"""Do the nowcasts of a training pay? Some are left out at random, and the loss falls without them or it does not.

A verdict compares with the loss of before the nowcast, and cannot see that training alone would have gone on falling:
a little is lost at every nowcast, and all are kept. No extrapolation of one period's trend sees it either, since its
error is larger than what one nowcast is worth. What is sure is a comparison with periods of the same training that
began without a nowcast, and were chosen for that before anything was known of them. Each is compared with its
neighbours before and after, so that a loss that falls ever more slowly favours neither.

Nowcasts have to earn their place: the rule stops them where the sum of these comparisons is against them, whether or
not it could be chance. It therefore stops about half of those that make no difference, which costs nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final, Literal

Kind = Literal["nowcast", "control", ""]

FIRST: Final = 8
"""Nowcasts that are made before any is left out: a training of ten, the default, is hardly touched."""
BLOCK: Final = 4
"""One of so many periods is left out."""
FEWEST: Final = 3
"""Comparisons before the sum is believed."""


class Payoff:
    """Leaves nowcasts out at random, compares, and says when there should be no more.

    Attributes:
        levels: Level of the loss at the end of every period.
        kinds: How each period began: with a nowcast that was kept, with one left out as a control, or neither.
        made: Nowcasts kept.
    """

    def __init__(self) -> None:
        self.levels: list[float] = []
        self.kinds: list[Kind] = []
        self.made = 0
        self._candidates = 0
        self._kind: Kind = ""

    def kept(self) -> None:
        """A nowcast was kept in the period under way."""
        self.made += 1
        self._kind = "nowcast"

    def over(self, level: float) -> None:
        """A period has ended at this level of the loss."""
        self.levels.append(level)
        self.kinds.append(self._kind)
        self._kind = ""

    def objection(self) -> str:
        """Why the period that begins should have no nowcast; ask only where nothing else speaks against one."""
        gains = self.gains()
        if len(gains) >= FEWEST and sum(gains) <= 0:
            return "the loss fell no faster in periods with a nowcast than where they were left out: there are no more"
        if self.made < FIRST:
            return ""
        block, place = divmod(self._candidates, BLOCK)
        self._candidates += 1
        # The same on every rank and in every run that is resumed, and independent of anything the training does.
        if random.Random(block).randrange(BLOCK) == place:
            self._kind = "control"
            return "left out, to see what the others are worth"
        return ""

    def gains(self) -> list[float]:
        """For every control, how much more the loss fell in the periods with a nowcast next to it."""
        falls = [before - after for before, after in pairwise(self.levels)]
        kinds = self.kinds[1:]
        nowcasts = [i for i, kind in enumerate(kinds) if kind == "nowcast"]
        gains = []
        for i, kind in enumerate(kinds):
            before = [n for n in nowcasts if n < i]
            after = [n for n in nowcasts if n > i]
            if kind == "control" and before and after:
                one, two = before[-1], after[0]
                share = (i - one) / (two - one)
                gains.append((1 - share) * falls[one] + share * falls[two] - falls[i])
        return gains

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for `load_state_dict`."""
        return {
            "levels": list(self.levels),
            "kinds": list(self.kinds),
            "made": self.made,
            "candidates": self._candidates,
            "kind": self._kind,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another left off; from the beginning where the state is empty."""
        self.levels, self.kinds = list(state.get("levels", ())), list(state.get("kinds", ()))
        self.made, self._candidates = int(state.get("made", 0)), int(state.get("candidates", 0))
        self._kind = state.get("kind", "")
