"""What the first training forward of a network is called with, kept until its network is wired."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nowcast_client.network.modules import Example

log = logging.getLogger("nowcast")

SMALL = 1 << 18
"""Elements of an input that is copied; of a larger one the tensor itself is kept, until the end of the step."""


class FirstForward:
    """Keeps the inputs of the first forward pass with gradients; takes its hook off when asked for them.

    Copies of the network (deepcopy, pickle, ``torch.save``) get a hook that does nothing in its place. Inside a
    compiled region nothing is kept: attach the compiled module then.

    Args:
        model: The network, as it is called in training; wrappers around it may be called instead of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._keeper = _Keeper(model)
        self._hook = model.register_forward_pre_hook(self._keeper, with_kwargs=True)

    @property
    def example(self) -> Example | None:
        """(positional, keyword) inputs; None where no forward pass was seen."""
        return self._keeper.example

    def forget(self) -> None:
        """Take the hook off, and let the inputs go."""
        self._hook.remove()
        self._keeper.example = None


class _Keeper:
    example: Example | None = None

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # a shallow copy shares the hook, and its forward passes are others

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling() or self.example is not None or not torch.is_grad_enabled():
            return
        if self._model() is not module:
            return
        try:
            self.example = tree_map(_kept, (tuple(args), dict(kwargs)))
        except Exception:  # tensors of somebody else's kind: the network is then wired by its names
            log.debug("the inputs of a forward pass cannot be kept", exc_info=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes anything, does nothing, needs no package of ours


def _kept(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach()
    return leaf.clone() if leaf.numel() <= SMALL else leaf
