"""The state of a training that is nowcast, as it goes into a checkpoint and comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from nowcast_client.errors import AttachError
from nowcast_client.loop.nowcasting import Nowcasting

VERSION = 2


def state_dict(work: Nowcasting) -> dict[str, Any]:
    """See `nowcast_client.handle.Handle.state_dict`."""
    return {
        "version": VERSION,
        "step": work.steps.step,
        "mode": work.mode,
        "network": work.patcher.network(),
        "last_snapshot": work.last_snapshot,
        "harm_steps": work.report.harm_steps,
        "counts": dict(work.report.counts),
        **work.windows.state_dict(),
        **work.trials.state_dict(),
        **work.gate.state_dict(),
    }


def load_state_dict(work: Nowcasting, state: Mapping[str, Any]) -> None:
    """See `nowcast_client.handle.Handle.load_state_dict`.

    Raises:
        AttachError: The state is of another version or another network.
    """
    if state.get("version") != VERSION:
        raise AttachError(f"state of version {state.get('version')!r}", expected=f"version {VERSION}")
    if state["network"] != work.patcher.network():
        raise AttachError(
            "the state was saved for another network", expected="the same parameters, of the same names and shapes"
        )
    work.agreement.forget()
    work.patcher.watch.forget()
    work.steps.resume(int(state["step"]))
    work.last_snapshot = int(state["last_snapshot"])
    work.report.harm_steps, work.report.counts = int(state["harm_steps"]), Counter(state["counts"])
    work.trials.load_state_dict(state)
    work.gate.load_state_dict(state)
    work.windows.load_state_dict(state)
    if state["mode"] == "off" and work.is_on:
        work.turn_off("it was off when the state was saved")
