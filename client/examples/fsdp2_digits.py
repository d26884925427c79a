"""FSDP2: the digits on two ranks, parameters in shards. Run: python client/examples/fsdp2_digits.py

That starts its ranks itself. So does torchrun: torchrun --nproc-per-node 2 client/examples/fsdp2_digits.py
"""

from __future__ import annotations

import logging

import torch
from common import accuracy, arguments, classifier, digits, on_ranks, share
from nowcast_client import attach
from nowcast_client.loggers import describe
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

options = arguments(__doc__, steps=600, period=100, ranks=2)


def train(rank: int) -> None:
    """What every rank does."""
    data, held_out = digits()
    model = classifier()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = {"period": options.period, "total_steps": options.steps, "wait": options.wait}
    with attach(model, optimizer, options.url, **settings) as nowcast:
        for x, y in share(data, rank, options.steps):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            nowcast.observe(loss)
            optimizer.step()
    trained = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        whole = classifier()
        whole.load_state_dict(trained)
        logging.info("held-out accuracy %.3f", accuracy(whole, held_out))
        logging.info(describe(nowcast.summary()))


if __name__ == "__main__":
    on_ranks(train, options.ranks)
