"""Where the service is and what lies on the way: urls, keys, proxies and certificates, each checked before it is used.

All of it is settled when a client is made. What cannot work is an `AttachError` that names the argument or environment
variable it came from; no other exception leaves this module.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import ssl
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import httpx

from nowcast_client.errors import AttachError

DEFAULT_URL = "http://127.0.0.1:8500"
ENV_URL, ENV_KEY, ENV_CA = "NOWCAST_URL", "NOWCAST_API_KEY", "NOWCAST_CA_FILE"
SOCKET_PATH_BYTES = 107
"""Longest path of a unix socket on Linux; the kernel's structure has no room for more."""
_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
_URLS = "http://host:port, https://host:port or unix:///path/to/socket"


@dataclass(frozen=True)
class Address:
    """A service's address, checked.

    Attributes:
        base: Base URL of its routes.
        socket_path: Its unix socket; None for TCP.
        proxy: Proxy to go through; None for none.
        tls: Certificates to trust; None where nothing on the way is encrypted.
        api_key: Bearer token; None for none.
    """

    base: str
    socket_path: str | None
    proxy: httpx.Proxy | None
    tls: ssl.SSLContext | None
    api_key: str | None


def given_url(url: str | None) -> str:
    """A url, or the environment's where none is given, or the default."""
    return url or os.environ.get(ENV_URL) or DEFAULT_URL


def resolve(url: str | None = None, api_key: str | None = None, ca_file: str | Path | None = None) -> Address:
    """Settle how a service is reached.

    Args:
        url: ``http(s)://host:port`` or ``unix:///path``. Default: ``NOWCAST_URL``, then ``http://127.0.0.1:8500``.
        api_key: Bearer token. Default: ``NOWCAST_API_KEY``.
        ca_file: PEM file of the certificate authorities to trust. Default: ``NOWCAST_CA_FILE``, then ``SSL_CERT_FILE``
            and ``SSL_CERT_DIR``, then those of the certifi package.

    Raises:
        AttachError: One of these, or a proxy variable, cannot work; the message names it.
    """
    target = given_url(url)
    named = f"{ENV_URL}={target!r}" if not url and os.environ.get(ENV_URL) else f"url {target!r}"
    key = _key(api_key)
    if target.startswith("unix:"):
        path = target.removeprefix("unix:")
        path = path[2:] if path.startswith("//") else path  # all of it: a path may hold a # or a ?
        if not path:
            raise AttachError(f"{named} names no socket", expected="unix:///path/to/socket")
        if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
            raise AttachError(
                f"{named} names a socket whose path has {len(os.fsencode(path))} bytes",
                expected=f"at most {SOCKET_PATH_BYTES}, which is all a unix socket's path may have",
                remedy="put the socket into a shorter folder, or give the path relative to the working directory",
            )
        return Address("http://nowcast", path, None, None, key)
    parts = _parsed(target, named)
    proxy = None if _is_local(parts.hostname or "") else _proxy_for(parts)
    through_tls = proxy is not None and proxy.url.scheme == "https"
    tls = _trusted(ca_file) if parts.scheme == "https" or through_tls else None
    if proxy is not None and through_tls:
        proxy.ssl_context = tls
    return Address(target.rstrip("/"), None, proxy, tls, key)


def _key(api_key: str | None) -> str | None:
    key = api_key or os.environ.get(ENV_KEY) or None
    if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
        raise AttachError(
            f"{'api_key' if api_key else ENV_KEY} holds a blank, a line break or a character outside ASCII",
            expected="a key as `nowcast key` prints it",
            remedy="strip it: a key read from a file often ends in a line break",
        )
    return key


def _parsed(target: str, named: str) -> SplitResult:
    """The parts of an HTTP url that can be used as one."""
    try:
        if re.search(r"[\s\x00-\x1f\x7f]", target):
            raise ValueError("it holds a blank")
        parts = urlsplit(target)
        if parts.scheme not in ("http", "https"):
            raise ValueError("its scheme is none of those")
        if not parts.hostname:
            raise ValueError("it names no host")
        if _ip(parts.hostname) is None and not all(0 < len(n) < 64 for n in parts.hostname.rstrip(".").split(".")):
            raise ValueError("a part of its host's name is empty or longer than 63 characters")
        if parts.port == 0:
            raise ValueError("port 0 is nobody's")
        if parts.query or parts.fragment:
            raise ValueError("a service's address ends before ? and #")
        httpx.URL(target)
    except (ValueError, httpx.InvalidURL) as exc:
        raise AttachError(f"{named} cannot be used: {exc}", expected=_URLS) from exc
    return parts


