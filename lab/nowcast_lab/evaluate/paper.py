"""The tasks of the NiNo paper by name, for whoever has their data: see `nowcast_lab.metatrain.standard`.

Networks, batch, steps and targets are the published ones where they are published (targets of language models are given
there as perplexities). Not published, and therefore of our choosing, are the heads of the two smallest GPT-2s, how the
111 million parameters of the Llama are laid out, and the whole of the vision transformer.
"""

from __future__ import annotations

import math

from nowcast_lab.evaluate.tasks import TASKS, Task
from nowcast_lab.metatrain.errors import InvalidRecipe
from nowcast_lab.metatrain.zoo import Arch

GPT2_TOKENS, LLAMA_TOKENS = 50_257, 128_256


def _vision(name: str, source: str, width: int, target: float, *, channels: int, size: int, classes: int) -> Task:
    arch = Arch(kind="convnet", widths=(width, 2 * width, 2 * width), channels=channels, size=size, classes=classes)
    return Task(name=name, arch=arch, source=source, steps=10_000, target=target, eval_every=100, eval_items=10_000)


def _language(
    name: str, source: str, layers: int, dim: int, heads: int, perplexity: float, *, steps: int = 10_000
) -> Task:
    return Task(
        name=name,
        arch=Arch(kind="gpt2", dim=dim, layers=layers, heads=heads, context=1024, vocabulary=GPT2_TOKENS),
        source=f"{source}:gpt2",
        batch=32,
        steps=steps,
        metric="loss",
        target=math.log(perplexity),
        eval_every=500,
        eval_items=200,
    )


PAPER_TASKS = (
    _vision("fm-16", "fashion", 16, 89.5, channels=1, size=28, classes=10),
    _vision("fm-32", "fashion", 32, 90.5, channels=1, size=28, classes=10),
    _vision("c100-32", "cifar100", 32, 39.0, channels=3, size=32, classes=100),
    _language("lm1b-3-24", "lm1b", 3, 24, 3, 352.0),
    _language("lm1b-2-32", "lm1b", 2, 32, 4, 319.0),
    _language("lm1b-3-64", "lm1b", 3, 64, 4, 181.0),
    _language("wiki-3-64", "wikitext103", 3, 64, 4, 147.0, steps=14_000),
    Task(
        name="llama-111m",
        arch=Arch(kind="llama", dim=384, layers=8, heads=6, kv_heads=2, context=1024, vocabulary=LLAMA_TOKENS),
        source="wikitext103:llama",
        batch=32,
        steps=14_000,
        metric="loss",
        eval_every=500,
        eval_items=200,
    ),
    Task(
        name="vit-imagenet32",
        arch=Arch(kind="vit", dim=384, layers=6, heads=6, size=32, patch=4, classes=1000),
        source="imagenet32",
        steps=10_000,
        eval_every=500,
        eval_items=10_000,
    ),
)


def task(name: str) -> Task:
    """A task by name: one of ours, or one of the paper's as it is written there (``FM-16``, ``LM1B/3-24``).

    Raises:
        InvalidRecipe: No task is called that.
    """
    known = TASKS | {task.name: task for task in PAPER_TASKS}
    plain = name.lower().replace("/", "-").replace(" ", "-")
    if plain not in known:
        raise InvalidRecipe(f"no task is called {name!r}", expected=f"one of {', '.join(known)}")
    return known[plain]
