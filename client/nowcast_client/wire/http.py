"""HTTP/1.1 to the service over TCP, TLS or a unix socket, blocking and for asyncio.

httpx stays in here: each of its exceptions leaves as a `nowcast_client.errors.TransportError`, and none of its log
lines reaches the user's log.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import httpx

from nowcast_client.errors import ConnectFailed, ConnectionCut, TimedOut
from nowcast_client.wire.address import Address, resolve
from nowcast_client.wire.transport import Chunk, Reply, Request

CONNECT_SECONDS = 10.0
"""Most seconds a connection may take to come about, however long an answer may."""
_ours: ContextVar[bool] = ContextVar("nowcast_request", default=False)
for _name in ("httpx", *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy", "socks"))):
    # Its log is about the user's own requests; ours would be a line for every snapshot.
    logging.getLogger(_name).addFilter(lambda record: not _ours.get())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what httpx logs here."""
    token = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(token)


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    """Turn every httpx exception into one of ours, and keep its log lines back."""
    try:
        with _quiet():
            yield
    except (httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
        raise ConnectFailed(
            f"the service did not take the connection ({type(exc).__name__})", remedy="check the url and that it runs"
        ) from exc
    except httpx.TimeoutException as exc:
        raise TimedOut(
            f"the service made no progress ({type(exc).__name__})", remedy="check that it runs, or allow it more time"
        ) from exc
    except (httpx.ConnectError, httpx.ProxyError) as exc:
        raise ConnectFailed(f"the service cannot be reached: {exc}", remedy="check the url and that it runs") from exc
    except httpx.HTTPError as exc:
        raise ConnectionCut(f"the exchange broke off: {type(exc).__name__}: {exc}", remedy="try again") from exc
    except (httpx.StreamError, httpx.InvalidURL) as exc:
        raise ConnectionCut(f"the exchange broke off: {type(exc).__name__}", remedy="try again") from exc


def _headers(request: Request, api_key: str | None) -> dict[str, str]:
    headers = {"Accept-Encoding": "identity", **request.headers}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    if request.body is not None:
        headers["Content-Length"] = str(request.content_length)
    return headers


def _options(address: Address) -> dict[str, Any]:
    """What both clients of httpx are made with; the environment has been read already."""
    # The client's own default would read the system's certificates even where there is nothing to check.
    return {"base_url": address.base, "trust_env": False, "verify": address.tls or False}


def _closed(response: httpx.Response) -> None:
    with _quiet():
        response.close()


def _timeout(seconds: float) -> httpx.Timeout:
    return httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))


class HttpTransport:
    """A `nowcast_client.wire.transport.Transport` over HTTP/1.1.

    Args:
        url: ``http://host:port``, ``https://host:port`` or ``unix:///path``. Default: see `resolve`.
        api_key: Sent as a bearer token. Default: ``NOWCAST_API_KEY``.
        ca_file: PEM file of the certificate authorities to trust.

    Raises:
        AttachError: The url, a proxy variable or a file of certificates cannot work.
    """

    def __init__(
        self, url: str | None = None, *, api_key: str | None = None, ca_file: str | Path | None = None
    ) -> None:
        address = resolve(url, api_key, ca_file)
        self._api_key = address.api_key
        path = address.socket_path
        self._http = httpx.Client(
            **_options(address),
            proxy=address.proxy,
            transport=httpx.HTTPTransport(uds=path, verify=False, trust_env=False) if path else None,
        )
        self.bytes_sent = 0
        self.bytes_received = 0

    @contextlib.contextmanager
    def send(self, request: Request, *, timeout: float) -> Iterator[Reply]:
        """See `Transport.send`."""
        with contextlib.ExitStack() as stack:
            with _mapped():
                built = self._http.build_request(
                    request.method,
                    request.path,
                    headers=_headers(request, self._api_key),
                    content=self._counted(request.body()) if request.body else None,
                    timeout=_timeout(timeout),
                )
                response = self._http.send(built, stream=True)
            stack.callback(_closed, response)
            yield Reply(response.status_code, response.headers, self._received(response))

    def _counted(self, chunks: Iterator[Chunk]) -> Iterator[bytes]:
        for chunk in chunks:
            self.bytes_sent += len(chunk)
            yield chunk  # type: ignore[misc]  # h11 takes any buffer

    def _received(self, response: httpx.Response) -> Iterator[bytes]:
        # Not around the loop: between two pieces the caller's code runs, and would run under our settings.
        chunks = response.iter_raw()
        while True:
            with _mapped():
                chunk = next(chunks, None)
            if chunk is None:
                return
            self.bytes_received += len(chunk)
            yield chunk

    def close(self) -> None:
        """Drop all connections."""
        with _quiet():
            self._http.close()


class AsyncHttpTransport:
    """The same for asyncio."""

    def __init__(
        self, url: str | None = None, *, api_key: str | None = None, ca_file: str | Path | None = None
    ) -> None:
        address = resolve(url, api_key, ca_file)
        self._api_key = address.api_key
        path = address.socket_path
        self._http = httpx.AsyncClient(
            **_options(address),
            proxy=address.proxy,
            transport=httpx.AsyncHTTPTransport(uds=path, verify=False, trust_env=False) if path else None,
        )

    async def call(
        self,
        request: Request,
        *,
        timeout: float,
        feed: Callable[[int, Mapping[str, str]], Callable[[bytes], object]],
    ) -> None:
        """Send a request and push the reply's body into the function that ``feed(status, headers)`` returns."""

        async def body(chunks: Iterator[Chunk]) -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk  # type: ignore[misc]

        with _mapped():
            built = self._http.build_request(
                request.method,
                request.path,
                headers=_headers(request, self._api_key),
                content=body(request.body()) if request.body else None,
                timeout=_timeout(timeout),
            )
            response = await self._http.send(built, stream=True)
            try:
                take = feed(response.status_code, response.headers)
                async for chunk in response.aiter_raw():
                    take(chunk)
            finally:
                await response.aclose()

    async def close(self) -> None:
        """Drop all connections."""
        with _quiet():
            await self._http.aclose()
