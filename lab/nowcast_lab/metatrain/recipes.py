"""What to collect: groups of trainings that differ only in seed, learning rate, weight decay and schedule.

A recipe is data: a name below, or a JSON file with the same fields. One group is trained in one vectorised loop and
becomes one shard.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Self

from nowcast_proto.errors import UnreadableFile
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from nowcast_lab.metatrain.errors import InvalidRecipe
from nowcast_lab.metatrain.vector import OptimizerName, Schedule
from nowcast_lab.metatrain.zoo import Arch, Init

Beta = Annotated[float, Field(ge=0, lt=1)]
CONTEXT = 5
"""Snapshots a nowcast is made from."""


class Nowcasts(BaseModel):
    """Nowcasts early in a training, so that what follows one is among the trajectories.

    Attributes:
        checkpoint: Registered name or path.
        period: Steps between them; five snapshots each, so a multiple of five times the group's ``every``.
        count: How many, from the first period on; the rest of the run is left alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str
    period: PositiveInt = 100
    count: PositiveInt = 3


class Group(BaseModel):
    """Trainings of one architecture on one source, run together.

    Attributes:
        arch: The architecture.
        source: Data source, see `nowcast_lab.metatrain.data`.
        models: Trainings in one vectorised loop.
        repeats: How many such loops, each with seeds of its own and a shard of its own.
        lr: Lowest and highest learning rate; each training draws its own, log-uniformly.
        optimizer: ``adamw``, ``sgd`` (momentum 0.9) or ``muon``, see `VectorOptimizer`.
        betas: AdamW's.
        weight_decay: Values to draw from.
        schedules: Learning-rate schedules to draw from.
        warmup: Share of the run with linear warm-up; from 1 on, its steps.
        init: Initial weights.
        steps: Optimizer steps.
        every: Optimizer steps between snapshots.
        batch: Images, or sequences of the architecture's context.
        nowcasts: Nowcasts made during the trainings; None for none.
        seen: Part of the training data that trainings see when a network is refined on them. Below 1 they overfit, and
            what a nowcast is worth is seen on the rest. Of no consequence to collecting.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    arch: Arch
    source: str
    models: PositiveInt = 4
    repeats: PositiveInt = 1
    lr: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (1e-3, 1e-2)
    optimizer: OptimizerName = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: tuple[float, ...] = (0.0, 0.01, 0.1)
    schedules: tuple[Schedule, ...] = ("constant", "constant", "cosine")
    warmup: Annotated[float, Field(ge=0)] = 0.0
    init: Init = "torch"
    steps: PositiveInt = 2000
    every: PositiveInt = 20
    batch: PositiveInt = 64
    nowcasts: Nowcasts | None = None
    seen: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _nowcasts_fall_on_snapshots(self) -> Self:
        if self.nowcasts is not None and self.nowcasts.period % (CONTEXT * self.every):
            raise ValueError(f"nowcasts every {self.nowcasts.period} steps need snapshots every fifth of that")
        return self

    @property
    def digest(self) -> str:
        """Names the group in a trajectory folder; a field added later, left at its default, changes nothing."""
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()[:12]


class Recipe(BaseModel):
    """Groups in the order they are collected: the most wanted first, so that a run cut short is still useful.

    Attributes:
        groups: What to train.
        seed: All randomness comes from it and the position of a group.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    groups: Annotated[tuple[Group, ...], Field(min_length=1)]
    seed: int = 0


def _conv(*widths: int, norm: bool = False, channels: int = 3, size: int = 16) -> Arch:
    return Arch(kind="convnet", widths=widths, norm=norm, channels=channels, size=size)


def _gpt2(layers: int, dim: int, heads: int, vocabulary: int = 256, context: int = 48) -> Arch:
    return Arch(kind="gpt2", layers=layers, dim=dim, heads=heads, vocabulary=vocabulary, context=context)


def _llama(layers: int, dim: int, heads: int, kv_heads: int, vocabulary: int = 256, context: int = 48) -> Arch:
    return Arch(
        kind="llama", layers=layers, dim=dim, heads=heads, kv_heads=kv_heads, vocabulary=vocabulary, context=context
    )


def _mlp(*widths: int, source: str) -> Arch:
    return Arch(kind="mlp", widths=widths, channels=1 if source == "digits" else 3, size=8)


