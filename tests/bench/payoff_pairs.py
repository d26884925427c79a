"""Record pairs of trainings, alone and with nowcasts, to try the rule that ends nowcasts on.

    python -m tests.bench.payoff_pairs --out pairs.jsonl --data FOLDER [--only NAME …]

A training with nowcasts leaves some out at random from the third on and goes on to the end whatever they are worth, so
that any rule can be tried on its periods afterwards. What it ends at is compared with the training alone of the same
seed. `tests/unit/proto/payoff_pairs.jsonl` was made with this.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from nowcast_lab.evaluate.arms import Arm
from nowcast_lab.evaluate.run import Local, run
from nowcast_lab.evaluate.tasks import TASKS, Task
from nowcast_lab.metatrain.data import load
from nowcast_proto.rules import payoff
from nowcast_service.predictors import make_predictor
from nowcast_service.weights.registry import resolve_checkpoint

DECAY = {"warmup": 0.05, "schedule": "cosine"}
PAIRS: dict[str, tuple[Task, dict[str, Any], int]] = {
    "text": (TASKS["choose-gpt2"], {"lr": 4e-3, **DECAY, "period": 48}, 1200),
    "text-hot": (TASKS["choose-gpt2"], {"lr": 1.2e-2, **DECAY, "period": 48}, 1200),
    "text-constant": (TASKS["choose-gpt2"], {"lr": 2e-3, "period": 60}, 1200),
    "text-muon": (TASKS["choose-gpt2"], {"optimizer": "muon", "lr": 0.02, **DECAY, "period": 48}, 1200),
    "conv": (TASKS["choose-conv"], {"lr": 3e-3, "period": 48}, 1000),
    "conv-muon": (TASKS["choose-conv"], {"optimizer": "muon", "lr": 0.05, "schedule": "linear", "period": 48}, 1000),
    "mlp": (TASKS["choose-mlp"], {"lr": 3e-3, "period": 48}, 1200),
    "language": (TASKS["gpt2-1m"], {"lr": 4e-3, **DECAY, "clip": 1.0, "period": 48}, 1200),
}


def pair(name: str, seed: int, data: str | None) -> dict[str, Any]:
    """One line: what the training alone and the one with nowcasts ended at, and the periods of the latter."""
    task, settings, steps = PAIRS[name]
    task = task.model_copy(update={"eval_every": steps})
    source = load(task.source, data)
    checkpoint = resolve_checkpoint("nowcast-h64")
    local = Local(make_predictor("nino", checkpoint, threads=1), checkpoint.digest)
    alone = run(task, Arm(**settings), seed, source, None, steps=steps)
    arm = Arm(**settings, predictor="nino", checkpoint="nowcast-h64", farthest=20, verdict="trial")
    nowcast = run(task, arm, seed, source, local, steps=steps)
    return {
        "pair": name,
        "seed": seed,
        "period": arm.period,
        "alone": [alone["final"], round(alone["train_loss"], 5)],
        "nowcast": [nowcast["final"], round(nowcast["train_loss"], 5)],
        "kept": nowcast["kept"],
        "made": nowcast["nowcasts"],
        "periods": nowcast["periods"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(PAIRS), choices=list(PAIRS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    payoff.FIRST, payoff.FEWEST = 2, 10**9  # type: ignore[misc]
    for seed in range(1, asked.seeds + 1):
        for name in asked.only:
            with asked.out.open("a") as file:
                file.write(json.dumps(pair(name, seed, asked.data)) + "\n")


if __name__ == "__main__":
    main()
