"""Whether a network that is called like one of a published family is wired like one.

Names cannot tell a network from another with the same names; its trace can. What the trace of each published family
looks like is recorded (``published.json``, made from small networks of the family, layer numbers taken as first and
later): which tensors have edges of which types, in which order, between which streams of neurons. A network is taken
for one of the family where its own trace says the same of every tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from nowcast_proto.wiring import ExplicitWiring

from nowcast_client.network.tracing.atoms import components

RECORDED = Path(__file__).with_name("published.json")
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
_PREFIX = re.compile(r"^(?:transformer|model|bert|visual)\.")
_EXTRA = re.compile(r"^(?:lm_head|score|classifier|qa_outputs|head|heads|cls|fc|proj)(?:\.|$)|pooler")
"""Heads on top of a network of the family, which its table knows or leaves."""

Shape = dict[str, list[list[Any]]]


def shape_of(wiring: ExplicitWiring) -> tuple[Shape, dict[str, list[bool]]]:
    """What is to be compared of a wiring.

    Returns:
        Parameter -> its parts in order, each (type, stream of its sources, stream of its targets); a stream is all
        ranges joined one to one. And stream -> whether it is fixed, ordered, has heads.
    """
    range_of = np.repeat(np.arange(len(wiring.ranges)), [one.size for one in wiring.ranges])
    pairs = []
    headed = np.zeros(len(wiring.ranges), dtype=bool)
    for block in wiring.blocks:
        ends = [
            np.unique(range_of[first : first + size])
            for first, size in ((block.source, block.n_sources), (block.target, block.n_targets))
        ]
        if block.diagonal:
            one, other = ends
            pairs.append((np.repeat(one[:1], len(one) + len(other)), np.concatenate([one, other])))
        elif block.type == "head":
            headed[ends[1]] = True
    stream = components(len(wiring.ranges), pairs)
    shape: Shape = {}
    facts: dict[str, list[bool]] = {}
    for block in sorted((b for b in wiring.blocks if b.parameter is not None), key=lambda b: b.offset):
        ends_of = []
        for first, size in ((block.source, block.n_sources), (block.target, block.n_targets)):
            number = int(range_of[first])
            alone = wiring.ranges[number].size == 1 and size == 1
            name = "" if alone else str(stream[number])
            ends_of.append(name)
            if not alone:
                inside = np.flatnonzero(stream == stream[number])
                facts[name] = [
                    any(wiring.ranges[i].fixed for i in inside),
                    any(wiring.ranges[i].ordered for i in inside),
                    bool(headed[inside].any()),
                ]
        part = [block.type, *ends_of]
        parts = shape.setdefault(str(block.parameter), [])
        if not parts or parts[-1] != part:
            parts.append(part)
    return shape, facts


def agrees(family: str, wiring: ExplicitWiring) -> str:
    """What a network has that its family has not; empty where they agree.

    Args:
        family: The family its names say.
        wiring: What its trace says, proven.
    """
    if family == "sequential":
        return _chain(wiring)
    recorded = _recorded().get(family)
    if recorded is None:
        return f"nothing is recorded of family {family!r}"
    shape, facts = shape_of(wiring)
    layers = sorted({int(found[0]) for name in shape if (found := _LAYER.findall(name))})
    for layer in layers or [0]:
        view = {}
        for name, parts in shape.items():
            numbers = _LAYER.findall(name)
            if not numbers or int(numbers[0]) == layer:
                view[_called(name, min(layer, 1))] = parts
        problem = _compare(view, facts, recorded["shape"], recorded["facts"])
        if problem:
            return problem
    return ""


def _called(name: str, layer: int) -> str:
    return _LAYER.sub(str(layer), _PREFIX.sub("", name), count=1)


def _compare(
    ours: Mapping[str, Sequence[Sequence[Any]]],
    facts: Mapping[str, Sequence[bool]],
    theirs: Mapping[str, Any],
    known: Mapping[str, Any],
) -> str:
    to: dict[str, str] = {}
    back: dict[str, str] = {}
    for name, parts in ours.items():
        expected = theirs.get(name)
        if expected is None:
            if _EXTRA.search(name):
                continue
            return f"{name!r} is no tensor of the family"
        if [part[0] for part in parts] != [part[0] for part in expected]:
            return f"{name!r} has edges of types {[part[0] for part in parts]}, the family's {[p[0] for p in expected]}"
        for part, wanted in zip(parts, expected, strict=True):
            for a, b in zip(part[1:], wanted[1:], strict=True):
                if (not a) != (not b) or to.setdefault(a, b) != b or back.setdefault(b, a) != a:
                    return f"{name!r} is between other neurons than in the family"
                if a and list(facts[a]) != list(known[b]):
                    return f"the neurons of {name!r} are fixed, ordered or in heads otherwise than in the family"
    return ""


def _chain(wiring: ExplicitWiring) -> str:
    """What keeps a network from being one plain chain of layers."""
    for block in wiring.blocks:
        if block.parameter is None:
            return f"neurons are joined by links of type {block.type!r}"
    layers = [block for block in wiring.blocks if block.type not in ("norm", "other")]
    for one, first in zip(wiring.ranges, wiring.firsts(), strict=True):
        met = {
            block.parameter
            for block in layers
            if first <= block.source < first + one.size or first <= block.target < first + one.size
        }
        if one.fixed and len(met) > 1:
            return f"neurons {one.name!r} have places of their own"
    fixed = [one for one in wiring.ranges if one.fixed and one.size > 1]
    if len(fixed) > 2:  # what a layer gives is not what the next one takes
        return f"neurons {fixed[1].name!r} have places of their own"
    return ""


@cache
def _recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORDED.read_text())
    return found


def record(wirings: Mapping[str, Sequence[ExplicitWiring]]) -> dict[str, Any]:
    """What ``published.json`` holds: the shapes of small networks of each family.

    Args:
        wirings: Family -> traced wirings; the first that has a tensor says what it is.
    """
    out: dict[str, Any] = {}
    for family, some in wirings.items():
        shape, facts = shape_of(some[0])
        named = {
            _called(name, min(int(numbers[0]), 1) if (numbers := _LAYER.findall(name)) else 0): parts
            for name, parts in shape.items()
        }
        out[family] = {"shape": named, "facts": facts}
    return out