def _every(period: int, count: int) -> Nowcasts:
    return Nowcasts(checkpoint="nowcast-h32", period=period, count=count)


def _cpu() -> Recipe:
    """For one CPU core: small images, short contexts, small vocabularies, widths beside the held-out ones."""

    def images(arch: Arch, models: int, **fields: Any) -> Group:
        source = f"cifar10@{arch.size}"
        defaults: dict[str, Any] = {"lr": (7e-4, 1.5e-2), "every": 10, "steps": 1500}
        return Group(**defaults | fields, arch=arch, source=source, models=models)

    def digits(arch: Arch, models: int, **fields: Any) -> Group:
        defaults: dict[str, Any] = {"lr": (1e-3, 2e-2), "every": 10, "steps": 1000, "batch": 32}
        return Group(**defaults | fields, arch=arch, source="digits", models=models)

    def text(arch: Arch, source: str, models: int, **fields: Any) -> Group:
        tokens = "bytes" if arch.vocabulary == 256 else f"words{arch.vocabulary}"
        defaults: dict[str, Any] = {"lr": (4e-4, 1e-2), "every": 10, "steps": 1500, "batch": 8}
        return Group(**defaults | fields, arch=arch, source=f"{source}:{tokens}", models=models)

    return Recipe(
        groups=(
            images(_conv(8, 16, 16), 8, batch=32),
            text(_gpt2(2, 24, 3, context=32), "shakespeare", 8),
            images(_conv(12, 24, 24), 4),
            images(_mlp(32, 32, source="cifar10"), 8, steps=2000),
            text(_gpt2(2, 16, 2, 128, 32), "headers", 16),
            digits(_conv(8, 16, channels=1, size=8), 8),
            images(_conv(12, 24, 24, norm=True), 4),
            text(_llama(2, 16, 4, 2, 128, 32), "headers", 12),
            images(_conv(16, 32, 24, size=8), 6, batch=128),
            text(_llama(2, 24, 4, 2, context=32), "shakespeare", 4),
            images(_conv(16, 24, 32), 4),
            digits(_mlp(24, source="digits"), 12),
            images(_conv(8, 16, 16, norm=True), 8, batch=32),
            text(_gpt2(2, 32, 4, context=32), "headers", 4),
            images(_conv(10, 20, 20), 4, lr=(1e-2, 1e-1), optimizer="sgd", weight_decay=(0.0, 5e-4), batch=32),
            images(_conv(12, 12, 24, 24), 4, batch=32),
            text(_gpt2(3, 20, 2, 96, 32), "shakespeare", 8),
            images(_conv(20, 40, 40, norm=True, size=8), 4),
            images(_mlp(48, 24, source="cifar10"), 8, steps=2000),
            digits(_conv(12, 24, 12, channels=1, size=8, norm=True), 8),
            text(_llama(3, 16, 2, 2, 96, 32), "shakespeare", 6),
            images(_conv(16, 24, 32, norm=True), 4, batch=32),
            images(_conv(20, 40, 40, size=8), 4),
            images(_conv(12, 24, 24), 4, nowcasts=_every(100, 4)),
            text(_gpt2(2, 16, 2, 128, 32), "shakespeare", 12, nowcasts=_every(100, 3)),
            images(_conv(8, 16, 16), 8, batch=32, nowcasts=_every(50, 6)),
            images(_conv(10, 20, 20, norm=True), 4, batch=32, nowcasts=_every(100, 4)),
            text(_llama(2, 16, 4, 2, 128, 32), "shakespeare", 8, nowcasts=_every(100, 3)),
            images(_conv(16, 32, 24, size=8), 6, batch=128, nowcasts=_every(200, 3)),
        )
    )


