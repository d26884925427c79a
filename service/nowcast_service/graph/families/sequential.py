"""Networks that are one chain of layers: linear, convolution of any kernel, normalisation.

The names of such a network say nothing, so the table is written from the shapes: each weight takes the neurons before
it to new ones, each 1-D tensor belongs to the newest neurons.
"""

from __future__ import annotations

import re

from nowcast_proto.spec import ArchitectureSpec, ParameterSpec
from nowcast_proto.table.elements import Element, Neurons, Vector, Weight
from nowcast_proto.wiring import WeightKind

from nowcast_service.graph.families.family import Expansion, Family

_EMBEDDING = re.compile(r"(^|[._])(\w*embed\w*|emb|wte|wpe)([._]|$)")


def _published(spec: ArchitectureSpec) -> Expansion:
    """The chain as the published weights know it: whole kernels only."""
    return _chain(spec, grouped=False)


def _faithful(spec: ArchitectureSpec) -> Expansion:
    """The chain with grouped and depthwise convolutions and flattened pixels as exact blocks."""
    return _chain(spec, grouped=True)


def _chain(spec: ArchitectureSpec, *, grouped: bool) -> Expansion:
    elements: list[Element] = []
    unplaced: dict[str, str] = {}
    width: int | None = None  # of the newest neurons; None before the first layer
    layer = 0
    for parameter in spec.parameters:
        shape = parameter.shape
        if len(shape) < 2:
            reason = _vector_problem(parameter, width)
            if reason:
                unplaced[parameter.name] = reason
                continue
            if width is None:
                elements.append(Neurons((f"layer{layer}",)))
                width = shape[0]
            kind: WeightKind = "norm" if parameter.name.endswith("weight") else "other"
            elements.append(Vector(parameter.name, kind, f"layer{layer}"))
            continue
        if len(shape) == 2 and _EMBEDDING.search(parameter.name):
            unplaced[parameter.name] = "looks like an embedding table, which a chain of layers has no place for"
            continue
        if not parameter.name.endswith("weight"):
            unplaced[parameter.name] = "not called weight, so its axes are not known"
            continue
        targets, sources = shape[:2]
        if width is None:
            elements.append(Neurons((f"layer{layer + 1}",), fed_by=(f"layer{layer}",)))
        else:
            elements.append(Neurons((f"layer{layer + 1}",)))
        fits = width is None or sources == width
        regular = width is not None and (
            (len(shape) == 2 and sources % width == 0)
            or (len(shape) > 2 and width % sources == 0 and targets % (width // sources) == 0)
        )
        if fits or (grouped and regular):
            kind = "linear" if len(shape) == 2 else "conv"
            elements.append(
                Weight(
                    parameter.name,
                    kind,
                    f"layer{layer}",
                    f"layer{layer + 1}",
                    grouped=grouped and len(shape) > 2,
                    flattened=grouped and len(shape) == 2,
                )
            )
        elif len(shape) > 2 and regular:
            unplaced[parameter.name] = f"grouped convolution over {width} channels, which published wiring cannot tell"
        else:
            unplaced[parameter.name] = f"takes {sources} inputs where the layer before has {width} neurons"
        width = targets
        layer += 1
    return Expansion(tuple(elements), unplaced)


def _vector_problem(parameter: ParameterSpec, width: int | None) -> str:
    if not parameter.shape:
        return "a scalar belongs to no neuron"
    if not parameter.name.endswith(("weight", "bias")):
        return "a 1-D tensor of no known role"
    if width is not None and parameter.shape[0] != width:
        return f"has {parameter.shape[0]} elements where the layer before has {width} neurons"
    return ""


FAMILIES = (Family("sequential", {"published": _published, "faithful": _faithful}, heads=False),)
