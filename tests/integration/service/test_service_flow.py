"""What the service answers when all is well: one shot and sessions, over TCP, unix socket and TLS."""

from __future__ import annotations

import ssl
import subprocess
import time

import numpy as np
import pytest
import torch
from nowcast_proto.arrays import from_bfloat16, to_bfloat16
from nowcast_proto.errors import ErrorBody, NowcastError, UnsupportedVersion
from nowcast_proto.messages import NowcastReplyHeader, SessionState, read_message
from nowcast_service.history import History
from nowcast_service.predictors import make_predictor
from nowcast_service.predictors.base import ahead

from .service_harness import (
    STREAM_HEADERS,
    Serve,
    Server,
    Training,
    ask,
    body,
    create,
    error,
    eventually,
    fetch,
    send,
    sequential,
    tensors,
)

pytestmark = pytest.mark.socket

SPEC = sequential(8, 16, 4)
TRAINING = Training(SPEC)
STEPS = (0, 100, 200, 300, 400)


def expected(predictor: str = "linear", k: int = 10, steps: tuple[int, ...] = STEPS) -> dict[str, np.ndarray]:
    """The same nowcast, without a service."""
    snapshots = [{n: torch.from_numpy(a) for n, a in TRAINING.at(step).items()} for step in steps]
    parameters, _ = ahead(make_predictor(predictor), History.of(SPEC, snapshots), k)
    return {name: tensor.numpy() for name, tensor in parameters.items()}


@pytest.mark.parametrize("path", ["/nowcast", "/v1/nowcast"])
@pytest.mark.parametrize("predictor", ["linear", "lawa", "snoo", "identity"])
def test_one_shot_equals_the_bare_predictor(server: Server, path: str, predictor: str):
    with server.client() as client:
        header, found = tensors(send(client, "POST", path, TRAINING.request(predictor=predictor)))
    wanted = expected(predictor)
    assert list(found) == list(SPEC.shapes())
    for name in wanted:
        assert np.array_equal(found[name], wanted[name])
    reply = read_message(NowcastReplyHeader, header)
    assert (reply.predictor, reply.k, reply.spec_digest) == (predictor, 10, SPEC.digest())
    assert reply.timings.compute > 0


def test_delta_scale_and_reply_dtype(server: Server):
    newest, wanted = TRAINING.at(400), expected()
    with server.client() as client:
        _, delta = tensors(send(client, "POST", "/nowcast", TRAINING.request(reply="delta")))
        _, half = tensors(send(client, "POST", "/nowcast", TRAINING.request(update_scale=0.5)))
        _, coarse = tensors(send(client, "POST", "/nowcast", TRAINING.request(reply_dtype="bfloat16")))
    for name in wanted:
        assert np.array_equal(newest[name] + delta[name], wanted[name])
        assert np.allclose(half[name], (wanted[name] + newest[name]) / 2, atol=1e-6)
        assert np.array_equal(coarse[name], from_bfloat16(to_bfloat16(wanted[name])))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.3), ("float16", 0.05)])
def test_narrow_snapshots_are_understood(server: Server, dtype: str, tolerance: float):
    with server.client() as client:
        _, found = tensors(send(client, "POST", "/nowcast", TRAINING.request(dtype=dtype)))
    for name, wanted in expected().items():
        # A horizon of 10 strides magnifies the rounding of the snapshots several times over.
        assert np.allclose(found[name], wanted, atol=tolerance)


