"""How fast snapshots stream, beside a bare socket with the same checksums, and what a one-shot call costs on top of the
predictor. Every figure has its rival in the same run; run it with ``python tests/bench/bench_service.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import numpy as np

MIB = 2**20
_CHUNK = MIB


# A service, and memory of processes


@contextmanager
def served(folder: Path, *, unix: bool = False, **settings: Any) -> Iterator[tuple[httpx.Client, int]]:
    """A service process; yields a client and the process id."""
    announced = folder / "url"
    announced.unlink(missing_ok=True)
    environment = {**os.environ, "NOWCAST_PORT": "0", "NOWCAST_PORT_FILE": str(announced), "NOWCAST_LOG_LEVEL": "error"}
    environment |= {f"NOWCAST_{name.upper()}": str(value) for name, value in settings.items()}
    if unix:
        environment["NOWCAST_UNIX_SOCKET"] = str(folder / "s.sock")
    process = subprocess.Popen([sys.executable, "-m", "nowcast_service.cli", "serve"], env=environment)
    try:
        while not announced.exists():
            if process.poll() is not None:
                raise RuntimeError("the service did not start")
            time.sleep(0.05)
        url = announced.read_text().strip()
        transport = httpx.HTTPTransport(uds=url.removeprefix("unix://")) if unix else None
        with httpx.Client(base_url="http://nowcast" if unix else url, transport=transport, timeout=600) as client:
            yield client, process.pid
    finally:
        process.terminate()
        process.wait(60)


def memory(pid: int | str, name: str) -> int:
    """A field of /proc/PID/status in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


@contextmanager
def peak(pid: int | str) -> Iterator[Callable[[], int]]:
    """Most memory a process takes in the block, beyond what it had before."""
    before = memory(pid, "VmRSS")
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    yield lambda: memory(pid, "VmHWM") - before


# The rival: one socket, the same checksums, nothing else


def _receive(listener: socket.socket, sizes: list[int], repeats: int) -> None:
    for size in sizes:
        for _ in range(repeats):
            connection, _ = listener.accept()
            with connection:
                digest = connection.recv(16, socket.MSG_WAITALL)
                target = memoryview(bytearray(size))
                state, crc, at = hashlib.blake2b(digest_size=16), 0, 0
                while at < size:
                    got = connection.recv_into(target[at : at + _CHUNK])
                    state.update(target[at : at + got])
                    crc = zlib.crc32(target[at : at + got], crc)
                    at += got
                same = connection.recv(4, socket.MSG_WAITALL) == crc.to_bytes(4, "little") and state.digest() == digest
                connection.sendall(b"1" if same else b"0")


