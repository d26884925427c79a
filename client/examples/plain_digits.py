"""A plain PyTorch loop: a classifier of digits. Run: python client/examples/plain_digits.py"""

from __future__ import annotations

import logging

import torch
from common import accuracy, arguments, classifier, digits
from nowcast_client import attach
from nowcast_client.loggers import ProgressLine, describe
from torch.utils.data import DataLoader, RandomSampler

options = arguments(__doc__, steps=600, period=100)
train, held_out = digits()
batches = DataLoader(train, 64, sampler=RandomSampler(train, replacement=True, num_samples=64 * options.steps))
model = classifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

progress = ProgressLine()
with attach(
    model,
    optimizer,
    options.url,
    period=options.period,
    total_steps=options.steps,
    wait=options.wait,
    on_event=progress,
) as handle:
    for x, y in batches:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        handle.observe(loss)
        optimizer.step()
progress.close()
logging.info("held-out accuracy %.3f", accuracy(model, held_out))
logging.info(describe(handle.summary()))
