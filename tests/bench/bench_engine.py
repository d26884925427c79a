"""Benchmarks of the exact engine, part by part.

    python tests/bench/bench_engine.py --part a b c d e f --published NINO_CHECKOUT
    python tests/bench/bench_engine.py --render

Every part takes some minutes and writes ``docs/results/engine-<part>.json`` with date and machine;
``--render`` turns all results there are into the tables of docs/benchmarks.md. Ratios are against a rival in the same
run: the floor (see floor.py) and the published code (checked out by the caller, run in a process of its own).

a  GPT-2 64 wide, 3.49 M edges: floor, published code, memory      d  several horizons from one pass
b  Llama 111 M: engine, floor, memory                              e  error of bf16 products
c  cost against edges, 66 k to 111 M                               f  element-wise kernels
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # siblings, when run as a script

from engine_models import MODELS, checkpoint, graph_and_positions, history
from engine_published import status
from engine_report import RENDER, RESULTS, load, render
from floor import Floor
from nowcast_service.nino.exact.engine import DEFAULT_BUDGET, ExactEngine

ROOT = Path(__file__).parents[2]
Result = dict[str, Any]


def machine(threads: int) -> Result:
    """Where and when."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "unknown",
    )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load before": round(os.getloadavg()[0], 2),
    }


def run_engine(
    name: str,
    threads: int,
    *,
    share: float = 0.0,
    repeats: int = 1,
    ks: tuple[int, ...] = (40,),
    precision: str = "float32",
) -> Result:
    """Time and memory of one model in this process.

    Args:
        name: Of `MODELS`.
        threads: Workers.
        share: Share of the graph on which the floors are measured after every prediction, with PyTorch's SiLU (twice)
            and with the engine's own; 0 for none.
        repeats: Predictions; times are medians.
        ks: Horizons.
        precision: Of the products.
    """
    spec = MODELS[name]()
    snapshots = history(spec)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    graph, positions = graph_and_positions(spec)
    engine = ExactEngine(checkpoint(), threads=threads, precision=precision)  # type: ignore[arg-type]
    floor, compiled = (Floor(engine, graph, share=share or 1.0, compiled=flag) for flag in (False, True))
    seconds, floors, compiled_floors, memory, timings = [], [], [], 0, {}
    for _ in range(repeats):
        timings = {}
        start = time.perf_counter()
        engine.predict(graph, snapshots, ks, positions=positions, timings=timings)
        seconds.append(time.perf_counter() - start)
        memory = memory or status("VmHWM") - before  # before the floor has buffers of its own
        if share:
            floors += [floor.seconds(), floor.seconds()]
            compiled_floors.append(compiled.seconds())
    result: Result = {
        "model": name,
        "edges": graph.n_edges,
        "nodes": graph.n_nodes,
        "parameters": spec.numel,
        "horizons": len(ks),
        "precision": precision,
        "budget": DEFAULT_BUDGET,
        "planned": engine.plan(graph, len(ks)).bytes,
        "seconds": statistics.median(seconds),
        "all seconds": seconds,
        "memory": memory,
        "snapshots": 5 * 4 * spec.numel,
        "phases": timings,
    }
    if share:
        result |= {"floor": statistics.median(floors), "all floors": floors, "floor share": share}
        result |= {"compiled floor": statistics.median(compiled_floors), "all compiled floors": compiled_floors}
        result["ratio"] = result["seconds"] / result["floor"]
        result["compiled ratio"] = result["seconds"] / result["compiled floor"]
    return result