def bare_copy(address: Any, data: memoryview) -> float:
    """Seconds to send a buffer over a bare socket, digest first, CRC-32 after, until the receiver has checked both."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    began = time.perf_counter()
    with socket.socket(family) as connection:
        connection.connect(address)
        connection.sendall(hashlib.blake2b(data, digest_size=16).digest())
        crc = 0
        for at in range(0, len(data), _CHUNK):
            crc = zlib.crc32(data[at : at + _CHUNK], crc)
            connection.sendall(data[at : at + _CHUNK])
        connection.sendall(crc.to_bytes(4, "little"))
        if connection.recv(1) != b"1":
            raise RuntimeError("the copy arrived damaged")
    return time.perf_counter() - began


# Streaming


def stream_once(client: httpx.Client, session: str, step: int, data: memoryview) -> float:
    """Seconds to stream one snapshot of one tensor, digest included, until the service has checked it."""
    from nowcast_proto.stream import Encoder
    from nowcast_proto.tensors import TensorFrame
    from nowcast_proto.version import MEDIA_TYPE

    began = time.perf_counter()
    encoder = Encoder("snapshot", {"step": step}, [TensorFrame("w", "float32", (len(data) // 4,), data)])
    headers = {"Content-Type": MEDIA_TYPE, "Content-Length": str(encoder.content_length)}
    response = client.put(f"/v1/sessions/{session}/snapshots/{step}", content=encoder.chunks(), headers=headers)
    seconds = time.perf_counter() - began
    if response.status_code != 201:
        raise RuntimeError(response.text)
    return seconds


def fit(sizes: list[int], seconds: list[float]) -> dict[str, float]:
    """``a + bytes / bandwidth`` by least squares, relative errors weighed."""
    x, y = np.array(sizes, dtype=float), np.array(seconds)
    slope, start = np.polyfit(x, y, 1, w=1 / y)
    return {"a_ms": 1e3 * float(start), "bandwidth_MBps": 1e-6 / float(slope)}


def bench_streaming(sizes_mb: list[int], repeats: int, unix: bool) -> dict[str, Any]:
    """Stream snapshots of each size and copy the same bytes over a bare socket, in turns."""
    sizes = [mb * 1_000_000 for mb in sizes_mb]
    buffers = {
        size: memoryview(np.random.default_rng(0).random(size // 4, dtype=np.float32)).cast("B") for size in sizes
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        listener = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        listener.bind(str(folder / "bare.sock") if unix else ("127.0.0.1", 0))
        listener.listen()
        rival = multiprocessing.get_context("fork").Process(
            target=_receive, args=(listener, sizes, repeats), daemon=True
        )
        rival.start()
        ours: dict[int, list[float]] = {}
        bare: dict[int, list[float]] = {}
        beyond: dict[str, int] = {}
        with served(folder, unix=unix, predictor="linear", budget=8 * 2**30) as (client, pid):
            for size in sizes:
                spec = {"family": "sequential", "parameters": [{"name": "w", "shape": [size // 4]}]}
                client.put(f"/v1/sessions/s{size}", json={"spec": spec, "keep": 2}).raise_for_status()
                for step in range(repeats):
                    bare.setdefault(size, []).append(bare_copy(listener.getsockname(), buffers[size]))
                    with peak(pid) as server_peak, peak("self") as own_peak:
                        ours.setdefault(size, []).append(stream_once(client, f"s{size}", step, buffers[size]))
                        # The tensor itself has to be somewhere on the server; the client's was there before.
                        beyond["server_MB"] = (server_peak() - size) // 10**6
                        beyond["client_MB"] = own_peak() // 10**6
                client.delete(f"/v1/sessions/s{size}")
        rival.terminate()
    best_ours, best_bare = ([min(times[size]) for size in sizes] for times in (ours, bare))
    largest = sizes[-1]
    return {
        "over": "unix" if unix else "tcp",
        "MB": sizes_mb,
        "ours_s": [round(s, 4) for s in best_ours],
        "bare_s": [round(s, 4) for s in best_bare],
        "ours": fit(sizes, best_ours) if len(sizes) > 1 else None,
        "bare": fit(sizes, best_bare) if len(sizes) > 1 else None,
        "rate_at_largest_MBps": round(largest / best_ours[-1] / 1e6, 1),
        "share_of_bare": round(best_bare[-1] / best_ours[-1], 3),
        "peak_beyond_one_tensor": beyond,
    }


# One shot


def bench_one_shot(widths: list[int], hidden: int, repeats: int) -> dict[str, Any]:
    """A one-shot call through the client against the same prediction without a service, in turns, in processes of
    their own; and the same call with a predictor that only copies, which is what moving the bytes costs.
    """
    import torch
    from nowcast_client import NowcastClient
    from nowcast_proto.spec import ArchitectureSpec
    from nowcast_service.nino.checkpoint import Checkpoint, save_checkpoint
    from nowcast_service.nino.config import NiNoConfig
    from nowcast_service.nino.model import NiNoTwin

    parameters = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        parameters += [
            {"name": f"{2 * i}.weight", "shape": [outputs, inputs]},
            {"name": f"{2 * i}.bias", "shape": [outputs]},
        ]
    spec = ArchitectureSpec.model_validate({"family": "sequential", "parameters": parameters})
    rng = np.random.default_rng(0)
    start = {p.name: rng.standard_normal(p.shape, dtype=np.float32) for p in spec.parameters}
    snapshots = [{n: a + np.float32(0.01 * i) * a for n, a in start.items()} for i in range(5)]
    torch.manual_seed(0)
    config = NiNoConfig(hidden=hidden)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(folder / "bench.safetensors", Checkpoint.of(config, NiNoTwin(config).state_dict()))
        context = multiprocessing.get_context("spawn")
        ours_end, theirs = context.Pipe()
        bare = context.Process(target=_bare, args=(theirs, folder / "bench.safetensors", spec.canonical(), snapshots))
        bare.start()
        times: dict[str, list[float]] = {"bare": [], "one_shot": [], "copy": []}
        with (
            served(folder, checkpoint=folder / "bench.safetensors") as (http, _),
            NowcastClient(str(http.base_url)) as client,
        ):
            for number in range(repeats + 1):
                ours_end.send(True)
                alone = ours_end.recv()
                before = _stages(http)
                nino = _timed(lambda: client.nowcast(spec, snapshots, 5, predictor="nino", reply="delta"))
                after = _stages(http)
                copied = _timed(lambda: client.nowcast(spec, snapshots, 5, predictor="identity", reply="delta"))
                if number:  # the first of each makes plans and encodings
                    for kind, seconds in (("bare", alone), ("one_shot", nino), ("copy", copied)):
                        times[kind].append(seconds)
        ours_end.send(False)
        bare.join(60)
    best = {name: min(values) for name, values in times.items()}
    return {
        "parameters": spec.numel,
        "hidden": hidden,
        "bytes_in": 5 * 4 * spec.numel,
        **{f"{name}_s": [round(s, 3) for s in values] for name, values in times.items()},
        "overhead": round(best["one_shot"] / best["bare"] - 1, 4),
        "overhead_of_medians": round(statistics.median(times["one_shot"]) / statistics.median(times["bare"]) - 1, 4),
        "timings_of_last": {stage: round(after[stage] - before[stage], 6) for stage in after},
    }


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _stages(client: httpx.Client) -> dict[str, float]:
    """Seconds of every stage since the service began."""
    lines = client.get("/metrics").text.splitlines()
    return {
        line.split('"')[1]: float(line.split()[-1]) for line in lines if line.startswith("nowcast_stage_seconds_sum")
    }


def _bare(pipe: Any, checkpoint: Path, spec_text: str, arrays: list[dict[str, Any]]) -> None:
    import torch
    from nowcast_proto.spec import ArchitectureSpec
    from nowcast_service.history import History
    from nowcast_service.nino.checkpoint import load_checkpoint
    from nowcast_service.predictors import make_predictor

    spec = ArchitectureSpec.parse(spec_text)
    predictor = make_predictor("nino", load_checkpoint(checkpoint))
    history = History.of(spec, [{n: torch.from_numpy(a) for n, a in snapshot.items()} for snapshot in arrays])
    while pipe.recv():
        began = time.perf_counter()
        predictor.predict(history, 5)
        pipe.send(time.perf_counter() - began)


def main() -> None:
    """Run and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 50, 200, 400], help="snapshot sizes in MB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 1024, 1024, 872], help="layers, one shot")
    parser.add_argument("--hidden", type=int, default=128, help="width of the graph network")
    parser.add_argument("--only", choices=["streaming", "one-shot"])
    options = parser.parse_args()
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "load_before": os.getloadavg()[0],
    }
    if options.only != "one-shot":
        result["streaming"] = [bench_streaming(options.sizes, options.repeats, unix) for unix in (False, True)]
    if options.only != "streaming":
        result["one_shot"] = bench_one_shot(options.widths, options.hidden, options.repeats)
    result["load_after"] = os.getloadavg()[0]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