def test_session_flow(server: Server):
    with server.client() as client:
        assert create(client, "flow", SPEC).status_code == 201
        assert create(client, "flow", SPEC).status_code == 200
        for step in STEPS:
            response = send(client, "PUT", f"/v1/sessions/flow/snapshots/{step}", TRAINING.snapshot(step))
            assert response.status_code == 201, response.text
        asked = ask(client, "flow", "n1", STEPS, reply="delta")
        assert asked.status_code == 202
        assert asked.headers["Location"] == "/v1/sessions/flow/nowcasts/n1"
        header, found = tensors(client.get(asked.headers["Location"], params={"wait": 30}))
        newest = TRAINING.at(400)
        for name, wanted in expected().items():
            # The displacement itself: not what is left of it after it was added and the newest weights taken off.
            assert np.allclose(found[name], wanted - newest[name], rtol=1e-5, atol=1e-6)
        assert read_message(NowcastReplyHeader, header).steps == STEPS
        state = SessionState.model_validate(client.get("/v1/sessions/flow").json())
        assert [s.step for s in state.snapshots] == list(STEPS)
        assert [n.state for n in state.nowcasts] == ["done"]
        assert client.delete("/v1/sessions/flow").status_code == 204
        assert client.delete("/v1/sessions/flow").status_code == 204
        error(client.get("/v1/sessions/flow"), 404, "not_found")


def test_everything_in_a_session_can_be_repeated(server: Server):
    with server.client() as client:
        create(client, "again", SPEC)
        for step in STEPS[:2]:
            for status in (201, 200, 200):
                response = send(client, "PUT", f"/v1/sessions/again/snapshots/{step}", TRAINING.snapshot(step))
                assert response.status_code == status
        assert len(client.get("/v1/sessions/again").json()["snapshots"]) == 2
        for _ in range(2):
            assert ask(client, "again", "n1", STEPS[:2]).status_code == 202
        first = fetch(client, "again", "n1").content
        assert fetch(client, "again", "n1").content == first
        assert ask(client, "again", "n1", STEPS[:2]).json()["state"] == "done"


def test_another_body_under_the_same_name_is_a_conflict(server: Server):
    other = Training(SPEC, seed=1)
    with server.client() as client:
        create(client, "conflict", SPEC)
        error(create(client, "conflict", sequential(8, 16, 5)), 409, "conflict")
        error(create(client, "conflict", SPEC, keep=6), 409, "conflict")
        for step in (0, 1):
            send(client, "PUT", f"/v1/sessions/conflict/snapshots/{step}", TRAINING.snapshot(step))
        found = error(send(client, "PUT", "/v1/sessions/conflict/snapshots/0", other.snapshot(0)), 409, "conflict")
        assert found["detail"]["digest"] == TRAINING.snapshot(0).header.content_digest()
        error(send(client, "PUT", "/v1/sessions/conflict/snapshots/7", TRAINING.snapshot(0)), 409, "conflict")
        ask(client, "conflict", "n1", (0, 1))
        error(ask(client, "conflict", "n1", (0, 1), k=11), 409, "conflict")
        # the first contents are still what is held
        _, found_tensors = tensors(fetch(client, "conflict", "n1"))
        wanted = expected(steps=(0, 1))
        assert all(np.array_equal(found_tensors[name], wanted[name]) for name in wanted)


def test_missing_snapshots_are_listed_and_can_be_sent_again(server: Server):
    with server.client() as client:
        create(client, "missing", SPEC)
        send(client, "PUT", "/v1/sessions/missing/snapshots/200", TRAINING.snapshot(200))
        found = error(ask(client, "missing", "n1", STEPS), 409, "missing_snapshots")
        assert found["detail"]["missing"] == [0, 100, 300, 400]
        for step in found["detail"]["missing"]:
            send(client, "PUT", f"/v1/sessions/missing/snapshots/{step}", TRAINING.snapshot(step))
        assert ask(client, "missing", "n1", STEPS).status_code == 202


