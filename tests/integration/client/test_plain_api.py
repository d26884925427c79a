"""The API without a training loop, synchronous and asynchronous, against a real server."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from nowcast_client import AsyncNowcastClient, NowcastClient
from nowcast_client.errors import ConnectFailed
from nowcast_lab.evaluate.remote import Remote
from nowcast_proto.errors import InvalidSnapshot, Unauthorized
from nowcast_proto.messages import HealthReply, ModelsReply
from nowcast_proto.spec import ArchitectureSpec

from .harness import Server

pytestmark = pytest.mark.socket

SPEC = ArchitectureSpec.model_validate(
    {
        "family": "sequential",
        "parameters": [{"name": "0.weight", "shape": [3, 4]}, {"name": "0.bias", "shape": [3]}],
    }
)
RNG = np.random.default_rng(0)
START = {p.name: RNG.standard_normal(p.shape).astype(np.float32) for p in SPEC.parameters}
STRIDE = {p.name: RNG.standard_normal(p.shape).astype(np.float32) for p in SPEC.parameters}
STRAIGHT = [{name: START[name] + i * STRIDE[name] for name in START} for i in range(5)]
"""A straight path, whose continuation everybody knows."""


def _is_continued(reply: dict[str, np.ndarray], k: int) -> bool:
    return all(np.allclose(reply[name], START[name] + (4 + k) * STRIDE[name], atol=1e-3) for name in START)


def test_nowcast_continues_a_straight_path(server: Server) -> None:
    with NowcastClient(server.url) as client:
        assert _is_continued(client.nowcast(SPEC, STRAIGHT, 7, predictor="linear"), 7)


def test_delta_is_what_is_to_be_added(server: Server) -> None:
    with NowcastClient(server.url) as client:
        delta = client.nowcast(SPEC, STRAIGHT, 3, predictor="linear", reply="delta")
    for name in START:
        np.testing.assert_allclose(delta[name], 3 * STRIDE[name], atol=1e-3)


def test_torch_tensors_come_back_as_torch_tensors(server: Server) -> None:
    snapshots = [{name: torch.from_numpy(array) for name, array in one.items()} for one in STRAIGHT]
    with NowcastClient(server.url) as client:
        reply = client.nowcast(SPEC, snapshots, 1, predictor="linear")
    assert all(isinstance(tensor, torch.Tensor) for tensor in reply.values())
    assert _is_continued({name: tensor.numpy() for name, tensor in reply.items()}, 1)


def test_a_bad_snapshot_is_refused_by_name(server: Server) -> None:
    broken = [dict(one) for one in STRAIGHT]
    broken[2]["0.bias"] = np.array([1.0, np.nan, 2.0], dtype=np.float32)
    with NowcastClient(server.url) as client, pytest.raises(InvalidSnapshot, match=r"0\.bias"):
        client.nowcast(SPEC, broken, 1, predictor="linear")


def test_many_nowcasts_at_once(server: Server) -> None:
    async def ask() -> list[dict[str, np.ndarray]]:
        async with AsyncNowcastClient(server.url) as client:
            return await asyncio.gather(*(client.nowcast(SPEC, STRAIGHT, k, predictor="linear") for k in range(1, 9)))

    replies = asyncio.run(ask())
    assert all(_is_continued(reply, k) for k, reply in enumerate(replies, start=1))


def test_async_says_what_is_served(server: Server) -> None:
    async def ask() -> tuple[ModelsReply, HealthReply]:
        async with AsyncNowcastClient(server.url) as client:
            return await client.models(), await client.ready()

    models, ready = asyncio.run(ask())
    assert ready.status == "ok"
    assert {"linear", "lawa", "snoo", "identity"} <= {model.predictor for model in models.models}
    assert {"gpt2", "llama", "sequential"} <= set(models.families)


def test_no_server_is_a_typed_error() -> None:
    async def ask() -> None:
        async with AsyncNowcastClient("http://127.0.0.1:9", timeout=1.0) as client:
            await client.nowcast(SPEC, STRAIGHT, 1)

    with pytest.raises(ConnectFailed, match="check the url"):
        asyncio.run(ask())


def test_the_http_library_writes_no_line_into_the_user_s_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Not for our requests; the user's own are still his to see."""
    with caplog.at_level(logging.DEBUG):
        with NowcastClient(server.url) as client:
            client.models()
        asyncio.run(_ready(server.url))
        mine = [record.name for record in caplog.records if record.name.split(".")[0] in ("httpx", "httpcore")]
        httpx.get(server.url + "/healthz", trust_env=False)
    assert not mine
    assert any(record.name == "httpx" for record in caplog.records)


async def _ready(url: str) -> HealthReply:
    async with AsyncNowcastClient(url) as client:
        return await client.ready()


def test_every_answer_says_which_process_gave_it(server: Server) -> None:
    answers = [httpx.get(server.url + path, trust_env=False) for path in ("/healthz", "/v1/models", "/no/such/route")]
    assert len({answer.headers["nowcast-instance"] for answer in answers}) == 1


def test_an_evaluation_asks_a_server_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the one client there is; the key comes from the environment, as for everybody."""
    server = Server(tmp_path, environment={"NOWCAST_API_KEY": "a long enough secret".replace(" ", "-")}).start()
    snapshots = [{name: torch.from_numpy(array) for name, array in one.items()} for one in STRAIGHT]
    try:
        with pytest.raises(Unauthorized):
            Remote(server.url, "linear", None)(SPEC, snapshots, 2, {})
        monkeypatch.setenv("NOWCAST_API_KEY", "a-long-enough-secret")
        found, state = Remote(server.url, "linear", None)(SPEC, snapshots, 2, {})
    finally:
        server.stop()
    assert _is_continued({name: tensor.numpy() for name, tensor in found.items()}, 2)
    assert state == {}
