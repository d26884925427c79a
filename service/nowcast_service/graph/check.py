"""Whether a network keeps the symmetries that its graph claims: neurons are permuted, and the outputs compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from nowcast_proto.errors import InvalidSpec
from torch import Tensor, nn

from nowcast_service.graph.blocks import NeuralGraph
from nowcast_service.graph.symmetry import Claim, claims, moved_tensors, together

TOLERANCE = 1e-6
"""Change of the outputs, relative to their size, that is taken for rounding in float64."""
Inputs = Mapping[str, object] | tuple[object, ...]


@dataclass(frozen=True)
class Finding:
    """What came of one claim.

    Attributes:
        claim: The permutation.
        change: Largest change of an output, relative to the largest output.
        tensors: The tensors it permutes.
        blamed: The tensors that are wired wrongly, as far as trying tells; empty where the claim holds.
        why: What trying told of them.
        seen: The outputs depend on the order of these tensors at all: permuting one alone changes them.
    """

    claim: Claim
    change: float
    tensors: tuple[str, ...]
    blamed: tuple[str, ...] = ()
    why: str = ""
    seen: bool = True

    @property
    def holds(self) -> bool:
        return self.change <= TOLERANCE


class Network:
    """A live model as a function of its parameters, in float64.

    Args:
        model: The model; its parameters are overwritten with random values, its running statistics reset.
        inputs: What to call it with: keyword arguments, or a tuple of positional ones.
        graph: Its graph; names are those of `named_parameters`.
        seed: Of the random values.

    Raises:
        InvalidSpec: The spec and the model do not have the same parameters.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, graph: NeuralGraph, seed: int = 0) -> None:
        self._model = model.double().eval()
        self._inputs = inputs
        self._live = dict(model.named_parameters())
        for name, shape in graph.spec.shapes().items():
            has = tuple(self._live[name].shape) if name in self._live else None
            if has != shape:
                raise InvalidSpec(
                    f"the spec lists {name!r} with shape {list(shape)}, the model has "
                    + (f"{list(has)}" if has else "no such parameter"),
                    expected="the spec of this model",
                    remedy="derive it with: nowcast spec show --model module:function",
                )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.reset_running_stats()
            for parameter in self._live.values():
                fan_in = math.prod(parameter.shape[1:]) if parameter.dim() > 1 else 1
                spread = min(0.6, 2 / math.sqrt(fan_in))  # lively, but not so much that a softmax saturates
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread)
        self.tensors = {name: self._live[name].detach().clone() for name in graph.spec.shapes()}

    @torch.no_grad()
    def outputs(self, changed: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """The floating outputs (of a mapping with logits only these), with some of the parameters replaced."""
        for name, tensor in {**self.tensors, **(changed or {})}.items():
            self._live[name].copy_(tensor)
        if isinstance(self._inputs, Mapping):
            given = self._model(**{name: _double(value) for name, value in self._inputs.items()})
        else:
            given = self._model(*(_double(value) for value in self._inputs))
        # States of a network's inside, given out beside its answer, move with the neurons.
        found = list(_floating(given["logits"] if isinstance(given, Mapping) and "logits" in given else given))
        if not found or not all(bool(tensor.isfinite().all()) for tensor in found):
            raise InvalidSpec(
                "the model gives no finite floating outputs" if found else "the model gives no floating outputs",
                expected="a model that returns tensors, or a tuple or mapping of tensors",
            )
        return found


def check(graph: NeuralGraph, network: Network, *, seed: int = 0) -> Iterator[Finding]:
    """Try every claim of a graph on its network.

    Args:
        graph: The graph, of a small network.
        network: The network.
        seed: Of the permutations.
    """
    original = network.outputs()

    def change(moved: Mapping[str, Tensor]) -> float:
        pairs = zip(network.outputs(moved), original, strict=True)
        return max(float((new - old).abs().max() / old.abs().max().clamp_min(1e-30)) for new, old in pairs)

    for claim in claims(graph, seed=seed):
        moved = moved_tensors(graph, network.tensors, claim.order)
        changed = change(moved)
        if changed > TOLERANCE:
            blamed, why = _blame(graph, network, claim, moved, change)
            yield Finding(claim, changed, tuple(moved), blamed, why)
        else:
            # A claim about tensors the outputs do not depend on would hold whatever the table said.
            seen = any(change({name: tensor}) > TOLERANCE for name, tensor in moved.items())
            yield Finding(claim, changed, tuple(moved), seen=seen)


def _blame(
    graph: NeuralGraph,
    network: Network,
    claim: Claim,
    moved: Mapping[str, Tensor],
    change: Callable[[Mapping[str, Tensor]], float],
) -> tuple[tuple[str, ...], str]:
    """The tensor that makes the difference: one too many is moved, or one too few."""
    for name in moved:
        if change({other: tensor for other, tensor in moved.items() if other != name}) <= TOLERANCE:
            return (name,), "moves with these neurons in the table, stays in the network"
    for range_ in graph.ranges:
        wider = together(graph, claim, range_)
        if wider is not None:
            both = moved_tensors(graph, network.tensors, wider)
            if change(both) <= TOLERANCE:
                more = tuple(name for name in both if name not in moved or not torch.equal(both[name], moved[name]))
                return more, f"belongs to neurons ({range_.name}) that go with these one by one; the table does not say"
    places = {
        tuple((claim.order[r.first : r.first + r.size] - r.first).tolist())
        for r in graph.ranges
        if r.name in claim.ranges
    }
    for name, tensor in network.tensors.items():
        for axis, size in enumerate(tensor.shape):
            for order in places:
                if sorted(order) == list(range(size)):
                    extra = moved.get(name, tensor).index_select(axis, torch.tensor(order).argsort())
                    if change({**moved, name: extra}) <= TOLERANCE:
                        return (name,), f"moves with these neurons in the network (axis {axis}), not in the table"
    return tuple(moved), "some of these are not wired as the network computes, or neurons have places of their own"


def _double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _floating(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _floating(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _floating(inner)