def _refine() -> Recipe:
    """For refining on CPU cores: small networks at rates around the best and up to four times that. Ten kinds of
    training in turn, as `refine` trains ten groups beside each other by default; two of them overfit."""

    def images(arch: Arch, source: str | None = None, **fields: Any) -> Group:
        defaults: dict[str, Any] = {"lr": (2e-3, 1.2e-2), "batch": 32, "models": 6}
        return Group(**defaults | fields, arch=arch, source=source or f"cifar10@{arch.size}")

    def text(arch: Arch, source: str, **fields: Any) -> Group:
        tokens = "bytes" if arch.vocabulary == 256 else f"words{arch.vocabulary}"
        defaults: dict[str, Any] = {"lr": (1.5e-3, 1.2e-2), "batch": 8, "models": 6}
        return Group(**defaults | fields, arch=arch, source=f"{source}:{tokens}")

    steep: dict[str, Any] = {"lr": (4e-3, 1.6e-2), "warmup": 50, "schedules": ("constant", "cosine")}
    return Recipe(
        groups=(
            text(_gpt2(2, 24, 3, context=32), "shakespeare"),
            images(_conv(10, 20, 24), models=4, batch=64),
            text(_llama(2, 16, 4, 2, 128, 32), "headers"),
            images(_conv(12, 24, 24, size=8), models=4, batch=256),
            images(_conv(8, 16, 16, norm=True), models=4, batch=64),
            text(_gpt2(3, 20, 2, 96, 32), "shakespeare", **steep),
            images(_conv(8, 16, 16), models=3, batch=128),
            images(_mlp(32, 32, source="cifar10")),
            images(_mlp(32, 24, source="digits"), "digits", models=8, seen=0.67),
            images(_conv(8, 16, 16, size=8), seen=0.04),
            text(_gpt2(2, 16, 2, 128, 32), "headers"),
            images(_conv(12, 24, 24), models=4),
            text(_llama(2, 24, 4, 2, context=32), "shakespeare"),
            images(_conv(20, 40, 40, size=8), models=4, batch=128),
            images(_conv(10, 20, 20, norm=True), models=4, batch=64),
            text(_gpt2(2, 24, 3, 128, 32), "headers", **steep),
            images(_conv(8, 16, 16, size=32), models=2, batch=64),
            images(_mlp(48, 24, source="cifar10")),
            images(_conv(8, 16, channels=1, size=8), "digits", seen=0.67),
            images(_mlp(32, 32, source="cifar10"), seen=0.04),
        )
    )


def _strong() -> Recipe:
    """For refining on the recipes people train with: half of the slots Muon, the rest AdamW with warm-up and a rate
    that decays, and SGD. Twenty groups, as `_refine`'s; the largest has a third of a million parameters."""
    decays: tuple[Schedule, ...] = ("linear", "cosine", "wsd")

    def images(arch: Arch, source: str | None = None, **fields: Any) -> Group:
        defaults: dict[str, Any] = {"batch": 48, "models": 3, "init": "he" if arch.kind == "convnet" else "torch"}
        return Group(**_MUON | defaults | fields, arch=arch, source=source or f"cifar10@{arch.size}")

    def text(arch: Arch, source: str, **fields: Any) -> Group:
        tokens = "bytes" if arch.vocabulary == 256 else f"words{arch.vocabulary}"
        defaults: dict[str, Any] = {"lr": (1e-2, 5e-2), "batch": 8, "models": 3}
        return Group(**_MUON | defaults | fields, arch=arch, source=f"{source}:{tokens}")

    adamw: dict[str, Any] = {"optimizer": "adamw", "betas": (0.9, 0.99), "warmup": 0.1, "schedules": decays}
    return Recipe(
        groups=(
            images(_conv(10, 20, 24)),
            text(_gpt2(2, 24, 3, context=32), "shakespeare"),
            images(_conv(12, 24, 24, size=8), batch=128),
            text(_llama(2, 24, 4, 2, context=32), "headers"),
            text(_gpt2(3, 48, 4, context=64), "headers", models=1),
            images(_conv(8, 16, 16), **adamw, lr=(4e-3, 1.6e-2)),
            text(_gpt2(2, 32, 4, context=32), "headers", **adamw | {"lr": (2e-3, 1.2e-2)}),
            images(_conv(8, 16, 16, norm=True), optimizer="sgd", lr=(2e-2, 0.2), weight_decay=(0.0, 5e-4)),
            images(_mlp(32, 24, source="digits"), "digits", **adamw, lr=(1e-3, 1e-2), models=8, seen=0.67, batch=32),
            text(_llama(2, 16, 4, 2, 128, 32), "headers", **adamw | {"lr": (2e-3, 1.2e-2)}),
            images(_conv(8, 16, 16, norm=True)),
            text(_llama(3, 32, 4, 2, context=32), "shakespeare", models=2),
            images(_conv(16, 32, 24, size=8), batch=128),
            text(_gpt2(2, 32, 4, context=48), "headers", models=2),
            text(_gpt2(3, 96, 4, context=48), "headers", models=1),
            images(_conv(12, 24, 24), **adamw, lr=(4e-3, 1.6e-2)),
            text(_gpt2(3, 20, 2, 96, 32), "shakespeare", **adamw | {"lr": (2e-3, 1.2e-2)}),
            images(_conv(10, 20, 20), optimizer="sgd", lr=(2e-2, 0.2), weight_decay=(0.0, 5e-4)),
            images(_mlp(32, 32, source="cifar10"), seen=0.04, batch=32),
            images(_conv(12, 24, 24, norm=True), **adamw, lr=(4e-3, 1.6e-2)),
        )
    )


