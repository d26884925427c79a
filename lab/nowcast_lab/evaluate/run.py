"""Time to target and end of run: train held-out tasks with and without nowcasts, and write down everything.

Every run of an arm is one JSON line. Runs of one seed share initial weights and batches across arms, so differences can
be paired. A predictor's time counts as training time; evaluations do not count for anybody.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import logging
import math
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, Protocol

import torch
from nowcast_proto.errors import InvalidSnapshot, NowcastError, UnreadableFile
from nowcast_proto.rules.horizon import horizon_at, horizon_schedule
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.history import History
from nowcast_service.predictors.base import State
from nowcast_service.runtime.memory import Peak
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nowcast_lab.evaluate.tasks import Task
from nowcast_lab.metatrain.data import Images, Text, load
from nowcast_lab.metatrain.errors import InvalidRecipe
from nowcast_lab.metatrain.vector import learning_rate

log = logging.getLogger(__name__)

CONTEXT = 5
WINDOW = 50
"""Most steps of the recovery window, which is no longer than a third of the period, as in the client: a good nowcast is
back on trend after 20 to 30 steps and ahead by 50."""
AHEAD = ("nino", "wnn", "linear")
"""Predictors of weights to come. What a training has reached at a step is measured before a nowcast due at that step,
which opens the next period and takes some of it to recover. SNOO's and LAWA's weights are what those train: they are
measured after."""


class Arm(BaseModel):
    """One way to train, all of it.

    Attributes:
        predictor: ``none``, ``nino``, ``wnn``, ``linear``, ``lawa`` or ``snoo``.
        checkpoint: Registered name or path, for ``nino`` and ``wnn``.
        optimizer: Base optimizer.
        lr: Peak learning rate.
        schedule: ``constant`` or ``cosine``.
        weight_decay: AdamW's.
        period: Steps between nowcasts; five snapshots are taken per period.
        farthest: Horizon of the first nowcast, in strides; later ones decay to 1.
        power: How they decay: 2 as published, 1 linearly, below 1 late.
        update_scale: Factor on every nowcast's displacement.
        lr_gate: No nowcast while the rate is below this fraction of its peak.
        stop_at: No nowcast after this fraction of the run.
        moments: Whether the optimizer's state is kept or reset at a nowcast.
        verdict: ``always`` keep a nowcast, or ``trial``: undo it when the loss does not come back, and make none while
            the loss is above the best it has been, or for a while after three that brought nothing better.
        outer_lr: SNOO's outer learning rate.
        outer_momentum: SNOO's momentum.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    predictor: Literal["none", "nino", "wnn", "linear", "lawa", "snoo"] = "none"
    checkpoint: str | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-3
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.01
    period: PositiveInt = 100
    farthest: PositiveInt = 40
    power: PositiveFloat = 2.0
    update_scale: float = 1.0
    lr_gate: float = 0.1
    stop_at: float = 1.0
    moments: Literal["keep", "reset"] = "keep"
    verdict: Literal["always", "trial"] = "always"
    outer_lr: float = 0.7
    outer_momentum: float = 0.5

    @property
    def label(self) -> str:
        """A short name for tables, without seed and learning rate."""
        if self.predictor == "none":
            return self.optimizer
        name = self.predictor
        if self.checkpoint is not None:
            name += f" {Path(self.checkpoint).stem}"
        extras = [f"every {self.period}"]
        if self.predictor == "snoo":
            extras.append(f"rate {self.outer_lr:g}, momentum {self.outer_momentum:g}")
        if self.update_scale != 1:
            extras.append(f"scale {self.update_scale:g}")
        if self.farthest != 40:
            extras.append(f"k {self.farthest}")
        if self.power != 2:
            extras.append(f"power {self.power:g}")
        if self.stop_at != 1:
            extras.append(f"until {self.stop_at:g}")
        if self.moments == "reset":
            extras.append("moments reset")
        if self.verdict == "trial":
            extras.append("trial")
        return f"{name} ({', '.join(extras)})"


class Predict(Protocol):
    """What an arm asks for a nowcast: the local predictor, or a server.

    Attributes:
        identity: Digest of the checkpoint, or address of the server: a line made with other weights under the same
            name is not taken for this one.
    """

    identity: str

    def __call__(
        self, spec: ArchitectureSpec, snapshots: list[dict[str, Tensor]], k: int, state: State
    ) -> tuple[dict[str, Tensor], State]: ...


@dataclass(frozen=True)
class Local:
    """A predictor of this process."""

    predictor: Any
    identity: str = ""

    def __call__(
        self, spec: ArchitectureSpec, snapshots: list[dict[str, Tensor]], k: int, state: State
    ) -> tuple[dict[str, Tensor], State]:
        return self.predictor.predict(History.of(spec, snapshots), k, state or None)