def test_only_the_newest_snapshots_and_answers_are_kept(server: Server):
    with server.client() as client:
        create(client, "keep", SPEC, keep=3)
        for step in STEPS:
            send(client, "PUT", f"/v1/sessions/keep/snapshots/{step}", TRAINING.snapshot(step))
        state = client.get("/v1/sessions/keep").json()
        assert [s["step"] for s in state["snapshots"]] == [200, 300, 400]
        assert client.get("/v1/sessions/keep/snapshots/0").json()["state"] == "missing"
        for number in range(4):
            assert ask(client, "keep", f"n{number}", (200, 300, 400)).status_code == 202
            tensors(fetch(client, "keep", f"n{number}"))
        error(fetch(client, "keep", "n0"), 404, "not_found")
        tensors(fetch(client, "keep", "n3"))


def test_snoo_forgets_a_nowcast_that_was_rolled_back(server: Server):
    """Momentum of a nowcast that training refused must not leak into the next."""

    def second(verdict: str | None) -> dict[str, np.ndarray]:
        with server.client() as client:
            name = f"snoo-{verdict}"
            create(client, name, SPEC, keep=8)
            for step in (0, 100, 200, 300):
                send(client, "PUT", f"/v1/sessions/{name}/snapshots/{step}", TRAINING.snapshot(step))
            ask(client, name, "n1", (0, 100), predictor="snoo")
            tensors(fetch(client, name, "n1"))
            if verdict:
                client.post(f"/v1/sessions/{name}/verdicts", json={"nowcast": "n1", "outcome": verdict})
            ask(client, name, "n2", (200, 300), predictor="snoo")
            return tensors(fetch(client, name, "n2"))[1]

    fresh = expected("snoo", steps=(200, 300))
    kept, applied, undone = second(None), second("applied"), second("rolled_back")
    assert all(np.array_equal(undone[name], fresh[name]) for name in fresh)
    assert all(np.array_equal(kept[name], applied[name]) for name in fresh)
    assert any(not np.array_equal(kept[name], fresh[name]) for name in fresh)


def test_verdicts_are_counted_once(server: Server):
    def counted(client) -> float:
        for line in client.get("/metrics").text.splitlines():
            if line.startswith('nowcast_verdicts_total{outcome="rolled_back"}'):
                return float(line.split()[-1])
        raise AssertionError("no such metric")

    with server.client() as client:
        create(client, "verdict", SPEC)
        before = counted(client)
        verdict = {"nowcast": "x", "outcome": "rolled_back"}
        error(client.post("/v1/sessions/verdict/verdicts", json=verdict), 404, "not_found")  # on nothing
        for step in (0, 100):
            send(client, "PUT", f"/v1/sessions/verdict/snapshots/{step}", TRAINING.snapshot(step))
        assert ask(client, "verdict", "x", (0, 100)).status_code == 202
        for new in (True, False):
            said = client.post("/v1/sessions/verdict/verdicts", json=verdict)
            assert said.json() == {"nowcast": "x", "outcome": "rolled_back", "counted": new}
        assert counted(client) == before + 1


def test_metrics_tell_stages_bytes_and_failures(server: Server):
    with server.client() as client:
        tensors(send(client, "POST", "/nowcast", TRAINING.request()))
        client.get("/v1/sessions/nobody")
        text = client.get("/metrics").text
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}
    for stage in ("queue", "input", "compute", "output"):
        assert values[f'nowcast_stage_seconds_count{{stage="{stage}"}}'] >= 1
    assert values['nowcast_bytes_total{direction="in"}'] > TRAINING.request().content_length - 1
    assert values['nowcast_bytes_total{direction="out"}'] > SPEC.numel * 4
    assert values['nowcast_failures_total{reason="not_found"}'] >= 1
    assert values['nowcast_nowcasts_total{predictor="linear",result="ok"}'] >= 1
    assert values["nowcast_budget_bytes"] == 8 * 2**30


def test_failed_nowcasts_say_why(server: Server):
    with server.client() as client:
        error(send(client, "POST", "/nowcast", TRAINING.request(steps=(0,))), 422, "invalid_snapshot")
        far = Training(SPEC)
        far._pace["2.bias"][0] = 3e37
        create(client, "failing", SPEC)
        for step in (0, 100):
            send(client, "PUT", f"/v1/sessions/failing/snapshots/{step}", far.snapshot(step))
        ask(client, "failing", "n1", (0, 100), k=100)
        error(fetch(client, "failing", "n1"), 422, "invalid_snapshot")


