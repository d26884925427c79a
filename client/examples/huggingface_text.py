"""Hugging Face Trainer: a small GPT-2 learns Python source. Run: python client/examples/huggingface_text.py"""

from __future__ import annotations

import tempfile

from common import TextWindows, arguments
from nowcast_client.integrations.huggingface import add_nowcast
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

BATCH = 8

options = arguments(__doc__, steps=300, period=60)
set_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
)
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            logging_steps=50,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=TextWindows(64, BATCH * options.steps),
    )
    nowcast = add_nowcast(trainer, options.url, period=options.period, wait=options.wait)
    trainer.train()
