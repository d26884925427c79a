"""``python -m nowcast_client.network.describe module:function``: the spec of the model that a function builds, as JSON.

A process of its own, so that a service's command line can ask for it without knowing the client. An error is the last
line of standard error, as JSON, with exit status 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from nowcast_proto.errors import NowcastError
from nowcast_proto.reference import load_function

from nowcast_client.network.derive import derive_spec
from nowcast_client.network.modules import Example

FAILED = 2


def with_example(built: Any) -> tuple[Any, Example | None]:
    """A network and its example inputs, as a function gives them.

    Args:
        built: The model; (model, inputs) with one tensor, a sequence of positional or a mapping of keyword inputs; or
            (model, positional, keyword).
    """
    if not isinstance(built, tuple):
        return built, None
    model, *inputs = built
    if len(inputs) == 2 and isinstance(inputs[1], Mapping):
        return model, (tuple(inputs[0]), inputs[1])
    if len(inputs) != 1:
        return model, None
    if isinstance(inputs[0], Mapping):
        return model, ((), inputs[0])
    return model, (tuple(inputs[0]) if isinstance(inputs[0], tuple | list) else (inputs[0],), {})


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the spec to standard output.

    Args:
        arguments: Those of the process where None.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m nowcast_client.network.describe", description=__doc__)
    parser.add_argument("model", help="module:function; the function returns the model, or the model and its inputs")
    parser.add_argument("--table", help="JSON document that says how the network is wired")
    parser.add_argument("--include-frozen", action="store_true", help="list parameters that do not train as well")
    given = parser.parse_args(arguments)
    try:
        model, example = with_example(load_function(given.model)())
        spec = derive_spec(model, example=example, include_frozen=given.include_frozen, table=given.table)
    except NowcastError as error:
        sys.stderr.write("\n" + error.body().model_dump_json() + "\n")
        return FAILED
    sys.stdout.write(spec.canonical() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
