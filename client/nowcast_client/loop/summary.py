"""What happened in a training so far, as plain numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nowcast_proto.trainings import Report

from nowcast_client.loop.nowcasting import Nowcasting
from nowcast_client.loop.savings import SMOOTHED, Baseline
from nowcast_client.network import coverage
from nowcast_client.wire.transport import Transport

COUNTED = ("snapshots", "asked", "arrived", "patched", "kept", "rolled_back", "rejected", "shadow", "unjudged")


def tell_people(work: Nowcasting) -> None:
    """Report to those who watch, where it is time to."""
    people, now = work.report.people, time.perf_counter()
    if people is not None and people.due(now, work.steps.step):
        work.trials.losses.read()
        people.tell(now, work.steps.step, work.mode, work.trials.losses.trace)


def last_report(work: Nowcasting) -> Callable[[], Report] | None:
    """What those who watch are told at the end."""
    people = work.report.people
    if people is None:
        return None
    work.trials.losses.read(block=True)
    return people.last(work.steps.step, work.mode, work.trials.losses.trace)


def summary(
    work: Nowcasting, transport: Transport | None, baseline: Sequence[float] | str | Path | None
) -> dict[str, Any]:
    """See `nowcast_client.handle.Handle.summary`.

    Args:
        work: The training.
        transport: The way to the service; None where this rank does not talk to it.
        baseline: Losses of an earlier run without nowcasts.

    Raises:
        AttachError: The baseline cannot be read.
    """
    report, windows, uploader, step = work.report, work.windows, work.windows.uploader, work.steps.step
    measured = None
    if baseline is not None:
        work.trials.losses.read()
        measured = Baseline(baseline).saved(*work.trials.losses.trace.between(step - SMOOTHED, step))
    found = uploader.coverage if uploader else None
    return {
        "mode": work.mode,
        "steps": step,
        **{name: report.counts[name] for name in COUNTED},
        "harm_steps": report.harm_steps,
        "steps_saved": measured,
        "seconds_per_step": work.steps.seconds_per_step,
        "skipped": report.part("skipped: "),
        "failed": report.part("failed: "),
        "bytes_sent": getattr(transport, "bytes_sent", windows.upload_bytes),
        "bytes_received": getattr(transport, "bytes_received", 0),
        "resent": uploader.session.resent if uploader else 0,
        "hook_seconds": report.hook_seconds,
        "wait_seconds": report.wait_seconds + work.agreement.waited,
        "host_bytes": (windows.ring.nbytes if windows.ring else 0) + work.patcher.backup.nbytes,
        "coverage": coverage.numbers(found) if found else None,
    }
