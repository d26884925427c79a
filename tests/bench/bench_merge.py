"""Fine-tunings of one small language model, merged in three ways.

    python -m tests.bench.bench_merge [--seeds N]

A GPT-2 of 2 x 48 is trained on the standard library's source and fine-tuned twice, on SymPy's source and on PyTorch's
C++ headers. Printed is the held-out loss of the merged network on both, by method and scale.
"""

from __future__ import annotations

import argparse
import copy

import torch
from nowcast_lab.evaluate.measure import batches, evaluate
from nowcast_lab.evaluate.tasks import TASKS, Task
from nowcast_lab.metatrain.data import load
from nowcast_service.files.merging import Snapshot, added, averaged, nowcast
from nowcast_service.predictors import make_predictor
from nowcast_service.weights.registry import resolve_checkpoint
from torch import nn
from torch.nn.functional import cross_entropy

TASK = TASKS["gpt2-code"]
HOME, AWAY = "stdlib:bytes", ("sympy:bytes", "headers:bytes")


def on(source: str) -> Task:
    return TASK.model_copy(update={"source": source})


def train(model: nn.Module, source: str, lr: float, steps: int, seed: int) -> Snapshot:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    stream = batches(on(source), load(source), seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        inputs, targets = next(stream)
        optimizer.zero_grad()
        output = model(inputs)
        cross_entropy(output.reshape(-1, output.shape[-1]), targets.reshape(-1)).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def losses(model: nn.Module, weights: Snapshot) -> list[float]:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return [evaluate(model, on(source), load(source)) for source in AWAY]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--checkpoint", default="nowcast-h64")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tuning", type=int, default=150)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    predictor = make_predictor("nino", resolve_checkpoint(asked.checkpoint), threads=1)
    rows: dict[str, list[list[float]]] = {}
    for seed in range(1, asked.seeds + 1):
        torch.manual_seed(seed)
        model = TASK.arch.build()
        base = train(model, HOME, 3e-3, asked.steps, seed)
        tuned = []
        for source in AWAY:
            one = copy.deepcopy(model)
            tuned.append(train(one, source, 1e-3, asked.tuning, seed))
        spec = TASK.arch.spec()
        found: dict[str, Snapshot] = {"base": base, "fine-tuning 1": tuned[0], "fine-tuning 2": tuned[1]}
        found["mean"] = averaged(tuned, [0.5, 0.5])
        found |= {f"task arithmetic {s:g}": added(base, tuned, s) for s in (0.4, 0.6, 0.7, 0.8, 1.0)}
        for scale in (0.25, 1.0, 2.5):
            found[f"nowcast, scale {scale:g}"] = nowcast(predictor, spec, base, tuned, range(1, 6), scale)
        for name, weights in found.items():
            rows.setdefault(name, []).append(losses(model, weights))
    print(f"| merged | {' | '.join(AWAY)} | both |\n|---|---|---|---|")
    for name, each in rows.items():
        mean = torch.tensor(each).mean(0).tolist()
        print(f"| {name} | {mean[0]:.3f} | {mean[1]:.3f} | {sum(mean) / 2:.3f} |")


if __name__ == "__main__":
    main()
