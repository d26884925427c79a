"""What this process may use: memory, processors and devices of the machine, or of its container where that is less."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from nowcast_proto.errors import InvalidRequest

_ROOT = Path("/")
_NONE = 1 << 60
"""Version 1 says "no limit" with a number about as large as fits."""


def memory_limit(root: Path = _ROOT) -> int | None:
    """Bytes this process may take: the least of the machine's memory and of the limits of its control groups.

    Args:
        root: Where ``/proc`` and ``/sys`` are found.

    Returns:
        None where the system does not tell.
    """
    found = [_number(folder / name) for folder, name in _groups(root, "memory", "memory.max", "memory.limit_in_bytes")]
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemTotal:")]
    except OSError:
        pass  # not Linux
    return min((limit for limit in found if limit is not None and limit < _NONE), default=None)


def processors(root: Path = _ROOT) -> int:
    """Processors this process may keep busy: those it may run on, or the quota of its control groups, rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = []
    for folder, name in _groups(root, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        try:
            quota, *period = (folder / name).read_text().split()
            of = period[0] if period else (folder / "cpu.cfs_period_us").read_text()
            if quota not in ("max", "-1"):
                shares.append(int(quota) / int(of))
        except (OSError, ValueError):
            continue
    return max(1, min([count, *(math.ceil(share) for share in shares)]))


def device_named(name: str, setting: str) -> str:
    """The device of this name, with ``auto`` decided.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        setting: Where it was said, for the message.

    Raises:
        InvalidRequest: There is no such device.
    """
    if name == "cpu":
        return name
    import torch  # takes a second or two

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind != "cuda" or name.endswith(":") or not (index or "0").isdecimal():
        raise InvalidRequest(f"{setting} {name!r} is not known", expected="auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count():
        raise InvalidRequest(
            f"{setting} {name!r} is not there",
            expected=f"cpu, or one of {torch.cuda.device_count()} CUDA devices",
            remedy="leave it away to take what is there",
        )
    return name


def _groups(root: Path, controller: str, new: str, old: str) -> Iterator[tuple[Path, str]]:
    """Folders that may hold a limit of this process, and the file's name there: its group's and all above."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            top, name = root / "sys/fs/cgroup", new
        elif controller in controllers.split(","):
            top, name = root / "sys/fs/cgroup" / controller, old
        else:
            continue
        # Inside a container the path is often the host's, and only the top is there.
        below = Path(path.lstrip("/"))
        for part in (below, *below.parents):
            yield top / part, name


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None
