"""How many operations a nowcast starts on a device, counted without one.

Run: python tests/bench/launches.py --network llama-384x6-128k --memory 4GiB

Tensors on torch's ``meta`` device have shapes and no values, so the engine walks its whole plan as it would on a GPU
and every operation that would start a kernel is counted. Snapshots count as resident on the device.
"""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from engine_models import MODELS, checkpoint, graph_and_positions
from nowcast_service.commands._terminal import parse_bytes
from nowcast_service.nino.exact import engine, listed, run
from nowcast_service.nino.exact.engine import ExactEngine
from nowcast_service.nino.scaling import Scale
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """Counts operations on ``meta`` tensors by name; views and allocations start nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = (value for value in (*args, out) if isinstance(value, Tensor))
        if not func.is_view and "empty" not in str(func) and any(tensor.is_meta for tensor in tensors):
            self.names[str(func)] += 1
        return out


class _Snapshots:
    """A history of tensors without values, which `History` itself rightly refuses."""

    def __init__(self, spec: Any, count: int) -> None:
        self.spec = spec
        self._count = count
        self._tensors = {name: torch.empty(shape, device="meta") for name, shape in spec.shapes().items()}

    def __len__(self) -> int:
        return self._count

    def flat(self, name: str) -> list[Tensor]:
        return [self._tensors[name].view(-1)] * self._count

    def newest(self, name: str) -> Tensor:
        return self._tensors[name]


def _add_sorted(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """As many operations as the real one, whose number of rows depends on values."""
    torch.argsort(index)
    for _ in range(5):
        total.add_(1)


def count(network: str, memory: int) -> Counter[str]:
    """Operations of one nowcast of a benchmark's network within an engine's memory."""
    trained = checkpoint()
    graph, positions = graph_and_positions(MODELS[network]())
    with (
        mock.patch.object(engine, "plain_arithmetic", return_value=nullcontext()),
        mock.patch.object(run, "scale_of", return_value=Scale(0.0, 1.0)),
        mock.patch.object(listed, "add_sorted", _add_sorted),
    ):
        made = ExactEngine(trained, device="meta", memory_budget=memory)
        snapshots: Any = _Snapshots(graph.spec, trained.config.context)
        with Launches() as launches:
            made.predict(graph, snapshots, [5], positions=positions)
    return launches.names


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(MODELS), default="llama-384x6-128k")
    parser.add_argument("--memory", type=parse_bytes, default="1GiB")
    options = parser.parse_args()
    names = count(options.network, options.memory)
    print(f"{options.network}: {sum(names.values()):,} operations")
    for name, number in names.most_common(12):
        print(f"{number:8,} {name}")
