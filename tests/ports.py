"""TCP ports that stay free until they are needed."""

from __future__ import annotations

import random
import socket

_OUTSIDE_EPHEMERAL = range(20_000, 32_000)
"""Ports no system hands out by itself: one that a server gives up while it restarts is not taken by a connection."""


def free_port() -> int:
    """A port of this machine's loopback that nobody listens on."""
    while True:
        port = random.SystemRandom().choice(_OUTSIDE_EPHEMERAL)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
