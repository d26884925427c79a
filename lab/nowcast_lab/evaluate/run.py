"""Time to target and end of run: train held-out tasks with and without nowcasts, and write down everything.

Every run of an arm is one JSON line. Runs of one seed share initial weights and batches across arms, so differences can
be paired. A predictor's time counts as training time; evaluations and averages of weights do not count for anybody.
"""

from __future__ import annotations

import contextlib
import logging
import math
import platform
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from nowcast_proto.errors import InvalidSnapshot
from nowcast_proto.rules.horizon import horizon_at, horizon_schedule
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.history import History
from nowcast_service.predictors.base import Predictor, State, ahead
from nowcast_service.runtime.memory import Peak
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nowcast_lab.evaluate.arms import AHEAD, Arm, Average, run_key
from nowcast_lab.evaluate.averages import Averages
from nowcast_lab.evaluate.measure import batches, evaluate
from nowcast_lab.evaluate.optimizers import Optimizers
from nowcast_lab.evaluate.tasks import Task
from nowcast_lab.evaluate.trial import OnTrial
from nowcast_lab.metatrain.data import Images, Text
from nowcast_lab.metatrain.zoo import initialised

log = logging.getLogger(__name__)

KINDS: tuple[Average, ...] = ("none", "ema", "lawa")


class Predict(Protocol):
    """What an arm asks for a nowcast: the local predictor, or a server.

    Attributes:
        identity: Digest of the checkpoint, or address of the server: a line made with other weights under the same
            name is not taken for this one.
    """

    @property
    def identity(self) -> str: ...

    def __call__(
        self, spec: ArchitectureSpec, snapshots: list[dict[str, Tensor]], k: int, state: State
    ) -> tuple[dict[str, Tensor], State]: ...


@dataclass(frozen=True)
class Local:
    """A predictor of this process."""

    predictor: Predictor
    identity: str = ""
    update_scale: float = 1.0

    def __call__(
        self, spec: ArchitectureSpec, snapshots: list[dict[str, Tensor]], k: int, state: State
    ) -> tuple[dict[str, Tensor], State]:
        return ahead(self.predictor, History.of(spec, snapshots), k, state or None, update_scale=self.update_scale)


class Nowcasts:
    """The nowcasts of a run: snapshots, gates, trial and what they took.

    Args:
        arm: The arm.
        model: What is trained.
        optimizers: Of the training.
        predict: Where nowcasts come from.
        task: The task.
        steps: Of the run.
        device: Where it trains.
    """

    def __init__(
        self,
        arm: Arm,
        model: nn.Module,
        optimizers: Optimizers,
        predict: Predict,
        task: Task,
        steps: int,
        device: str,
    ) -> None:
        self._arm, self._model, self._optimizers, self._predict = arm, model, optimizers, predict
        self._spec, self._steps = task.arch.spec(), steps
        self._horizons = horizon_schedule(steps, arm.period, farthest=arm.farthest, power=arm.power)
        self._snapshots: deque[dict[str, Tensor]] = deque(maxlen=arm.context)
        self._state: State = {}
        self._trial = OnTrial(model, optimizers, arm.period, steps) if arm.verdict == "trial" else None
        self._peak = Peak(device)
        self.made = self.kept = 0

    def after_step(self, step: int, loss: float) -> None:
        """Whatever is due after step ``step``, counted from 1, whose loss is that of the weights before it."""
        if self._trial is not None:
            self._trial.observe(step - 1, loss)
            verdict = self._trial.verdict(step)
            if verdict is not None:
                self.kept += verdict
                if not verdict:
                    self._snapshots.clear()
                    self._state = {}
        if step % self._arm.every == 0:
            self._snapshots.append({name: p.detach().clone() for name, p in self._model.named_parameters()})
        if self._due(step):
            self._jump(step)

    def _due(self, step: int) -> bool:
        arm = self._arm
        if step % arm.period or len(self._snapshots) < arm.context:
            return False
        if self._optimizers.fraction(step - 1) < arm.lr_gate or step > arm.stop_at * self._steps:
            return False
        return self._trial is None or not self._trial.objection(step)

    def _jump(self, step: int) -> None:
        arm = self._arm
        k = arm.farthest if arm.fixed else horizon_at(step - 1, self._horizons, arm.period)
        if self._trial is not None:
            self._trial.begin(step)
        with self._peak.measured():
            applied = self._apply(k)
        self.made += 1
        if not applied:
            if self._trial is not None:
                self._trial.withdraw()
        else:
            self.kept += self._trial is None
            if arm.moments == "reset":
                self._optimizers.forget()
        self._snapshots.clear()

    def _apply(self, k: int) -> bool:
        """Make one nowcast and take it over; False where the predictor could not."""
        try:
            parameters, carried = self._predict(self._spec, list(self._snapshots), k, self._state)
        except InvalidSnapshot as error:  # the training itself has diverged, or the prediction is not finite
            log.warning("nowcast refused: %s", error)
            return False
        self._state = dict(carried)
        scale = self._trial.best.payoff.scale if self._trial is not None else 1.0
        with torch.no_grad():
            for name, p in self._model.named_parameters():
                p.copy_(parameters[name]) if scale == 1.0 else p.lerp_(parameters[name], scale)
        return True

    @property
    def periods(self) -> list[tuple[int, float, float, str]]:
        """Of a run on trial: the last step of every period, the loss at its end, its error, and how it began."""
        periods = self._trial.best.payoff.periods if self._trial is not None else []
        return [(one.step, round(one.level, 6), round(one.error, 6), one.kind) for one in periods]

    @property
    def nbytes(self) -> int | None:
        """Memory of the snapshots and the largest nowcast; None where it could not be measured or none was made."""
        if self._peak.nbytes is None:
            return None
        return self._peak.nbytes + self._arm.context * sum(
            p.numel() * p.element_size() for p in self._model.parameters()
        )


