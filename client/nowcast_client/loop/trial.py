"""A patch on trial, and the losses it is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nowcast_proto.rules.verdict import Floats, LossTrace, TrialSettings, Verdict, judge

from nowcast_client.errors import AttachError
from nowcast_client.loop.losses import LossReader
from nowcast_client.loop.savings import SMOOTHED
from nowcast_client.tensors.patch import Patch

MIN_WINDOW = 5
"""Shortest recovery window, in steps, that a verdict can be read from."""


def fitted(trial: bool | TrialSettings, period: int) -> TrialSettings | None:
    """The judge's settings for a period; None where patches are not judged.

    Raises:
        AttachError: There would be no losses to judge by, with these settings at this period.
    """
    if trial is False:
        return None
    settings = trial if isinstance(trial, TrialSettings) else TrialSettings()
    window = min(settings.window, period // 3)
    if period // 3 < MIN_WINDOW:
        raise AttachError(
            f"period={period} leaves {window} steps to judge a patch in",
            expected=f"a period of at least {3 * MIN_WINDOW} steps with trial",
            remedy="use a longer period, or trial=False to patch unconditionally",
        )
    for name, number, most, why in (
        ("min_tail", settings.min_tail, window, f"the recovery window has {window} steps at period={period}"),
        ("min_reference", settings.min_reference, settings.reference, f"reference={settings.reference}"),
        ("min_reference", settings.min_reference, period - window, f"period={period} leaves that many after a trial"),
    ):
        if not 1 <= number <= most:
            raise AttachError(
                f"TrialSettings({name}={number}) can never be met: {why}",
                expected=f"{name} from 1 to {most}",
                remedy=f"lower {name}, or use a longer period",
            )
    if window < MIN_WINDOW or not 0.0 < settings.tail <= 1.0:
        raise AttachError(
            f"TrialSettings(window={settings.window}, tail={settings.tail:g}) leaves no losses to judge a patch by",
            expected=f"a window of at least {MIN_WINDOW} steps, and a tail above 0 and at most 1",
        )
    return replace(settings, window=window)


@dataclass(frozen=True)
class Trial:
    """A patch on trial.

    Attributes:
        patch: It.
        patched_at: Step after which it was written.
        reference_from: First step whose loss says what was normal before.
    """

    patch: Patch
    patched_at: int
    reference_from: int


class Trials:
    """The reported losses, and the patch that is judged by them.

    Args:
        settings: How patches are judged; None where they are not.
        period: Steps between nowcasts.

    Attributes:
        settings: As given.
        losses: Where losses are reported.
        open: The patch on trial.
        settled_at: Losses before this step belong to a trial, or to other weights, and say nothing about the trend.
    """

    def __init__(self, settings: TrialSettings | None, period: int) -> None:
        reference, window = (settings.reference, settings.window) if settings is not None else (0, 0)
        self.settings = settings
        self.losses = LossReader(LossTrace(keep=2 * (period + reference + window) + SMOOTHED))
        self.open: Trial | None = None
        self.settled_at = 0
        self._period = period
        self._undone_in_a_row = 0

    @property
    def window(self) -> int:
        """Steps of the recovery window."""
        return self.settings.window if self.settings is not None else 1

    def reference_from(self, step: int) -> int:
        """First step whose loss says what was normal before a patch made now."""
        return max(self.settled_at, step - self.settings.reference) if self.settings is not None else 0

    def trend(self, step: int) -> Floats:
        """Losses of the newest stretch, half a period, in which nothing but training moved them."""
        self.losses.read(block=True)
        return self.losses.trace.between(max(self.settled_at, step - self._period // 2), step - 1)[1]

    def blind(self, step: int) -> bool:
        """Whether too few losses are known to judge a patch made now."""
        if self.settings is None:
            return False
        self.losses.read(block=True)
        known = self.losses.trace.between(self.reference_from(step), step - 1)[0].size
        return bool(known < self.settings.min_reference)

    def begin(self, patch: Patch, step: int, reference_from: int) -> None:
        """A patch has been written."""
        if self.settings is not None:
            self.open = Trial(patch, step, reference_from)

    def over(self, step: int) -> bool:
        """Whether the window of the patch on trial is over."""
        return self.open is not None and step >= self.open.patched_at + self.window

    def lost(self) -> bool:
        """Whether the loss has stopped being a number under the patch on trial."""
        return self.open is not None and self.losses.trace.lost(self.open.patched_at)

    def verdict(self, step: int) -> Verdict | None:
        """The judge's, once it can be told."""
        over, trial, trace = self.over(step), self.open, self.losses.trace
        if trial is None or self.settings is None:
            return None
        self.losses.read(block=over)
        if not (over or self.lost()):
            return None
        after, before = trace.between(trial.patched_at, step), trace.between(trial.reference_from, trial.patched_at - 1)
        return judge(*before, *after, patched_at=trial.patched_at, settings=self.settings)

    def close(self, verdict: Verdict, step: int) -> bool:
        """The trial is over; returns whether its patch was the second in a row that was undone."""
        self.open = None
        self.settled_at = step
        self._undone_in_a_row = 0 if verdict.keep else self._undone_in_a_row + 1
        return self._undone_in_a_row >= 2

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for `load_state_dict`."""
        return {"rolled_back_in_a_row": self._undone_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another left off; its patch on trial counts as kept."""
        self.open = None
        self._undone_in_a_row = int(state["rolled_back_in_a_row"])
