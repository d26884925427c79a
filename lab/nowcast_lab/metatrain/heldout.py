"""What no trajectory may contain: the evaluation tasks' architectures on their data, and their texts.

Written down before the first trajectory was collected. An image task holds out its architecture on its corpus at every
resolution; a text that any task reads is held out for every architecture, since the demo shows it too.
"""

from __future__ import annotations

from nowcast_lab.metatrain.data import corpus_of
from nowcast_lab.metatrain.errors import InvalidRecipe
from nowcast_lab.metatrain.zoo import Arch

HELD_OUT_CORPORA = frozenset({"stdlib", "sympy", "torch", "fashion", "cifar100", "imagenet32", "lm1b", "wikitext103"})
"""Texts of the demo, of the held-out text tasks and of the validation task, and the data of the seed paper's tasks but
CIFAR-10: no trajectory of any architecture reads them."""

HELD_OUT_KINDS = frozenset({"vit"})
"""Architectures no trajectory shows at all."""

HELD_OUT_CONVNETS = frozenset({(16, 32, 32), (24, 48, 48), (32, 64, 64), (14, 28, 28)})
"""Convolutional widths held out on CIFAR-10, with and without batch norm, at every resolution."""

HELD_OUT_MLPS = frozenset({(48, 48), (40, 40)})
"""MLP widths held out on digits; the second came later, and no trajectory or refinement had it."""


def why_held_out(arch: Arch, source: str) -> str | None:
    """The reason this architecture may not be collected on this source, or None where it may."""
    corpus = corpus_of(source)
    if corpus in HELD_OUT_CORPORA:
        return f"the data {corpus!r} is held out for every architecture"
    if arch.kind in HELD_OUT_KINDS:
        return f"the architecture {arch.kind!r} is held out on all data"
    if arch.kind == "convnet" and corpus == "cifar10" and arch.widths in HELD_OUT_CONVNETS:
        return f"a convnet of widths {list(arch.widths)} is held out on cifar10"
    if arch.kind == "mlp" and corpus == "digits" and arch.widths in HELD_OUT_MLPS:
        return f"an MLP of widths {list(arch.widths)} is held out on digits"
    return None


def refuse_held_out(arch: Arch, source: str) -> None:
    """Refuse what is held out.

    Raises:
        InvalidRecipe: The combination is held out for evaluation.
    """
    reason = why_held_out(arch, source)
    if reason is not None:
        raise InvalidRecipe(
            f"{arch.label} on {source} may not be collected: {reason}",
            expected="trajectories that share no task with the evaluation",
            remedy="take it out of the recipe; the list is in nowcast_lab.metatrain.heldout",
        )
