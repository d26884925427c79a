"""A real service in a process of its own for every test here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a running ``nowcast serve`` with the linear predictor."""
    folder = tmp_path_factory.mktemp("service")
    announced = folder / "url"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NOWCAST_PREDICTOR": "linear"}
    command = [sys.executable, "-m", "nowcast_service.cli", "serve", "--port", "0", "--port-file", str(announced)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while not announced.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the service did not start:\n{(folder / 'log').read_text()}")
            time.sleep(0.05)
        yield announced.read_text().strip()
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOWCAST_URL", "NOWCAST_MODE", "NOWCAST_API_KEY"):
        monkeypatch.delenv(name, raising=False)
