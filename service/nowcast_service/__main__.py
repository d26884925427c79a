"""The ``nowcast`` script, and ``python -m nowcast_service``: the command line, where its libraries are installed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; where only the thin client is installed, say what is missing."""
    try:
        from nowcast_service.cli import main as run
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("nowcast_"):
            raise
        sys.exit(f"nowcast: the command line needs {missing.name}: pip install 'nowcast-sidecar[service]'")
    run()


if __name__ == "__main__":
    main()
