"""May a nowcast be asked for now?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nowcast_proto.rules.verdict import BestLevel, Floats, TrialSettings


class Gate:
    """What speaks against a nowcast.

    Args:
        lr_gate: Part of the largest learning rate below which there is none.
        total_steps: Length of the training, None where it is not known.
        trial: How patches are judged; None where they are not.
        judging: Whether patches will be written and judged, so that the best level of the loss counts.
    """

    def __init__(self, lr_gate: float, total_steps: int | None, trial: TrialSettings | None, *, judging: bool) -> None:
        self._lr_gate = lr_gate
        self._total_steps = total_steps
        self._window = trial.window if trial is not None else 1
        self._best = BestLevel(trial) if trial is not None and judging else None
        self._lr_max = 0.0

    def note(self, rate: float | None) -> None:
        """Remember the learning rate."""
        self._lr_max = max(self._lr_max, rate or 0.0)

    def kept(self) -> None:
        """Another nowcast was kept."""
        if self._best is not None:
            self._best.kept()

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
        return self._best.objection(losses()) if self._best is not None else ""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for `load_state_dict`."""
        return {"lr_max": self._lr_max, "best": self._best.state_dict() if self._best is not None else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another left off."""
        self._lr_max = float(state["lr_max"])
        if self._best is not None:
            self._best.load_state_dict(state.get("best") or {})
