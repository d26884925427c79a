"""How rules are written: a function of a `Call` that returns the labels of the results, registered by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nowcast_client.network.tracing.atoms import Ints
from nowcast_client.network.tracing.labels import Label
from nowcast_client.network.tracing.meeting import Meeting


@dataclass(frozen=True)
class Tensor:
    """An argument of an operation.

    Attributes:
        label: What its axes run over.
        shape: Its sizes.
        constant: Its values where they are known and depend on no parameter.
        value: Number of its value in the recording.
    """

    label: Label
    shape: tuple[int, ...]
    constant: Any = None
    value: int = -1

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def whole_numbers(self) -> Ints | None:
        """Its values as whole numbers, where they are known."""
        if self.constant is None or self.constant.is_floating_point() or self.constant.is_complex():
            return None
        return np.asarray(self.constant.tolist(), dtype=np.int64)


@dataclass
class Call:
    """One operation to be judged.

    Attributes:
        name: Of the operation, without namespace and overload.
        arguments: By name; tensors as `Tensor`.
        out: Shapes of the results, nested as the results are.
        meeting: Writes down what is restricted.
        used: Whether anything reads a result; nested as the results are.
        uses: Writes down what a parameter is used for: (value number, role).
    """

    name: str
    arguments: dict[str, Any]
    out: Any
    meeting: Meeting
    used: Any
    uses: Callable[[Tensor, str], None]

    def tensor(self, name: str) -> Tensor:
        """An argument that is a tensor."""
        found = self.arguments[name]
        if not isinstance(found, Tensor):
            raise TypeError(f"{name} of {self.name} is no tensor")
        return found

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or a default."""
        return self.arguments.get(name, default)

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return list(_tensors(self.arguments.values()))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the only, or the first, result."""
        out = self.out
        while not isinstance(out, tuple):
            out = out[0]
        return out

    def axis(self, tensor: Tensor, index: int) -> int:
        """An axis counted from the front."""
        return index % tensor.ndim if tensor.ndim else 0

    def axes(self, tensor: Tensor, indices: Any) -> list[int]:
        """Axes counted from the front; all where there are none."""
        if isinstance(indices, int):
            indices = [indices]
        return [self.axis(tensor, i) for i in indices] if indices else list(range(tensor.ndim))

    def data(self) -> Any:
        """Results all of whose axes are data."""
        return _each(self.out, self.meeting.axes.data)


def _tensors(values: Any) -> Any:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _each(out: Any, make: Callable[[Sequence[int]], Label]) -> Any:
    if isinstance(out, tuple):
        return make(out)
    if isinstance(out, list):
        return [_each(one, make) for one in out]
    return None


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}
"""Name of an operation -> its rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations of these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def unknown(call: Call, why: str | None = None) -> Any:
    """What is done where nothing is known: all neurons that enter stay where they are, results are data."""
    for tensor in call.tensors():
        call.meeting.fix(tensor.label, None, why or f"operation {call.name} is not known to treat neurons alike")
    return call.data()
