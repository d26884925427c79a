"""What the hook costs a training in every integration: its seconds over the training's, in the same run.

Run: python tests/bench/bench_integrations.py [--steps 500] [--period 200] [--only plain ddp]

One service runs beside the trainings, on the same cores. Nothing waits for nowcasts (``wait=0``), as in a real
training. Every run has to show patches and their verdicts; one that does not is an error. The hook's seconds are
wall-clock: everything between its first line and its last, losses that are reported included. The ranks of DDP and
FSDP2 share the machine too; the costliest rank is reported, and how much of its part was waiting for the other one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nowcast_client import attach
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

BATCH = 256


def data() -> TensorDataset:
    pixels, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels))


def loader(steps: int) -> DataLoader[Any]:
    rows = data()
    return DataLoader(rows, BATCH, sampler=RandomSampler(rows, replacement=True, num_samples=BATCH * steps))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 384),
        nn.ReLU(),
        nn.Linear(384, 384),
        nn.ReLU(),
        nn.Linear(384, 384),
        nn.ReLU(),
        nn.Linear(384, 10),
    )


class WithLoss(nn.Module):
    """What a Trainer trains."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.network(x), labels)}


Result = dict[str, float]


def told(summary: dict[str, Any], seconds: float) -> Result:
    names = ("hook_seconds", "wait_seconds", "steps", "snapshots", "patched", "rejected", "unjudged")
    judged = summary["kept"] + summary["rolled_back"]
    return {"seconds": seconds, "judged": judged, **{name: summary[name] for name in names}}


def plain(url: str, steps: int, settings: dict[str, Any]) -> Result:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return loop(model, optimizer, url, steps, settings)


def loop(model: nn.Module, optimizer: Any, url: str, steps: int, settings: dict[str, Any]) -> Result:
    batches = loader(steps)
    with attach(model, optimizer, url, **settings) as handle:
        begun = time.perf_counter()
        for x, y in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            handle.observe(loss)
            optimizer.step()
        return told(handle.summary(), time.perf_counter() - begun)


def huggingface(url: str, steps: int, settings: dict[str, Any]) -> Result:
    from nowcast_client.integrations.huggingface import add_nowcast
    from transformers import Trainer, TrainingArguments

    class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
        rows = data()

        def __len__(self) -> int:
            return BATCH * steps

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            x, y = self.rows[index % len(self.rows)]
            return {"x": x, "labels": y}

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            WithLoss(),
            TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=BATCH,
                learning_rate=1e-3,
                save_strategy="no",
                logging_steps=100,
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Rows(),
        )
        callback = add_nowcast(trainer, url, **settings)
        begun = time.perf_counter()
        trainer.train()
        return told(callback.summary, time.perf_counter() - begun)


def accelerate(url: str, steps: int, settings: dict[str, Any]) -> Result:
    from accelerate import Accelerator
    from nowcast_client.integrations.accelerate import attach as attach_accelerated

    accelerator = Accelerator(cpu=True)
    model = network()
    model, optimizer, batches = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader(steps)
    )
    with attach_accelerated(accelerator, model, optimizer, url, **settings) as handle:
        begun = time.perf_counter()
        for x, y in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            handle.observe(loss)
            optimizer.step()
        return told(handle.summary(), time.perf_counter() - begun)


def lightning(url: str, steps: int, settings: dict[str, Any]) -> Result:
    import lightning as framework
    from nowcast_client.integrations.lightning import NowcastCallback

    class Digits(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    callback = NowcastCallback(url, **settings)
    trainer = framework.Trainer(
        max_epochs=1,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begun = time.perf_counter()
    trainer.fit(Digits(), loader(steps))
    return told(callback.summary, time.perf_counter() - begun)


def on_ranks(kind: str) -> Callable[[str, int, dict[str, Any]], Result]:
    def run(url: str, steps: int, settings: dict[str, Any]) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(rank_of, args=(kind, folder, url, steps, settings), nprocs=2, join=True)
            results = [json.loads(path.read_text()) for path in Path(folder).glob("rank-*")]
        worst: Result = max(results, key=lambda r: r["hook_seconds"] / r["seconds"])
        return {**worst, "snapshots": max(r["snapshots"] for r in results)}

    return run


def rank_of(rank: int, kind: str, folder: str, url: str, steps: int, settings: dict[str, Any]) -> None:
    """One rank of a training on two."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model: nn.Module = network()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        for layer in list(model.children()):
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(model)
    result = loop(model, torch.optim.AdamW(model.parameters(), lr=1e-3), url, steps, settings)
    (Path(folder) / f"rank-{rank}").write_text(json.dumps(result))
    dist.destroy_process_group()


ARMS: dict[str, Callable[[str, int, dict[str, Any]], Result]] = {
    "plain": plain,
    "huggingface": huggingface,
    "accelerate": accelerate,
    "lightning": lightning,
    "ddp": on_ranks("ddp"),
    "fsdp2": on_ranks("fsdp2"),
}


@contextmanager
def service() -> Iterator[str]:
    """A service with the linear predictor: the predictor's time is not the hook's."""
    with tempfile.TemporaryDirectory() as folder:
        announced = Path(folder) / "url"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NOWCAST_PREDICTOR": "linear"}
        command = [sys.executable, "-m", "nowcast_service.cli", "serve", "--port", "0", "--port-file", str(announced)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not announced.exists():
                if process.poll() is not None:
                    raise RuntimeError("the service did not start")
                time.sleep(0.05)
            yield announced.read_text().strip()
        finally:
            process.terminate()
            process.wait(30)


def bench(
    steps: int, period: int, only: list[str] | None = None, *, wait: float = 0.0, url: str | None = None
) -> dict[str, Result]:
    """Figures by integration; ``cost`` is the hook's part of the training's time, ``waiting`` is a part of it.

    Raises:
        RuntimeError: A training had no patch, or none that was judged.
    """
    torch.set_num_threads(1)
    settings = {"period": period, "total_steps": steps, "update_scale": 0.05, "wait": wait}
    results = {}
    with nullcontext(url) if url else service() as address:
        for name, arm in ARMS.items():
            if only is None or name in only:
                found = arm(address, steps, settings)
                if not found["patched"] or not found["judged"]:
                    raise RuntimeError(f"{name}: no patch was judged, so the figures would lack its cost: {found}")
                shares = {"cost": found["hook_seconds"], "waiting": found["wait_seconds"]}
                results[name] = {**found, **{k: v / found["seconds"] for k, v in shares.items()}}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--period", type=int, default=200)
    parser.add_argument("--only", nargs="*", choices=sorted(ARMS))
    options = parser.parse_args()
    results = bench(options.steps, options.period, options.only)
    size = sum(parameter.numel() for parameter in network().parameters())
    print(f"{size / 1e6:.2f} M parameters, batch {BATCH}, period {options.period}", file=sys.stderr)
    for name, row in results.items():
        print(
            f"{name:12} {row['steps']:5.0f} steps, {1e3 * row['seconds'] / row['steps']:6.2f} ms each; "
            f"{row['snapshots']:3.0f} snapshots, {row['patched']:2.0f} patches, {row['judged']:2.0f} judged; "
            f"hook {100 * row['cost']:.3f} %, of it waiting for ranks {100 * row['waiting']:.3f} %",
            file=sys.stderr,
        )
    print(json.dumps({"load": os.getloadavg()[0], "cores": os.cpu_count(), "results": results}))


if __name__ == "__main__":
    main()
