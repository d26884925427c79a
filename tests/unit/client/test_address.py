"""Urls, keys, proxies and certificates from arguments and the environment: taken, or refused by name."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from nowcast_client.errors import AttachError
from nowcast_client.wire import address
from nowcast_client.wire.address import resolve

FAR = "http://nowcast.example:8500"
AWAY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("SSL_", "NOWCAST_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1",
        "http://host:99999",
        "http://host:0",
        "http://host:port",
        "http://ho st:8500",
        "http://host:8500\n",
        "http://",
        "http://:8500",
        "http://host:8500?key=1",
        "http://host:8500/#top",
        "ftp://host",
        "host:8500",
        "unix://",
        "http://" + "a" * 64 + ".example",
        "unix:///" + "deep/" * 30 + "socket",
    ],
)
def test_a_url_that_cannot_work_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttachError) as caught:
        resolve(url)
    assert repr(url)[1:-1] in str(caught.value)
    monkeypatch.setenv("NOWCAST_URL", url)
    with pytest.raises(AttachError, match="NOWCAST_URL"):
        resolve()


@pytest.mark.parametrize("url", ["http://host", "https://host/prefix/", "http://[::1]:8500", "http://10.0.0.1:1"])
def test_a_url_that_can_work_is_taken(url: str) -> None:
    assert resolve(url).base == url.rstrip("/")


@pytest.mark.parametrize("path", ["/tmp/a#b", "/tmp/a?b", "/tmp/a b", "here/socket", "/tmp/%41"])
def test_a_socket_s_path_is_taken_as_it_is(path: str) -> None:
    assert resolve(f"unix://{path}").socket_path == path


@pytest.mark.parametrize("key", ["nc_1\n", "two words", "schlüssel"])
def test_a_key_no_header_can_hold_is_named(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttachError, match="api_key") as caught:
        resolve(FAR, key)
    assert key not in str(caught.value)
    monkeypatch.setenv("NOWCAST_API_KEY", key)
    with pytest.raises(AttachError, match="NOWCAST_API_KEY"):
        resolve(FAR)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HTTP_PROXY", "127.0.0.1:port"),
        ("http_proxy", "http://127.0.0.1:99999"),
        ("HTTP_PROXY", "ftp://127.0.0.1:21"),
        ("HTTP_PROXY", "http://"),
        ("ALL_PROXY", "http://[::1"),
        ("all_proxy", "http://ho st:1"),
        ("HTTP_PROXY", "http://user:secret@host:port"),
    ],
)
def test_a_proxy_that_cannot_work_is_named(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(AttachError, match=variable) as caught:
        resolve(FAR)
    assert "secret" not in str(caught.value)
    assert resolve("http://127.0.0.1:8500").proxy is None  # nothing stands between a process and its own machine
    monkeypatch.setenv("NO_PROXY", "example")
    assert resolve(FAR).proxy is None


def test_a_socks_proxy_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    monkeypatch.setattr(address.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AttachError, match=r"ALL_PROXY.*httpx\[socks\]"):
        resolve(FAR)


@pytest.mark.parametrize(
    ("exempt", "url", "through"),
    [
        ("", FAR, True),
        ("*", FAR, False),
        ("example", FAR, False),
        (".example", FAR, False),
        ("*.example", FAR, False),
        ("ample", FAR, True),
        ("NOWCAST.example:8500", FAR, False),
        ("nowcast.example:80", FAR, True),
        ("10.0.0.0/8", "http://10.1.2.3", False),
        ("10.0.0.0/8", "http://11.1.2.3", True),
        ("10.0.0.0/8", FAR, True),
        ("fd00::/8", "http://[fd12::1]:1", False),
        ("[fd00::]/8", "http://[fd12::1]:1", False),
        ("fd00::/8", "http://10.1.2.3", True),
        ("::1, fe80::1", "http://[fe80::1]", False),
        ("[fe80::1]:80", "http://[fe80::1]", False),
        ("[fe80::1]:81", "http://[fe80::1]", True),
        ("[fe80::1]", "http://[fe80:0:0::1]:9", False),
        ("10.0.0.1:8500", "http://10.0.0.1:8500", False),
        ("10.0.0.1", "http://10.0.0.10", True),
    ],
)
def test_no_proxy(exempt: str, url: str, through: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", AWAY)
    monkeypatch.setenv("NO_PROXY", exempt)
    assert (resolve(url).proxy is not None) == through


def test_a_range_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", AWAY)
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/40")
    with pytest.raises(AttachError, match=r"NO_PROXY holds '10\.0\.0\.0/40'"):
        resolve(FAR)


@pytest.mark.parametrize("url", ["https://nowcast.example", "https://127.0.0.1:8500"])
@pytest.mark.parametrize("variable", ["NOWCAST_CA_FILE", "SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_certificates_that_cannot_be_read_are_named(
    variable: str, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("no certificate")
    for path in (tmp_path / "missing", rubbish):
        monkeypatch.setenv(variable, str(path))
        with pytest.raises(AttachError, match=variable):
            resolve(url)
    assert resolve(url.replace("https", "http")).tls is None
    if variable != "SSL_CERT_DIR":
        with pytest.raises(AttachError, match="ca_file"):
            resolve(url, ca_file=rubbish)


def test_certificates_of_the_usual_authorities_are_the_default() -> None:
    found = resolve("https://127.0.0.1:8500").tls
    assert found is not None
    assert found.verify_mode == ssl.CERT_REQUIRED
    assert found.get_ca_certs()
