"""Arms of an evaluation: one way to train, all of it, and what identifies a run of it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from nowcast_proto.errors import NowcastError, UnreadableFile
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from nowcast_lab.evaluate.tasks import Task
from nowcast_lab.metatrain.errors import InvalidRecipe
from nowcast_lab.metatrain.recipes import CONTEXT, Beta
from nowcast_lab.metatrain.vector import REST, Schedule
from nowcast_lab.metatrain.zoo import Init

Average = Literal["none", "ema", "lawa"]
"""Weights that are evaluated: the live ones, their exponential average, or the mean of the newest snapshots."""
Share = Annotated[float, Field(ge=0, lt=1)]

AHEAD = ("nino", "wnn", "linear")
"""Predictors of weights to come. What a training has reached at a step is measured before a nowcast due at that step,
which opens the next period and takes some of it to recover. SNOO's and LAWA's weights are what those train: they are
measured after."""
NAMES = {"adamw": "AdamW", "sgd": "SGD", "muon": "Muon", "soap": "SOAP", "schedulefree": "schedule-free AdamW"}


class Arm(BaseModel):
    """One way to train, all of it.

    Attributes:
        predictor: ``none``, ``nino``, ``wnn``, ``linear``, ``lawa`` or ``snoo``.
        checkpoint: Registered name or path, for ``nino`` and ``wnn``.
        optimizer: Base optimizer: ``adamw``, ``sgd`` (momentum 0.9), ``muon``, ``soap`` or ``schedulefree`` (AdamW).
        lr: Peak learning rate.
        rest_lr: With Muon, AdamW's peak rate for what is no hidden matrix; a tenth of ``lr`` by default.
        warmup: Share of the run with linear warm-up.
        schedule: What follows it: ``constant``, ``cosine``, ``linear`` or ``wsd``, see `learning_rate`.
        betas: Of AdamW, SOAP and schedule-free; the library's own by default.
        weight_decay: Of the optimizer.
        clip: Largest norm of a gradient.
        nesterov: EMA-Nesterov's lookahead; 0 is without it.
        nesterov_decay: Of the average of the steps that it looks along.
        init: Initial weights.
        average: Which weights are evaluated; all three ways are in every line of results.
        ema_span: Share of the run that the exponential average reaches back.
        period: Steps between nowcasts.
        context: Snapshots that a nowcast is made from.
        stride: Steps between them; a ``context``-th of the period by default.
        farthest: Horizon of the first nowcast, in strides; later ones decay to 1.
        power: How they decay: 2 as published, 1 linearly, below 1 late.
        fixed: All horizons are the first.
        update_scale: Factor on every nowcast's displacement.
        lr_gate: No nowcast while the rate is below this fraction of its peak.
        stop_at: No nowcast after this fraction of the run.
        moments: Whether the optimizer's state is kept or reset at a nowcast.
        verdict: ``always`` keep a nowcast, or ``trial``: the judge of the client decides.
        outer_lr: SNOO's outer learning rate.
        outer_momentum: SNOO's momentum.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    predictor: Literal["none", "nino", "wnn", "linear", "lawa", "snoo"] = "none"
    checkpoint: str | None = None
    optimizer: Literal["adamw", "sgd", "muon", "soap", "schedulefree"] = "adamw"
    lr: PositiveFloat = 3e-3
    rest_lr: PositiveFloat | None = None
    warmup: Share = 0.0
    schedule: Schedule = "constant"
    betas: tuple[Beta, Beta] | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: PositiveFloat | None = None
    nesterov: Annotated[float, Field(ge=0)] = 0.0
    nesterov_decay: Share = 0.99
    init: Init = "torch"
    average: Average = "none"
    ema_span: Annotated[float, Field(gt=0, le=1)] = 0.02
    period: PositiveInt = 100
    context: PositiveInt = CONTEXT
    stride: PositiveInt | None = None
    farthest: PositiveInt = 40
    power: PositiveFloat = 2.0
    fixed: bool = False
    update_scale: float = 1.0
    lr_gate: float = 0.1
    stop_at: float = 1.0
    moments: Literal["keep", "reset"] = "keep"
    verdict: Literal["always", "trial"] = "always"
    outer_lr: float = 0.7
    outer_momentum: float = 0.5

    @property
    def every(self) -> int:
        """Steps between snapshots."""
        return self.stride or max(1, self.period // self.context)

    @property
    def adamw_lr(self) -> float:
        """Peak rate of AdamW beside Muon."""
        return self.rest_lr or REST * self.lr

    @property
    def method(self) -> str:
        """A short name for tables, without seed, learning rate and schedule."""
        base = NAMES[self.optimizer]
        if self.nesterov:
            base += f", EMA-Nesterov {self.nesterov:g} ({self.nesterov_decay:g})"
        if self.average != "none":
            base += f", {self.average.upper()}"
        if self.init != "torch":
            base += ", He"
        return base if self.predictor == "none" else f"{base} + {self._nowcasts()}"

    def _nowcasts(self) -> str:
        name: str = self.predictor
        if self.checkpoint is not None:
            name += f" {Path(self.checkpoint).stem}"
        extras = [f"every {self.period}"]
        if self.predictor == "snoo":
            extras.append(f"rate {self.outer_lr:g}, momentum {self.outer_momentum:g}")
        if self.stride is not None or self.context != CONTEXT:
            extras.append(f"{self.context} snapshots every {self.every}")
        if self.update_scale != 1:
            extras.append(f"scale {self.update_scale:g}")
        if self.farthest != 40 or self.fixed:
            extras.append(f"k {self.farthest}" + " fixed" * self.fixed)
        if self.power != 2:
            extras.append(f"power {self.power:g}")
        if self.stop_at != 1:
            extras.append(f"until {self.stop_at:g}")
        if self.moments == "reset":
            extras.append("moments reset")
        if self.verdict == "trial":
            extras.append("trial")
        return f"{name} ({', '.join(extras)})"

    @property
    def recipe(self) -> str:
        """Rate and schedule, for tables."""
        warmup = f"{100 * self.warmup:g} % warm-up, " if self.warmup else ""
        return f"{warmup}{self.schedule}"


def run_key(task: Task, arm: Arm, seed: int, steps: int, identity: str = "", *, until_target: bool = False) -> str:
    """What identifies a run: an unchanged line is not run again.

    Fields at their defaults do not count, so that one added later changes no key.
    """
    parts = [
        task.model_dump(mode="json", exclude_defaults=True),
        arm.model_dump(mode="json", exclude_defaults=True),
        seed,
        steps,
        identity,
        until_target,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def read_arms(path: Path) -> tuple[Arm, ...]:
    """Arms from a JSON file, a list of objects; a list as a field's value means all combinations.

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
    """All arms of one entry, lists multiplied out; ``betas``, itself a pair, is a list of pairs then.

    Raises:
        InvalidRecipe: A field is unknown or out of range.
    """
    unknown = sorted(set(entry) - set(Arm.model_fields))
    if unknown:
        raise InvalidRecipe(f"an arm has no {', '.join(map(repr, unknown))}", expected=", ".join(Arm.model_fields))
    values = [value if _is_choice(name, value) else [value] for name, value in entry.items()]
    arms = []
    for combination in itertools.product(*values):
        with _as_recipe_error(entry):
            arms.append(Arm.model_validate(dict(zip(entry, combination, strict=True))))
    return arms


def _is_choice(name: str, value: Any) -> bool:
    return isinstance(value, list) and not (name == "betas" and value and not isinstance(value[0], list))


@contextlib.contextmanager
def _as_recipe_error(entry: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except NowcastError:
        raise
    except ValueError as exc:
        raise InvalidRecipe(f"{dict(entry)} is no arm: {exc}", expected="fields of Arm") from exc
