"""From a table to links with names: stacks repeated for the layers there are, templates filled in, aliases resolved.

Layers are found by names with ``*`` for a number, compared piece by piece: no pattern runs as a regular expression.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from nowcast_proto.errors import InvalidSpec
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.table.elements import (
    Count,
    Diagonal,
    Element,
    Heads,
    Neurons,
    Residual,
    Same,
    Spread,
    Stack,
    Vector,
    Weight,
)

MAX_WORK = 20_000_000
"""Cap on elements times parameters: a table may not make a small network expensive to wire."""

_TEMPLATE = re.compile(r"\{(\w+)(#?)([+-]\d+)?\}")


@dataclass(frozen=True, slots=True)
class Network:
    """What a table is expanded for.

    Attributes:
        kind: What to call such networks in messages.
        shapes: Name -> shape of every parameter, in order.
        num_heads: Query heads per attention layer; 1 where there are none.
        num_kv_heads: Key and value heads.
        head_dim: Size of a head, where it is known.
        roots: Optional name prefixes of the whole network.
    """

    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int | None = None
    roots: tuple[str, ...] = ()

    @classmethod
    def of(cls, spec: ArchitectureSpec, kind: str, roots: tuple[str, ...] = ()) -> Network:
        """The network a spec describes."""
        return cls(kind, spec.shapes(), spec.num_heads or 1, spec.kv_heads or 1, spec.head_dim, roots)

    def count(self, count: Count) -> int:
        """A count of a table as a number."""
        return {"H": self.num_heads, "K": self.num_kv_heads}[count] if isinstance(count, str) else count


@dataclass(frozen=True, slots=True)
class Link:
    """An element of a table with its templates filled in.

    Attributes:
        element: The element.
        label: What to call its block.
        ends: Source and target; a vector has its own node and the range.
        parameter: The tensor, where it has one.
        shape: The tensor's shape.
    """

    element: Weight | Vector | Diagonal | Heads | Residual | Spread
    label: str
    ends: tuple[str, str]
    parameter: str | None = None
    shape: tuple[int, ...] = ()


@dataclass
class Expanded:
    """A table written out for one network.

    Attributes:
        links: In the table's order.
        layout: Groups of ranges side by side, with what feeds them, in the order they lie.
        same: Alias -> range.
        roles: Parameter -> the part it plays.
    """

    links: list[Link] = field(default_factory=list)
    layout: list[tuple[list[str], set[str]]] = field(default_factory=list)
    same: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)


def expand(elements: tuple[Element, ...], network: Network) -> Expanded:
    """Write a table out for one network.

    Raises:
        InvalidSpec: A tensor or layer the table needs is missing, an alias is an alias of itself, or table and network
            are too large together.
    """
    made = _Expander(network)
    made.expand(elements, {}, None)
    done = made.done
    done.links = [
        replace(link, ends=(done_end(link.ends[0], done), done_end(link.ends[1], done))) for link in done.links
    ]
    return done


def done_end(end: str, expanded: Expanded) -> str:
    """An end with the range's own name in place of an alias."""
    range_, colon, part = end.partition(":")
    passed = {range_}
    while range_ in expanded.same:
        range_ = expanded.same[range_]
        if range_ in passed:
            raise InvalidSpec(
                f"the table calls range {range_!r} another name of itself",
                expected="aliases that end at a range",
                remedy="take one of its 'same' elements away",
            )
        passed.add(range_)
    return range_ + colon + part


