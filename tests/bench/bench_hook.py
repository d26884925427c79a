"""What nowcasting takes from the trainer: time inside the hook, and wall-clock with the server on the same cores.

    python tests/bench/bench_hook.py                    # both networks, on this machine's CPU
    python tests/bench/bench_hook.py --model small --steps 60 --period 20

The server is a process of its own on the same cores. Each network is trained from the same seed, alone and attached, in
alternating rounds, so that a change in the machine's load meets both. Reported:

hook         share of the step time spent inside the hook, measured over the run at the period given
at 200/1000  the same at these periods, from the measured cost of a snapshot, a patch and an ordinary step
wall-clock   attached loop over the loop alone; what uploads and the server's own work take from shared cores is in
             here. A period costs the same work however long it is, so what is measured at a short period shrinks by as
             much at a longer one; that figure is worked out, not measured, and is printed as such
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from nowcast_client import attach
from nowcast_lab.demo.training_job.gpt import GPT, GPTConfig

ROOT = Path(__file__).parents[2]
MODELS = {
    # name: configuration, sequences per step, tokens per sequence
    "small": (GPTConfig(), 16, 64),
    "30M": (GPTConfig(vocab_size=16_384, n_positions=128, n_embd=432, n_layer=10, n_head=6), 8, 128),
}


@dataclass
class Figures:
    """One network's result; times in seconds, shares of the step time."""

    model: str
    parameters: int
    steps: int
    period: int
    predictor: str
    step: float
    hook_idle: float
    hook_snapshot: float
    hook_patch: float
    hook_share: float
    hook_share_200: float
    hook_share_1000: float
    wall_ratio: float
    snapshots: int
    patched: int
    megabytes_sent: float


@contextmanager
def server(predictor: str) -> Iterator[str]:
    """A server in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        announced = Path(folder) / "url"
        arguments = ("--port", "0", "--port-file", str(announced), "--predictor", predictor, "--log-level", "error")
        process = subprocess.Popen(
            [sys.executable, "-m", "nowcast_service.cli", "serve", *arguments],
            stdout=subprocess.DEVNULL,
        )
        try:
            while not (announced.exists() and announced.read_text().strip()):
                if process.poll() is not None:
                    raise RuntimeError("the service did not start")
                time.sleep(0.05)
            yield announced.read_text().strip()
        finally:
            process.terminate()
            process.wait(20)


class Loop:
    """A training on random tokens; what it learns does not matter here."""

    def __init__(self, name: str, url: str | None, period: int) -> None:
        config, self.batch, self.length = MODELS[name]
        torch.manual_seed(0)
        self.vocabulary = config.vocab_size
        self.model = GPT(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.handle = attach(
            self.model, self.optimizer, url, period=period, mode="on" if url else "off", update_scale=0.0
        )
        self.steps: list[float] = []
        self.hooks: dict[str, list[float]] = {"idle": [], "snapshot": [], "patch": []}
        self.hook_total = 0.0
        self.wall = 0.0

    def run(self, steps: int) -> None:
        """Take steps, noting for each what the hook took and what it did."""
        begin = time.perf_counter()
        for _ in range(steps):
            start = time.perf_counter()
            tokens = torch.randint(self.vocabulary, (self.batch, self.length + 1))
            self.optimizer.zero_grad()
            loss = self.model.loss(tokens)
            loss.backward()
            before = self.handle.summary()
            self.handle.observe(loss)
            self.optimizer.step()
            after = self.handle.summary()
            took = after["hook_seconds"] - before["hook_seconds"]
            what = "idle"
            if after["patched"] > before["patched"]:
                what = "patch"
            elif after["snapshots"] > before["snapshots"]:
                what = "snapshot"
            self.hooks[what].append(took)
            self.hook_total += took
            self.steps.append(time.perf_counter() - start)
        self.wall += time.perf_counter() - begin


def measure(
    name: str, steps: int, period: int, predictor: str, rounds: int = 3, *, running: str | None = None
) -> Figures:
    """Train one network alone and attached, to a server that is ``running`` or to one of its own."""
    with nullcontext(running) if running else server(predictor) as url:
        alone, attached = Loop(name, None, period), Loop(name, url, period)
        alone.run(3)
        warm = Loop(name, None, period)  # the first steps of a process pay for imports and allocations
        warm.run(3)
        alone.wall, alone.steps = 0.0, []
        for _ in range(rounds):
            alone.run(steps // rounds)
            attached.run(steps // rounds)
        attached.handle.wait(60)
        summary = attached.handle.summary()
        attached.handle.close()
    step = statistics.median(alone.steps)
    cost = {what: statistics.median(times) if times else float("nan") for what, times in attached.hooks.items()}

    def share(at: int) -> float:
        # A patch is written once a period; with trial its backup is part of it, the verdict costs an idle hook.
        patch = 0.0 if cost["patch"] != cost["patch"] else cost["patch"]
        return (5 * cost["snapshot"] + patch + (at - 6) * cost["idle"]) / (at * step)

    return Figures(
        model=name,
        parameters=sum(p.numel() for p in attached.model.parameters()),
        steps=len(attached.steps),
        period=period,
        predictor=predictor,
        step=step,
        hook_idle=cost["idle"],
        hook_snapshot=cost["snapshot"],
        hook_patch=cost["patch"],
        hook_share=attached.hook_total / (step * len(attached.steps)),
        hook_share_200=share(200),
        hook_share_1000=share(1000),
        wall_ratio=attached.wall / alone.wall,
        snapshots=summary["snapshots"],
        patched=summary["patched"],
        megabytes_sent=summary["bytes_sent"] / 1e6,
    )


def main() -> None:
    """Measure and print; results also go to a dated file with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--steps", type=int, help="steps of each loop; default 600 for the small network, 36 else")
    parser.add_argument("--period", type=int, help="default 200 for the small network, 18 else")
    parser.add_argument("--predictor", default="linear")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    options = parser.parse_args()
    figures = []
    for name in MODELS if options.model == "all" else [options.model]:
        small = name == "small"
        steps, period = options.steps or (600 if small else 36), options.period or (200 if small else 18)
        found = measure(name, steps, period, options.predictor)
        figures.append(asdict(found))
        print(
            f"{name}: {found.parameters / 1e6:.2f} M parameters, step {found.step * 1e3:.1f} ms; "
            f"hook {found.hook_share:.2%} at period {period}, {found.hook_share_200:.2%} at 200, "
            f"{found.hook_share_1000:.2%} at 1000 "
            f"(idle {found.hook_idle * 1e6:.0f} us, snapshot {found.hook_snapshot * 1e3:.2f} ms, patch "
            f"{found.hook_patch * 1e3:.2f} ms); wall-clock x {found.wall_ratio:.3f} over {found.steps} steps with the "
            f"server on the same {os.cpu_count()} cores, by that x {1 + (found.wall_ratio - 1) * period / 1000:.4f} at "
            f"1000; {found.snapshots} snapshots, {found.patched} patches, {found.megabytes_sent:.0f} MB sent",
            flush=True,
        )
    if options.out:
        machine = {
            "cpus": os.cpu_count(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "load": os.getloadavg()[0],
        }
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        options.out.write_text(json.dumps({"date": stamp, "machine": machine, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