def run_key(task: Task, arm: Arm, seed: int, steps: int, identity: str = "", *, until_target: bool = False) -> str:
    """What identifies a run: an unchanged line is not run again."""
    # A field that came later counts where it is not at its default, so that older lines stay known.
    later = {"power"} if arm.power == 2 else set()
    parts = [task.model_dump(mode="json"), arm.model_dump(mode="json", exclude=later), seed, steps, identity]
    parts += ["until target"] * until_target + ["measured before nowcasts"] * (arm.predictor in AHEAD)
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    on_step: Callable[[int], None] = lambda _: None,
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
        on_step: Called with every step.

    Returns:
        The JSON line: arm, curve of (step, metric, training seconds with nowcasts), final metric and loss, nowcasts
        made and kept, seconds of training and of nowcasts, and the bytes of host memory (on CUDA: of the device) that
        five snapshots and the largest nowcast took; a server's are its own and do not count.
    """
    steps = steps or task.steps
    torch.manual_seed(seed)
    model = task.arch.build(running_stats=True).to(device)
    spec = task.arch.spec()
    optimizer = _optimizer(arm, model)
    horizons = horizon_schedule(steps, arm.period, farthest=arm.farthest, power=arm.power)
    stride = arm.period // CONTEXT
    snapshots: deque[dict[str, Tensor]] = deque(maxlen=CONTEXT)
    state: State = {}
    trial: _Trial | None = None
    best = _Best() if arm.verdict == "trial" else None
    recent: deque[float] = deque(maxlen=WINDOW)
    settled: deque[float] = deque(maxlen=max(1, arm.period // 2))
    tail: deque[float] = deque(maxlen=max(1, steps // 20))
    curve: list[tuple[int, float, float]] = []
    made = kept = 0
    nowcast_seconds = training_seconds = 0.0
    peak = Peak(device)
    stream = _batches(task, data, seed)

    def measure() -> None:
        curve.append((step, round(evaluate(model, task, data), 5), training_seconds + nowcast_seconds))

    for step in range(1, steps + 1):
        inputs, targets = next(stream)
        began = time.perf_counter()
        fraction = learning_rate(arm.schedule, step - 1, steps)
        for group in optimizer.param_groups:
            group["lr"] = arm.lr * fraction
        output = model(inputs)
        loss = cross_entropy(output.reshape(-1, output.shape[-1]), targets.reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        value = float(loss.detach())
        recent.append(value)
        settled.append(value)
        tail.append(value)
        training_seconds += time.perf_counter() - began
        due_to_measure = step % task.eval_every == 0 or step == steps
        if due_to_measure and arm.predictor in AHEAD:
            measure()
        if predict is not None:
            began = time.perf_counter()
            if trial is not None and (verdict := trial.observe(value)) is not None:
                kept += verdict
                if verdict and best is not None:
                    best.kept += 1
                if not verdict:
                    trial.undo(model, optimizer)
                    snapshots.clear()
                    state = {}
                trial = None
                settled.clear()
            if step % stride == 0:
                snapshots.append({name: p.detach().clone() for name, p in model.named_parameters()})
            gated = fraction < arm.lr_gate or step > arm.stop_at * steps
            due = step % arm.period == 0 and len(snapshots) == CONTEXT and not gated and trial is None
            if due and not (best is not None and best.objects(list(settled))):
                k = horizon_at(step - 1, horizons, arm.period)
                if arm.verdict == "trial":
                    trial = _Trial(list(recent), model, optimizer, max(1, min(WINDOW, arm.period // 3)))
                with peak.measured():
                    applied = _apply(model, spec, list(snapshots), k, state, predict)
                if applied:
                    made += 1
                    kept += trial is None
                    if arm.moments == "reset":
                        optimizer.state.clear()
                else:
                    made += 1
                    trial = None
                snapshots.clear()
            nowcast_seconds += time.perf_counter() - began
        if due_to_measure and arm.predictor not in AHEAD:
            measure()
        on_step(step)
        if not math.isfinite(value):
            break
        reached = until_target and task.target is not None and curve and task.better(curve[-1][1], task.target)
        if reached:
            break
    final = curve[-1][1] if curve and curve[-1][0] == step and math.isfinite(value) else math.nan
    return {
        "key": run_key(task, arm, seed, steps, predict.identity if predict else "", until_target=until_target),
        "task": task.name,
        "arm": arm.model_dump(mode="json"),
        "weights": predict.identity if predict else "",
        "seed": seed,
        "steps": steps,
        "curve": [[s, m, round(t, 4)] for s, m, t in curve],
        "final": final,
        "train_loss": sum(tail) / len(tail),
        "nowcasts": made,
        "kept": int(kept),
        "training_seconds": round(training_seconds, 4),
        "nowcast_seconds": round(nowcast_seconds, 4),
        "nowcast_bytes": None if peak.nbytes is None else peak.nbytes + CONTEXT * _parameter_bytes(model),
        "machine": f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}",
    }


def _processor() -> str:
    """Its name: rounding differs between processors, and long trainings with it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _parameter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _optimizer(arm: Arm, model: nn.Module) -> torch.optim.Optimizer:
    if arm.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=arm.lr, momentum=0.9, weight_decay=arm.weight_decay)
    return torch.optim.AdamW(model.parameters(), lr=arm.lr, weight_decay=arm.weight_decay)