_MUON: dict[str, Any] = {
    "optimizer": "muon",
    "lr": (2e-2, 8e-2),
    "warmup": 0.05,
    "schedules": ("linear", "linear", "cosine", "wsd", "constant"),
}
"""Rates around the best of a sweep; AdamW has a tenth of them for what is no hidden matrix."""


def _gpu() -> Recipe:
    """For one accelerator: full-size images, wider networks, longer runs, hundreds of trajectories."""
    text_lr = (2e-4, 6e-3)
    images = tuple(
        Group(
            arch=_conv(*widths, norm=norm, size=size),
            source=f"cifar10@{size}",
            models=24,
            repeats=2,
            lr=(5e-4, 1.5e-2),
            steps=6000,
            every=20,
            batch=128,
        )
        for widths in ((8, 16, 16), (12, 24, 24), (16, 24, 32), (20, 40, 40), (12, 12, 24, 24))
        for norm in (False, True)
        for size in (16, 32)
    )
    texts = tuple(
        Group(arch=arch, source=f"{text}:{tokens}", models=12, lr=text_lr, steps=6000, batch=32)
        for text in ("shakespeare", "headers")
        for vocabulary, tokens in ((256, "bytes"), (2000, "words2000"))
        for arch in (
            _gpt2(2, 32, 4, vocabulary, 64),
            _gpt2(3, 24, 3, vocabulary, 64),
            _gpt2(4, 48, 4, vocabulary, 64),
            _llama(2, 32, 4, 2, vocabulary, 64),
            _llama(3, 48, 4, 4, vocabulary, 64),
        )
    )
    return Recipe(groups=_cpu().groups + images + texts)


def _smoke() -> Recipe:
    """Seconds on any machine, no files needed: what the tests run."""
    return Recipe(
        groups=(
            Group(
                arch=Arch(kind="mlp", widths=(8,), channels=1, size=8),
                source="digits",
                models=3,
                steps=240,
                every=4,
                batch=32,
            ),
            Group(arch=_conv(4, 6, channels=1, size=8), source="digits", models=2, steps=240, every=4, batch=32),
        )
    )


RECIPES = {"cpu": _cpu, "gpu": _gpu, "refine": _refine, "smoke": _smoke, "strong": _strong}


def read_recipe(name_or_path: str) -> Recipe:
    """A recipe by name, or from a JSON file.

    Raises:
        InvalidRecipe: The name is unknown and no such file exists, or the file does not hold a recipe.
        UnreadableFile: The file cannot be read.
    """
    if name_or_path in RECIPES:
        return RECIPES[name_or_path]()
    path = Path(name_or_path)
    if not path.exists():
        raise InvalidRecipe(
            f"no recipe is called {name_or_path!r} and no such file exists",
            expected=f"one of {', '.join(RECIPES)}, or a JSON file",
        )
    try:
        return Recipe.model_validate(json.loads(path.read_bytes()))
    except OSError as exc:
        raise UnreadableFile(f"{path} cannot be read: {exc.strerror}") from exc
    except (ValidationError, json.JSONDecodeError) as exc:
        raise InvalidRecipe(
            f"{path} is not a recipe: {exc}", expected='{"groups": [{"arch": …, "source": …}, …]}'
        ) from exc