@pytest.mark.parametrize(
    ("steps", "fields", "says"),
    [
        ((0,), {}, "1 snapshots"),
        ((0, 100, 300), {}, "evenly spaced"),
        ((0, 100), {"k": 10_000, "predictor": "nino"}, "k=10000"),
        ((0, 100), {"predictor": "nino"}, "exactly 5"),
    ],
)
def test_what_can_be_known_is_refused_when_it_is_asked(server: Server, steps: tuple, fields: dict, says: str):
    """Before a single snapshot has been sent."""
    with server.client() as client:
        create(client, "early", SPEC)
        response = ask(client, "early", "n1", steps, **fields)
        assert response.status_code == 422
        assert says in response.text
        error(fetch(client, "early", "n1"), 404, "not_found")


def test_a_session_of_no_use_is_not_made(server: Server):
    strange = SPEC.model_copy(update={"family": "nosuch"}).model_dump(mode="json")
    with server.client() as client:
        error(client.put("/v1/sessions/strange", json={"spec": strange}), 422, "unsupported_architecture")
        error(client.get("/v1/sessions/strange"), 404, "not_found")
        assert client.put("/v1/sessions/strange?predictor=linear", json={"spec": strange}).status_code == 201
        few = {"spec": SPEC.model_dump(mode="json"), "keep": 2}
        error(client.put("/v1/sessions/few?predictor=nino", json=few), 422, "invalid_request")
        assert client.put("/v1/sessions/few?predictor=linear", json=few).status_code == 201


def test_what_does_not_fit_the_spec_is_refused_by_name(server: Server):
    other = Training(sequential(8, 17, 4))
    with server.client() as client:
        create(client, "fit", SPEC)
        path = "/v1/sessions/fit/snapshots/0"
        found = error(send(client, "PUT", path, other.snapshot(0)), 422, "invalid_snapshot")
        assert "0.weight" in found["message"]
        assert found["expected"] == "shape [16, 8]"
        bad = Training(SPEC)
        bad._start["2.bias"][1] = np.nan
        assert "2.bias" in error(send(client, "PUT", path, bad.snapshot(0)), 422, "invalid_snapshot")["message"]
        assert client.get(path).json()["state"] == "missing"
        wide = Training(SPEC)
        create(client, "narrow", SPEC, dtype="bfloat16")
        error(send(client, "PUT", "/v1/sessions/narrow/snapshots/0", wide.snapshot(0)), 422, "invalid_snapshot")
        path = "/v1/sessions/narrow/snapshots/0"
        assert send(client, "PUT", path, wide.snapshot(0, "bfloat16")).status_code == 201


def test_large_finite_values_are_not_taken_for_infinite_ones(server: Server):
    huge = Training(SPEC)
    for array in huge._start.values():
        array[...] = 3e38
    with server.client() as client:
        create(client, "huge", SPEC)
        assert send(client, "PUT", "/v1/sessions/huge/snapshots/0", huge.snapshot(0)).status_code == 201


def test_unknown_versions_and_media_types(server: Server):
    with server.client() as client:
        data = body(TRAINING.request())
        other = client.post("/nowcast", content=data, headers={"Content-Type": "application/vnd.nowcast.v9"})
        assert error(other, 400, "unsupported_version")["detail"] == {"served": [1]}
        error(client.post("/nowcast", content=data, headers={"Content-Type": "text/plain"}), 422, "invalid_request")
        newer = client.post(
            "/nowcast", content=data.replace(b"\xa7version\x01", b"\xa7version\x02"), headers=STREAM_HEADERS
        )
        found = error(newer, 400, "unsupported_version")
        assert isinstance(NowcastError.from_body(ErrorBody(**found)), UnsupportedVersion)


