"""Accelerate: ``attach(accelerator, model, optimizer, url=..., period=...)`` after ``accelerator.prepare``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import nn

from nowcast_client.handle import Handle
from nowcast_client.handle import attach as attach_hook


def attach(
    accelerator: Accelerator, model: nn.Module, optimizer: object, url: str | None = None, **settings: Any
) -> Handle:
    """Nowcast a training loop written with Accelerate.

    The handle's state goes into ``accelerator.save_state`` and comes back with ``load_state``; its metrics go to the
    accelerator's trackers.

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

    def take(numbers: Mapping[str, float], step: int) -> None:
        if accelerator.trackers:
            accelerator.log(dict(numbers), step=step)

    settings.setdefault("metrics", take)
    handle = attach_hook(model, optimizer, url, **settings)
    accelerator.register_for_checkpointing(handle)
    return handle
