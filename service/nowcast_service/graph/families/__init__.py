"""The families, as data: one file a kind, found by being here.

Published tables reproduce the node layout of the published NiNo graphs, with their departures from the networks' true
symmetries, because the trained weights know it. Faithful tables keep every permutation of neurons that keeps the
function. The order of the elements is the order of edges and of the nodes that 1-D tensors add.

A module of this package that has ``FAMILIES``, a tuple of `Family`, adds them.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from nowcast_service.graph.families.family import Family

__all__ = ["Family", "families"]


def families() -> dict[str, Family]:
    """Every known family by name.

    Raises:
        ValueError: Two modules have a family of the same name.
    """
    found: dict[str, Family] = {}
    for module in sorted(iter_modules(__path__), key=lambda module: module.name):
        for family in getattr(import_module(f"{__name__}.{module.name}"), "FAMILIES", ()):
            if family.name in found:
                raise ValueError(f"family {family.name!r} is in {module.name}.py and in a module before it")
            found[family.name] = family
    return found
