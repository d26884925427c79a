"""The one contract every predictor fulfils."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from nowcast_proto.errors import HorizonOutOfRange, InternalError, InvalidRequest, InvalidSnapshot
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
    """How far will the parameters have moved, k strides after the newest snapshot?"""

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
        """Predict the displacement of all parameters; whoever asked scales it and adds it to the newest snapshot.

        Args:
            history: Snapshots, oldest first, evenly spaced by one stride.
            k: Horizon in strides, counted from the newest snapshot.
            state: What the previous call of this session returned, or None.
            check: To be called between parts of the work, a few times a second; raises when the answer is no longer
                wanted.

        Returns:
            Name -> float32 displacement from the newest snapshot, under the spec's names and shapes, on the device of
            the snapshots, the caller's to write to; and the state to hand to the next call.

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


def taken(displacement: dict[str, Tensor], name: str, newest: Tensor, who: str) -> Tensor:
    """One tensor of a prediction, taken out of it so that memory goes as it comes.

    Raises:
        InternalError: The predictor did not keep to its contract.
    """
    found = displacement.pop(name, None)
    if found is None or found.shape != newest.shape or found.dtype != torch.float32:
        came = "nothing" if found is None else f"{str(found.dtype).removeprefix('torch.')} of shape {list(found.shape)}"
        raise InternalError(
            f"predictor {who} answered {came} for tensor {name[:100]!r}",
            expected=f"a float32 displacement of shape {list(newest.shape)}",
            remedy="mend the predictor",
        )
    return found


def moved(newest: Tensor, displacement: Tensor, update_scale: float = 1.0, *, name: str, who: str) -> Tensor:
    """``newest + update_scale * displacement``, in the displacement's memory: the one place where either is applied.

    Raises:
        InvalidSnapshot: It is not finite; finite snapshots can overflow when far ones are extrapolated.
    """
    if update_scale != 1.0:
        displacement.mul_(update_scale)
    parameters = displacement.add_(newest)
    if not all_finite(parameters):
        raise InvalidSnapshot(
            f"the prediction of {who} for tensor {name[:100]!r} is not finite",
            expected="weights that float32 can hold after the update",
            remedy="check that the training run has not diverged",
        )
    return parameters


def ahead(
    predictor: Predictor, history: History, k: int, state: State | None = None, *, update_scale: float = 1.0
) -> tuple[dict[str, Tensor], State]:
    """Where the parameters will be.

    Args:
        predictor: Which predicts.
        history: Snapshots, oldest first.
        k: Horizon in strides.
        state: See `Predictor.predict`.
        update_scale: Factor on the displacement.

    Returns:
        Name -> float32 tensor of future parameters; and the state to hand to the next call.

    Raises:
        InvalidRequest: The factor is not finite.
        NowcastError: Whatever the predictor raises.
    """
    if not math.isfinite(update_scale):
        raise InvalidRequest(f"update scale {update_scale}", expected="a finite number")
    displacement, state = predictor.predict(history, k, state)
    parameters = {}
    for name in history.spec.shapes():
        newest = history.newest(name)
        change = taken(displacement, name, newest, predictor.name)
        parameters[name] = moved(newest, change, update_scale, name=name, who=predictor.name)
    return parameters, state
