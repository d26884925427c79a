"""What the service may use: read from control groups of both versions, and from a real one where it can be made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nowcast_proto.errors import InvalidRequest
from nowcast_service.runtime.container import device_named, memory_limit, processors

MIB = 2**20


def tree(root: Path, files: dict[str, str]) -> Path:
    """A file system with these files."""
    files = {"proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\n", **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, 64 * 2**30),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 64 * 2**30),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{512 * MIB}\n"}, 512 * MIB),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": f"{700 * MIB}\n"}, 700 * MIB),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": f"{700 * MIB}\n",
                "sys/fs/cgroup/a/b/memory.max": f"{600 * MIB}\n",
            },
            600 * MIB,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{300 * MIB}\n",
            },
            300 * MIB,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/abc\n",
                "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "9223372036854771712\n",
            },
            64 * 2**30,
        ),
    ],
)
def test_the_least_limit_holds(tmp_path: Path, files: dict[str, str], limit: int):
    assert memory_limit(tree(tmp_path, files)) == limit


def test_where_nothing_is_said_nothing_is_known(tmp_path: Path):
    assert memory_limit(tmp_path) is None


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"},
        {
            "proc/self/cgroup": "4:cpu:/a\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    ],
)
def test_a_quota_of_processors_is_rounded_up(tmp_path: Path, files: dict[str, str]):
    assert processors(tree(tmp_path, files)) == 1


@pytest.mark.parametrize("quota", ["max 100000", "100000000 100000"])
def test_no_more_processors_than_there_are(tmp_path: Path, quota: str):
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": quota}
    assert processors(tree(tmp_path, files)) == len(os.sched_getaffinity(0))


def test_a_real_control_group():
    """A child in a group of its own sees the group's limit, and sets its budget by it."""
    old = Path("/sys/fs/cgroup/memory")
    group = (old if old.is_dir() else old.parent) / f"nowcast-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as exc:
        pytest.skip(f"no control group can be made here: {exc}")
    try:
        name = "memory.limit_in_bytes" if (group / "memory.limit_in_bytes").exists() else "memory.max"
        try:
            (group / name).write_text(str(1500 * MIB))
        except OSError as exc:
            pytest.skip(f"no limit can be set here: {exc}")
        script = (
            f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
            "from nowcast_service.runtime.container import memory_limit\n"
            "from nowcast_service.settings import Settings\n"
            "print(memory_limit(), int(Settings().budget))\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        limit, budget = map(int, done.stdout.split())
        assert limit == 1500 * MIB
        assert budget == (1500 - 512) * MIB * 3 // 4
    finally:
        group.rmdir()


@pytest.mark.parametrize("name", ["cuda:99", "cuda:", "cuda:x", "tpu", "CPU", ""])
def test_a_device_that_is_not_there_is_named(name: str):
    with pytest.raises(InvalidRequest, match=f"NOWCAST_DEVICE '{name}'"):
        device_named(name, "NOWCAST_DEVICE")
