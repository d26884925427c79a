"""Elements of parameters follow the neurons of their edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nowcast_proto.wiring import ExplicitWiring, WiringBlock
from torch import Tensor

from nowcast_client.network.symmetries import Heads, classes
from nowcast_client.network.tracing.atoms import Ints


def carry(block: WiringBlock, blocks: Sequence[WiringBlock], order: Ints, old: Tensor, new: Tensor) -> bool:
    """Copy the elements of a block to where its edges go; False where they go to no block of the parameter."""
    to_source = order[block.source : block.source + block.n_sources]
    to_target = order[block.target : block.target + block.n_targets]
    goal = _goal(block, blocks, to_source, to_target)
    if goal is None:
        return False
    rows = torch.as_tensor(to_source - goal.source, device=old.device)
    columns = torch.as_tensor(to_target - goal.target, device=old.device)
    if block.diagonal:
        if not bool((rows == columns).all()):
            return False
        _elements(goal, new)[rows] = _elements(block, old)
        return True
    source, target = _elements(block, old), _elements(goal, new)
    still = bool((rows == torch.arange(len(rows), device=rows.device)).all()) and len(rows) == goal.n_sources
    if still:
        target[:, columns] = source
    else:
        target[rows[:, None], columns[None, :]] = source
    return True


def _elements(block: WiringBlock, tensor: Tensor) -> Tensor:
    """(sources, targets, features), or (sources, features) where diagonal, as a view."""
    flat = tensor.view(-1)
    if block.diagonal:
        return flat.as_strided(
            (block.n_sources, block.features), (block.source_stride, block.feature_stride), block.offset
        )
    return flat.as_strided(
        (block.n_sources, block.n_targets, block.features),
        (block.source_stride, block.target_stride, block.feature_stride),
        block.offset,
    )


def _goal(block: WiringBlock, blocks: Sequence[WiringBlock], sources: Ints, targets: Ints) -> WiringBlock | None:
    """The block that has an edge wherever the edges of another go."""

    def takes(other: WiringBlock) -> bool:
        return (
            other.type == block.type
            and other.diagonal == block.diagonal
            and other.features == block.features
            and other.source <= sources.min()
            and sources.max() < other.source + other.n_sources
            and other.target <= targets.min()
            and targets.max() < other.target + other.n_targets
        )

    if takes(block):
        return block
    beside = [other for other in blocks if (other.source, other.target) == (block.source, block.target)]
    goals = [other for other in blocks if takes(other)]
    if not goals:
        return None
    rank = next(number for number, other in enumerate(beside) if other is block)
    return goals[min(rank, len(goals) - 1)]


def moved_elements(wiring: ExplicitWiring, sizes: Mapping[str, int]) -> int:
    """Elements with an end that may change places with another."""
    free = np.zeros(wiring.n_nodes, dtype=bool)
    for sets in classes(wiring).members:
        free[sets.ravel()] = True
    for swap in Heads(wiring).swaps():
        free[list(swap)] = True
    held: dict[str, int] = {}
    seen: set[Any] = set()
    for block in wiring.blocks:
        if block.parameter is None or (block.parameter, block.elements()) in seen:
            continue
        seen.add((block.parameter, block.elements()))
        sources = free[block.source : block.source + block.n_sources]
        targets = free[block.target : block.target + block.n_targets]
        edges = (
            (sources | targets).sum()
            if block.diagonal
            else sources.size * targets.size - (~sources).sum() * (~targets).sum()
        )
        held[block.parameter] = held.get(block.parameter, 0) + int(edges) * block.features
    return sum(min(count, sizes.get(name, 0)) for name, count in held.items())


def moves(block: WiringBlock, order: Ints) -> bool:
    """Whether a permutation moves a neuron at either end of a block."""
    sources = np.arange(block.source, block.source + block.n_sources)
    targets = np.arange(block.target, block.target + block.n_targets)
    return bool((order[sources] != sources).any() or (order[targets] != targets).any())
