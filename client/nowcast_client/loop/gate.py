"""May a nowcast be asked for now?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nowcast_proto.rules.heldout import HeldOut
from nowcast_proto.rules.verdict import BestLevel, Floats, TrialSettings


class Gate:
    """What speaks against a nowcast.

    Args:
        lr_gate: Part of the largest learning rate below which there is none.
        total_steps: Length of the training, None where it is not known.
        period: Steps between nowcasts.
        trial: How patches are judged; None where they are not.
        judging: Whether patches will be written and judged, so that the best level of the loss counts.

    Attributes:
        held_out: Where losses on held-out data are reported.
    """

    def __init__(
        self, lr_gate: float, total_steps: int | None, period: int, trial: TrialSettings | None, *, judging: bool
    ) -> None:
        self._lr_gate = lr_gate
        self._total_steps = total_steps
        self._window = trial.window if trial is not None else 1
        planned = total_steps // period if total_steps is not None else None
        self._best = BestLevel(trial, planned) if trial is not None and judging else None
        self._lr_max = 0.0
        self.held_out = HeldOut()

    def note(self, rate: float | None) -> None:
        """Remember the learning rate."""
        self._lr_max = max(self._lr_max, rate or 0.0)

    def tried(self, *, kept: bool) -> None:
        """The trial of another nowcast is over."""
        if self._best is not None:
            self._best.tried(kept=kept)

    @property
    def scale(self) -> float:
        """Part of the predicted change that should be written."""
        return self._best.payoff.scale if self._best is not None else 1.0

    def objection(self, step: int, rate: float | None, losses: Callable[[], Floats]) -> str:
        """Why no nowcast should be asked for now; empty where nothing speaks against one.

        Args:
            step: Steps so far.
            rate: The learning rate.
            losses: Gives those of the newest stretch in which nothing but training moved them.
        """
        if rate is not None and self._lr_max > 0 and rate < self._lr_gate * self._lr_max:
            return "the learning rate has decayed"
        if self._total_steps is not None and step + self._window > self._total_steps:
            return "the training ends before the nowcast could prove itself"
        if self._best is None:
            return ""
        return self.held_out.objection() or self._best.objection(step, losses())

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for `load_state_dict`."""
        best = self._best.state_dict() if self._best is not None else None
        return {"lr_max": self._lr_max, "best": best, "held_out": self.held_out.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another left off."""
        self._lr_max = float(state["lr_max"])
        self.held_out.load_state_dict(state.get("held_out") or {})
        if self._best is not None:
            self._best.load_state_dict(state.get("best") or {})
