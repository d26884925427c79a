"""A recording is followed: labels go through all operations until nothing new is found of the parameters."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nowcast_client.network.tracing.atoms import Ints, Ledger
from nowcast_client.network.tracing.labels import Axes, Label, Part
from nowcast_client.network.tracing.meeting import Meeting
from nowcast_client.network.tracing.parameters import Parameters
from nowcast_client.network.tracing.recording import Operation, Recording, Ref, Value
from nowcast_client.network.tracing.rules import RULES, Call, Tensor
from nowcast_client.network.tracing.rules.base import unknown
from nowcast_client.network.tracing.rules.pointwise import elementwise

log = logging.getLogger("nowcast")
MAX_PASSES = 12
"""Times the labels are worked out anew; parameters found divided later than that stay as they are."""


@dataclass
class Followed:
    """What following a recording found.

    Attributes:
        ledger: Neurons and what restricts them.
        parameters: Their labels and structures.
        names: Of the parameters.
        shapes: Of the parameters.
        uses: Parameter -> what it is used for, and how often.
        unknown: Operations without a rule -> how often they met neurons.
    """

    ledger: Ledger
    parameters: Parameters
    names: list[str]
    shapes: list[tuple[int, ...]]
    uses: dict[int, Counter[str]] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)


class Follower:
    """Follows one recording; see the module."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.names = list(recording.parameters)
        self.shapes = [recording.values[value].shape for value in recording.parameters.values()]
        self.parameters = Parameters(self.names, self.shapes)
        self._classes: dict[int, list[Ints | None] | None] = {}
        self._used = _used(recording)

    def follow(self) -> Followed:
        """Label everything, again and again while the parameters' structures change."""
        for attempt in range(MAX_PASSES):
            self.parameters.closed = attempt == MAX_PASSES - 1
            found = self._once()
            if not self.parameters.changed():
                break
        return found

    def _once(self) -> Followed:
        ledger = Ledger()
        axes = Axes(ledger)
        self.parameters.begin(axes, ledger)
        found = Followed(ledger, self.parameters, self.names, self.shapes)
        meeting = Meeting(axes, ledger, self.parameters)
        labels: dict[int, Label] = {}
        sources: dict[int, frozenset[int]] = {}  # value -> parameters it is made of alone
        for index, parameter in enumerate(self.recording.parameters.values()):
            labels[parameter] = self.parameters.labels[index]
            ledger.parameter_of[parameter] = index
            sources[parameter] = frozenset({index})

        def label_of(number: int) -> Label:
            if number not in labels:
                labels[number] = self._constant(number, axes)
            return labels[number]

        def uses(tensor: Tensor, role: str) -> None:
            for number in sources.get(tensor.value, ()):
                found.uses.setdefault(number, Counter())[role] += 1

        for place, operation in enumerate(self.recording.operations):
            ledger.now = place + 1
            numbers = _numbers(operation.results)
            inputs = _numbers(operation.arguments)
            if numbers and all(self._is_constant(n) for n in numbers):
                continue
            meeting.what = operation.name
            made = self._apply(operation, label_of, meeting, uses, found)
            self._note_uses(inputs, numbers, sources, made, found)
            made_of = frozenset[int]().union(*(sources.get(n, frozenset()) for n in inputs))
            for number, label in zip(numbers, _flat(made, len(numbers)), strict=False):
                value = self.recording.values[number]
                if label is None or len(label.axes) != len(value.shape):
                    label = axes.data(value.shape)
                labels[number] = label
                if label.param:
                    sources[number] = made_of
        for number in self.recording.outputs:
            label = label_of(number)
            for part in label.parts:
                if part.kind == "grid":
                    ledger.fix(part.grid, "an output of the network")
        return found

    @staticmethod
    def _note_uses(
        inputs: list[int], results: list[int], sources: dict[int, frozenset[int]], made: Any, found: Followed
    ) -> None:
        """A parameter is used where something comes of it that is no parameter."""
        if all(label is None or label.param for label in _flat(made, len(results))):
            return
        for number in inputs:
            for parameter in sources.get(number, ()):
                found.uses.setdefault(parameter, Counter())["other"] += 0

    def _apply(self, operation: Operation, label_of: Any, meeting: Meeting, uses: Any, found: Followed) -> Any:
        name = operation.name
        base = name.removesuffix("_copy") if name != "index_copy" else name
        if (base not in RULES and base.endswith("_") and base[:-1] in RULES) or (
            operation.pointwise and base.endswith("_")
        ):
            base = base.removesuffix("_")
        arguments = {
            key.rstrip("_") if key == "self_" else key: self._argument(value, label_of)
            for key, value in operation.arguments.items()
        }
        out = self._shapes(operation.results)
        used = self._uses(operation.results)
        call = Call(base, arguments, out, meeting, used, uses)
        if _empty(out):
            return call.data()
        rule = RULES.get(base)
        if rule is None and operation.pointwise:
            rule = elementwise
        try:
            if rule is not None:
                return rule(call)
        except (ValueError, TypeError, IndexError, KeyError, StopIteration) as error:
            log.debug("rule of %s: %s", name, error, exc_info=True)
            why = f"operation {name} is used in a way that is not known ({error})"
        else:
            why = f"operation {name} is not known"
        if any(part.kind == "grid" for tensor in call.tensors() for part in tensor.label.parts):
            found.unknown[name] += 1
        return unknown(call, why)

    def _argument(self, value: Any, label_of: Any) -> Any:
        if isinstance(value, Ref):
            known = self.recording.values[value.value]
            return Tensor(label_of(value.value), known.shape, known.constant, value.value)
        if isinstance(value, list | tuple):
            return [self._argument(one, label_of) for one in value]
        return value

    def _shapes(self, results: Any) -> Any:
        if isinstance(results, list | tuple):
            return [self._shapes(one) for one in results]
        return self.recording.values[results].shape if isinstance(results, int) else None

    def _uses(self, results: Any) -> Any:
        if isinstance(results, list | tuple):
            return [self._uses(one) for one in results]
        return results in self._used

    def _is_constant(self, number: int) -> bool:
        value = self.recording.values[number]
        return value.constant is not None and not value.given

    def _constant(self, number: int, axes: Axes) -> Label:
        """The label of something no operation made: an input, a buffer, a constant."""
        value = self.recording.values[number]
        if value.constant is None or value.given:
            return axes.data(value.shape)
        if number not in self._classes:
            self._classes[number] = _slices(value)
        classes = self._classes[number]
        label = axes.blank(value.shape)
        if classes is None:
            return axes.data(value.shape)
        parts = [
            Part((axis[0],), known, "class") if known is not None else None
            for axis, known in zip(label.axes, classes, strict=True)
            if axis
        ]
        return Label(label.axes, tuple(part for part in parts if part is not None), param=True)


