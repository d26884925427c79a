"""What a hostile spec costs everybody else: ``python -m tests.e2e.hostile`` prints a table.

Each input is a few hundred bytes to eight megabytes of what a stranger may send: wirings with enormous or degenerate
graphs, long bodies, long heads of streams, right and wrong. While it is worked on (for several senders at once with
``--senders``), another client asks for /healthz and for small nowcasts, and the memory of the service is watched.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgpack
from nowcast_proto.stream import Encoder
from nowcast_proto.tensors import TensorFrame

from ..integration.service.service_harness import STREAM_HEADERS, Server, Training, body, sequential

HEALTH, NOWCAST, GROWTH = 0.25, 5.0, 100 * 2**20
"""What others may notice: seconds for /healthz (99 of 100), seconds for a small nowcast, bytes the service grows by."""
JSON = {"Content-Type": "application/json"}
Spec = dict[str, Any]


# ------------------------------------------------------------------------ the inputs


@dataclass(frozen=True)
class Input:
    """One request.

    Attributes:
        name: What it is.
        method: Of HTTP.
        path: With ``{n}`` for the sender's number.
        headers: Of HTTP.
        content: The body.
    """

    name: str
    method: str
    path: str
    headers: dict[str, str]
    content: bytes


def ranges(*sizes: int) -> list[Spec]:
    return [{"name": f"r{n}", "size": size} for n, size in enumerate(sizes)]


def block(source: int, n_sources: int, target: int, n_targets: int, **fields: Any) -> Spec:
    """A block of weights; dense, target-major, of parameter ``w``, unless fields say otherwise."""
    strides = {"source_stride": 1, "target_stride": n_sources} | fields
    about = {"type": "linear", "parameter": "w", "source": source, "n_sources": n_sources, "target": target}
    return about | {"n_targets": n_targets} | strides


def wired(shapes: dict[str, list[int]], sizes: list[int], blocks: list[Spec]) -> Spec:
    parameters = [{"name": name, "shape": shape} for name, shape in shapes.items()]
    return {"parameters": parameters, "graph": {"ranges": ranges(*sizes), "blocks": blocks}}


def link(source: int, target: int, count: int) -> Spec:
    """A residual link from neuron i to neuron i of two stretches."""
    about = {"type": "residual", "source": source, "n_sources": count, "target": target, "n_targets": count}
    return about | {"diagonal": True}


def wirings(scale: float) -> Iterator[tuple[str, Spec]]:
    """Hostile wirings, at a part of their full size."""

    def n(full: int) -> int:
        return max(4, int(full * scale))

    many = n(90_000)
    yield (
        "shifted links: every neuron a kind of its own",
        wired(
            {"w": [many]}, [2 * many], [block(0, many, many, many, diagonal=True, target_stride=0), link(0, 1, many)]
        ),
    )
    chain = n(40_000)
    yield (
        "a chain of single neurons",
        wired({"w": [chain]}, [1] * (chain + 1), [block(i, 1, i + 1, 1, offset=i) for i in range(chain)]),
    )
    stars = n(600)
    yield (
        "equal stars, not connected",
        wired(
            {"w": [stars * 8]},
            [9] * stars,
            [block(9 * i, 1, 9 * i + 1, 8, offset=8 * i, source_stride=0, target_stride=1) for i in range(stars)],
        ),
    )
    parts = n(20_000)
    yield (
        "pairs of neurons, not connected",
        wired({"w": [parts]}, [1] * (2 * parts), [block(2 * i, 1, 2 * i + 1, 1, offset=i) for i in range(parts)]),
    )
    wide = n(4_000_000)
    yield "four million neurons on one", wired({"w": [wide, 1]}, [1, wide], [block(0, 1, 1, wide, target_stride=1)])
    side = n(2_000)
    half = side // 2
    yield (
        "links of all kinds across each other",
        wired(
            {"w": [side, side]},
            [side] * 40,
            [block(0, side, side, side)]
            + [link(side * (i % 39) + i % half, side * (7 * i % 39) + 3 * i % half, side - half) for i in range(100)],
        ),
    )
    heads = n(20_000)
    yield (
        "heads of every size",
        wired(
            {"w": [heads, 1]},
            [1, heads, 200],
            [block(0, 1, 1, heads, target_stride=1)]
            + [
                {
                    "type": "head",
                    "source": heads + 1 + i,
                    "n_sources": 1,
                    "target": 1 + i,
                    "n_targets": heads // (i + 1),
                }
                for i in range(200)
            ],
        ),
    )


def families(scale: float) -> Iterator[tuple[str, Spec]]:
    """Hostile specs of known families."""
    layers = max(4, int(50_000 * scale))
    yield (
        "a perceptron of fifty thousand layers",
        {
            "family": "sequential",
            "parameters": [{"name": f"{i}.weight", "shape": [1, 1]} for i in range(layers)],
        },
    )
    yield (
        "twelve million heads",
        {
            "family": "llama",
            "num_heads": 12_000_000,
            "parameters": [{"name": "model.layers.0.self_attn.q_proj.weight", "shape": [12_000_000, 1]}],
        },
    )


def long_ones(scale: float) -> Iterator[tuple[str, bytes]]:
    """Long JSON bodies, right and wrong."""
    count = max(10, int(100_000 * scale))
    good = [{"name": f"layers.{i}.weight", "shape": [3, 3]} for i in range(count)]
    yield "a hundred thousand tensors", json.dumps({"spec": {"family": "own", "parameters": good}}).encode()
    bad = [{"nmae": f"layers.{i}", "shpe": "x"} for i in range(int(1.8 * count))]
    yield "180,000 errors", json.dumps({"spec": {"family": "own", "parameters": bad}}).encode()
    late = [*good[:-1], {"name": "last", "shape": [0]}]
    yield "an error at the end", json.dumps({"spec": {"family": "own", "parameters": late}}).encode()
    names = [{"name": str(i) * 100, "shape": [1] * 8} for i in range(int(0.1 * count))]
    yield "long names", json.dumps({"spec": {"family": "own", "parameters": names}}).encode()
    yield "deeply nested", b'{"spec":' + b"[" * int(4_000_000 * scale)
    yield "large numbers", b'{"spec":[' + b",".join([b"9" * 4000] * max(2, int(1900 * scale))) + b"]}"
    yield "many fields", json.dumps({"spec": {f"f{i}": [] for i in range(6 * count)}}).encode()[: 8 << 20]


def inputs(scale: float = 1.0) -> list[Input]:
    """All of them; at a part of their full size for a quick look."""
    found = []
    stream = dict(STREAM_HEADERS)
    for name, spec in (*wirings(scale), *families(scale)):
        whole = json.dumps({"spec": spec}).encode()
        found.append(Input(f"session: {name}", "PUT", "/v1/sessions/h{n}?predictor=nino", JSON, whole))
        numel = sum(_numel(p["shape"]) for p in spec["parameters"])
        if numel * 20 < 8 << 20 and len(spec["parameters"]) < 1000:
            frames = [
                TensorFrame(p["name"], "float32", tuple(p["shape"]), bytes(4 * _numel(p["shape"])), snapshot)
                for snapshot in range(5)
                for p in spec["parameters"]
            ]
            message = {"spec": spec, "k": 1, "predictor": "nino", "deadline": 20.0}
            found.append(
                Input(
                    f"one-shot: {name}",
                    "POST",
                    "/v1/nowcast",
                    stream,
                    body(Encoder("nowcast.request", message, frames)),
                )
            )
    for name, content in long_ones(scale):
        found.append(Input(f"body: {name}", "PUT", "/v1/sessions/h{n}?predictor=linear", JSON, content))
    count = max(10, int(60_000 * scale))
    for name, last in (("sixty thousand tensors", 1), ("an error at the end", 0)):
        parameters = [{"name": f"l.{i}", "shape": [1]} for i in range(count - 1)] + [{"name": "z", "shape": [last]}]
        rows = [
            {"name": p["name"], "dtype": "float32", "shape": [1], "digest": bytes(16), "snapshot": 0}
            for p in parameters
        ]
        message = {"spec": {"family": "own", "parameters": parameters}, "k": 1, "predictor": "linear"}
        head = msgpack.packb({"version": 1, "kind": "nowcast.request", "message": message, "tensors": rows})
        found.append(Input(f"head: {name}", "POST", "/v1/nowcast", stream, len(head).to_bytes(4, "little") + head))
    return found


def _numel(shape: list[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


# --------------------------------------------------------------------------- the run


@dataclass
class Row:
    """What one input did.

    Attributes:
        name: Of the input.
        nbytes: Its length.
        statuses: What its senders were answered.
        seconds: Until the last of them was.
        health: Seconds of every /healthz meanwhile.
        nowcasts: Seconds of every small nowcast of another client meanwhile.
        growth: Bytes that the service's memory rose by at most.
    """

    name: str
    nbytes: int
    statuses: list[str] = field(default_factory=list)
    seconds: float = 0.0
    health: list[float] = field(default_factory=list)
    nowcasts: list[float] = field(default_factory=list)
    growth: int = 0

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.health, n=100, method="inclusive")[98] if len(self.health) > 1 else 0.0

    def wrong(self) -> list[str]:
        """Which promise was not kept."""
        found = [f"answered {one}" for one in self.statuses if one.startswith(("500", "0 "))]
        if self.p99 > HEALTH:
            found.append(f"/healthz {self.p99:.2f} s")
        if max(self.nowcasts, default=0.0) > NOWCAST:
            found.append(f"a small nowcast {max(self.nowcasts):.1f} s")
        if self.growth > GROWTH:
            found.append(f"grew by {self.growth >> 20} MiB")
        return found


def attack(server: Server, one: Input, senders: int) -> Row:
    """Send an input from so many clients at once, and see what others notice."""
    row, over = Row(one.name, len(one.content)), threading.Event()
    small = body(Training(sequential(8, 16, 4)).request())

    def sent(number: int) -> None:
        with server.client(timeout=120.0) as client:
            try:
                path = one.path.format(n=number)
                answer = client.request(one.method, path, content=one.content, headers=one.headers)
                code = answer.json().get("code", "") if answer.status_code >= 400 else ""
                row.statuses.append(f"{answer.status_code} {code}".strip())
                if answer.status_code < 300 and one.method == "PUT":
                    client.delete(path.partition("?")[0])
            except httpx.HTTPError as exc:
                row.statuses.append(f"0 {type(exc).__name__}")

    def watched(times: list[float], pause: float, ask: Callable[[httpx.Client], httpx.Response]) -> None:
        with server.client(timeout=120.0) as client:
            while not over.is_set():
                began = time.monotonic()
                good = ask(client).status_code == 200
                times.append(time.monotonic() - began if good else 120.0)
                time.sleep(pause)

    before = server.rss()
    server.reset_peak()
    watchers = [
        threading.Thread(target=watched, args=(row.health, 0.01, lambda client: client.get("/healthz"))),
        threading.Thread(
            target=watched,
            args=(row.nowcasts, 0.2, lambda c: c.post("/v1/nowcast", content=small, headers=STREAM_HEADERS)),
        ),
    ]
    attackers = [threading.Thread(target=sent, args=(number,)) for number in range(senders)]
    began = time.monotonic()
    for thread in (*watchers, *attackers):
        thread.start()
    for thread in attackers:
        thread.join()
    row.seconds = time.monotonic() - began
    time.sleep(0.5)
    over.set()
    for thread in watchers:
        thread.join()
    row.growth = server.peak() - before
    return row


def run(folder: Path, scale: float = 1.0, senders: int = 1, only: str = "") -> list[Row]:
    """All inputs, one after the other, against one service."""
    server = Server(folder, {"NOWCAST_CACHE": "", "NOWCAST_CHECKPOINT": "nowcast-h64"}).start()
    rows = []
    try:
        attack(server, Input("first calls", "GET", "/readyz", {}, b""), 1)
        for one in inputs(scale):
            if only in one.name:
                rows.append(attack(server, one, senders))
                sys.stderr.write(f"{one.name}: {', '.join(rows[-1].statuses)}\n")
        with server.client() as client:
            lines = client.get("/metrics").text
        end = time.monotonic() + 60
        while "nowcast_sessions 0.0" not in lines and time.monotonic() < end:
            time.sleep(0.5)
            with server.client() as client:
                lines = client.get("/metrics").text
        assert "nowcast_sessions 0.0" in lines, "sessions are left"
    finally:
        server.stop()
    return rows


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = [
        "| input | bytes | answers | s | /healthz p50, p99, max ms | small nowcast max s | memory MiB |",
        "|---|---:|---|---:|---|---:|---:|",
    ]
    for row in rows:
        health = [statistics.median(row.health), row.p99, max(row.health)] if row.health else []
        answers = ", ".join(sorted(set(row.statuses)))
        lines.append(
            f"| {row.name} | {row.nbytes:,} | {answers} | {row.seconds:.1f} | "
            f"{', '.join(f'{1e3 * one:.0f}' for one in health)} | {max(row.nowcasts, default=0):.2f} | "
            f"{row.growth / 2**20:+.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="part of their full size the inputs have")
    parser.add_argument("--senders", type=int, default=1, help="clients that send an input at once")
    parser.add_argument("--only", default="", help="inputs whose names hold this")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(Path(folder), given.scale, given.senders, given.only)
    sys.stdout.write(table(rows) + "\n")
    wrong = [f"{row.name}: {', '.join(row.wrong())}" for row in rows if row.wrong()]
    sys.stdout.write("\n".join(["", *wrong] if wrong else ["", "every promise was kept"]) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
