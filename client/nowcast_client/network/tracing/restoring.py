"""A forward pass beside a training leaves nothing behind: attributes, containers, hooks, caches and random numbers."""

from __future__ import annotations

import contextlib
import functools
import gc
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as shared

_CONTAINERS = (list, set, deque)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever a forward keeps for later is not kept from this one: it would be tensors of no use to a later step.

    Attributes of modules and the containers in them, tensors that are no buffers, cached functions and all generators
    of random numbers are afterwards as before. Hooks that are not torch's own do not run: what they note or count is
    the training's.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_same_chance(model))
        stack.enter_context(_same_caches())
        stack.enter_context(_same_attributes(model))
        for module in model.modules():
            _set_aside(module._forward_hooks)
            _set_aside(module._forward_pre_hooks)
        for hooks in (shared._global_forward_hooks, shared._global_forward_pre_hooks):
            held = dict(hooks)
            stack.callback(hooks.update, held)
            hooks.clear()
        yield


@contextlib.contextmanager
def _same_attributes(model: nn.Module) -> Iterator[None]:
    held = [
        (own, dict(own))
        for module in model.modules()
        for own in (module.__dict__, *(value for value in module.__dict__.values() if isinstance(value, dict)))
    ]
    values = [value for _, own in held for value in own.values()]
    containers = [(value, value.copy()) for value in values if isinstance(value, _CONTAINERS)]
    plain = [value for value in values if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)]
    tensors = [(tensor, tensor._version, tensor.detach().clone()) for tensor in plain if not tensor.is_inference()]
    try:
        yield
    finally:
        for own, before in held:
            own.clear()
            own.update(before)
        for container, items in containers:
            container.clear()
            container.extend(items) if isinstance(container, list | deque) else container.update(items)
        with torch.no_grad():
            for tensor, version, value in tensors:
                if tensor._version != version:
                    tensor.copy_(value)


@contextlib.contextmanager
def _same_chance(model: nn.Module) -> Iterator[None]:
    python, array = random.getstate(), np.random.get_state()
    devices = sorted({tensor.get_device() for tensor in model.parameters() if tensor.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


@contextlib.contextmanager
def _same_caches() -> Iterator[None]:
    # By exact type: isinstance would ask every lazy proxy in the process what it is, and wake some of them.
    caches = [found for found in gc.get_objects() if type(found) is functools._lru_cache_wrapper]
    misses = [cache.cache_info().misses for cache in caches]
    try:
        yield
    finally:
        for cache, before in zip(caches, misses, strict=True):
            if cache.cache_info().misses != before:
                cache.cache_clear()


def _set_aside(hooks: dict[int, Callable[..., Any]]) -> None:
    for number in [number for number, hook in hooks.items() if not _is_torchs(hook)]:
        del hooks[number]


def _is_torchs(hook: Any) -> bool:
    """Hooks of torch compute weights (weight norm, pruning); others look on."""
    origin = getattr(hook, "__module__", None) or type(hook).__module__
    return origin.split(".")[0] == "torch"


def seed_anew(devices: list[int]) -> None:
    """The same noise in every forward. To be called in `untouched`, which keeps these generators and no others."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    for device in devices:
        torch.cuda.default_generators[device].manual_seed(0)
