"""The one contract every predictor fulfils."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from nowcast_proto.errors import HorizonOutOfRange, InvalidRequest, InvalidSnapshot
from torch import Tensor

from nowcast_service.history import History, all_finite
from nowcast_service.predictors.graphs import Needs

Check = Callable[[], None]
FARTHEST_BASELINE = 1_000_000
"""Largest horizon of predictors without a trained horizon; beyond it a request is a mistake."""
State = dict[str, Any]
"""What a predictor carries from one nowcast of a session to the next; empty for all but `snoo`. A caller that rejects
or rolls back a nowcast hands the state from before it to the next call."""


def unasked() -> None:
    """The answer is always wanted."""


class Predictor(Protocol):
    """Where will the parameters be, k strides after the newest snapshot?"""

    name: str
    context: int
    """Snapshots needed; 0 where any number from two on will do."""
    farthest: int
    """Largest horizon it can be asked for."""
    needs: Sequence[Needs]
    """What it wants computed from a spec before it predicts; empty where it looks at no graph."""

    def predict(
        self, history: History, k: int, state: State | None = None, *, check: Check = unasked
    ) -> tuple[dict[str, Tensor], State]:
        """Predict all parameters.

        Args:
            history: Snapshots, oldest first, evenly spaced by one stride.
            k: Horizon in strides, counted from the newest snapshot.
            state: What the previous call of this session returned, or None.
            check: To be called between parts of the work, a few times a second; raises when the answer is no longer
                wanted.

        Returns:
            Name -> float32 tensor of future parameters (not deltas), under the spec's names and shapes; and the state
            to hand to the next call.

        Raises:
            InvalidSnapshot: The history does not fit the predictor.
            HorizonOutOfRange: k is outside what the predictor can do.
        """
        ...


def check_horizon(ks: int | Iterable[int], farthest: int = FARTHEST_BASELINE) -> None:
    """Refuse horizons outside 1 … farthest.

    Raises:
        HorizonOutOfRange: As said.
    """
    for k in (ks,) if isinstance(ks, int) else ks:
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= farthest:
            raise HorizonOutOfRange(
                f"horizon k={k}",
                expected=f"a whole number of strides from 1 to {farthest}",
                remedy="choose a horizon the predictor was made for",
            )


def check_count(count: int, context: int, who: str) -> None:
    """Refuse another number of snapshots than a predictor reads.

    Raises:
        InvalidSnapshot: As said.
    """
    if (context and count != context) or (not context and count < 2):
        raise InvalidSnapshot(
            f"{count} snapshots were given",
            expected=f"exactly {context}, the context of {who}" if context else f"at least 2 for {who}",
            remedy="send evenly spaced snapshots, oldest first",
        )


def check_kept(keep: int, context: int, who: str) -> None:
    """Refuse to keep fewer snapshots than a predictor reads.

    Raises:
        InvalidRequest: As said.
    """
    if keep < context:
        raise InvalidRequest(
            f"a session that keeps {keep} snapshots", expected=f"at least {context}, the context of {who}"
        )


def check_even(steps: Sequence[int]) -> None:
    """Refuse snapshots that do not lie one stride apart: every predictor reads them so.

    Raises:
        InvalidRequest: As said.
    """
    strides = [b - a for a, b in pairwise(steps)]
    if any(stride != strides[0] for stride in strides):
        raise InvalidRequest(
            f"the steps {list(steps)} lie {min(strides)} to {max(strides)} apart",
            expected="snapshots that are evenly spaced, one stride apart",
            remedy="ask with the newest evenly spaced snapshots",
        )


def move(newest: Tensor, target: Tensor, update_scale: float) -> Tensor:
    """``newest + update_scale * (target - newest)``, exactly ``target`` where the scale is 1."""
    return target if update_scale == 1.0 else torch.lerp(newest.to(target), target, update_scale)


def check_finite(parameters: Mapping[str, Tensor], who: str) -> None:
    """Refuse predictions that are not finite; finite inputs can overflow when far ones are extrapolated.

    Raises:
        InvalidSnapshot: A predicted tensor has NaN or infinity.
    """
    for name in parameters:
        if not all_finite(parameters[name]):
            raise InvalidSnapshot(
                f"the prediction of {who} for tensor {name!r} is not finite",
                expected="weights that float32 can hold after the update",
                remedy="check that the training run has not diverged",
            )
