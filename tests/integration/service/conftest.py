"""A real service in a process of its own, on a real socket, for every test here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .service_harness import Serve, Server


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts services with the given settings: ``serve(max_queue=2)``."""
    servers: list[Server] = []

    def start(**settings: Any) -> Server:
        folder = tmp_path / f"server-{len(servers)}"
        folder.mkdir()
        server = Server(folder, {f"NOWCAST_{name.upper()}": str(value) for name, value in settings.items()})
        servers.append(server)
        return server.start()

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One service with default settings for the tests of a module."""
    running = Server(tmp_path_factory.mktemp("server"), {}).start()
    yield running
    running.stop()
