"""A wiring is proven on the live network: what it says may change places does, and the outputs stay.

All neurons that are claimed to be alike are permuted at random, the weights with them, in float64 where the network
allows; then whole heads and groups change places. What changes the outputs is found by halves and becomes *fixed*: a
mistake in the trace costs coverage, and never gives a false graph. One copy of the weights is made, and moved to and
fro; a bound on its size is stated.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from nowcast_proto.errors import UnsupportedArchitecture
from nowcast_proto.wiring import ExplicitWiring, WiringBlock, WiringRange
from torch import Tensor, nn

from nowcast_client.network.live import Network, change_of, ready
from nowcast_client.network.moving import carry, moved_elements, moves
from nowcast_client.network.symmetries import Heads, classes, shuffled
from nowcast_client.network.tracing.atoms import Ints
from nowcast_client.network.tracing.recording import evaluating
from nowcast_client.network.tracing.restoring import untouched

log = logging.getLogger("nowcast")

MAX_COPY = 8 << 30
"""Bytes that the copy of the weights may take; a network whose copy would take more is not proven, and says so."""


@dataclass(frozen=True)
class Proof:
    """What came of proving a wiring.

    Attributes:
        wiring: What holds: claims that failed are taken back.
        proven: Whether it was tried at all.
        moved: Elements that change places under what is proven.
        elements: Elements of all parameters.
        demoted: Ranges whose claims failed -> how much the outputs changed.
        blind: Parameters whose order the outputs do not see, so that trying proves nothing of them.
        forwards: Forward passes it took.
        seconds: Time it took.
        note: Why it was not tried, or in which precision it was.
        broken: It was not tried as the network does not run beside its training, or gives other outputs each time.
    """

    wiring: ExplicitWiring
    proven: bool
    moved: int
    elements: int
    demoted: Mapping[str, float] = field(default_factory=dict)
    blind: tuple[str, ...] = ()
    forwards: int = 0
    seconds: float = 0.0
    note: str = ""
    broken: bool = False

    @property
    def share(self) -> float:
        """Share of the elements that symmetries move, all of them proven."""
        return self.moved / max(1, self.elements)


def prove(
    model: nn.Module,
    wiring: ExplicitWiring,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    max_copy: int = MAX_COPY,
) -> Proof:
    """Try a wiring on the network, and take back what does not hold.

    Args:
        model: A ``torch.nn.Module`` without wrappers; it is left as it is.
        wiring: What its trace claims.
        args: Positional inputs of a forward pass.
        kwargs: Keyword inputs.
        seed: Of the permutations.
        max_copy: Bytes that the copy of the weights may take.
    """
    began = time.monotonic()
    elements = sum(parameter.numel() for parameter in model.parameters())
    why = _too_large(model, elements, max_copy)
    if why:
        return Proof(wiring, False, 0, elements, note=why)
    with untouched(model), evaluating(model):
        try:
            network, tolerance, note = ready(model, args, kwargs or {}, elements, max_copy)
        except Exception as error:  # whatever a forward of somebody else's raises
            log.debug("the network cannot be tried", exc_info=True)
            return Proof(wiring, False, 0, elements, note=f"the network cannot be tried: {error}", broken=True)
        trial = _Trial(network, wiring, tolerance, seed)
        demoted = trial.run()
        blind = trial.blind() if not demoted else ()
    fixed = trial.stays
    held = _demoted(wiring, fixed)
    moved = moved_elements(held, {name: tensor.numel() for name, tensor in network.tensors.items()})
    return Proof(held, True, moved, elements, demoted, blind, network.forwards, time.monotonic() - began, note)


def _too_large(model: nn.Module, elements: int, max_copy: int) -> str:
    tensors = list(model.parameters())
    if any(tensor.is_meta for tensor in tensors):
        return "its weights are on no device"
    size = max((tensor.element_size() for tensor in tensors), default=4)
    if elements * size > max_copy:
        return f"a copy of its weights takes {elements * size / 2**30:.1f} GiB, the bound is {max_copy / 2**30:.1f}"
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    for device in devices:
        free = torch.cuda.mem_get_info(device)[0]
        if 2 * elements * size > free:
            return f"a copy of its weights does not fit beside it on {device}"
    return ""


class _Trial:
    """Tries claims on a network whose weights move to and fro."""

    def __init__(self, network: Network, wiring: ExplicitWiring, tolerance: float, seed: int) -> None:
        self.network, self.wiring, self.tolerance = network, wiring, tolerance
        self.generator = np.random.default_rng(seed)
        self.reference = network.reference
        self.blocks: dict[str, list[WiringBlock]] = {}
        for block in wiring.blocks:
            if block.parameter is not None:
                self.blocks.setdefault(block.parameter, []).append(block)
        self.stays = np.zeros(wiring.n_nodes, dtype=bool)
        self.changes: dict[str, float] = {}
        self.names = [one.name for one in wiring.ranges for _ in range(one.size)] if wiring.n_nodes < 1 << 22 else []

    def run(self) -> dict[str, float]:
        """Neurons, then heads; twice, as one permutation may hold by luck."""
        found = list(classes(self.wiring).members)
        for _ in range(2):
            self._neurons(found)
            found = [sets for sets in found if not self.stays[sets].any()]
        swaps = Heads(self.wiring).swaps()
        self._heads(swaps)
        return self.changes

    def _holds(self, order: Ints) -> float:
        """How much the outputs change; the weights stay moved where that is nothing, and go back elsewhere."""
        moved = self._move(order)
        if moved is None:
            return float("inf")
        try:
            change = change_of(self.network.outputs(), self.reference)
        except ValueError:
            change = float("inf")
        if not change <= self.tolerance:
            inverse = np.empty_like(order)
            inverse[order] = np.arange(len(order))
            if self._move(inverse) is None:
                raise UnsupportedArchitecture(
                    "a permutation of neurons cannot be undone", expected="a consistent wiring"
                )
        return change

    def _neurons(self, found: Sequence[Ints]) -> None:
        if not found:
            return
        change = self._holds(shuffled(found, self.wiring.n_nodes, self.generator))
        if change <= self.tolerance:
            return
        if len(found) == 1:
            self._fix(found[0].ravel(), change)
            return
        before = int(self.stays.sum())
        self._neurons(found[: len(found) // 2])
        self._neurons(found[len(found) // 2 :])
        if int(self.stays.sum()) == before:  # each holds alone, all together do not
            self._fix(np.concatenate([sets.ravel() for sets in found]), change)

    def _heads(self, swaps: Sequence[dict[int, int]]) -> None:
        rounds: list[list[dict[int, int]]] = []
        taken: list[set[int]] = []
        for swap in swaps:
            if any(self.stays[node] for node in swap):
                continue
            for group, nodes in zip(rounds, taken, strict=True):
                if not nodes & swap.keys():
                    group.append(swap)
                    nodes.update(swap)
                    break
            else:
                rounds.append([swap])
                taken.append(set(swap))
        for group in rounds:
            self._swap(group)

    def _swap(self, group: Sequence[dict[int, int]]) -> None:
        order = np.arange(self.wiring.n_nodes)
        for swap in group:
            order[list(swap)] = list(swap.values())
        change = self._holds(order)
        if change <= self.tolerance:
            return
        if len(group) > 1:
            self._swap(group[: len(group) // 2])
            self._swap(group[len(group) // 2 :])
        elif change < float("inf"):
            self._fix(np.array(sorted(group[0])), change, heads_only=True)

    def _fix(self, nodes: Ints, change: float, *, heads_only: bool = False) -> None:
        if heads_only:
            heads = {block.source for block in self.wiring.blocks if block.type == "head"}
            nodes = np.array([node for node in nodes.tolist() if node in heads], dtype=np.int64)
        self.stays[nodes] = True
        for name in sorted({self.names[node] for node in nodes.tolist()}) if self.names else ["neurons"]:
            self.changes[name] = max(change, self.changes.get(name, 0.0))

    def _move(self, order: Ints) -> list[str] | None:
        """Put the elements of all weights where a permutation of neurons sends them; None where it sends none."""
        pending: list[tuple[str, Tensor]] = []
        for name, blocks in self.blocks.items():
            if name not in self.network.tensors:
                return None
            todo = [block for block in blocks if moves(block, order)]
            if not todo:
                continue
            old = self.network.tensors[name]
            new = old.clone()
            done: set[Any] = set()
            for block in todo:
                key = (block.elements(), block.source, block.target, block.diagonal)
                if key in done:
                    continue
                done.add(key)
                if not carry(block, blocks, order, old, new):
                    return None
            pending.append((name, new))
        for name, new in pending:
            self.network.tensors[name] = new
        return [name for name, _ in pending]

    def blind(self) -> tuple[str, ...]:
        """Parameters that the outputs do not depend on in any way that trying could see (key biases, say)."""
        order = shuffled(classes(self.wiring).members, self.wiring.n_nodes, self.generator)
        seen: dict[str, bool] = {}
        tensors = self.network.tensors
        names = [name for name, blocks in self.blocks.items() if any(moves(block, order) for block in blocks)]
        handles = []
        for name in names:
            leaf = tensors[name]
            if not leaf.is_floating_point():
                continue
            leaf.requires_grad_(True)

            def look(tensor: Tensor, name: str = name) -> None:
                if tensor.grad is not None:
                    spread = float(tensor.grad.abs().max())
                    seen[name] = spread > 0 and spread > 1e-13 * scale
                tensor.grad = None

            handles.append(leaf.register_post_accumulate_grad_hook(look))
        scale = max((float(tensor.abs().max()) for tensor in self.reference if tensor.numel()), default=0.0)
        try:
            outputs = self.network.outputs(gradients=True)
            generator = torch.Generator().manual_seed(3)
            total = sum(
                (output * torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)).sum().real
                for output in outputs
            )
            if isinstance(total, Tensor) and total.requires_grad:
                total.backward()
        except Exception as error:  # a backward of somebody else's: nothing is then said of blindness
            log.debug("blind tensors: %s", error)
            return ()
        finally:
            for handle in handles:
                handle.remove()
            for name in names:
                tensors[name].requires_grad_(False)
        return tuple(name for name in names if not seen.get(name, False))


def _demoted(wiring: ExplicitWiring, stays: Ints) -> ExplicitWiring:
    """The wiring with some neurons fixed, ranges cut where they are fixed in part."""
    if not stays.any():
        return wiring
    ranges: list[WiringRange] = []
    first = 0
    for one in wiring.ranges:
        inside = stays[first : first + one.size]
        edges = [0, *(np.flatnonzero(np.diff(inside.astype(np.int8))) + 1).tolist(), one.size]
        for number, (start, end) in enumerate(pairwise(edges)):
            name = one.name if number == 0 else f"{one.name}/{number}"
            fixed = one.fixed or bool(inside[start])
            ranges.append(
                one.model_copy(
                    update={"name": name, "size": end - start, "fixed": fixed, "ordered": one.ordered and not fixed}
                )
            )
        first += one.size
    return ExplicitWiring(ranges=tuple(ranges), blocks=wiring.blocks, left=wiring.left)
