"""Accelerate: ``attach(accelerator, model, optimizer, url=..., period=...)`` after ``accelerator.prepare``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import nn

from nowcast_client.attaching import attach as attach_hook
from nowcast_client.handle import Handle
from nowcast_client.loggers import Metrics, is_wandb, to_wandb
from nowcast_client.settings import AttachSettings, Connection


def attach(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: object,
    url: str | Connection | None = None,
    **settings: Unpack[AttachSettings],
) -> Handle:
    """Nowcast a training loop written with Accelerate.

    The handle's state goes into ``accelerator.save_state`` and comes back with ``load_state``; its metrics go to the
    accelerator's trackers. Where a tracker has one step for everything, that step stays the training loop's own.

    Args:
        accelerator: The Accelerator.
        model: The prepared model.
        optimizer: The prepared optimizer, or a sequence of them.
        url: As in `nowcast_client.attach`.
        settings: Everything else `nowcast_client.attach` takes.

    Returns:
        The handle; report the loss with ``handle.observe(loss)``.

    Raises:
        AttachError: As `nowcast_client.attach`.
    """
    settings.setdefault("metrics", _to_trackers(accelerator))
    handle = attach_hook(model, optimizer, url, **settings)
    accelerator.register_for_checkpointing(handle)
    return handle


def _to_trackers(accelerator: Accelerator) -> Metrics:
    """Metrics to the trackers the accelerator has when they come."""
    known: list[tuple[Any, Metrics]] = []

    def target(tracker: Any) -> Metrics:
        found = next((metrics for one, metrics in known if one is tracker), None)
        if found is None:
            found = _to_tracker(tracker)
            known.append((tracker, found))
        return found

    def take(numbers: Mapping[str, float], step: int) -> None:
        if accelerator.is_main_process:
            for tracker in accelerator.trackers:
                target(tracker)(numbers, step)

    return take


def _to_tracker(tracker: Any) -> Metrics:
    run = tracker.tracker
    if is_wandb(run):
        return to_wandb(run)
    if tracker.name == "comet_ml":  # its tracker would set the step of everything that is logged later
        return lambda numbers, step: run.log_metrics(dict(numbers), step=step)
    if tracker.name == "dvclive":  # its tracker would begin a new step

        def take(numbers: Mapping[str, float], step: int) -> None:
            for name, value in {**numbers, "nowcast/step": float(step)}.items():
                run.log_metric(name, value)

        return take
    return lambda numbers, step: tracker.log(dict(numbers), step=step)
