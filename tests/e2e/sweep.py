"""Requests that nobody should send, by the thousand: ``python -m tests.e2e.sweep --requests 24000``.

Three kinds in turn: requests that were right before they were damaged, HTTP in shapes that no library writes, and one
tenant's requests for what is another's. None may be answered 500, hang, hold memory when it is over, or show a tenant
what is not its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from nowcast_service.runtime.keys import hash_key

from ..integration.service.service_harness import (
    STREAM_HEADERS,
    Server,
    Training,
    ask,
    body,
    create,
    fetch,
    send,
    sequential,
)

ALICE, BOB = "nc_alice-has-a-key-of-her-own", "nc_bob-has-another-key-altogether"
SPEC = sequential(6, 8, 3)
TRAINING = Training(SPEC)
STEPS = (0, 100, 200, 300, 400)
PATIENCE = 60.0
"""Seconds after which an answer that has not come will not come."""
GROWTH = 100 * 2**20
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    1e308,
    "",
    "x" * 5000,
    "\x00",
    "../..",
    [],
    {},
    [[]] * 50,
    {"a": {"a": {}}},
]
Request = tuple[str, str, bytes, dict[str, str]]
"""Method, path, body, headers."""


@dataclass
class Outcome:
    """What was seen.

    Attributes:
        statuses: Kind and status -> how often.
        wrong: What must not be.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def valid(draw: random.Random) -> Request:
    """A request that is right, of any route."""
    name = f"s{draw.randrange(6)}"
    step = draw.choice(STEPS)
    session = {"spec": SPEC.model_dump(mode="json", exclude_none=True), "keep": 5}
    job = {"nowcast": f"n{draw.randrange(9)}", "steps": STEPS, "k": 3, "predictor": "linear", "deadline": 20.0}
    report = {"step": 5, "loss_steps": [1, 2], "losses": [2.0, 1.0], "events": [{"kind": "patched", "step": 2}]}
    verdict = {"nowcast": f"n{draw.randrange(9)}", "outcome": "kept"}

    def told(method: str, path: str, message: object) -> Request:
        return method, path, json.dumps(message).encode(), {"Content-Type": "application/json"}

    stream = dict(STREAM_HEADERS)
    return draw.choice(
        [
            told("PUT", f"/v1/sessions/{name}", session),
            ("PUT", f"/v1/sessions/{name}/snapshots/{step}", body(TRAINING.snapshot(step)), stream),
            told("POST", f"/v1/sessions/{name}/nowcasts", job),
            told("POST", f"/v1/sessions/{name}/verdicts", verdict),
            told("POST", f"/v1/sessions/{name}/reports", report),
            ("POST", "/v1/nowcast", body(TRAINING.request(deadline=20.0)), stream),
            ("GET", f"/v1/sessions/{name}/nowcasts/n1?wait=0", b"", {}),
            (
                "GET",
                draw.choice(["/v1/status", "/v1/models", "/v1/trainings", "/metrics", f"/v1/sessions/{name}"]),
                b"",
                {},
            ),
            ("DELETE", f"/v1/sessions/{name}", b"", {}),
        ]
    )


