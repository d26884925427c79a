"""What a live module says of its parameters: plain names, shapes, and which of them are one tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from nowcast_proto.errors import UnsupportedArchitecture

Example = tuple[Sequence[Any], Mapping[str, Any]]
"""(positional, keyword) inputs of one forward pass."""

_WRAPPERS = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""Name parts that torch.compile, activation checkpointing and FSDP put between a module and its parameters."""


class Module(Protocol):
    """What is needed of a ``torch.nn.Module``."""

    def named_parameters(self, *, remove_duplicate: bool = ...) -> Iterable[tuple[str, Any]]: ...

    def named_modules(self) -> Iterable[tuple[str, Any]]: ...


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers (compile, DDP, checkpointing) add to it."""
    name = _WRAPPERS.sub("", name)
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return _WRAPPERS.sub("", name)


def unwrapped(model: Any) -> Any:
    """The module inside compile and data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if inner is None:
            return model
        model = inner


def tensors_of(model: Module) -> tuple[dict[str, tuple[int, ...]], list[str], dict[str, str]]:
    """Shapes by plain name, which of them are frozen, and aliases of tied tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    frozen: list[str] = []
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for raw, parameter in model.named_parameters(remove_duplicate=False):
        name = plain_name(raw)
        if id(parameter) in first:
            ties[name] = first[id(parameter)]
            continue
        first[id(parameter)] = name
        shapes[name] = tuple(parameter.shape)
        if not parameter.requires_grad:
            frozen.append(name)
    if not shapes:
        raise UnsupportedArchitecture("the model has no parameters", expected="a network with weights")
    return shapes, frozen, ties