def _is_local(host: str) -> bool:
    """Whether a host is this machine: no proxy stands between a process and its own machine."""
    if host.rstrip(".").lower() == "localhost":
        return True
    address = _ip(host)
    return address is not None and address.is_loopback


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


# ------------------------------------------------------------------------ proxies


def _proxy_for(parts: SplitResult) -> httpx.Proxy | None:
    """The proxy the environment names for a url; None where it names none or exempts the host."""
    known = urllib.request.getproxies()
    scheme = parts.scheme if known.get(parts.scheme) else "all"
    value = known.get(scheme)
    if not value or _is_exempt(parts, known.get("no") or ""):
        return None
    source = _variable(f"{scheme}_proxy") or f"the system's {scheme} proxy"
    full = value if "://" in value else f"http://{value}"
    shown = re.sub(r"//[^/@]*@", "//…@", full)  # a password is nobody's business
    try:
        found = urlsplit(full)
        if found.scheme not in _PROXY_SCHEMES:
            raise ValueError(f"its scheme is {found.scheme!r}")
        if not found.hostname or re.search(r"\s", full) or found.port == 0:
            raise ValueError("it names no host and port")
        proxy = httpx.Proxy(full)
    except (ValueError, httpx.InvalidURL) as exc:
        raise AttachError(
            f"{source}={shown!r} cannot be used: {exc}",
            expected=f"host:port, or a url that begins with {', '.join(_PROXY_SCHEMES)}",
            remedy=f"mend {source}, or list {parts.hostname} in NO_PROXY",
        ) from exc
    if found.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise AttachError(
            f"{source}={shown!r} is a socks proxy, and the package for those is not installed",
            expected="the socksio package",
            remedy=f"pip install 'httpx[socks]', or list {parts.hostname} in NO_PROXY",
        )
    return proxy


def _variable(name: str) -> str | None:
    """The environment variable of a name in either case; the lower case wins, as everywhere."""
    return next((found for found in (name, name.upper()) if os.environ.get(found)), None)


def _is_exempt(parts: SplitResult, exempt: str) -> bool:
    """Whether NO_PROXY lists a url's host: by name, domain, address or range, each with or without a port."""
    host = (parts.hostname or "").rstrip(".").lower()
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    return any(_lists(entry.strip(), host, port) for entry in exempt.split(",") if entry.strip())


def _lists(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    if "/" in entry:
        try:
            network = ipaddress.ip_network(entry.replace("[", "").replace("]", ""), strict=False)
        except ValueError as exc:
            raise AttachError(
                f"{_variable('no_proxy') or 'NO_PROXY'} holds {entry!r}, which is no range of addresses: {exc}",
                expected="names, domains, addresses and ranges such as 10.0.0.0/8 or fd00::/8, with commas between",
            ) from exc
        address = _ip(host)
        return address is not None and address.version == network.version and address in network
    if _ip(entry) is not None:  # an address without a port; those of IPv6 are made of colons
        return _ip(entry) == _ip(host)
    name, _, wanted = entry.rpartition(":") if re.search(r":\d+$", entry) else (entry, "", "")
    if wanted and int(wanted) != port:
        return False
    if _ip(name) is not None:
        return _ip(name) == _ip(host)
    name = name.removeprefix("*").strip(".").lower()
    return host == name or host.endswith("." + name)


# ------------------------------------------------------------------- certificates


def _trusted(ca_file: str | Path | None) -> ssl.SSLContext:
    """What certificates are held against; reading the usual ones takes longer than a small nowcast."""
    sources = [("ca_file", ca_file), *((name, os.environ.get(name)) for name in (ENV_CA, "SSL_CERT_FILE"))]
    source, path = next(((name, value) for name, value in sources if value), ("SSL_CERT_DIR", None))
    folder = os.environ.get("SSL_CERT_DIR") if path is None else None
    if path is None and not folder:
        return httpx.create_ssl_context(trust_env=False)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if folder and not Path(folder).is_dir():
            raise NotADirectoryError("it is no folder")
        context.load_verify_locations(cafile=path and os.fspath(path), capath=folder)
    except (OSError, ValueError) as exc:  # an SSLError is an OSError
        raise AttachError(
            f"{source}={str(path or folder)!r} cannot be used: {exc}",
            expected="certificates of authorities in PEM" + (" in a folder made by `openssl rehash`" if folder else ""),
            remedy=f"mend {source}, or take it away to trust the usual authorities",
        ) from exc
    return context
