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
from nowcast_proto.errors import NowcastError
from torch import Tensor

from nowcast_client.demo.gpt import GPT, GPTConfig
from nowcast_client.demo.text import Text, standard_library
from nowcast_client.hook import Event, Mode, attach
from nowcast_client.schedule import MAX_HORIZON

log = logging.getLogger("nowcast.demo")

Emit = Callable[[dict[str, Any]], object]
"""Takes one event: its ``event`` says which, the rest are JSON values."""

SMOOTHING = 0.98
"""Weight of the past in the training loss that is shown."""


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        steps: Optimizer steps.
        seed: Of the weights and of the order of the data.
        rate: Peak learning rate of AdamW; warmed up, then cosine down to a tenth. By default the one at which training
            alone did best in 1,000 steps, of 0.002, 0.004, 0.008, 0.016 and 0.032.
        batch: Windows per step.
        period: Steps between nowcasts.
        max_horizon: First and longest horizon of a nowcast, in strides of a fifth of the period.
        every: Steps between measurements of the held-out loss.
        threads: CPU threads.
        mode: ``on``, ``shadow`` or ``off`` (alone, nothing attached).
        url: Where the service is.
        predictor: Predictor to ask for; the service's own choice when None.
    """

    steps: int = 1000
    seed: int = 1
    rate: float = 1.6e-2
    batch: int = 16
    period: int = 100
    max_horizon: int = MAX_HORIZON
    every: int = 25
    threads: int = 1
    mode: Mode = "off"
    url: str | None = None
    predictor: str | None = None


WARM_UP = 100
HELD_OUT_WINDOWS = 256


def learning_rate(job: Job, step: int) -> float:
    """Rate of the given step, counted from 0: linear warm-up, then a cosine down to a tenth of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / job.steps))
    return job.rate * min(1.0, (step + 1) / WARM_UP) * (0.1 + 0.9 * cosine)


class Windows:
    """Random windows of a text, in an order its seed fixes.

    Args:
        text: (n,) bytes.
        length: Bytes of a window.
        seed: Of the order.
    """

    def __init__(self, text: Any, length: int, seed: int) -> None:
        self._text = torch.from_numpy(text.copy())
        self._offsets = torch.arange(length)
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> Tensor:
        """The next (count, length) windows, int64."""
        last = self._text.numel() - self._offsets.numel()
        starts = torch.randint(0, last, (count, 1), generator=self._generator)
        return self._text[starts + self._offsets].long()


def train(job: Job, text: Text, emit: Emit, config: GPTConfig | None = None) -> float:
    """Run one training.

    Args:
        job: What to do.
        text: The corpus.
        emit: Told of the start, of progress, of every nowcast and of the end.
        config: Sizes of the network.

    Returns:
        Held-out loss at the end, in nats per byte.

    Raises:
        NowcastError: What `attach` refuses, an address that is none say. Once training runs, none is raised.
    """
    config = config or GPTConfig()
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(job, step) / job.rate)
    data = Windows(text.training, config.n_positions + 1, job.seed)
    held_out = Windows(text.held_out, config.n_positions + 1, 0).draw(HELD_OUT_WINDOWS)
    emit(
        {
            "event": "start",
            "parameters": sum(p.numel() for p in model.parameters()),
            "training_bytes": int(text.training.size),
            "held_out_bytes": int(text.held_out.size),
            "files": text.files,
        }
    )

    def measure() -> float:
        with torch.no_grad():
            return model.loss(held_out).item()

    smooth, measuring, measured = math.nan, 0.0, math.nan
    with attach(
        model,
        optimizer,
        url=job.url,
        period=job.period,
        total_steps=job.steps,
        max_horizon=job.max_horizon,
        mode=job.mode,
        predictor=job.predictor,
        on_event=lambda happened: emit(_told(happened)),
    ) as handle:
        start = time.perf_counter()
        for step in range(1, job.steps + 1):
            loss = model.loss(data.draw(job.batch))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            handle.observe(loss)
            optimizer.step()
            schedule.step()
            value = loss.item()
            smooth = value if step == 1 else SMOOTHING * smooth + (1 - SMOOTHING) * value
            if step % job.every == 0 or step == job.steps:
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
    parser = argparse.ArgumentParser(prog="python -m nowcast_client.demo", description=__doc__)
    for name, kind, told in (
        ("steps", int, "optimizer steps"),
        ("seed", int, "of weights and data order"),
        ("rate", float, "peak learning rate"),
        ("batch", int, "windows per step"),
        ("period", int, "steps between nowcasts"),
        ("max-horizon", int, "longest horizon, in strides"),
        ("every", int, "steps between measurements of the held-out loss"),
        ("threads", int, "CPU threads"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, default=getattr(defaults, name.replace("-", "_")), help=f"{told} (%(default)s)"
        )
    parser.add_argument("--mode", choices=("on", "shadow", "off"), default="on", help="off trains alone (%(default)s)")
    parser.add_argument("--url", help="the service (default: NOWCAST_URL, then its usual port on this machine)")
    parser.add_argument("--predictor", help="the service's predictor (default: its own choice)")
    parser.add_argument("--events", action="store_true", help="one JSON object per line on stdout")
    options = vars(parser.parse_args(arguments))
    events = options.pop("events")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        train(Job(**options), standard_library(), _to_stdout if events else _to_log)
    except NowcastError as error:
        log.error("%s", error)
        return 2
    return 0
