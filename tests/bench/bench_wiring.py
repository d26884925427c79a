"""How many networks of a folder are wired, proven and judged right: ``python tests/bench/bench_wiring.py FOLDER``.

The folder holds a ``registry.py`` with `REGISTRY`, whose entries make cases (model, args, kwargs, output), and modules
that fill it. Where no folder is given, ``zoo`` in NOWCAST_SHARED is taken; without either there is nothing to do.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from nowcast_client.network.tracing.recording import outputs_of
from nowcast_client.network.wired import wire
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.graph.contract import contract
from nowcast_service.graph.wiring.build import build_graph
from nowcast_service.predictors.wnn import ANY_KERNEL

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.bench.judge import Judge, Verdict

log = logging.getLogger("bench")
MODULES = ("vision", "language", "other", "libraries")


def document(spec: ArchitectureSpec) -> dict[str, Any]:
    """The wiring of the spec that is sent, as ``nowcast graph --json`` prints it.

    It claims the network's own symmetries, without the departures of published wiring.
    """
    faithful = spec if spec.graph is not None else spec.model_copy(update={"wiring": "faithful"})
    return contract(build_graph(faithful, max_features=ANY_KERNEL))


def judged(case: Any, spec: ArchitectureSpec) -> Verdict:
    """What the judge says of the wiring a spec asks for, in the highest precision that the network takes."""

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    model, tolerance = case.model, 2e-6
    args, kwargs = [double(x) for x in case.args], {name: double(x) for name, x in case.kwargs.items()}

    def run(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            out = model(*args, **kwargs)
        found: torch.Tensor = case.output(out) if case.output else outputs_of(out)[0]
        return found.clone()

    try:
        model.double()
        run(args, kwargs)
    except Exception:  # whatever a network raises that refuses float64
        model.float()
        args, kwargs, tolerance = case.args, case.kwargs, 2e-4
    live = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in live.values():
            if bool((tensor == tensor.reshape(-1)[0]).all()) and (tensor.numel() > 1 or not tensor.any()):
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    tensors = {name: tensor.detach().clone() for name, tensor in live.items()}

    def outputs(changed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            for name, tensor in changed.items():
                live[name].copy_(tensor)
        return run(args, kwargs)

    return Judge(document(spec), tensors, outputs, tolerance).judge()


def main(arguments: Sequence[str] | None = None) -> int:
    """Try all networks, or those named; the exit status is 1 where a claim is false or something crashes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args(arguments)
    shared = os.environ.get("NOWCAST_SHARED")
    folder = given.folder or (Path(shared) / "zoo" if shared else None)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("nowcast").setLevel(logging.WARNING)
    if folder is None or not (folder / "registry.py").exists():
        log.info("no networks: name a folder, or set NOWCAST_SHARED")
        return 0
    sys.path.insert(0, str(folder))
    registry = importlib.import_module("registry").REGISTRY
    for module in MODULES:
        importlib.import_module(module)
    counts = {"right": 0, "poor": 0, "false": 0, "crash": 0, "missing": 0}
    for name in given.names or registry:
        began = time.monotonic()
        try:
            torch.manual_seed(0)
            case = registry[name].factory()
            wired = wire(case.model, case.args, case.kwargs)
            verdict = judged(case, wired.spec)
            kind = "false" if verdict.false else "right" if verdict.share > 0.5 else "poor"
            note = f"{verdict.share:.2f} moved, wired as {wired.spec.kind}, {time.monotonic() - began:.1f} s"
            note += f" {verdict.false[:2]}" if verdict.false else ""
        except ModuleNotFoundError as error:
            kind, note = "missing", str(error)
        except Exception as error:  # a crash is a result here
            kind, note = "crash", repr(error)[:200]
        counts[kind] += 1
        log.info("%-8s%s: %s", kind, name, note)
    log.info("%s", ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return int(counts["false"] + counts["crash"] > 0)


if __name__ == "__main__":
    sys.exit(main())
