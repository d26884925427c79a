"""The training job: a plain loop, one call to `attach` in front of it and one to `observe` in it.

Its progress goes to stderr for people, or as one JSON object per line to stdout (``--events``) for whoever started it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nowcast_client.attaching import attach
from nowcast_client.handle import Event
from nowcast_client.settings import MAX_HORIZON, Mode
from nowcast_proto.errors import NowcastError

from nowcast_lab.demo.training_job.letters import letters
from nowcast_lab.demo.training_job.task import Task
from nowcast_lab.demo.training_job.text import code

log = logging.getLogger("nowcast.demo")

Emit = Callable[[dict[str, Any]], object]
"""Takes one event: its ``event`` says which, the rest are JSON values."""

SMOOTHING = 0.98
"""Weight of the past in the training loss that is shown."""
MUON_RATE = 0.02
"""Peak rate of Muon, its usual one: nobody has swept it here."""
WARM_UP = 100
"""Steps until the peak rate."""
TASKS: dict[str, Callable[[], Task]] = {"letters": letters, "text": code}
"""What can be trained, by name."""


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        task: What to train, of `TASKS`.
        steps: Optimizer steps; the task's own number when None.
        seed: Of the weights and of the order of the data.
        rate: Peak learning rate of AdamW; the best for training alone when None.
        period: Steps between nowcasts; `attach`'s choice when None.
        max_horizon: First and longest horizon of a nowcast, in strides of a fifth of the period.
        every: Steps between measurements of the held-out loss.
        threads: CPU threads.
        mode: ``on``, ``shadow`` or ``off`` (alone, nothing attached).
        url: Where the service is.
        predictor: Predictor to ask for; the service's own choice when None.
        optimizer: ``adamw``, or ``muon`` for hidden matrices and kernels beside AdamW for the rest.
    """

    task: str = "letters"
    steps: int | None = None
    seed: int = 1
    rate: float | None = None
    period: int | None = None
    max_horizon: int = MAX_HORIZON
    every: int = 25
    threads: int = 1
    mode: Mode = "off"
    url: str | None = None
    predictor: str | None = None
    optimizer: str = "adamw"


def share_of_peak(step: int, steps: int) -> float:
    """Rate of a step, counted from 0, over the peak rate: linear warm-up, then half a cosine down to a tenth."""
    return min(1.0, (step + 1) / WARM_UP) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def train(job: Job, emit: Emit) -> float:
    """Run one training.

    Args:
        job: What to do.
        emit: Told of the start, of progress, of every nowcast and of the end.

    Returns:
        Held-out loss at the end, in the task's unit.

    Raises:
        NowcastError: The task's data cannot be read; what `attach` refuses, an address that is none say. Once training
            runs, none is raised.
    """
    task = TASKS[job.task]()
    steps, rate = job.steps or task.steps, job.rate or task.rate
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    model = task.model()
    optimizers = _optimizers(job, task, model, rate)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: share_of_peak(step, steps)) for one in optimizers]
    order = torch.Generator().manual_seed(job.seed)
    size = sum(p.numel() for p in model.parameters())
    emit(
        {
            "event": "start",
            "about": f"{task.title} of {size:,} parameters {task.subject}",
            "unit": task.unit,
            "steps": steps,
            "rate": rate,
        }
    )

    def measure() -> float:
        model.eval()
        with torch.no_grad():
            loss = task.loss(model, task.held_out).item()
        model.train()
        return loss

    smooth, measuring, measured = math.nan, 0.0, math.nan
    with attach(
        model,
        optimizers,
        url=job.url,
        period=job.period,
        total_steps=steps,
        max_horizon=job.max_horizon,
        mode=job.mode,
        predictor=job.predictor,
        on_event=lambda happened: emit(_told(happened)),
    ) as handle:
        start = time.perf_counter()
        for step in range(1, steps + 1):
            loss = task.loss(model, task.draw(task.batch, order))
            model.zero_grad()
            loss.backward()
            if task.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip)
            handle.observe(loss)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            value = loss.item()
            smooth = value if step == 1 else SMOOTHING * smooth + (1 - SMOOTHING) * value
            if step % job.every == 0 or step == steps:
                # The clock stands still while the held-out loss is measured: a job would not do this so often.
                pause = time.perf_counter()
                measured = measure()
                emit(
                    {
                        "event": "progress",
                        "step": step,
                        "seconds": pause - start - measuring,
                        "loss": smooth,
                        "held_out": measured,
                    }
                )
                measuring += time.perf_counter() - pause
        seconds = time.perf_counter() - start - measuring
        report = handle.summary()
    emit({"event": "end", "seconds": seconds, "held_out": measured, "report": report})
    return measured


def _optimizers(job: Job, task: Task, model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    rest = list(model.parameters())
    made: list[torch.optim.Optimizer] = []
    if job.optimizer == "muon":
        from nowcast_lab.evaluate.optimizers import KernelMuon
        from nowcast_lab.metatrain.zoo import hidden_matrices

        names = hidden_matrices(model)
        hidden = [p for name, p in model.named_parameters() if name in names]
        rest = [p for name, p in model.named_parameters() if name not in names]
        made = [KernelMuon(hidden, lr=MUON_RATE, weight_decay=task.weight_decay)]
    return [torch.optim.AdamW(rest, lr=rate, betas=task.betas, weight_decay=task.weight_decay), *made]


def _told(happened: Event) -> dict[str, Any]:
    """An event of the hook as plain values."""
    detail = {k: v for k, v in happened.detail.items() if isinstance(v, str | int | float)}
    return {"event": "nowcast", "kind": happened.kind, "step": happened.step, "detail": detail}


def _to_stdout(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _to_log(event: dict[str, Any]) -> None:
    if event["event"] == "progress":
        log.info("step %d: loss %.3f, held out %.3f", event["step"], event["loss"], event["held_out"])
    elif event["event"] == "nowcast" and event["kind"] in ("patched", "kept"):
        log.info("step %d: nowcast %s", event["step"], event["kind"])
    elif event["event"] == "end":
        log.info("%.1f s, held-out loss %.4f; %s", event["seconds"], event["held_out"], json.dumps(event["report"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one training from the command line; returns the exit status."""
    defaults = Job()
    parser = argparse.ArgumentParser(prog="python -m nowcast_lab.demo.training_job", description=__doc__)
    parser.add_argument("--task", choices=tuple(TASKS), default=defaults.task, help="what to train (%(default)s)")
    for name, kind, told in (
        ("steps", int, "optimizer steps (default: the task's)"),
        ("seed", int, "of weights and data order (%(default)s)"),
        ("rate", float, "peak learning rate (default: the best for training alone)"),
        ("period", int, "steps between nowcasts (default: by the length of the training)"),
        ("max-horizon", int, "longest horizon, in strides (%(default)s)"),
        ("every", int, "steps between measurements of the held-out loss (%(default)s)"),
        ("threads", int, "CPU threads (%(default)s)"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(defaults, name.replace("-", "_")), help=told)
    parser.add_argument("--mode", choices=("on", "shadow", "off"), default="on", help="off trains alone (%(default)s)")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default=defaults.optimizer, help="(%(default)s)")
    parser.add_argument("--url", help="the service (default: NOWCAST_URL, then its usual port on this machine)")
    parser.add_argument("--predictor", help="the service's predictor (default: its own choice)")
    parser.add_argument("--events", action="store_true", help="one JSON object per line on stdout")
    options = vars(parser.parse_args(arguments))
    events = options.pop("events")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        train(Job(**options), _to_stdout if events else _to_log)
    except NowcastError as error:
        log.error("%s", error)
        return 2
    return 0
