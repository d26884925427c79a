"""Weights kept by wrappers around an optimizer (Lookahead's slow weights and their kind), under whatever name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nowcast_client.errors import AttachError
from nowcast_client.tensors.layout import Layout, inside, local

DEPTH = 4
"""Levels of dicts and lists in an attribute that are looked through."""
LIKE = 0.5
"""Distance from the weights, as a part of their norm, up to which a tensor is the weights again."""
LOOKED_AT = 8
Path = tuple[object, ...]


@dataclass(frozen=True)
class Kept:
    """A second copy of a weight.

    Attributes:
        where: Wrapper, attribute and place in it: the same from one look to the next, whatever tensor lies there.
        name: The weight, as in the layout.
        tensor: The copy.
    """

    where: Path
    name: str
    tensor: Tensor


def alike(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether tensors are the weights again, to within half their norm.

    Moments are of the size of gradients and point elsewhere; for every one of several tensors to come that close to
    the weights by chance does not happen.

    Args:
        pairs: Tensors, and the weights they may be.
    """
    looked = 0
    for tensor, weight in pairs:
        own = local(weight).detach().float()
        size = float(own.norm())
        if own.numel() < 16 or size == 0.0:
            continue
        if float((local(tensor).detach().float().to(own.device) - own).norm()) >= LIKE * size:
            return False
        looked += 1
        if looked == LOOKED_AT:
            break
    return looked > 0


def kept_by(outermost: Sequence[object], layout: Layout) -> list[Kept]:
    """Every second copy of the weights that wrappers keep now.

    Args:
        outermost: Optimizers as the caller passed them, wrappers around them included.
        layout: The trained parameters.

    Raises:
        AttachError: A wrapper keeps weights in a way in which they cannot be told apart.
    """
    names = {id(p): name for name, p in layout.parameters.items() if name in layout.movable}
    held = {local(p).data_ptr() for p in layout.parameters.values()}
    found: list[Kept] = []
    for number, wrapper in _wrappers(outermost):
        families: dict[Path, list[tuple[Path, nn.Parameter | None, Tensor]]] = {}
        for attribute, value in list(vars(wrapper).items()):
            if attribute != "param_groups":
                for path, key, tensor in _tensors(value, (number, attribute), None, DEPTH):
                    # Where a copy shares the weights' memory it moves with them.
                    if tensor.is_floating_point() and local(tensor).data_ptr() not in held:
                        kin = tuple(part for part in path if isinstance(part, str))
                        families.setdefault((number, *kin), []).append((path, key, tensor))
        order = [p for p in _order(wrapper) if id(p) in names]
        for family, members in families.items():
            found += _matched(type(wrapper).__name__, family, members, order, names)
    return found


def lying_at(outermost: Sequence[object]) -> dict[Path, Tensor]:
    """Every tensor wrappers keep now, by its place."""
    return {
        path: tensor
        for number, wrapper in _wrappers(outermost)
        for attribute, value in list(vars(wrapper).items())
        if attribute != "param_groups"
        for path, _, tensor in _tensors(value, (number, attribute), None, DEPTH)
    }


def _matched(
    wrapper: str,
    family: Path,
    members: list[tuple[Path, nn.Parameter | None, Tensor]],
    order: list[nn.Parameter],
    names: dict[int, str],
) -> list[Kept]:
    """Which weights the tensors of one attribute are; none where they are something else."""
    parameters = [key for _, key, _ in members]
    tensors = [tensor for *_, tensor in members]
    if all(parameter is None for parameter in parameters):
        if [t.shape for t in tensors] != [p.shape for p in order]:
            if any(alike([(t, p)]) for t in tensors for p in order if t.shape == p.shape):
                raise AttachError(
                    f"{wrapper} keeps a second copy of the weights (attribute {family[-1]!r}) in an order of its own",
                    expected="one tensor for every trained parameter, in the optimizer's order, or by parameter",
                    remedy="a patch of the visible weights alone would be pulled back out; attach without this wrapper",
                )
            return []
        parameters = list(order)
    pairs = [
        (path, key, tensor)
        for (path, _, tensor), key in zip(members, parameters, strict=True)
        if key is not None and id(key) in names and tensor.shape == key.shape
    ]
    if not alike([(tensor, key) for _, key, tensor in pairs]):
        return []
    return [Kept(path, names[id(key)], tensor) for path, key, tensor in pairs]


def _wrappers(outermost: Sequence[object]) -> Iterator[tuple[int, object]]:
    number = 0
    for current in outermost:
        seen: set[int] = set()
        inner = inside(current)
        while inner is not None and id(current) not in seen:
            seen.add(id(current))
            yield number, current
            number, current, inner = number + 1, inner, inside(inner)


def _tensors(
    value: Any, path: Path, key: nn.Parameter | None, depth: int
) -> Iterator[tuple[Path, nn.Parameter | None, Tensor]]:
    """Tensors in a value: where, by which parameter they are kept, and they."""
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter) or key is not None:
            yield path, key, value
    elif depth and isinstance(value, dict):
        for name, item in list(value.items()):
            parameter = name if isinstance(name, nn.Parameter) else key
            yield from _tensors(item, (*path, name if isinstance(name, str) else id(name)), parameter, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _tensors(item, (*path, place), key, depth - 1)


def _order(wrapper: object) -> list[nn.Parameter]:
    current: object | None = wrapper
    while current is not None and not isinstance(current, Optimizer):
        current = inside(current)
    groups = current.param_groups if isinstance(current, Optimizer) else []
    return [p for group in groups for p in group["params"]]
