"""A patch is on trial: watch the reported loss through a recovery window, then keep the patch or undo it.

The loss right after a nowcast says nothing: a good one raises it for 10 to 30 steps and is ahead by 50. So the judge
looks at the end of the window only, compares it with the level from before the nowcast, allows for the noise of the
loss, and gives a level that is still falling fast enough the benefit of the doubt. It does not extrapolate the old
trend downwards: a training curve is convex, a straight line through it promises too much, and a nowcast that merely did
not hurt would be undone. What a wrong "keep" can cost is bounded by the same rule: the kept weights are, within the
noise, no worse than those of one reference window earlier.

Within the noise many of them may still add up to a drift no single verdict sees, or take back what training makes good
between them. `BestLevel` sees both: no nowcast is asked for while the loss lies above the best it has been, nor after
three that brought nothing better. That training alone would have fallen further only `Payoff` sees, which it asks last.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nowcast_proto.rules.payoff import Level, Payoff

Floats = NDArray[np.float64]
RECOVERY = 50
"""Steps after which the spike of a good nowcast was over in every training that was measured."""


@dataclass(frozen=True)
class TrialSettings:
    """How the judge decides; the defaults are those that pass the simulation in ``test_verdict.py``.

    Attributes:
        window: Steps of the recovery window.
        reference: Steps before the nowcast that say what was normal.
        tail: Part of the window, at its end, whose level is judged.
        z: Standard errors the level may lie above the expectation.
        margin: Part of the expectation the level may lie above it besides, for losses without noise.
        min_reference: Reported losses needed before the nowcast; with fewer nothing is patched.
        min_tail: Reported losses needed at the window's end; with fewer the patch is undone.
        patience: Kept nowcasts in a row that may bring no lower loss than the lowest before, until they pause; one less
            after every pause.
    """

    window: int = 50
    reference: int = 50
    tail: float = 0.4
    z: float = 3.0
    margin: float = 0.005
    min_reference: int = 8
    min_tail: int = 3
    patience: int = 3


@dataclass(frozen=True)
class Verdict:
    """What the judge found.

    Attributes:
        keep: Whether the patch stays.
        reason: One sentence.
        expected: Level of the loss the nowcast is measured against.
        level: Level at the end of the window.
        tolerance: How far ``level`` may lie above ``expected``.
    """

    keep: bool
    reason: str
    expected: float
    level: float
    tolerance: float


class LossTrace:
    """Reported losses by optimizer step; several reports for one step (accumulation) are averaged.

    Args:
        keep: Steps to remember.
    """

    def __init__(self, keep: int) -> None:
        self._rows: deque[list[float]] = deque(maxlen=keep)  # [step, sum, count]

    def add(self, step: int, loss: float) -> None:
        """Add one report for the weights after ``step`` optimizer steps."""
        if self._rows and self._rows[-1][0] == step:
            self._rows[-1][1] += loss
            self._rows[-1][2] += 1
        else:
            self._rows.append([float(step), loss, 1.0])

    def lost(self, first: int) -> bool:
        """Whether the loss since step ``first`` has stopped being a number; see `hopeless`."""
        newest = [total for step, total, _ in islice(reversed(self._rows), 2) if step >= first]
        return len(newest) == 2 and not any(map(math.isfinite, newest))

    def between(self, first: int, last: int) -> tuple[Floats, Floats]:
        """Steps and mean losses of the reports for steps first … last, both included."""
        rows = [(s, total / n) for s, total, n in self._rows if first <= s <= last]
        found = np.array(rows, dtype=np.float64).reshape(-1, 2)
        return found[:, 0], found[:, 1]


def noise(losses: Floats) -> float:
    """Standard deviation of the noise on a loss, blind to its trend and to outliers.

    Half the squared difference of neighbours has the noise's variance whatever slow trend lies under it; the median
    makes a few spikes harmless.
    """
    if losses.size < 2:
        return math.inf
    return float(1.4826 * np.median(np.abs(np.diff(losses))) / math.sqrt(2.0))


def trimmed_mean(losses: Floats) -> float:
    """Mean without the lowest and the highest tenth."""
    cut = losses.size // 10
    ordered = np.sort(losses)
    return float(ordered[cut : losses.size - cut].mean())


def slope(steps: Floats, losses: Floats, sigma: float) -> tuple[float, float]:
    """Least-squares slope per step and its standard error under noise ``sigma``."""
    centred = steps - steps.mean()
    spread = float((centred**2).sum())
    if spread == 0.0:
        return 0.0, math.inf
    return float((centred * losses).sum() / spread), sigma / math.sqrt(spread)


class BestLevel:
    """The lowest level the loss has had, and whether nowcasts are still good for a lower one.

    Args:
        settings: What counts as level with it.
        planned: Nowcasts that the training has room for; None where its length is not known.

    Attributes:
        best: The lowest level so far; None before the first.
        nowcasts: Those that were kept since.
        pauses: Times nowcasts were found to bring nothing.
        pause: Lower levels training alone has to bring before the next nowcast: one the first time, then two, four …
        payoff: Whether the sum of the nowcasts pays.
    """

    def __init__(self, settings: TrialSettings, planned: int | None = None) -> None:
        self._settings = settings
        self.best: Level | None = None
        self.nowcasts = self.pauses = self.pause = 0
        self.payoff = Payoff(planned)

    def tried(self, *, kept: bool) -> None:
        """The trial of another nowcast is over."""
        self.nowcasts += kept
        self.payoff.tried()

    def objection(self, step: int, losses: Floats) -> str:
        """Why no nowcast should be made now; empty where nothing speaks against one.

        Args:
            step: Of the training.
            losses: (n,) those of the newest stretch in which nothing but training moved them; stretches should be
                about equally long, so that a falling loss falls from one to the next. Too few say nothing.
        """
        losses = losses[np.isfinite(losses)]
        if losses.size < self._settings.min_reference:
            return ""
        now = Level(trimmed_mean(losses), noise(losses) / math.sqrt(losses.size))
        self.payoff.over(step, now)
        if self.best is None or now.mean <= self.best.mean:
            self.best, self.nowcasts, self.pause = now, 0, max(0, self.pause - 1)
        elif self.pause == 0 and self.nowcasts >= max(1, self._settings.patience - self.pauses):
            self.pause = 2**self.pauses
            self.pauses += 1
        if self.pause:
            return "nowcasts have brought no better loss lately: they wait until training alone brings one"
        tolerance = self._settings.z * math.hypot(now.error, self.best.error)
        if now.mean > self.best.mean + tolerance + self._settings.margin * abs(self.best.mean):
            return "the loss is above the best it has been: nowcasts wait until it is back"
        return self.payoff.objection()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for `load_state_dict`."""
        level = list(astuple(self.best)) if self.best else None
        counts = {"nowcasts": self.nowcasts, "pauses": self.pauses, "pause": self.pause}
        return {"best": level, **counts, "payoff": self.payoff.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another left off; from the beginning where the state is empty."""
        level = state.get("best")
        self.best = Level(*level) if level else None
        self.nowcasts, self.pauses, self.pause = (int(state.get(n, 0)) for n in ("nowcasts", "pauses", "pause"))
        self.payoff.load_state_dict(state.get("payoff") or {})


def hopeless(losses: Floats) -> bool:
    """Whether a patch must go before its window ends: the loss has stopped being a number.

    One infinite loss alone is what gradient scaling lives with; two in a row are not.
    """
    return losses.size >= 2 and not bool(np.isfinite(losses[-2:]).any())


def judge(
    reference_steps: Floats,
    reference: Floats,
    after_steps: Floats,
    after: Floats,
    *,
    patched_at: int,
    settings: TrialSettings,
) -> Verdict:
    """Decide at the end of the recovery window.

    Args:
        reference_steps: (n,) steps of the losses from before the nowcast.
        reference: (n,) those losses.
        after_steps: (m,) steps of the losses since.
        after: (m,) those losses.
        patched_at: Step after which the weights were patched.
        settings: How to decide.
    """
    window = settings.window
    if hopeless(after):
        return Verdict(False, "the loss is not finite", math.nan, math.nan, math.nan)
    sane = np.isfinite(reference)
    reference_steps, reference = reference_steps[sane], reference[sane]
    sane = np.isfinite(after)
    after_steps, after = after_steps[sane], after[sane]
    # In a short window the part of it that is judged would hold too few losses.
    tail = after_steps > patched_at + min(window * (1.0 - settings.tail), window - 1.0 - settings.min_tail)
    tail_steps, end = after_steps[tail], after[tail]
    if reference.size < settings.min_reference:
        return Verdict(False, f"only {reference.size} losses from before the nowcast", math.nan, math.nan, math.nan)
    if end.size < settings.min_tail:
        return Verdict(False, f"only {end.size} losses reported at the end of the window", math.nan, math.nan, math.nan)

    sigma = noise(reference)
    expected = trimmed_mean(reference)
    # A loss that was rising anyway (warm-up, a harder curriculum) is not the nowcast's fault.
    rise, rise_error = slope(reference_steps, reference, sigma)
    if rise > 3.0 * rise_error:
        expected += rise * float(tail_steps.mean() - reference_steps.mean())
    level = trimmed_mean(end)
    tolerance = settings.z * sigma * math.sqrt(1.0 / end.size + 1.0 / reference.size)
    tolerance += settings.margin * abs(expected)
    if level <= expected + tolerance:
        return Verdict(True, "the loss is back on trend", expected, level, tolerance)

    trend = rise if rise < -3.0 * rise_error else 0.0
    excess = after - expected - trend * (after_steps - tail_steps.mean())
    if _recovering(after_steps - patched_at, excess, sigma, tolerance, window):
        return Verdict(True, "the loss is still above its trend but falling towards it", expected, level, tolerance)
    return Verdict(False, "the loss did not come back to its trend", expected, level, tolerance)


def _recovering(ages: Floats, excess: Floats, sigma: float, tolerance: float, window: int) -> bool:
    """Whether a loss still too high will be back in time, if its excess goes on halving as it does.

    In time is one more window on, or when spikes have been seen to be over where a short window ends before that.

    A spike decays like an exponential; a straight line through its steep beginning would promise far too much.

    Args:
        ages: (m,) steps since the patch.
        excess: (m,) loss above the expectation.
        sigma: Noise of the loss.
        tolerance: Excess that counts as back.
        window: Steps of the window.
    """
    # The first steps after the patch fall steepest; they are left out where the window can do without.
    late = ages > max(0.0, min(window / 3.0, window - 30.0))
    ages, excess = ages[late], excess[late]
    fall, fall_error = slope(ages, excess, sigma)
    middle = ages.size // 2
    if middle < 2 or fall >= -3.0 * fall_error:
        return False
    before, now = float(excess[:middle].mean()), float(excess[middle:].mean())
    apart = float(ages[middle:].mean() - ages[:middle].mean())
    if now <= 0.0 or before <= now:
        return now <= 0.0
    ahead = max(window, RECOVERY - window)
    return bool(now * (now / before) ** (ahead / apart) <= tolerance)
