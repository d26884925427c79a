"""``nowcast doctor``: is everything here as nowcasting needs it, from the environment to a real round trip."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import metadata
from typing import TYPE_CHECKING, Literal

import typer

from nowcast_lab.commands.status import Key, Url

if TYPE_CHECKING:
    from nowcast_client import NowcastClient

Mark = Literal["ok", "note", "bad"]
_CLOCK = 60.0
"""Seconds two clocks may differ: certificates and expiry times stand that much."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    mark: Mark
    told: str


def register(root: typer.Typer) -> None:
    """Add the subcommand to the command line."""
    root.command()(doctor)


def doctor(url: Url = None, key: Key = None) -> None:
    """Look at versions, device, proxies and clock, and send a small nowcast to the service and back.

    Exit status 0 where all is well, 1 where something keeps nowcasts from working.
    """
    from nowcast_client.wire.address import given_url
    from rich.console import Console

    console, bad = Console(highlight=False), 0
    colours: dict[Mark, str] = {"ok": "green", "note": "yellow", "bad": "red"}
    for finding in _findings(given_url(url), key):
        bad += finding.mark == "bad"
        console.print(f"[{colours[finding.mark]}]{finding.mark:>4}[/]  [bold]{finding.what}[/]  {finding.told}")
    if bad:
        raise typer.Exit(1)


def _findings(url: str, key: str | None) -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield _versions()
    yield _device()
    yield from _proxies()
    yield from _service(url, key)


def _versions() -> Finding:
    told, missing = [], []
    for name in ("nowcast-sidecar", "torch", "torch-geometric", "httpx", "numpy"):
        try:
            told.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    return Finding("packages", "note" if missing else "ok", ", ".join(told) + "".join(f"; no {n}" for n in missing))


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding("device", "ok", f"{names}; CUDA {torch.version.cuda}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    mark: Mark = "note" if torch.get_num_threads() > (cores or 1) else "ok"
    return Finding("device", mark, f"no CUDA; {cores} processors, torch uses {torch.get_num_threads()} threads")


def _proxies() -> Iterator[Finding]:
    names = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    found = {n: os.environ[n] for name in names for n in (name, name.upper()) if os.environ.get(n)}
    if found:
        # Names only: a proxy's url may hold a password.
        yield Finding("proxies", "note", f"set by {', '.join(found)}; addresses of this machine are reached directly")
    else:
        yield Finding("proxies", "ok", "none in the environment")


def _service(url: str, key: str | None) -> Iterator[Finding]:
    from nowcast_client import NowcastClient
    from nowcast_proto.errors import NowcastError

    try:
        client = NowcastClient(url, api_key=key)
    except NowcastError as error:
        yield Finding("service", "bad", f"{url}: {error}")
        return
    with client:
        first = _looked("service", lambda: f"{url} answers, version {client.health().version}")
        yield first
        if first.mark == "bad":
            return
        yield _looked("ready", lambda: "nowcasts get done" if client.ready() else "")
        yield _looked("models", lambda: ", ".join(model.name for model in client.models().models))
        yield _round_trip(client)
    yield _clock(url)


def _looked(what: str, look: Callable[[], str]) -> Finding:
    from nowcast_proto.errors import NowcastError

    begun = time.perf_counter()
    try:
        told = look()
    except NowcastError as error:
        return Finding(what, "bad", str(error))
    return Finding(what, "ok", f"{told} ({1000 * (time.perf_counter() - begun):.0f} ms)")


def _round_trip(client: NowcastClient) -> Finding:
    import numpy as np
    from nowcast_proto.spec import ArchitectureSpec

    spec = ArchitectureSpec.parse(
        '{"family":"sequential","parameters":[{"name":"0.weight","shape":[16,8]},{"name":"2.weight","shape":[4,16]}]}'
    )
    random = np.random.default_rng(0)
    start = {name: random.normal(size=shape).astype(np.float32) for name, shape in spec.shapes().items()}
    snapshots = [{name: array * (1 - 0.01 * i) for name, array in start.items()} for i in range(5)]

    def look() -> str:
        future = client.nowcast(spec, snapshots, k=5)
        finite = all(bool(np.isfinite(array).all()) for array in future.values())
        return f"a nowcast of {spec.numel} parameters came back, {'finite' if finite else 'NOT FINITE'}"

    return _looked("round trip", look)


def _clock(url: str) -> Finding:
    import httpx

    if not url.startswith("http"):
        return Finding("clock", "ok", "the service is on this machine")
    try:
        told = httpx.get(url.rstrip("/") + "/healthz", timeout=10.0).headers.get("date")
        there = parsedate_to_datetime(told).timestamp() if told else None
    except (httpx.HTTPError, ValueError) as error:
        return Finding("clock", "note", f"not compared: {error}")
    if there is None:
        return Finding("clock", "note", "not compared: the service sends no date")
    apart = abs(time.time() - there)
    return Finding("clock", "ok" if apart < _CLOCK else "note", f"{apart:.0f} s apart from the service's")
