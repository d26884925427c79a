"""Evaluation tasks: what is trained, on what, for how long, towards which target.

Written down before the first evaluation (``choose-mlp`` and ``choose-full`` before the first on them). The ``choose-``
tasks alone are for choosing among checkpoints and settings, so that no reported task has a say in what is reported on
it. Every task is held out from meta-training (`heldout`): its architecture on its data is in no trajectory, and texts
of text tasks are in none at all.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from nowcast_lab.metatrain.zoo import Arch

SEEDS = (1, 2, 3, 4, 5)
"""Seeds of every evaluation, in this order: a run of n seeds takes the first n."""


class Task(BaseModel):
    """One thing to train.

    Attributes:
        name: How the command line knows it.
        arch: The network.
        source: Its data.
        batch: Images, or sequences.
        steps: Length of a run.
        metric: ``accuracy`` (per cent, higher is better) or ``loss`` (validation, lower is better).
        target: Published target of the metric; None where the target is what tuned AdamW ends at.
        eval_every: Steps between evaluations.
        eval_items: Test images, or sequences, of one evaluation.
        once: Read no part of a text twice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    arch: Arch
    source: str
    batch: PositiveInt = 128
    steps: PositiveInt = 2000
    metric: Literal["accuracy", "loss"] = "accuracy"
    target: float | None = None
    eval_every: PositiveInt = 50
    eval_items: PositiveInt = 2000
    once: bool = False

    def better(self, one: float, other: float) -> bool:
        """Whether metric `one` is at least as good as `other`."""
        return one >= other if self.metric == "accuracy" else one <= other


def _conv(*widths: int, size: int, norm: bool = False) -> Arch:
    return Arch(kind="convnet", widths=widths, size=size, norm=norm)


def _digits(name: str, width: int) -> Task:
    arch = Arch(kind="mlp", widths=(width, width), channels=1, size=8)
    return Task(
        name=name, arch=arch, source="digits", batch=32, steps=600, metric="loss", eval_every=20, eval_items=297
    )


def _code(name: str, arch: Arch) -> Task:
    return Task(name=name, arch=arch, source="stdlib:bytes", batch=16, metric="loss", eval_items=64)


_TASKS = (
    # For choosing among checkpoints and settings; never reported as a result.
    Task(name="choose-conv", arch=_conv(14, 28, 28, size=16), source="cifar10@16", batch=64, steps=1000),
    Task(
        name="choose-gpt2",
        arch=Arch(kind="gpt2", dim=40, layers=2, heads=4, context=64),
        source="sympy:bytes",
        batch=16,
        steps=600,
        metric="loss",
        eval_items=64,
    ),
    Task(name="choose-full", arch=_conv(14, 28, 28, size=32), source="cifar10@32", steps=2000, eval_every=100),
    _digits("choose-mlp", 40),
    # The paper's protocol and its larger network; minutes per run on a GPU, hours on a core.
    Task(
        name="c10-16",
        arch=_conv(16, 32, 32, size=32),
        source="cifar10@32",
        steps=10_000,
        target=66.0,
        eval_every=100,
        eval_items=5000,
    ),
    Task(
        name="c10-32",
        arch=_conv(32, 64, 64, size=32),
        source="cifar10@32",
        steps=10_000,
        target=72.5,
        eval_items=10_000,
    ),
    Task(name="c10-16-bn", arch=_conv(16, 32, 32, size=32, norm=True), source="cifar10@32", steps=2000),
    # The same networks and one between them on images of half the size: ten seconds to a minute per run on a core.
    Task(name="half-16", arch=_conv(16, 32, 32, size=16), source="cifar10@16", batch=64),
    Task(name="half-24", arch=_conv(24, 48, 48, size=16), source="cifar10@16", batch=64),
    Task(name="half-16-bn", arch=_conv(16, 32, 32, size=16, norm=True), source="cifar10@16", batch=64),
    _digits("digits-mlp", 48),
    Task(name="vit", arch=Arch(kind="vit", dim=32, layers=2, heads=4, size=16, patch=4), source="cifar10@16", batch=64),
    _code("gpt2-code", Arch(kind="gpt2", dim=48, layers=2, heads=4, context=64)),
    # Near a million parameters, on text that is never repeated.
    Task(
        name="gpt2-1m",
        arch=Arch(kind="gpt2", dim=128, layers=4, heads=4, context=128),
        source="torch:bytes",
        batch=16,
        steps=3000,
        metric="loss",
        eval_every=100,
        eval_items=64,
        once=True,
    ),
    _code("llama-code", Arch(kind="llama", dim=32, layers=3, heads=4, kv_heads=2, context=64)),
)

TASKS = {task.name: task for task in _TASKS}
