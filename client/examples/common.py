"""What the examples share: real data that every machine has, and their command line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

import torch
from nowcast_lab.demo.training_job.text import standard_library
from sklearn.datasets import load_digits
from torch import Tensor, distributed, nn
from torch.utils.data import TensorDataset


def arguments(about: str | None, steps: int, period: int, ranks: int = 0) -> argparse.Namespace:
    """The options every example has; those on several ranks can be told how many."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="embedded", help="a running service; embedded starts one (%(default)s)")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps (%(default)s)")
    parser.add_argument("--period", type=int, default=period, help="steps between nowcasts (%(default)s)")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds a nowcast may hold up training (%(default)s)")
    if ranks:
        parser.add_argument("--ranks", type=int, default=ranks, help="processes to start (%(default)s)")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return parser.parse_args()


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,797 scanned digits of 8 x 8 pixels, from scikit-learn: three quarters to learn from, the rest held out.

    Returns:
        Pixels (n, 64) in 0 … 1 and labels (n,), twice.
    """
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    cut = len(y) * 3 // 4
    return TensorDataset(x[order[:cut]], y[order[:cut]]), TensorDataset(x[order[cut:]], y[order[cut:]])


def classifier(seed: int = 0) -> nn.Sequential:
    """A small network for the digits."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def share(data: TensorDataset, rank: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A rank's own random batches of 64."""
    x, y = data.tensors
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        chosen = torch.randint(len(y), (64,), generator=generator)
        yield x[chosen], y[chosen]


def on_ranks(train: Callable[[int], None], count: int) -> None:
    """Run ``train(rank)`` on every rank: those torchrun has started, else ``count`` processes of our own."""
    if "RANK" in os.environ:
        _rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://", train)
    else:
        with tempfile.TemporaryDirectory() as folder:
            meeting = f"file://{folder}/ranks"
            torch.multiprocessing.spawn(_rank, args=(count, meeting, train), nprocs=count)


def _rank(rank: int, count: int, meeting: str, train: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    train(rank)
    distributed.destroy_process_group()


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Part of the data the model gets right."""
    x, y = data.tensors
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


class TextWindows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of the standard library's own source, as bytes, for a causal language model.

    Args:
        length: Bytes of a window.
        count: How many windows, spread over the text.
    """

    def __init__(self, length: int, count: int) -> None:
        text = standard_library().training
        starts = torch.linspace(0, len(text) - length, count).long()
        self._windows = torch.stack([torch.from_numpy(text[s : s + length].copy()) for s in starts.tolist()]).long()

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._windows[index], "labels": self._windows[index]}
