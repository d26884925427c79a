"""A real engine, a real image, real containers. Without an engine these tests skip and say how to get one."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator

import pytest

from .container_harness import HOW, ROOT, Stack, compose_command, works


@pytest.fixture(scope="session")
def compose() -> list[str]:
    """The compose command of this machine."""
    command = compose_command()
    if command is None:
        pytest.skip(f"no Compose on this machine: {HOW}")
    return command


@pytest.fixture(scope="session")
def build_settings() -> dict[str, str]:
    """What a build needs on this machine: nothing where the official image can be pulled, else the local base image."""
    if not works("docker", "info"):
        pytest.skip(f"no container engine runs on this machine: {HOW}")
    if "NOWCAST_BASE_IMAGE" in os.environ or not works("docker", "image", "inspect", "nowcast-base:local"):
        return {}
    told = subprocess.run(
        ["bash", ROOT / ".ci" / "engine.sh"], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    return dict(part.split("=", 1) for part in shlex.split(told.replace("export ", "")))


@pytest.fixture(scope="session")
def stack(compose: list[str], build_settings: dict[str, str]) -> Iterator[Stack]:
    """The service in a container, built from this tree and healthy; everything is gone afterwards."""
    stack = Stack(compose, f"nowcast-test-{os.getpid()}", build_settings)
    stack("build", timeout=1500)
    try:
        stack("up", "-d", timeout=300)
        stack.wait_healthy()
        yield stack
    finally:
        stack("--profile", "train", "down", "-v", "-t", "15", timeout=180, check=False)
