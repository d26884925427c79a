"""Many clients, little room: memory stays bounded, everybody is served in the end, and nothing leaks."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import httpx
import numpy as np
import pytest
from nowcast_proto.messages import NowcastJob, SessionCreate
from nowcast_proto.stream import Decoder

from .service_harness import (
    STREAM_HEADERS,
    Serve,
    Server,
    Training,
    ask,
    body,
    create,
    eventually,
    fetch,
    sequential,
    tensors,
)

pytestmark = [pytest.mark.socket, pytest.mark.slow]

MIB = 2**20


async def until_served(
    client: httpx.AsyncClient, seen: Counter[int], method: str, path: str, **options: object
) -> httpx.Response:
    """Call, and call again when told to come back, as any client should."""
    for attempt in range(2000):
        response = await client.request(method, path, **options)
        seen[response.status_code] += 1
        if response.status_code not in (429, 503):
            return response
        pause = int(response.headers["Retry-After"])
        assert 1 <= pause <= 60
        assert response.json()["code"] in ("busy", "unavailable")
        await asyncio.sleep(pause * min(2**attempt, 16) * random.uniform(0.1, 0.5))
    raise AssertionError(f"{method} {path} was never served")


class Evicted(Exception):
    """The service dropped the session for others; its owner begins again."""


async def call(client: httpx.AsyncClient, seen: Counter[int], status: int, method: str, path: str, **options: object):
    """Call until served, with this status."""
    response = await until_served(client, seen, method, path, **options)
    if response.status_code == 410:
        raise Evicted
    assert response.status_code == status, response.text
    return response


@pytest.mark.timeout(1800)
def test_two_hundred_clients_against_a_small_budget(serve: Serve):
    """200 one-shot calls and 200 sessions of 256 KiB snapshots at once, with room for a handful of histories."""
    training = Training(sequential(128, 256, 128))
    steps = (0, 100)
    request = body(training.request(steps=steps))
    snapshots = {step: body(training.snapshot(step)) for step in steps}
    budget = 8 * MIB
    server = serve(
        budget=budget, max_queue=4, max_queue_per_key=4, max_uploads=8, evict_after=30, max_sessions_per_key=1000
    )
    seen: Counter[int] = Counter()
    wanted = Decoder()

    async def one_shot(client: httpx.AsyncClient) -> bytes:
        response = await call(client, seen, 200, "POST", "/nowcast", content=request, headers=STREAM_HEADERS)
        decoder = Decoder()
        decoder.feed(response.content)
        decoder.finish()
        return b"".join(bytes(f.view()) for f in decoder.frames)

    async def session(client: httpx.AsyncClient, name: str) -> None:
        path = f"/v1/sessions/{name}"
        made = SessionCreate(spec=training.spec, keep=2).model_dump_json()
        job = NowcastJob(nowcast="n", steps=steps, k=10, predictor="linear").model_dump_json(exclude_none=True)
        while True:
            try:
                await call(client, seen, 201, "PUT", path, content=made)
                for step, data in snapshots.items():
                    options = {"content": data, "headers": STREAM_HEADERS}
                    await call(client, seen, 201, "PUT", f"{path}/snapshots/{step}", **options)
                await call(client, seen, 202, "POST", f"{path}/nowcasts", content=job)
                await call(client, seen, 200, "GET", f"{path}/nowcasts/n", params={"wait": 60})
                await call(client, seen, 204, "DELETE", path)
                return
            except Evicted:
                continue

    async def everybody(count: int) -> list[bytes]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client,
            asyncio.TaskGroup() as all_,
        ):
            answers = [all_.create_task(one_shot(client)) for _ in range(count)]
            for i in range(count):
                all_.create_task(session(client, f"s{i}"))
        return [answer.result() for answer in answers]

    with server.client() as client:
        wanted.feed(client.post("/nowcast", content=request, headers=STREAM_HEADERS).content)
        asyncio.run(everybody(10))  # threads, their heaps, caches
        before = server.settled()
        server.reset_peak()
        answers = asyncio.run(everybody(200))
        assert set(answers) == {b"".join(bytes(f.view()) for f in wanted.frames)}
        assert seen[429] > 50, f"the budget was meant to be small: {seen}"
        assert seen[500] == 0
        # Admitting everybody would reserve 200 one-shots of 0.75 MiB and 200 sessions of 1.25 MiB: 400 MiB. What it may
        # take is the budget and 400 connections with at most 160 KiB of buffers each.
        assert server.peak() - before < budget + 400 * 160 * 1024, f"{(server.peak() - before) / MIB:.0f} MiB"
        metrics = client.get("/metrics").text
        assert "nowcast_held_bytes 0.0" in metrics
        assert "nowcast_sessions 0.0" in metrics
        assert client.get("/readyz").status_code == 200


@pytest.mark.timeout(1800)
def test_soak_of_five_thousand_nowcasts(serve: Serve):
    """5,000 nowcasts of many clients and sessions, some deleted, some left to expire: memory stays, nothing is left."""
    server = serve(session_expiry=15, max_queue=64, max_queue_per_key=64, max_uploads=64, log_level="warning")
    training = Training(sequential(8, 16, 4))
    steps = (0, 100)
    snapshots = {step: body(training.snapshot(step)) for step in steps}
    request = body(training.request(steps=steps))
    seen: Counter[int] = Counter()
    done = 0

    async def session(client: httpx.AsyncClient, name: str, nowcasts: int) -> None:
        nonlocal done
        made = SessionCreate(spec=training.spec, keep=2).model_dump_json()
        await until_served(client, seen, "PUT", f"/v1/sessions/{name}", content=made)
        for step, data in snapshots.items():
            path = f"/v1/sessions/{name}/snapshots/{step}"
            await until_served(client, seen, "PUT", path, content=data, headers=STREAM_HEADERS)
        for number in range(nowcasts):
            job = NowcastJob(nowcast=f"n{number}", steps=steps, k=1 + number, predictor="linear")
            path = f"/v1/sessions/{name}/nowcasts"
            content = job.model_dump_json(exclude_none=True)
            response = await until_served(client, seen, "POST", path, content=content)
            assert response.status_code == 202, response.text
            response = await client.get(response.headers["Location"], params={"wait": 30})
            assert response.status_code == 200, response.text
            done += 1
        if hash(name) % 2:
            await client.delete(f"/v1/sessions/{name}")

    async def round_of(number: int, clients: int, sessions: int, nowcasts: int, shots: int) -> None:
        nonlocal done

        async def one(i: int) -> None:
            nonlocal done
            async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
                for j in range(sessions):
                    await session(client, f"s-{number}-{i}-{j}", nowcasts)
                for _ in range(shots):
                    options = {"content": request, "headers": STREAM_HEADERS}
                    response = await until_served(client, seen, "POST", "/nowcast", **options)
                    assert response.status_code == 200, response.text
                    done += 1

        await asyncio.gather(*(one(i) for i in range(clients)))

    # Twice 500 to warm up: allocator, caches, thread stacks.
    for number in range(2):
        asyncio.run(round_of(number, 10, 5, 8, 10))
    warm, warm_at = server.settled(), done
    number = 2
    while done < 5000 + warm_at:
        asyncio.run(round_of(number, 10, 5, 8, 10))
        number += 1
    assert done - warm_at >= 5000
    assert eventually(lambda: server.rss() < 1.05 * warm), f"grew from {warm / MIB:.0f} to {server.rss() / MIB:.0f} MiB"
    with server.client() as client:
        assert eventually(lambda: "nowcast_sessions 0.0" in client.get("/metrics").text, 60)
        metrics = client.get("/metrics").text
        assert "nowcast_held_bytes 0.0" in metrics
        assert "nowcast_queue_depth 0.0" in metrics
    assert seen[500] == 0


def test_large_histories_go_back_to_the_system(server: Server):
    """Memory of dropped sessions is returned, not kept by the heap: ten more of them leave not one snapshot behind."""
    training = Training(sequential(512, 2048, 512))
    steps = (0, 100, 200)
    snapshots = {step: body(training.snapshot(step)) for step in steps}
    one = training.spec.numel * 4

    def come_and_go(client: httpx.Client) -> None:
        create(client, "large", training.spec)
        for step, data in snapshots.items():
            path = f"/v1/sessions/large/snapshots/{step}"
            assert client.put(path, content=data, headers=STREAM_HEADERS).status_code == 201
        ask(client, "large", "n", steps)
        _, found = tensors(fetch(client, "large", "n"))
        assert all(np.isfinite(array).all() for array in found.values())
        held = server.rss()
        client.delete("/v1/sessions/large")
        assert eventually(lambda: held - server.rss() > 2 * one), f"of {held / MIB:.0f} MiB"

    with server.client() as client:
        client.get("/readyz")
        for _ in range(3):  # threads, their heaps, caches
            come_and_go(client)
        warm = server.settled()
        for _ in range(10):
            come_and_go(client)
        assert eventually(lambda: server.rss() - warm < one, 20), f"{(server.rss() - warm) / MIB:.1f} MiB were kept"
