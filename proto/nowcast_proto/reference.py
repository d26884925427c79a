"""Objects named on a command line: ``package.module:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nowcast_proto.errors import InvalidRequest


def load_function(reference: str) -> Callable[[], Any]:
    """The function a reference names; modules of the current folder are found as well.

    Args:
        reference: ``module:function``.

    Raises:
        InvalidRequest: It names none, or its module does not import.
    """
    module, colon, name = reference.partition(":")
    if not (module and colon and name):
        raise InvalidRequest(f"{reference!r} names no function", expected="module:function, as in nets:tiny")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as exc:
        raise InvalidRequest(
            f"module {module!r} does not import: {exc}", remedy="run in its folder, or put that on PYTHONPATH"
        ) from exc
    if not callable(found):
        raise InvalidRequest(f"module {module!r} has no function {name!r}", expected="a function without arguments")
    function: Callable[[], Any] = found
    return function