class _Expander:
    def __init__(self, network: Network) -> None:
        self.network = network
        self.roots = (*network.roots, "")
        self.done = Expanded()
        self.work = 0

    def expand(self, elements: tuple[Element, ...], env: dict[str, str], prefix: str | None) -> None:
        # Layers first: a tensor listed before its stack may belong to the neurons after the last layer.
        layers = {element: self._layers(element, env, prefix) for element in elements if isinstance(element, Stack)}
        env.update({stack.count: str(len(found)) for stack, found in layers.items()})
        self._afford(len(elements))
        for element in elements:
            match element:
                case Stack():
                    for number, (written, start) in enumerate(layers[element]):
                        # A copy, so that the counts of inner stacks stay with their layer.
                        inside = {**env, element.var: str(number), f"{element.var}#": written}
                        self.expand(element.elements, inside, start)
                case Neurons():
                    ranges = [_fill(name, env) for name in element.ranges]
                    self.done.layout.append((ranges, {_fill(name, env) for name in element.fed_by}))
                case Same():
                    apart = element.when == "mha" and self.network.num_heads != self.network.num_kv_heads
                    if not apart and not self._has(element.unless, env, prefix):
                        self.done.same[_fill(element.alias, env)] = _fill(element.range, env)
                case Weight() | Vector() | Diagonal():
                    self._tensor(element, env, prefix)
                case Heads():
                    self._link(element, element.heads, element.target, env, prefix)
                case Spread():
                    self._link(element, element.source, element.target, env, prefix)
                case Residual():
                    given = element.given is None or self._has(element.given, env, prefix)
                    if given and not self._has(element.unless, env, prefix):
                        self._link(element, element.source, element.target, env, prefix)

    def _link(
        self, element: Heads | Residual | Spread, source: str, target: str, env: dict[str, str], prefix: str | None
    ) -> None:
        label = (prefix or "") + _fill(element.label, env)
        self.done.links.append(Link(element, label, (_fill(source, env), _fill(target, env))))

    def _layers(self, stack: Stack, env: dict[str, str], prefix: str | None) -> list[tuple[str, str]]:
        """Number as written and start of the tensor names of every layer, in order."""
        roots = self.roots if prefix is None else (prefix,)
        pieces = _fill(stack.find, env).split("*")
        found: dict[tuple[int, ...], tuple[str, str]] = {}
        self._afford(len(self.network.shapes))
        for name in self.network.shapes:
            for root in roots:
                match = _numbers(name, root, pieces)
                if match is not None:
                    numbers, end = match
                    start = name[:end] if stack.relative else (prefix or "")
                    found.setdefault(tuple(map(int, numbers)), (".".join(numbers), start))
                    break
        if not found and stack.required:
            raise InvalidSpec(
                f"{self.network.kind} finds no layer in this network",
                expected=f"tensors whose names start like {stack.find!r}, with a number for *",
                remedy=f"check the names; the first tensor is {next(iter(self.network.shapes))!r}",
            )
        return [found[key] for key in sorted(found)]

    def _tensor(self, element: Weight | Vector | Diagonal, env: dict[str, str], prefix: str | None) -> None:
        names = _fill(element.tensor, env).split("|")
        candidates = self._candidates(names, prefix)
        parameter = next((name for name in candidates if name in self.network.shapes), None)
        if parameter is None:
            if element.required:
                raise InvalidSpec(
                    f"tensor {candidates[0]!r} is missing",
                    expected=f"a network of {self.network.kind} to have it",
                    remedy="list every parameter in the spec, or name the family the network belongs to",
                )
            return
        label = parameter
        if element.label is not None:
            label = parameter.removesuffix(next(n for n in names if parameter.endswith(n))) + _fill(element.label, env)
        target = _fill(element.target, env)
        ends = (f"#{label}", target) if isinstance(element, Vector) else (_fill(element.source, env), target)
        self.done.links.append(Link(element, label, ends, parameter, self.network.shapes[parameter]))
        bias = isinstance(element, Vector) and element.type == "other"
        self.done.roles.setdefault(parameter, "bias" if bias else element.type)

    def _candidates(self, names: list[str], prefix: str | None) -> list[str]:
        return [root + name for name in names for root in ((prefix,) if prefix is not None else self.roots)]

    def _has(self, tensor: str | None, env: dict[str, str], prefix: str | None) -> bool:
        if tensor is None:
            return False
        return any(name in self.network.shapes for name in self._candidates(_fill(tensor, env).split("|"), prefix))

    def _afford(self, steps: int) -> None:
        self.work += steps
        if self.work > MAX_WORK:
            raise InvalidSpec(
                f"the table is too large for {len(self.network.shapes)} parameters",
                expected=f"at most {MAX_WORK} elements and names to look at, layers counted one by one",
                remedy="nest stacks less deeply",
            )


def _numbers(name: str, root: str, pieces: list[str]) -> tuple[list[str], int] | None:
    """The numbers in a name that starts with a root and then these pieces with numbers between; None if it does not."""
    if not name.startswith(root + pieces[0]):
        return None
    at = len(root) + len(pieces[0])
    numbers = []
    for piece in pieces[1:]:
        end = at
        while end < len(name) and name[end] in "0123456789":
            end += 1
        if end == at or not name.startswith(piece, end):
            return None
        numbers.append(name[at:end])
        at = end + len(piece)
    return numbers, at


def _fill(template: str, env: dict[str, str]) -> str:
    """Fill ``{i}``, ``{i+1}`` and ``{i#}`` in a template."""

    def value(match: re.Match[str]) -> str:
        name, raw, step = match.groups()
        if name + raw not in env:
            return match.group(0)
        return env[name + raw] if not step else str(int(env[name]) + int(step))

    return _TEMPLATE.sub(value, template)


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements from one index to the next, by axis, of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
