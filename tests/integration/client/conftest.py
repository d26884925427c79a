"""Servers for the client's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .harness import Job, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it alive."""
    running = Server(tmp_path_factory.mktemp("server")).start()
    yield running
    running.stop()


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Server]:
    """A server of one's own, to be killed."""
    running = Server(tmp_path).start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def clean(server: Server) -> torch.Tensor:
    """Weights after 70 steps with one nowcast and no fault."""
    job = Job(server.url)
    job.run(70)
    job.handle.close()
    assert job.count("patched") == 1
    return job.weights()


@pytest.fixture(scope="session")
def alone() -> torch.Tensor:
    """Weights after 70 steps without any nowcast."""
    return Job(None).run(70).weights()
