"""Lightning: ``Trainer(callbacks=[NowcastCallback(url=..., period=...)])``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor

try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError:  # the same code under its older name
    from pytorch_lightning import LightningModule, Trainer  # type: ignore[assignment]
    from pytorch_lightning.callbacks import Callback  # type: ignore[assignment]

from nowcast_client.attaching import attach
from nowcast_client.handle import Handle
from nowcast_client.integrations.networks import network
from nowcast_client.loggers import Metrics, describe, is_wandb, to_wandb, together
from nowcast_client.settings import AttachSettings, Connection

log = logging.getLogger("nowcast")


class NowcastCallback(Callback):
    """Attaches when training starts, acts after a batch has ended, reports its loss, keeps its state in checkpoints.

    Weights change only in ``on_train_batch_end``: never between a forward pass and its backward pass, whatever
    optimizers, closures and manual optimization do inside the batch.

    Args:
        url: As in `nowcast_client.attach`.
        held_out: Name under which ``validation_step`` logs the loss on held-out data, where it does.
        settings: Everything else `nowcast_client.attach` takes; ``total_steps`` is the Trainer's by default. With
            manual optimization, give ``trial=False`` or return the loss from ``training_step``.

    Attributes:
        handle: The handle while training runs.
        summary: What `Handle.summary` said when the last training ended.
    """

    def __init__(
        self, url: str | Connection | None = None, *, held_out: str = "val_loss", **settings: Unpack[AttachSettings]
    ) -> None:
        self.handle: Handle | None = None
        self.summary: dict[str, Any] = {}
        self._url = url
        self._held_out = held_out
        self._settings: AttachSettings = settings
        self._saved: dict[str, Any] | None = None
        self._step_before = 0
        self._pending: dict[int, dict[str, float]] = {}
        self._targets: list[Metrics] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the innermost optimizers; go on from a checkpoint's state."""
        total = trainer.estimated_stepping_batches
        settings: AttachSettings = {
            "total_steps": int(total) if total != float("inf") else None,
            "metrics": self._take,
            **self._settings,
            "acts": "when_told",
        }
        self.handle = attach(network(pl_module), list(trainer.optimizers), self._url, **settings)
        self._targets = [_to_logger(logger) for logger in trainer.loggers]
        if self._saved is not None:
            self.handle.load_state_dict(self._saved)
            self._saved = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember which weights the batch's loss will be of."""
        if self.handle is not None:
            self._step_before = self.handle.step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report the loss; then take a snapshot, patch, or judge."""
        if self.handle is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Lightning divides the loss of a batch by the number of batches it accumulates.
            parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self.handle.observe(loss.detach() * parts, step=self._step_before)
        self.handle.act()
        pending, self._pending = self._pending, {}
        for step, numbers in pending.items():
            for target in self._targets:
                target(numbers, step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the loss on held-out data."""
        loss = trainer.callback_metrics.get(self._held_out)
        if self.handle is not None and loss is not None and not trainer.sanity_checking:
            self.handle.observe(loss, split="validation")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach and say what was gained."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        if self.handle is not None:
            return self.handle.state_dict()
        return self._saved or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken up when training starts."""
        self._saved = state_dict or None

    def _detach(self) -> None:
        if self.handle is not None:
            self._saved = self.handle.state_dict()
            self.handle.close()
            self.summary = self.handle.summary()
            log.info("%s", describe(self.summary))
            self.handle = None

    def _take(self, numbers: Mapping[str, float], step: int) -> None:
        self._pending[step] = together(self._pending.get(step, {}), numbers)


def _to_logger(logger: Any) -> Metrics:
    """Metrics to one of Lightning's loggers. A logger's step is that of a row; W&B's is the whole run's."""
    if is_wandb(logger.experiment):
        return to_wandb(logger.experiment)
    return lambda numbers, step: logger.log_metrics(dict(numbers), step)
