"""Trainings on several ranks, for the tests: every function here runs in a process per rank."""

from __future__ import annotations

import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sklearn.datasets import load_digits
from torch import Tensor, nn

SETTINGS = {"period": 20, "wait": 60.0, "update_scale": 0.05}


Job = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and what it gets after the rank."""


def run(jobs: dict[str, Job], size: int, folder: Path, *, seconds: float = 400.0) -> dict[str, list[Any]]:
    """Run jobs one after another on the same ranks; starting processes takes longer than most of them.

    Returns:
        By job, what it returned on every rank. A job that failed, and those after it, are left out on some rank and
        raise when looked up with `of`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # One process imports everything once; the ranks are its forks.
    context = mp.get_context("forkserver")
    os.environ["OMP_NUM_THREADS"] = "1"
    modules = {function.__module__ for function, _ in jobs.values()}
    context.set_forkserver_preload([__name__, "nowcast_client.ranks.together", "torch.distributed.fsdp", *modules])
    processes = [context.Process(target=_main, args=(jobs, rank, size, str(folder))) for rank in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in stuck:
        processes[rank].kill()
    results: dict[str, list[Any]] = {}
    for name in jobs:
        paths = [folder / f"{name}-{rank}.pt" for rank in range(size)]
        if all(path.exists() for path in paths):
            results[name] = [torch.load(path, weights_only=True) for path in paths]
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("error-*")))
    results["errors"] = [f"ranks {stuck} hung\n" if stuck else "", errors]
    return results


def of(results: dict[str, list[Any]], name: str) -> list[Any]:
    """What a job returned on every rank.

    Raises:
        RuntimeError: It, or one before it, failed.
    """
    if name not in results:
        raise RuntimeError(f"{name} did not end on all ranks\n" + "".join(results["errors"]))
    return results[name]


def _main(jobs: dict[str, Job], rank: int, size: int, folder: str) -> None:
    name = "the beginning"
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        for name, (function, arguments) in jobs.items():
            torch.save(function(rank, *arguments), f"{folder}/{name}-{rank}.pt")
            dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"rank {rank} in {name}:\n{traceback.format_exc()}")
        sys.exit(1)


def network(widths: tuple[int, ...] = (64, 24, 10)) -> nn.Sequential:
    """The same on every rank."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batches(rank: int, same: bool = False) -> Any:
    """Endless batches of digits; other ones on every rank unless ``same``."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels)
    generator = torch.Generator().manual_seed(0 if same else rank)
    while True:
        chosen = torch.randint(0, len(y), (32,), generator=generator)
        yield x[chosen], y[chosen]


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Any, handle: Any = None, *, exact: bool = False
) -> Tensor:
    """One optimizer step; ``exact`` takes the gradients' signs only, which a step of a power of two adds exactly."""
    x, y = next(data)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    if handle is not None:
        handle.observe(loss)
    for parameter in model.parameters() if exact else ():
        parameter.grad.sign_()
    optimizer.step()
    return loss.detach()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, whole, on every rank."""
    return {
        name.removeprefix("module."): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }
