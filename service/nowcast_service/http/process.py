"""One process that serves: its socket, its signals, its end.

What an application cannot promise by itself, because it is the server's to keep, is here and nowhere else: bounds on
connections, a drain before the door is closed, and an end within the grace. Any ASGI server can run `create_app`; with
these promises only this one.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import stat
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from nowcast_proto.errors import InvalidRequest
from pydantic import ByteSize

from nowcast_service.files.replacing import replacing
from nowcast_service.http.app import create_app
from nowcast_service.http.connection import Connection, Door
from nowcast_service.observe import logs
from nowcast_service.runtime.container import memory_limit, processors
from nowcast_service.runtime.service import Service
from nowcast_service.settings import Settings

log = logging.getLogger(__name__)

_SPARE_FILES = 64
"""Open files left to all else than connections."""


class Server(uvicorn.Server):
    """Serves one application on one socket.

    The first signal drains instead of closing the door at once: finished answers can still be fetched. The second ends
    it.

    Args:
        app: From `create_app`.
        listener: Bound, not yet listening.
    """

    def __init__(self, app: FastAPI, listener: socket.socket) -> None:
        self._service: Service = app.state.service
        settings = self._service.settings
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                access_log=False,
                log_config=None,
                server_header=False,
                ssl_certfile=str(settings.tls_certificate) if settings.tls_certificate else None,
                ssl_keyfile=str(settings.tls_key) if settings.tls_key else None,
                timeout_graceful_shutdown=max(1, round(settings.shutdown_grace * 0.1)),
                timeout_keep_alive=75,
                ws="none",
            )
        )
        self._listener = listener
        self._door = Door(_most_connections(settings))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: Future[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to end has come."""
        if self._drain is not None or not self.started or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        grace = self._service.settings.shutdown_grace
        log.info("%s: finishing what runs, within %g s", signal.Signals(sig).name, grace)
        self._drain = asyncio.run_coroutine_threadsafe(self._finish(), self._loop)

    async def _finish(self) -> None:
        # A little is kept back for connections to close and the process to end.
        await self._service.drain(self._service.settings.shutdown_grace * 0.8)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=[])
        settings = self._service.settings

        def connected() -> Connection:
            return Connection(
                self.config,
                self.server_state,
                self.lifespan.state,
                door=self._door,
                patience=settings.upload_idle,
            )

        self.servers.append(
            await self._loop.create_server(
                connected,
                sock=self._listener,
                ssl=self.config.ssl,
                backlog=self.config.backlog,
                ssl_handshake_timeout=settings.upload_idle if self.config.ssl else None,
            )
        )
        # What was imported stays: collections that go through it each time would stop everything for a while.
        gc.collect()
        gc.freeze()
        url = _url(settings, self._listener)
        log.info("serving %s", url)
        if settings.port_file is not None:
            with replacing(settings.port_file) as temporary:
                temporary.write_text(url + "\n")


def serve_until_told(settings: Settings) -> None:
    """Serve until a signal says to stop.

    Raises:
        NowcastError: A setting cannot be used, or the address cannot be bound.
    """
    logs.configure(style=settings.log_format, level=settings.log_level)
    _compare(settings)
    app = create_app(settings)
    listener = _bind(settings)
    if settings.parent_fd is not None:
        threading.Thread(target=_outlive_nobody, args=(settings,), name="parent-watch", daemon=True).start()
    try:
        Server(app, listener).run()
    except (OSError, KeyError) as exc:
        raise InvalidRequest(f"the service could not start: {exc}") from exc
    finally:
        if settings.unix_socket is not None:
            settings.unix_socket.unlink(missing_ok=True)
    if not app.state.service.engine.idle:
        # The device thread is still inside a kernel and would hold up the interpreter's own end.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(0)


def _compare(settings: Settings) -> None:
    """Warn where a setting is more than there is."""
    limit, count = memory_limit(), processors()
    if limit is not None and settings.budget > limit:
        log.warning(
            "NOWCAST_BUDGET=%s is more than the %s this machine or container has: it will be killed before it refuses",
            settings.budget.human_readable(),
            ByteSize(limit).human_readable(),
        )
    if settings.threads > count:
        log.warning("NOWCAST_THREADS=%d is more than the %d processors there are", settings.threads, count)


def _most_connections(settings: Settings) -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return settings.max_connections
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(1, files - _SPARE_FILES)
    if files == resource.RLIM_INFINITY or most >= settings.max_connections:
        return settings.max_connections
    log.warning(
        "this process may open %d files: %d connections at once instead of NOWCAST_MAX_CONNECTIONS=%d",
        files,
        most,
        settings.max_connections,
    )
    return most


def _outlive_nobody(settings: Settings) -> None:
    """End the process when the parent's end of the pipe closes, however the parent ended."""
    try:
        while settings.parent_fd is not None and os.read(settings.parent_fd, 1):
            pass
    except OSError as exc:
        log.error("parent_fd %s cannot be read: %s", settings.parent_fd, exc.strerror)
    log.info("the parent process is gone")
    for path in (settings.unix_socket, settings.port_file):
        if path is not None:
            path.unlink(missing_ok=True)
    logging.shutdown()
    os._exit(0)


def _bind(settings: Settings) -> socket.socket:
    where = str(settings.unix_socket or f"{settings.host}:{settings.port}")
    try:
        if settings.unix_socket is not None:
            return _bind_unix(settings.unix_socket)
        family, *_, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as exc:
        raise InvalidRequest(
            f"{where} cannot be bound: {exc.strerror}", remedy="stop what listens there, or choose another"
        ) from exc
    return listener


def _bind_unix(path: Path) -> socket.socket:
    if path.exists():
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise InvalidRequest(f"{path} exists and is not a socket", remedy="choose another path")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise InvalidRequest(f"another service listens on {path}", remedy="stop it, or choose another path")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Nobody else may connect from the first moment on.
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    return listener


def _url(settings: Settings, listener: socket.socket) -> str:
    if settings.unix_socket is not None:
        return f"unix://{settings.unix_socket.absolute()}"
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.tls_certificate else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