def _apply(
    model: nn.Module,
    spec: ArchitectureSpec,
    snapshots: list[dict[str, Tensor]],
    k: int,
    state: State,
    predict: Predict,
) -> bool:
    """Make one nowcast and take it over; False where the predictor could not."""
    try:
        parameters, carried = predict(spec, snapshots, k, state)
    except InvalidSnapshot as error:  # the training itself has diverged, or the prediction is not finite
        log.warning("nowcast refused: %s", error)
        return False
    state.clear()
    state.update(carried)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(parameters[name])
    return True


class _Trial:
    """A nowcast on trial: the client's rule without its benefit of the doubt.

    The mean loss at the end of the window must be no higher than the mean before the nowcast, within three standard
    errors of the noise between neighbouring steps.
    """

    def __init__(self, before: list[float], model: nn.Module, optimizer: torch.optim.Optimizer, window: int) -> None:
        self._before, self._window = before, window
        self._weights = copy.deepcopy(model.state_dict())
        self._optimizer = copy.deepcopy(optimizer.state_dict())
        self._after: list[float] = []

    def observe(self, loss: float) -> bool | None:
        """Note a loss; the verdict at the end of the window, or at once where the loss is no number."""
        self._after.append(loss)
        if not math.isfinite(loss):
            return False
        if len(self._after) < self._window:
            return None
        end = self._after[self._window * 3 // 5 :]
        error = _noise(self._before) * math.sqrt(1 / len(end) + 1 / max(1, len(self._before)))
        return fmean(end) <= fmean(self._before) + 3 * error

    def undo(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Back to the weights and the optimizer's state from before the nowcast."""
        model.load_state_dict(self._weights)
        optimizer.load_state_dict(self._optimizer)


class _Best:
    """The client's other rule: no nowcast while the loss lies above the best it has been, by more than its noise; and
    when three kept ones brought nothing better, a pause until training alone has, twice as long every time."""

    def __init__(self) -> None:
        self._best: tuple[float, float] | None = None
        self._pauses = self._pause = 0
        self.kept = 0

    def objects(self, losses: list[float]) -> bool:
        """Whether no nowcast should be made now.

        Args:
            losses: Of half a period, or since the last verdict where that is later; fewer than 8 say nothing.
        """
        if len(losses) < 8:
            return False
        level, error = fmean(losses), _noise(losses) / math.sqrt(len(losses))
        if self._best is None or level <= self._best[0]:
            self._best, self.kept, self._pause = (level, error), 0, max(0, self._pause - 1)
        elif self._pause == 0 and self.kept >= max(1, 3 - self._pauses):
            self._pause = 2**self._pauses
            self._pauses += 1
        allowed = 3 * math.hypot(error, self._best[1]) + 0.005 * abs(self._best[0])
        return self._pause > 0 or level > self._best[0] + allowed


def _noise(losses: list[float]) -> float:
    """Standard deviation of the noise between neighbouring steps, blind to their trend."""
    gaps = [abs(b - a) for a, b in itertools.pairwise(losses)]
    return 1.4826 * median(gaps) / math.sqrt(2) if gaps else 0.0


def _batches(task: Task, data: Images | Text, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Reshuffled epochs of images, or random windows of text; a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(data, Text):
        offsets = torch.arange(task.arch.context + 1)
        while True:
            starts = torch.randint(len(data.train) - task.arch.context - 1, (task.batch, 1), generator=generator)
            windows = data.train[(starts + offsets).to(data.train.device)]
            yield windows[:, :-1], windows[:, 1:]
    while True:
        order = torch.randperm(len(data.train_y), generator=generator)
        for rows in order.split(task.batch):
            if len(rows) == task.batch:
                index = rows.to(data.train_y.device)
                yield data.train_x[index], data.train_y[index]


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, data: Images | Text) -> float:
    """The task's metric on held-out data: accuracy in per cent, or mean loss."""
    model.eval()
    try:
        if isinstance(data, Text):
            stride = max(1, (len(data.test) - task.arch.context - 1) // task.eval_items)
            starts = torch.arange(task.eval_items, device=data.test.device)[:, None] * stride
            windows = data.test[starts + torch.arange(task.arch.context + 1, device=data.test.device)]
            inputs, targets = windows[:, :-1], windows[:, 1:]
        else:
            # Every so many images: files may be sorted by class.
            stride = max(1, len(data.test_y) // task.eval_items)
            inputs, targets = data.test_x[::stride][: task.eval_items], data.test_y[::stride][: task.eval_items]
        losses, right, count = 0.0, 0, 0
        for x, y in zip(inputs.split(500), targets.split(500), strict=True):
            output = model(x)
            losses += float(cross_entropy(output.reshape(-1, output.shape[-1]), y.reshape(-1), reduction="sum"))
            right += int((output.argmax(-1) == y).sum())
            count += y.numel()
    finally:
        model.train()
    return 100 * right / count if task.metric == "accuracy" else losses / count


@dataclass(frozen=True)
class Plan:
    """Runs to make: every arm on every task with every seed, in an order that finishes seeds together."""

    tasks: tuple[Task, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    steps: int | None = None
    until_target: bool = False

    def __iter__(self) -> Iterator[tuple[Task, Arm, int]]:
        for task in self.tasks:
            for seed in self.seeds:
                for arm in self.arms:
                    yield task, arm, seed

    def __len__(self) -> int:
        return len(self.tasks) * len(self.arms) * len(self.seeds)


def execute(
    plan: Plan,
    out: Path,
    make: Callable[[Arm], Predict | None],
    *,
    data: str | None = None,
    device: str = "cpu",
    on_run: Callable[[dict[str, Any]], None] = lambda _: None,
    on_step: Callable[[int], None] = lambda _: None,
) -> int:
    """Make all runs of a plan that `out` does not hold, and append them.

    Args:
        plan: What to run.
        out: JSON lines.
        make: The predictor of an arm, None for the arm without.
        data: Folder of the data files.
        device: Where to train.
        on_run: Called with every finished run, old or new.
        on_step: Called with every step of the current run.

    Returns:
        Number of new runs.
    """
    done = {line["key"]: line for line in read_runs(out)}
    new = 0
    predicts = {arm: make(arm) for arm in plan.arms}
    for task, arm, seed in plan:
        steps = plan.steps or task.steps
        predict = predicts[arm]
        key = run_key(task, arm, seed, steps, predict.identity if predict else "", until_target=plan.until_target)
        if key in done:
            on_run(done[key])
            continue
        source = load(task.source, data)
        _check_fit(task, source)
        line = run(
            task,
            arm,
            seed,
            source.to(torch.device(device)),
            predict,
            steps=steps,
            until_target=plan.until_target,
            device=device,
            on_step=on_step,
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        new += 1
        on_run(line)
    return new


def _check_fit(task: Task, data: Images | Text) -> None:
    if isinstance(data, Text) != task.arch.is_text:
        raise InvalidRecipe(f"task {task.name} cannot be trained on {task.source}", expected="text for text networks")


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of a results file; a last line cut short by a crash is dropped.

    Raises:
        UnreadableFile: A line that is not the last is no JSON, or the file cannot be read.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    runs = []
    for number, line in enumerate(lines, 1):
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError as exc:
            if number == len(lines):
                path.write_text("".join(f"{good}\n" for good in lines[:-1]))
                break
            raise UnreadableFile(f"{path}, line {number}, is no JSON: {exc}", remedy="remove that line") from exc
    return runs


def read_arms(path: Path) -> tuple[Arm, ...]:
    """Arms from a JSON file, a list of objects; a list as a value of lr, schedule, period or update_scale means all
    of its combinations.

    Raises:
        UnreadableFile: The file cannot be read.
        InvalidRecipe: It does not hold arms.
    """
    try:
        entries = json.loads(path.read_bytes())
    except OSError as exc:
        raise UnreadableFile(f"{path} cannot be read: {exc.strerror}") from exc
    except json.JSONDecodeError as exc:
        raise InvalidRecipe(f"{path} is no JSON: {exc}", expected='[{"predictor": …, "lr": […]}, …]') from exc
    if not isinstance(entries, list):
        raise InvalidRecipe(f"{path} is not a list", expected='[{"predictor": …, "lr": […]}, …]')
    return tuple(arm for entry in entries for arm in expand(entry))


def expand(entry: Mapping[str, Any]) -> Iterable[Arm]:
    """All arms of one entry, lists multiplied out.

    Raises:
        InvalidRecipe: A field is unknown or out of range.
    """
    names = list(entry)
    values = [value if isinstance(value, list) else [value] for value in entry.values()]
    arms = []
    for combination in itertools.product(*values):
        with _as_recipe_error(entry):
            arms.append(Arm.model_validate(dict(zip(names, combination, strict=True))))
    return arms


@contextlib.contextmanager
def _as_recipe_error(entry: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except NowcastError:
        raise
    except ValueError as exc:
        raise InvalidRecipe(f"{dict(entry)} is no arm: {exc}", expected="fields of Arm") from exc
