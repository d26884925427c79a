"""The network inside what a framework trains."""

from __future__ import annotations

from typing import Any


def network(module: Any) -> Any:
    """A module's only child with parameters, where it has no parameters of its own; else the module itself.

    A module that wraps a network to return its loss, or to say how it is trained, adds nothing to the architecture.
    """
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    own = next(module.parameters(recurse=False), None)
    return children[0] if len(children) == 1 and own is None else module
