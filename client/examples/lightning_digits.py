"""Lightning: the digits, one callback. Run: python client/examples/lightning_digits.py"""

from __future__ import annotations

import logging

import lightning
import torch
from common import accuracy, arguments, classifier, digits
from nowcast_client.integrations.lightning import NowcastCallback
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

options = arguments(__doc__, steps=600, period=100)
train, held_out = digits()
batches = DataLoader(train, 64, sampler=RandomSampler(train, replacement=True, num_samples=64 * options.steps))


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = classifier()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


module = Digits()
nowcast = NowcastCallback(options.url, period=options.period, wait=options.wait)
trainer = lightning.Trainer(
    max_epochs=1,
    callbacks=[nowcast],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, batches)
logging.info("held-out accuracy %.3f", accuracy(module.network.cpu(), held_out))
