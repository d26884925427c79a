"""``nowcast serve`` and ``nowcast key``."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import signal
import socket
import stat
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from nowcast_proto.errors import InvalidRequest
from pydantic import ValidationError

log = logging.getLogger(__name__)


def register(root: typer.Typer) -> None:
    """Add the subcommands to the command line."""
    root.command("serve")(serve)
    root.command("key")(key)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port; 0 takes a free one; 8500 by default.")] = None,
    unix_socket: Annotated[Path | None, typer.Option(help="Listen on this unix socket instead.")] = None,
    port_file: Annotated[Path | None, typer.Option(help="Write the bound URL to this file.")] = None,
    parent_fd: Annotated[int | None, typer.Option(help="End at once when this inherited pipe closes.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Default checkpoint: a registered name or a path.")] = None,
    predictor: Annotated[str | None, typer.Option(help="Default predictor.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:0.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    allow_anonymous: Annotated[
        bool | None, typer.Option("--allow-anonymous", help="Serve other machines without keys.")
    ] = None,
) -> None:
    """Serve nowcasts. Every setting is also read from the environment, as NOWCAST_<NAME>."""
    run({name: value for name, value in locals().items() if value is not None})


def key(tenant: Annotated[str, typer.Option(help="Who the key is for.")] = "default") -> None:
    """Make a key. The key goes to its user, the hash to the service; the key is shown once."""
    from nowcast_service.runtime.keys import hash_key, new_key

    fresh = new_key()
    typer.echo(f"key:  {fresh}")
    typer.echo(f"hash: {tenant}:{hash_key(fresh)}")


def run(given: dict[str, Any]) -> None:
    """Serve until told to stop.

    Args:
        given: Settings that override the environment.

    Raises:
        NowcastError: A setting is wrong, or the address cannot be bound.
    """
    from nowcast_service.observe import logs
    from nowcast_service.settings import Settings

    try:
        settings = Settings(**given)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(
            f"setting {name}: {first['msg']}" if name else first["msg"], remedy="see docs/operations.md"
        ) from exc
    logs.configure(style=settings.log_format, level=settings.log_level)

    import torch
    import uvicorn

    from nowcast_service.http.app import create_app
    from nowcast_service.http.connection import Connection

    if settings.threads:
        torch.set_num_threads(settings.threads)
    app = create_app(settings)

    class Server(uvicorn.Server):
        """Drains on the first signal instead of closing the door at once: finished answers can still be fetched."""

        _drain: concurrent.futures.Future[None] | None = None

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self._drain is not None or not self.started:
                self.should_exit = self.force_exit = True
                return
            log.info("%s: finishing what runs, within %g s", signal.Signals(sig).name, settings.shutdown_grace)
            self._drain = asyncio.run_coroutine_threadsafe(self._finish(), self._loop)

        async def _finish(self) -> None:
            # A little is kept back for connections to close and the process to end.
            await app.state.service.drain(settings.shutdown_grace * 0.8)
            self.should_exit = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            self._loop = asyncio.get_running_loop()
            await super().startup(sockets)
            url = _url(settings, listener)
            log.info("serving %s", url)
            if settings.port_file is not None:
                _announce(settings.port_file, url)

    Connection.patience = settings.upload_idle
    config = uvicorn.Config(
        app,
        http=Connection,
        access_log=False,
        log_config=None,
        server_header=False,
        ssl_certfile=str(settings.tls_certificate) if settings.tls_certificate else None,
        ssl_keyfile=str(settings.tls_key) if settings.tls_key else None,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace * 0.1)),
        timeout_keep_alive=75,
        ws="none",
    )
    listener = _bind(settings)
    if settings.parent_fd is not None:
        threading.Thread(target=_outlive_nobody, args=(settings,), name="parent-watch", daemon=True).start()
    try:
        Server(config).run(sockets=[listener])
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


def _outlive_nobody(settings: Any) -> None:
    """End the process when the parent's end of the pipe closes, however the parent ended."""
    try:
        while os.read(settings.parent_fd, 1):
            pass
    except OSError as exc:
        log.error("parent_fd %d cannot be read: %s", settings.parent_fd, exc.strerror)
    log.info("the parent process is gone")
    for path in (settings.unix_socket, settings.port_file):
        if path is not None:
            path.unlink(missing_ok=True)
    logging.shutdown()
    os._exit(0)


def _bind(settings: Any) -> socket.socket:
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


def _url(settings: Any, listener: socket.socket) -> str:
    if settings.unix_socket is not None:
        return f"unix://{settings.unix_socket.absolute()}"
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.tls_certificate else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _announce(path: Path, url: str) -> None:
    from nowcast_service.files.replacing import replacing

    with replacing(path) as temporary:
        temporary.write_text(url + "\n")
