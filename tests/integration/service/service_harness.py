"""A real service in a process of its own, and what a client of it needs."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from nowcast_proto.arrays import float32_of, frame_of
from nowcast_proto.messages import NowcastJob, NowcastRequest, SessionCreate, SnapshotHeader
from nowcast_proto.spec import ArchitectureSpec
from nowcast_proto.stream import Decoder, Encoder, Header
from nowcast_proto.version import MEDIA_TYPE
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


def sequential(*widths: int) -> ArchitectureSpec:
    """A multi-layer perceptron of these widths."""
    parameters = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        parameters += [
            {"name": f"{2 * i}.weight", "shape": [outputs, inputs]},
            {"name": f"{2 * i}.bias", "shape": [outputs]},
        ]
    return ArchitectureSpec.model_validate({"family": "sequential", "parameters": parameters})


@dataclass
class Server:
    """A running ``nowcast serve``."""

    folder: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] = field(init=False)
    url: str = field(init=False, default="")
    starts: int = 0

    def start(self) -> Server:
        """Start it and wait until it listens."""
        self.starts += 1
        announced = self.folder / f"url-{self.starts}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NOWCAST_PORT": "0", **self.environment}
        environment["NOWCAST_PORT_FILE"] = str(announced)
        self.log = self.folder / f"log-{self.starts}"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nowcast_service.cli", "serve"], env=environment, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 120
        while not announced.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the service did not start:\n{self.log.read_text()}")
            time.sleep(0.02)
        self.url = announced.read_text().strip()
        return self

    def client(self, key: str | None = None, **options: Any) -> httpx.Client:
        """An HTTP client bound to it."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        options = {"timeout": 60.0, **options}
        if self.url.startswith("unix://"):
            transport = httpx.HTTPTransport(uds=self.url.removeprefix("unix://"))
            return httpx.Client(base_url="http://localhost", transport=transport, headers=headers, **options)
        return httpx.Client(base_url=self.url, headers=headers, **options)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def rss(self) -> int:
        """Resident bytes of the process."""
        return self._status("VmRSS")

    def settled(self, seconds: float = 3.0) -> int:
        """Resident bytes once this long brought no lower reading: freed memory goes back after a second of quiet."""
        low, until = self.rss(), time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(0.1)
            if (now := self.rss()) < low:
                low, until = now, time.monotonic() + seconds
        return low

    def peak(self) -> int:
        """Most resident bytes since it started, or since `reset_peak`."""
        return self._status("VmHWM")

    def reset_peak(self) -> None:
        """Start measuring the peak anew."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def _status(self, name: str) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise KeyError(name)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        """End it, whatever state it is in."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(30)


Serve = Callable[..., Server]


@dataclass
class Training:
    """Snapshots of a network on its way: a straight line per weight, plus a wobble."""

    spec: ArchitectureSpec
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self._start = {p.name: rng.standard_normal(p.shape, dtype=np.float32) for p in self.spec.parameters}
        self._pace = {p.name: rng.standard_normal(p.shape, dtype=np.float32) * 1e-2 for p in self.spec.parameters}

    def at(self, step: int) -> Arrays:
        """Parameters after ``step`` steps of 100 to a stride."""
        return {
            n: (self._start[n] + self._pace[n] * np.float32(step / 100 + 0.1 * np.sin(step))).astype(np.float32)
            for n in self._start
        }

    def snapshot(self, step: int, dtype: str = "float32") -> Encoder:
        """The stream of one snapshot."""
        frames = [frame_of(n, a, dtype=dtype) for n, a in self.at(step).items()]
        return Encoder(SnapshotHeader.KIND, SnapshotHeader(step=step), frames)

    def request(
        self, dtype: str = "float32", steps: tuple[int, ...] = (0, 100, 200, 300, 400), **fields: Any
    ) -> Encoder:
        """The stream of a one-shot request."""
        frames = [
            frame_of(n, a, dtype=dtype, snapshot=i) for i, step in enumerate(steps) for n, a in self.at(step).items()
        ]
        message = NowcastRequest(spec=self.spec, **{"k": 10, "predictor": "linear", **fields})
        return Encoder(NowcastRequest.KIND, message, frames)


STREAM_HEADERS = {"Content-Type": MEDIA_TYPE}


def body(encoder: Encoder, start: int = 0) -> bytes:
    """A stream in one piece."""
    return b"".join(bytes(chunk) for chunk in encoder.chunks(start=start))


def send(client: httpx.Client, method: str, path: str, encoder: Encoder, **headers: str) -> httpx.Response:
    """Stream an encoder's chunks."""
    length = {"Content-Length": str(encoder.content_length)}
    return client.request(method, path, content=encoder.chunks(), headers={**STREAM_HEADERS, **length, **headers})


def tensors(response: httpx.Response) -> tuple[Header, Arrays]:
    """Decode an answer."""
    assert response.status_code == 200, response.text
    decoder = Decoder()
    decoder.feed(response.content)
    header = decoder.finish()
    return header, {frame.name: float32_of(frame) for frame in decoder.frames}


def create(client: httpx.Client, session: str, spec: ArchitectureSpec, **fields: Any) -> httpx.Response:
    """Create a session."""
    return client.put(f"/v1/sessions/{session}", content=SessionCreate(spec=spec, **fields).model_dump_json())


def ask(client: httpx.Client, session: str, nowcast: str, steps: tuple[int, ...], **fields: Any) -> httpx.Response:
    """Ask for a nowcast."""
    job = NowcastJob(nowcast=nowcast, steps=steps, **{"k": 10, "predictor": "linear", **fields})
    return client.post(f"/v1/sessions/{session}/nowcasts", content=job.model_dump_json(exclude_none=True))


def fetch(client: httpx.Client, session: str, nowcast: str, seconds: float = 60.0) -> httpx.Response:
    """Fetch a nowcast, asking again while it is not done."""
    deadline = time.monotonic() + seconds
    while True:
        response = client.get(f"/v1/sessions/{session}/nowcasts/{nowcast}", params={"wait": 10})
        if response.status_code != 202 or time.monotonic() > deadline:
            return response


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether a condition comes true; the time given is for a machine that is busy with other things."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def error(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Assert that a response is the one error body, with this status and code."""
    assert response.status_code == status, response.text
    found = response.json()
    assert set(found) == {"code", "message", "expected", "remedy", "detail"}
    assert found["code"] == code, found
    assert found["message"]
    return found