def isolated(part: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
    """A part in a process of its own, so that memory is its own."""
    call = json.dumps([part.__name__, args, kwargs])
    done = subprocess.run([sys.executable, __file__, "--call", call], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def part_a(threads: int, published: str | None = None, name: str = "gpt2-64x3-50k", repeats: int = 3) -> Result:
    """One model against its floor and the published code."""
    result = isolated(run_engine, name, threads, share=1.0, repeats=repeats)
    if published:
        result["published"] = run_published(name, threads, published)
        result["faster"] = result["published"]["seconds"] / result["seconds"]
        result["less memory"] = result["published"]["memory"] / result["memory"]
    return result


def run_published(name: str, threads: int, published: str) -> Result:
    """The published code on the same inputs, and how far its prediction is from ours."""
    spec, ckpt = MODELS[name](), checkpoint()
    snapshots = history(spec)
    graph, positions = graph_and_positions(spec)
    with tempfile.TemporaryDirectory() as folder:
        inputs, output = Path(folder) / "inputs.pt", Path(folder) / "output.pt"
        flat = [torch.cat([t.flatten() for t in s.values()]) for s in snapshots.snapshots]
        given = {
            "shapes": [(p.name, list(p.shape)) for p in spec.parameters],
            "heads": spec.num_heads,
            "snapshots": flat,
            "positions": positions,
            "state_dict": dict(ckpt.state),
            "model_args": {"wte_pos_enc": False},
            "k": 40,
        }
        torch.save(given, inputs)
        script = Path(__file__).with_name("engine_published.py")
        command = [sys.executable, str(script), published, str(inputs), str(output), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        theirs = torch.load(output, weights_only=True).double()
    result: Result = json.loads(done.stdout.splitlines()[-1])
    ours = ExactEngine(ckpt, threads=threads).predict(graph, snapshots, [40], positions=positions)[0]
    mine = torch.cat([t.flatten() for t in ours.values()]).double()
    result["difference of the update"] = float((mine - theirs).norm() / (theirs - flat[-1].double()).norm())
    return result


def part_b(threads: int, name: str = "llama-384x6-128k", share: float = 0.1) -> Result:
    """The large model; its floor on a share of every block, scaled by edges."""
    return isolated(run_engine, name, threads, share=share)


def part_c(threads: int, names: tuple[str, ...] = tuple(MODELS)) -> Result:
    """Cost against edges. The largest model is taken from part b where that has been run with as many threads."""
    rows = []
    for name in names:
        held = load("b") if name == "llama-384x6-128k" else None
        if held and held["machine"]["threads"] == threads:
            rows.append({key: held[key] for key in ("model", "edges", "seconds", "memory")})
            continue
        small = "gpt2-24" in name or "gpt2-64" in name
        row = isolated(run_engine, name, threads, repeats=3 if small else 1)
        rows.append({key: row[key] for key in ("model", "edges", "seconds", "memory")})
    x, y = ([math.log(row[key]) for row in rows] for key in ("edges", "seconds"))
    slope, _ = statistics.linear_regression(x, y)
    return {"rows": rows, "slope": slope}


def part_d(threads: int, name: str = "gpt2-64x3-50k") -> Result:
    """Several horizons from one pass."""
    counts = (1, 2, 5, 10, 40)
    rows = [isolated(run_engine, name, threads, ks=tuple(range(1, n + 1)), repeats=2) for n in counts]
    return {"model": name, "rows": [{k: row[k] for k in ("horizons", "seconds", "memory")} for row in rows]}


def part_e(threads: int, names: tuple[str, ...] = ("gpt2-24x2-1k", "gpt2-24x3-50k"), ckpt: str | None = None) -> Result:
    """Error of bf16 products against float32."""
    from nowcast_service.nino.checkpoint import load_checkpoint

    network = load_checkpoint(Path(ckpt)) if ckpt else checkpoint()
    rows = []
    for name in names:
        spec = MODELS[name]()
        snapshots = history(spec)
        graph, positions = graph_and_positions(spec)
        newest = torch.cat([t.flatten() for t in snapshots.snapshots[-1].values()])
        flat = {}
        for precision in ("float32", "bf16"):
            engine = ExactEngine(network, threads=threads, precision=precision)  # type: ignore[arg-type]
            results = engine.predict(graph, snapshots, [1, 40], positions=positions)
            flat[precision] = [torch.cat([t.flatten() for t in r.values()]) - newest for r in results]
        errors = [float((h - f).norm() / f.norm()) for f, h in zip(flat["float32"], flat["bf16"], strict=True)]
        rows.append({"model": name, "edges": graph.n_edges, "k=1": errors[0], "k=40": errors[1]})
    return {"checkpoint": Path(ckpt).name if ckpt else "random, d = 128", "rows": rows}


CPP = """
#include <torch/extension.h>
#include <cmath>
void fused(torch::Tensor u, torch::Tensor s, torch::Tensor t) {
  float* up = u.data_ptr<float>(); const float* sp = s.data_ptr<float>(); const float* tp = t.data_ptr<float>();
  const long I = u.size(0), J = u.size(1), d = u.size(2);
  for (long i = 0; i < I; ++i) for (long j = 0; j < J; ++j) {
    float* x = up + (i * J + j) * d; const float* a = sp + i * d; const float* b = tp + j * d;
    #pragma omp simd
    for (long c = 0; c < d; ++c) { const float y = x[c] + a[c] + b[c]; x[c] = y / (1.0f + std::exp(-y)); }
  }
}
"""


def part_f(threads: int = 1) -> Result:
    """u <- silu(u + s_i + t_j) on one tile, one thread: the engine's kernel against PyTorch and a C++ loop."""
    del threads
    from nowcast_service.nino.exact.kernels import add_silu
    from torch.utils.cpp_extension import load_inline

    torch.set_num_threads(1)
    u, s, t = torch.randn(192, 10, 128), torch.randn(192, 128), torch.randn(10, 128)

    def plain() -> None:
        u.add_(s[:, None]).add_(t)
        torch.nn.functional.silu(u, inplace=True)

    def fused(u: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> None:
        u.copy_(torch.nn.functional.silu(u + s[:, None] + t))

    flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp-simd"]
    extension = load_inline(
        "nowcast_bench_silu", CPP, functions=["fused"], extra_cflags=flags, extra_ldflags=["-lmvec"]
    )
    compiled = torch.compile(fused)
    weight, product = torch.randn(128, 128) / 128, torch.empty(1920, 128)
    kernels: dict[str, Callable[[], object]] = {
        "numba, what the engine uses": lambda: add_silu(u.numpy(), s.numpy(), t.numpy()),
        "plain PyTorch": plain,
        "torch.compile": lambda: compiled(u, s, t),
        "C++": lambda: extension.fused(u, s, t),
        "SiLU alone, PyTorch": lambda: torch.nn.functional.silu(u, inplace=True),
        "one 128 x 128 product": lambda: torch.mm(u.view(-1, 128), weight, out=product),
    }
    best = dict.fromkeys(kernels, math.inf)
    with torch.no_grad():
        for _ in range(200):
            for name, kernel in kernels.items():
                u.normal_()
                start = time.perf_counter()
                kernel()
                best[name] = min(best[name], time.perf_counter() - start)
    return {"rows": [{"kernel": name, "ns per edge": 1e9 * value / 1920} for name, value in best.items()]}


def run(part: str, options: argparse.Namespace) -> None:
    """Run one part and keep its result."""
    about = machine(1 if part == "f" else options.threads)
    extra = {"a": {"published": options.published}, "e": {"ckpt": options.checkpoint}}.get(part, {})
    result = globals()[f"part_{part}"](options.threads, **extra)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"engine-{part}.json"
    path.write_text(json.dumps({"machine": about, **result}, indent=1) + "\n")
    print(path.read_text(), flush=True)
    render()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(RENDER), nargs="+", default=[], help="which parts to run, in this order")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--published", help="a checkout of the published code, for part a")
    parser.add_argument("--checkpoint", help="a trained checkpoint, for part e")
    parser.add_argument("--render", action="store_true", help="write docs/benchmarks.md from the results there are")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        name, args, kwargs = json.loads(options.call)
        kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
        print(json.dumps(globals()[name](*args, **kwargs)))
        return
    for part in options.part:
        run(part, options)
    if options.render:
        render()


if __name__ == "__main__":
    main()
