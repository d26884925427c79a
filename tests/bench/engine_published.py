"""Runs the published NiNo code on one history, in this process alone, and prints what it took as JSON.

Usage: engine_published.py PUBLISHED_CHECKOUT INPUTS.pt OUTPUT.pt THREADS

INPUTS holds ``shapes``, ``heads``, ``snapshots``, ``positions``, ``state_dict``, ``model_args`` and ``k``. Timed is
what a nowcast takes: scaling, filling the graph, the network, un-scaling. Building the graph is not; the memory it
takes is counted.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import sys
import time
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages the published modules import at the top and never use on this path."""

    names = ("torchvision", "datasets", "accelerate", "evaluate", "tensorboard", "timm", "nltk")

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] in self.names else None

    def create_module(self, spec):  # type: ignore[no-untyped-def]
        module = MagicMock(name=spec.name)
        module.__path__ = []
        module.__spec__ = spec
        return module

    def exec_module(self, module) -> None:  # type: ignore[no-untyped-def]
        pass


def _package(name: str, path: Path) -> None:
    """A package whose own ``__init__`` is skipped: it would import training code."""
    module = types.ModuleType(name)
    module.__path__ = [str(path)]
    sys.modules[name] = module


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main(published: str, inputs: str, output: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    sys.path.insert(0, published)
    sys.meta_path.append(_Absent())
    _package("optim", Path(published) / "optim")
    _package("utils", Path(published) / "utils")
    stdout, sys.stdout = sys.stdout, sys.stderr  # the published code prints
    network = importlib.import_module("optim.model").NiNoModel
    scale = importlib.import_module("utils.scale")
    given = torch.load(inputs, weights_only=True, mmap=False)
    shapes = [(name, torch.Size(shape)) for name, shape in given["shapes"]]
    snapshots = given["snapshots"]
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    graph_class = importlib.import_module("graph.graph_gpt").NeuralGraphGPT
    graph = graph_class(shapes, num_heads=given["heads"], lpe=given["positions"])
    model = network(**given["model_args"]).eval()
    model.load_state_dict(given["state_dict"])
    start = time.perf_counter()
    with torch.no_grad():
        states = torch.stack(snapshots, dim=1)
        states, scales = scale.scale_params(states, shapes, method="std")
        graph.set_edge_attr(states)
        graph.pyg_graph = model(graph.pyg_graph, k=given["k"])
        x = scale.unscale_params(graph.to_vector(), shapes, scales, method="std")
    seconds = time.perf_counter() - start
    torch.save(x.reshape(-1), output)
    stdout.write(json.dumps({"seconds": seconds, "memory": status("VmHWM") - before}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
