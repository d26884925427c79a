"""Keys and tenants, swept over every route the application has."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from nowcast_service.http.app import OPEN_ROUTES, create_app
from nowcast_service.runtime.keys import hash_key, new_key
from nowcast_service.settings import Settings

from .service_harness import Server, Training, ask, create, error, fetch, send, sequential, tensors

pytestmark = pytest.mark.socket

SPEC = sequential(8, 16, 4)
TRAINING = Training(SPEC)
ALICE, BOB = new_key(), new_key()


def all_routes() -> list[tuple[str, str]]:
    """Every (method, path) the application answers, the documentation included."""

    def walk(routes: list) -> Iterator[tuple[str, str]]:
        for route in routes:
            inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
            if inner:
                yield from walk(inner)
            elif getattr(route, "methods", None):
                for method in sorted(route.methods - {"HEAD", "OPTIONS"}):
                    yield method, route.path

    return sorted(walk(create_app(Settings(predictor="linear")).routes))


ROUTES = all_routes()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with two tenants, one key in a file and one in the environment."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = folder / "keys"
    keys.write_text(f"# who may call\nalice:{hash_key(ALICE)}  # the first tenant\n")
    environment = {"NOWCAST_API_KEYS_FILE": str(keys), "NOWCAST_API_KEY_HASHES": f"bob:{hash_key(BOB)}"}
    server = Server(folder, environment).start()
    with server.client(ALICE) as client:
        assert create(client, "hers", SPEC).status_code == 201
        for step in (0, 100):
            assert send(client, "PUT", f"/v1/sessions/hers/snapshots/{step}", TRAINING.snapshot(step)).is_success
        ask(client, "hers", "n1", (0, 100))
        tensors(fetch(client, "hers", "n1"))
    yield server
    server.stop()


def call(client: httpx.Client, method: str, path: str) -> httpx.Response:
    """Call a route as it would be called on Alice's session."""
    filled = path.format(session="hers", training="hers", step=0, nowcast="n1")
    if path.endswith(("nowcast", "{step}")) and method in ("POST", "PUT"):
        encoder = TRAINING.request() if path.endswith("nowcast") else TRAINING.snapshot(0)
        return send(client, method, filled, encoder)
    bodies = {
        "/v1/sessions/{session}/nowcasts": {"nowcast": "n1", "steps": [0, 100], "k": 10, "predictor": "linear"},
        "/v1/sessions/{session}/verdicts": {"nowcast": "n1", "outcome": "applied"},
        "/v1/sessions/{session}/reports": {"step": 1},
    }
    return client.request(method, filled, json=bodies.get(path))


def test_the_sweep_knows_all_routes():
    assert len(ROUTES) >= 17
    assert {("POST", "/nowcast"), ("DELETE", "/v1/sessions/{session}"), ("GET", "/metrics")} <= set(ROUTES)
    assert {("GET", "/openapi.json"), ("GET", "/docs")} <= set(ROUTES)
    assert {path for _, path in ROUTES} >= OPEN_ROUTES


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_key_and_wrong_keys_are_refused(guarded: Server, method: str, path: str):
    wrong = [None, new_key(), ALICE[:-1], ALICE + "x", hash_key(ALICE)]
    for key in wrong:
        with guarded.client(key) as client:
            response = call(client, method, path)
        if path in OPEN_ROUTES:
            assert response.status_code == 200
        else:
            found = error(response, 401, "unauthorized")
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert ALICE not in response.text
            assert hash_key(ALICE) not in response.text
            assert not found["detail"]


@pytest.mark.parametrize(("method", "path"), [r for r in ROUTES if "{session}" in r[1]])
def test_another_tenants_session_does_not_exist(guarded: Server, method: str, path: str):
    with guarded.client(BOB) as bob, guarded.client(ALICE) as alice:
        before = alice.get("/v1/sessions/hers").json()
        if (method, path) == ("PUT", "/v1/sessions/{session}"):
            # He may have one of the same name: it is another session, and hers stays as it is.
            assert create(bob, "hers", sequential(2, 3)).status_code == 201
            assert bob.get("/v1/sessions/hers").json()["snapshots"] == []
            bob.delete("/v1/sessions/hers")
        elif method == "DELETE":
            assert call(bob, method, path).status_code == 204  # nothing of his to drop
        else:
            error(call(bob, method, path), 404, "not_found")
        after = alice.get("/v1/sessions/hers").json()
        for state in (before, after):
            state.pop("expires_in")
            for snapshot in state["snapshots"]:
                snapshot.pop("age")
        assert after == before


def test_other_schemes_are_no_keys(guarded: Server):
    with guarded.client() as client:
        for value in (f"Basic {ALICE}", ALICE, "Bearer", f"Bearer {ALICE} {ALICE}", "Bearer \xff\xfe"):
            response = client.get("/v1/models", headers={"Authorization": value.encode("latin-1")})
            error(response, 401, "unauthorized")
        assert client.get("/v1/models", headers={"Authorization": f"bearer {ALICE}"}).status_code == 200


def test_routes_that_do_not_exist_need_a_key_too(guarded: Server):
    with guarded.client() as client:
        error(client.get("/nope"), 401, "unauthorized")
    with guarded.client(ALICE) as client:
        error(client.get("/nope"), 404, "not_found")
        response = client.patch("/v1/sessions/hers")
        assert set(error(response, 405, "method_not_allowed")["detail"]["allow"].split(", ")) <= {
            "PUT",
            "GET",
            "DELETE",
        }
        error(client.get("/v1/sessions/hers/snapshots/minus"), 422, "invalid_request")
        error(client.get("/v1/sessions/.hidden"), 422, "invalid_request")
