"""Batches of a task, the same for every arm of a seed, and its metric."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nowcast_lab.evaluate.tasks import Task
from nowcast_lab.metatrain.data import Images, Text
from nowcast_lab.metatrain.errors import InvalidRecipe


def batches(task: Task, data: Images | Text, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Reshuffled epochs of images, or windows of text; a function of the seed alone.

    Raises:
        InvalidRecipe: A text that is to be read once has been read.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(data, Text):
        offsets = torch.arange(task.arch.context + 1)
        for starts in _starts(task, len(data.train), generator):
            windows = data.train[(starts[:, None] + offsets).to(data.train.device)]
            yield windows[:, :-1], windows[:, 1:]
        raise InvalidRecipe(
            f"{task.source} is too short for {task.name} at this length: it is read once", remedy="give fewer --steps"
        )
    while True:
        order = torch.randperm(len(data.train_y), generator=generator)
        for rows in order.split(task.batch):
            if len(rows) == task.batch:
                index = rows.to(data.train_y.device)
                yield data.train_x[index], data.train_y[index]


def _starts(task: Task, length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """(batch,) first tokens of windows: random ones for ever, or every window once, in random order."""
    while not task.once:
        yield torch.randint(length - task.arch.context - 1, (task.batch,), generator=generator)
    windows = (length - 1) // task.arch.context
    for rows in torch.randperm(windows, generator=generator).split(task.batch):
        if len(rows) == task.batch:
            yield rows * task.arch.context


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, data: Images | Text) -> float:
    """The task's metric on held-out data: accuracy in per cent, or mean loss."""
    was_training = model.training
    model.eval()
    try:
        inputs, targets = _held_out(task, data)
        losses, right, count = 0.0, 0, 0
        for x, y in zip(inputs.split(500), targets.split(500), strict=True):
            output = model(x)
            losses += float(cross_entropy(output.reshape(-1, output.shape[-1]), y.reshape(-1), reduction="sum"))
            right += int((output.argmax(-1) == y).sum())
            count += y.numel()
    finally:
        model.train(was_training)
    return 100 * right / count if task.metric == "accuracy" else losses / count


def _held_out(task: Task, data: Images | Text) -> tuple[Tensor, Tensor]:
    if isinstance(data, Text):
        stride = max(1, (len(data.test) - task.arch.context - 1) // task.eval_items)
        starts = torch.arange(task.eval_items, device=data.test.device)[:, None] * stride
        windows = data.test[starts + torch.arange(task.arch.context + 1, device=data.test.device)]
        return windows[:, :-1], windows[:, 1:]
    # Every so many images: files may be sorted by class.
    stride = max(1, len(data.test_y) // task.eval_items)
    return data.test_x[::stride][: task.eval_items], data.test_y[::stride][: task.eval_items]