def _slices(value: Value) -> list[Ints | None] | None:
    """For each axis the class of each slice (equal slices, equal class); None where all are equal."""
    constant = value.constant
    if constant is None:
        return None
    if constant.dtype in (torch.bfloat16, torch.float16):
        constant = constant.float()
    array = constant.detach().cpu().resolve_conj().numpy()
    out: list[Ints | None] = []
    for axis, size in enumerate(array.shape):
        if size == 1 or array.size == 0:
            out.append(None)
            continue
        rows = np.moveaxis(array, axis, 0).reshape(size, -1)
        if (rows == rows[:1]).all():
            out.append(None)
            continue
        table: dict[bytes, int] = {}
        kinds = [table.setdefault(np.ascontiguousarray(row).tobytes(), len(table)) for row in rows]
        out.append(np.array(kinds, dtype=np.int64))
    return out


def _numbers(results: Any) -> list[int]:
    if isinstance(results, Ref):
        return [results.value]
    if isinstance(results, bool):
        return []
    if isinstance(results, int):
        return [results]
    if isinstance(results, dict):
        return [n for one in results.values() for n in _numbers(one) if not isinstance(one, int)]
    if isinstance(results, list | tuple):
        return [n for one in results for n in _numbers(one)]
    return []


def _flat(made: Any, count: int) -> list[Label | None]:
    if made is None:
        return [None] * count
    if isinstance(made, list | tuple):
        return list(made)
    return [made] * count


def _empty(out: Any) -> bool:
    if isinstance(out, tuple):
        return 0 in out
    return isinstance(out, list) and bool(out) and all(_empty(one) for one in out)


def _used(recording: Recording) -> set[int]:
    """Values that some operation reads, or that the network gives out."""
    found = set(recording.outputs)

    def walk(value: Any) -> None:
        if isinstance(value, Ref):
            found.add(value.value)
        elif isinstance(value, list | tuple):
            for one in value:
                walk(one)

    for operation in recording.operations:
        for value in operation.arguments.values():
            walk(value)
    return found


def numel(shape: tuple[int, ...]) -> int:
    """Number of elements."""
    return math.prod(shape)
