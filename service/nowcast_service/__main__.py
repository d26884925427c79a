"""The ``nowcast`` script, and ``python -m nowcast_service``: the command line, where its libraries are installed."""

from __future__ import annotations

import os
import signal
import sys


def _end(number: int, _: object) -> None:
    os._exit(0)


def main() -> None:
    """Run the command line; where only the thin client is installed, say what is missing."""
    if "serve" in sys.argv[1:]:
        # As process 1 of a container it would not be ended by signals it does not handle, and the imports below take
        # seconds. The server takes over when it is there; until then there is nothing to finish.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end)
    try:
        from nowcast_service.cli import main as run
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("nowcast_"):
            raise
        sys.exit(f"nowcast: the command line needs {missing.name}: pip install 'nowcast-sidecar[service]'")
    run()


if __name__ == "__main__":
    main()