def damaged(draw: random.Random) -> Request:
    """A request that was right before."""
    method, path, content, headers = valid(draw)
    kind = draw.randrange(7)
    if kind == 0 and content:
        data = bytearray(content)
        for _ in range(draw.randrange(1, 8)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        content = bytes(data)
    elif kind == 1 and content:
        a, b = sorted(draw.randrange(len(content)) for _ in range(2))
        content = content[:a] + content[b:] if draw.random() < 0.5 else content[:b] + content[a:]
    elif kind == 2 and headers.get("Content-Type") == "application/json":
        content = json.dumps(_mangled(json.loads(content), draw)).encode()
    elif kind == 3:
        path = path.replace(
            "/s", draw.choice(["/%00", "/..%2f", "/" + "x" * 200, "/é".encode().decode("latin1"), "//", "/s"]), 1
        )
    elif kind == 4:
        headers = headers | {
            draw.choice(
                ["Nowcast-Offset", "Nowcast-Digest", "Nowcast-Session", "Content-Type", "traceparent", "X-Request-ID"]
            ): draw.choice(["-1", "9" * 30, "x", "0" * 32, "application/vnd.nowcast.v7", "", "a" * 3000])
        }
    elif kind == 5:
        method = draw.choice(["GET", "PUT", "POST", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "NOWCAST"])
    else:
        path += draw.choice(
            ["?wait=-1", "?wait=nan", "?predictor=%00", "?checkpoint=../../x", "?k=1&k=2", "/", "?" + "a" * 3000]
        )
    return method, path, content, headers


def _mangled(tree: Any, draw: random.Random) -> Any:
    """One value somewhere in a message, replaced or left away, or one more."""
    if isinstance(tree, dict) and tree and draw.random() < 0.8:
        key = draw.choice(sorted(tree))
        chance = draw.random()
        if chance < 0.15:
            return {name: value for name, value in tree.items() if name != key}
        if chance < 0.3:
            return tree | {draw.choice(["x", "", "__class__", key * 2]): draw.choice(JUNK)}
        return tree | {key: _mangled(tree[key], draw)}
    if isinstance(tree, list) and tree and draw.random() < 0.7:
        at = draw.randrange(len(tree))
        return [*tree[:at], _mangled(tree[at], draw), *tree[at + 1 :]]
    return draw.choice(JUNK)


def raw(draw: random.Random) -> bytes:
    """Bytes on a connection, more or less HTTP."""
    method, path, content, headers = valid(draw)
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {draw.choice([ALICE, BOB, 'wrong', ''])}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    kind = draw.randrange(8)
    if kind == 0:
        lines.append(f"Content-Length: {draw.choice(['-1', '1e9', '99999999999999999999', '5, 6', ' 7', '+3'])}")
    elif kind == 1:
        lines += [f"Content-Length: {len(content)}", "Transfer-Encoding: chunked"]
    elif kind == 2:
        lines.append("Transfer-Encoding: chunked")
        content = b"".join(
            draw.choice([b"%x\r\n%s\r\n", b"%x;a=b\r\n%s\r\n", b"0%x\r\n%s\n", b"-%x\r\n%s\r\n"]) % (len(part), part)
            for part in (content[at : at + 50] for at in range(0, min(len(content), 500), 50))
        ) + draw.choice([b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"", b"zz\r\n"])
    elif kind == 3:
        lines[0] = draw.choice(
            ["GET", "GET /", "GET / HTTP/9.9", "\x00\x01", f"{method} http://elsewhere{path} HTTP/1.1", " "]
        )
    elif kind == 4:
        lines += [f"X{n}: {'y' * draw.randrange(100)}" for n in range(draw.randrange(1, 120))]
    elif kind == 5:
        lines += draw.sample(
            ["Host: y", "Expect: 100-continue", "Upgrade: websocket", "Connection: x", " folded: line", "no colon"], 3
        )
    elif kind == 6:
        content = content[: draw.randrange(len(content) + 1)]
        lines.append(f"Content-Length: {len(content) + draw.randrange(1, 50)}")
    end = draw.choice(["\r\n"] * 6 + ["\n"])
    head = end.join(lines) + end + end
    return head.encode("latin1") + content


def theirs(draw: random.Random) -> Request:
    """One tenant's request for what is the other's: the session ``alices``."""
    where = "/v1/sessions/alices"
    job = {"nowcast": f"b{draw.randrange(99)}", "steps": STEPS, "k": 3}
    choices: list[Request] = [
        ("GET", where, b"", {}),
        ("GET", f"{where}/snapshots/{draw.choice(STEPS)}", b"", {}),
        ("PUT", f"{where}/snapshots/{draw.choice(STEPS)}", body(TRAINING.snapshot(100)), dict(STREAM_HEADERS)),
        ("POST", f"{where}/nowcasts", json.dumps(job).encode(), {}),
        ("GET", f"{where}/nowcasts/hers?wait=0", b"", {}),
        ("POST", f"{where}/verdicts", b'{"nowcast": "hers", "outcome": "rejected"}', {}),
        ("POST", f"{where}/reports", b'{"step": 9, "loss_steps": [], "losses": []}', {}),
        ("GET", "/v1/trainings/alices", b"", {}),
        ("GET", "/v1/trainings/alices/graph", b"", {}),
        ("DELETE", where, b"", {}),
    ]
    return draw.choice(choices)


class Sweep:
    """A service with two tenants, and a sweep over it."""

    def __init__(self, folder: Path, seed: int) -> None:
        keys = f"alice:{hash_key(ALICE)},bob:{hash_key(BOB)}"
        settings = {"API_KEY_HASHES": keys, "UPLOAD_IDLE": "2", "PREDICTOR": "linear", "LOG_LEVEL": "error"}
        self.server = Server(folder, {f"NOWCAST_{name}": value for name, value in settings.items()}).start()
        self.found = Outcome()
        self._draw = random.Random(seed)

    def run(self, requests: int) -> Outcome:
        """So many requests; what is wrong is noted, and nothing is raised."""
        with self.server.client(ALICE) as alice, self.server.client(BOB, timeout=PATIENCE) as bob:
            self._prepare(alice)
            warm = min(requests, 300)
            self._requests(bob, warm)
            before, files = self.server.settled(), self._files()
            self._requests(bob, requests - warm)
            self._look_at(alice)
        self._look_back(before, files)
        return self.found

    def _prepare(self, alice: httpx.Client) -> None:
        create(alice, "alices", SPEC)
        for step in STEPS:
            send(alice, "PUT", f"/v1/sessions/alices/snapshots/{step}", TRAINING.snapshot(step))
        ask(alice, "alices", "hers", STEPS)
        fetch(alice, "alices", "hers")

    def _requests(self, bob: httpx.Client, count: int) -> None:
        for number in range(count):
            kind = ("damaged", "theirs", "raw", "damaged")[number % 4]
            if kind == "raw":
                self._shape(raw(self._draw))
                continue
            request = damaged(self._draw) if kind == "damaged" else theirs(self._draw)
            method, path, content, headers = request
            try:
                answer = bob.request(method, path, content=content or None, headers=headers)
            except httpx.InvalidURL:
                continue
            except httpx.HTTPError as exc:
                self.found.wrong.append(f"{type(exc).__name__} for {request!r:.500}")
                continue
            self._note(kind, answer.status_code, request, answer.content)

    def _note(self, kind: str, status: int, request: object, answer: bytes) -> None:
        self.found.statuses[f"{kind} {status}"] += 1
        if status == 500 or b"Traceback" in answer:
            self.found.wrong.append(f"{status} for {request!r:.500}: {answer[:200]!r}")
        if (
            kind == "theirs"
            and status < 400
            and not (status == 204 and isinstance(request, tuple) and request[0] == "DELETE")
        ):
            self.found.wrong.append(f"bob was answered {status} for {request!r:.300}: {answer[:200]!r}")

    def _shape(self, data: bytes) -> None:
        answer = b""
        try:
            with socket.create_connection(("127.0.0.1", self.server.port), PATIENCE) as link:
                with contextlib.suppress(OSError):  # it may be cut off before it has said all
                    link.sendall(data)
                    link.shutdown(socket.SHUT_WR)
                while len(answer) < 1 << 20 and (part := link.recv(1 << 16)):
                    answer += part
        except TimeoutError:
            self.found.wrong.append(f"no end for {data[:500]!r}")
            return
        except ConnectionError:  # cut off, which is an answer
            pass
        status = int(answer[9:12]) if answer[:5] == b"HTTP/" and answer[9:12].isdigit() else 0
        self._note("raw", status, data, answer)

    def _look_at(self, alice: httpx.Client) -> None:
        """Alice has what she had."""
        state = alice.get("/v1/sessions/alices").json()
        if [one["step"] for one in state.get("snapshots", ())] != list(STEPS):
            self.found.wrong.append(f"alice's session: {state}")
        if fetch(alice, "alices", "hers").status_code != 200:
            self.found.wrong.append("alice's nowcast is gone")

    def _look_back(self, before: int, files: int) -> None:
        """Nothing is left when both have gone."""
        held = "nothing was answered"
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with self.server.client(ALICE) as alice, self.server.client(BOB) as bob:
                for client, names in ((alice, ["alices"]), (bob, [f"s{n}" for n in range(6)])):
                    listed = [
                        one["training"]
                        for one in client.get("/v1/trainings").json().get("trainings", ())
                        if "training" in one
                    ]
                    for name in {*names, *listed}:
                        client.delete(f"/v1/sessions/{name}")
                held = next(line for line in alice.get("/metrics").text.splitlines() if line.startswith("nowcast_held"))
            if held.endswith(" 0.0") and self._files() <= files + 8:
                break
            time.sleep(0.5)
        else:
            self.found.wrong.append(f"{held}; {self._files()} open files, {files} before")
        grown = self.server.settled() - before
        self.found.statuses["MiB grown"] = grown >> 20
        if grown > GROWTH:
            self.found.wrong.append(f"the service grew by {grown >> 20} MiB")
        if self.server.process.poll() is not None:
            self.found.wrong.append(f"the service ended with {self.server.process.returncode}")

    def _files(self) -> int:
        return len(os.listdir(f"/proc/{self.server.process.pid}/fd"))


def run(folder: Path, requests: int, seed: int = 0) -> Outcome:
    """A sweep from start to end."""
    sweep = Sweep(folder, seed)
    try:
        return sweep.run(requests)
    finally:
        sweep.server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=24_000, help="how many in all")
    parser.add_argument("--seed", type=int, default=0, help="of what is sent")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), given.requests, given.seed)
    sys.stdout.write(json.dumps(dict(sorted(found.statuses.items())), indent=2) + "\n")
    sys.stdout.write("\n".join(found.wrong[:20] or ["nothing was wrong"]) + "\n")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
