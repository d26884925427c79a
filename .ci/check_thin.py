"""Check an environment into which only the wheel was installed: what came along, and that the client works in it.

Run by the environment's own interpreter. Exit status 0 when all holds, 1 with a line saying what does not.
"""

import importlib.metadata as metadata
import re
import socket
import subprocess
import sys
from pathlib import Path

WANTED = {"numpy", "httpx", "msgpack", "pydantic"}


def name_of(requirement: str) -> str:
    return re.split(r"[\s\[;<>=!~(]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def required(distribution: str) -> set[str]:
    """Names a distribution needs in its plain form, without extras."""
    try:
        found = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:  # needed on other platforms or Python versions only
        return set()
    return {name_of(line) for line in found if "extra ==" not in line}


def main() -> str | None:
    direct = required("nowcast-sidecar")
    if direct != WANTED:
        return f"the wheel asks for {sorted(direct)}, expected {sorted(WANTED)}"
    allowed, todo = {"nowcast-sidecar", "pip", "setuptools"}, set(direct)
    while todo:
        allowed |= todo
        todo = set().union(*map(required, todo)) - allowed
    extra = {d.metadata["Name"].lower().replace("_", "-") for d in metadata.distributions()} - allowed
    if extra:
        return f"installed beyond what the client needs: {sorted(extra)}"

    import nowcast_proto
    from nowcast_client import NowcastClient
    from nowcast_proto.errors import NowcastError

    if any(module in sys.modules for module in ("torch", "fastapi", "torch_geometric")):
        return "importing the client loaded torch or the server"
    if "site-packages" not in nowcast_proto.__file__:
        return f"{nowcast_proto.__file__} is not the installed package"
    with socket.socket() as unused:  # bound but not listening: a connection is refused
        unused.bind(("127.0.0.1", 0))
        try:
            NowcastClient(f"http://127.0.0.1:{unused.getsockname()[1]}").models()
        except NowcastError as error:
            sys.stdout.write(f"a server that is not there: {type(error).__name__}: {error}\n")
        else:
            return "a server that is not there raised nothing"
    script = [str(Path(sys.prefix) / "bin" / "nowcast")]
    told = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    if told.returncode == 0 or "nowcast-sidecar[service]" not in told.stderr:
        return f"the command line without its libraries said {told.stderr!r}, expected what to install"
    sys.stdout.write(f"thin client: {', '.join(sorted(allowed - {'pip', 'setuptools'}))}\n")
    return None


if __name__ == "__main__":
    sys.exit(main())