def run(
    task: Task,
    arm: Arm,
    seed: int,
    data: Images | Text,
    predict: Predict | None,
    *,
    steps: int | None = None,
    until_target: bool = False,
    device: str = "cpu",
    on_step: Callable[[int, float], None] = lambda *_: None,
) -> dict[str, Any]:
    """Train once.

    Args:
        task: What to train.
        arm: How.
        seed: Initial weights and batches.
        data: The task's source, on `device`.
        predict: Where nowcasts come from; None for the arm without.
        steps: Length of the run where it is not the task's.
        until_target: End the run where it reaches the task's target; schedules stay those of the whole run.
        device: Where to train.
        on_step: Called with every step and its training loss.

    Returns:
        The JSON line: arm, curve of (step, metric, training seconds with nowcasts), the metric by kind of averaged
        weights at the same steps, final metric and loss, nowcasts made and kept, the periods of
        a run on trial (last step, level of the loss, its error, how they began), seconds of training and of nowcasts,
        and the bytes of host memory (on CUDA: of the device) that the snapshots and the largest nowcast took; a
        server's are its own and do not count.
    """
    steps = steps or task.steps
    torch.manual_seed(seed)
    model = initialised(task.arch.build(running_stats=True), arm.init).to(device)
    optimizers = Optimizers(arm, model, steps)
    averages = Averages(model, arm.ema_span * steps, arm.every, arm.context)
    nowcasts = Nowcasts(arm, model, optimizers, predict, task, steps, device) if predict is not None else None
    tail: deque[float] = deque(maxlen=max(1, steps // 20))
    curve: list[tuple[int, float, float]] = []
    averaged: dict[str, list[float]] = {kind: [] for kind in KINDS}
    nowcast_seconds = training_seconds = 0.0
    stream = batches(task, data, seed)

    def measure() -> None:
        optimizers.mode(training=False)
        for kind in KINDS:
            averaged[kind].append(round(evaluate(averages.model(kind), task, data), 5))
        optimizers.mode(training=True)
        curve.append((step, averaged[arm.average][-1], training_seconds + nowcast_seconds))

    optimizers.mode(training=True)
    for step in range(1, steps + 1):
        inputs, targets = next(stream)
        began = time.perf_counter()
        optimizers.look_ahead(step - 1)
        output = model(inputs)
        loss = cross_entropy(output.reshape(-1, output.shape[-1]), targets.reshape(-1))
        model.zero_grad(set_to_none=True)
        loss.backward()
        optimizers.step(step - 1)
        value = float(loss.detach())
        tail.append(value)
        training_seconds += time.perf_counter() - began
        averages.update(step)
        due_to_measure = step % task.eval_every == 0 or step == steps
        if due_to_measure and arm.predictor in AHEAD:
            measure()
        if nowcasts is not None:
            began = time.perf_counter()
            nowcasts.after_step(step, value)
            nowcast_seconds += time.perf_counter() - began
        if due_to_measure and arm.predictor not in AHEAD:
            measure()
        on_step(step, value)
        if not math.isfinite(value):
            break
        if until_target and task.target is not None and curve and task.better(curve[-1][1], task.target):
            break
    ended = bool(curve) and curve[-1][0] == step and math.isfinite(value)
    return {
        "key": run_key(task, arm, seed, steps, predict.identity if predict else "", until_target=until_target),
        "task": task.name,
        "arm": arm.model_dump(mode="json", exclude_defaults=True),
        "weights": predict.identity if predict else "",
        "seed": seed,
        "steps": steps,
        "curve": [[s, m, round(t, 4)] for s, m, t in curve],
        "averaged": averaged,
        "final": curve[-1][1] if ended else math.nan,
        "train_loss": sum(tail) / len(tail),
        "nowcasts": nowcasts.made if nowcasts else 0,
        "kept": nowcasts.kept if nowcasts else 0,
        "periods": nowcasts.periods if nowcasts else [],
        "training_seconds": round(training_seconds, 4),
        "nowcast_seconds": round(nowcast_seconds, 4),
        "nowcast_bytes": nowcasts.nbytes if nowcasts else None,
        "machine": f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}",
    }


def seen_as(line: dict[str, Any], kind: Average, key: str) -> dict[str, Any]:
    """The line of the same training, evaluated with another average of its weights."""
    metrics = line["averaged"][kind]
    arm = {name: value for name, value in line["arm"].items() if name != "average"}
    return line | {
        "key": key,
        "arm": arm | ({"average": kind} if kind != "none" else {}),
        "curve": [[s, m, t] for (s, _, t), m in zip(line["curve"], metrics, strict=True)],
        "final": metrics[-1] if math.isfinite(line["final"]) else math.nan,
    }


def _processor() -> str:
    """Its name: rounding differs between processors, and long trainings with it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
