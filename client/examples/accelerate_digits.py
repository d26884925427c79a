"""Accelerate: the digits, with gradient accumulation and clipping. Run: python client/examples/accelerate_digits.py"""

from __future__ import annotations

import logging

import torch
from accelerate import Accelerator
from common import accuracy, arguments, classifier, digits
from nowcast_client.integrations.accelerate import attach
from nowcast_client.loggers import describe
from torch.utils.data import DataLoader, RandomSampler

PARTS = 2  # micro-batches per optimizer step

options = arguments(__doc__, steps=600, period=100)
train, held_out = digits()
accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=PARTS)
samples = 32 * PARTS * options.steps
batches = DataLoader(train, 32, sampler=RandomSampler(train, replacement=True, num_samples=samples))
model = classifier()
model, optimizer, batches = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), batches)

with attach(
    accelerator,
    model,
    optimizer,
    options.url,
    period=options.period,
    total_steps=options.steps,
    wait=options.wait,
) as handle:
    for x, y in batches:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            handle.observe(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
logging.info("held-out accuracy %.3f", accuracy(accelerator.unwrap_model(model).cpu(), held_out))
logging.info(describe(handle.summary()))