def test_models_names_what_there_is(server: Server):
    with server.client() as client:
        found = client.get("/v1/models").json()
    assert {"linear", "lawa", "snoo", "identity"} <= {model["name"] for model in found["models"]}
    assert [model["default"] for model in found["models"]].count(True) == 1
    assert {"sequential", "gpt2", "llama"} <= set(found["families"])
    assert found["protocol_versions"] == [1]


def test_clients_cannot_name_files(server: Server, tmp_path):
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"secret")
    with server.client() as client:
        for name in (str(secret), "../../etc/passwd", "/etc/passwd"):
            error(send(client, "POST", "/nowcast", TRAINING.request(predictor=None, checkpoint=name)), 404, "not_found")


def test_over_a_unix_socket(serve: Serve, tmp_path):
    server = serve(unix_socket=tmp_path / "nowcast.sock")
    assert (tmp_path / "nowcast.sock").stat().st_mode & 0o777 == 0o600
    with server.client() as client:
        _, found = tensors(send(client, "POST", "/nowcast", TRAINING.request()))
    assert all(np.array_equal(found[name], wanted) for name, wanted in expected().items())


def test_over_tls(serve: Serve, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    names = ["-keyout", key, "-out", certificate, "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make.split(), *names], check=True, capture_output=True)
    server = serve(tls_certificate=certificate, tls_key=key)
    assert server.url.startswith("https://")
    with server.client(verify=ssl.create_default_context(cafile=certificate)) as client:
        _, found = tensors(send(client, "POST", "/nowcast", TRAINING.request()))
    assert all(np.array_equal(found[name], wanted) for name, wanted in expected().items())


def test_sessions_expire_with_a_clear_error(serve: Serve):
    with serve(session_expiry=0.3).client() as client:
        create(client, "short", SPEC)
        # Nobody asks for it: its memory is given back all the same.
        assert eventually(lambda: "nowcast_held_bytes 0.0" in client.get("/metrics").text)
        error(client.get("/v1/sessions/short"), 410, "expired")
        assert create(client, "short", SPEC).status_code == 201


def test_the_longest_idle_session_makes_room(server: Server, serve: Serve):
    with server.client() as client:
        need = create(client, "probe", SPEC).json()["bytes_held"]
    idle = 3.0  # far longer than the first three calls take, so that none of them finds an idle session
    with serve(budget=2 * need, evict_after=idle).client() as client:
        assert create(client, "first", SPEC).status_code == 201
        assert create(client, "second", SPEC).status_code == 201
        busy = create(client, "third", SPEC)
        error(busy, 429, "busy")
        assert int(busy.headers["Retry-After"]) >= 1
        time.sleep(idle + 0.1)
        client.get("/v1/sessions/first")  # now the second one is idle for longest
        assert create(client, "third", SPEC).status_code == 201
        error(client.get("/v1/sessions/second"), 410, "expired")
        assert client.get("/v1/sessions/first").status_code == 200
        error(create(client, "large", sequential(80, 160, 40)), 413, "too_large")


def test_session_header_must_agree(server: Server):
    with server.client() as client:
        create(client, "header", SPEC)
        assert client.get("/v1/sessions/header", headers={"Nowcast-Session": "header"}).status_code == 200
        error(client.get("/v1/sessions/header", headers={"Nowcast-Session": "other"}), 422, "invalid_request")


def test_deadlines_are_kept(server: Server):
    with server.client() as client:
        error(send(client, "POST", "/nowcast", TRAINING.request(deadline=1e-6)), 504, "deadline_exceeded")
        create(client, "late", SPEC)
        for step in (0, 1):
            send(client, "PUT", f"/v1/sessions/late/snapshots/{step}", TRAINING.snapshot(step))
        ask(client, "late", "n1", (0, 1), deadline=1e-6)
        error(fetch(client, "late", "n1"), 504, "deadline_exceeded")
