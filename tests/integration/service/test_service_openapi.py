"""Schemathesis against the running service: whatever the document allows, no server error and no surprise."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nowcast_proto.version import MEDIA_TYPE
from nowcast_service.http.app import create_app
from nowcast_service.settings import Settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from .service_harness import Server, Training, body, create, send, sequential

pytestmark = [pytest.mark.socket, pytest.mark.slow]

TRAINING = Training(sequential(8, 16, 4))
STREAMS = [body(TRAINING.request()), body(TRAINING.snapshot(0))]
WHOLE = st.sampled_from(STREAMS)
BODIES = st.one_of(WHOLE, st.binary(max_size=200), st.tuples(WHOLE, st.integers(0, 400)).map(lambda b: b[0][: b[1]]))

schemathesis.openapi.media_type(MEDIA_TYPE, BODIES)

SCHEMA = schemathesis.openapi.from_dict(create_app(Settings(predictor="linear")).openapi())
ENDLESS = "GET /v1/watch"
"""A stream that goes on as long as somebody reads: the tests of the page read it."""
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}
del OPERATIONS[ENDLESS]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def prepared(server: Server) -> Server:
    """A service with a session called s1 that holds a snapshot."""
    with server.client() as client:
        create(client, "s1", TRAINING.spec)
        send(client, "PUT", "/v1/sessions/s1/snapshots/0", TRAINING.snapshot(0))
    return server


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "forbidden"])
@pytest.mark.parametrize("label", OPERATIONS)
def test_the_service_does_what_its_document_says(prepared: Server, label: str, mode: GenerationMode):
    operation = OPERATIONS[label]
    if mode is GenerationMode.NEGATIVE and not (operation.path_parameters or operation.query or operation.headers):
        mode = GenerationMode.POSITIVE  # nothing in it can be wrong

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
    @given(operation.as_strategy(generation_mode=mode), st.booleans())
    def check(case, known):
        if known and "session" in (case.path_parameters or {}) and case.method != "DELETE":
            case.path_parameters["session"] = "s1"  # get past "no such session" as often as not
        case.call_and_validate(base_url=prepared.url, checks=CHECKS)

    check()


def test_the_document_is_complete(server: Server):
    with server.client() as client:
        document = client.get("/openapi.json").json()
    assert set(document["paths"]) >= {"/v1/nowcast", "/v1/sessions/{session}", "/v1/models", "/readyz"}
    for name in ("SessionCreate", "NowcastJob", "Verdict", "ErrorBody", "NowcastRequest", "NowcastReplyHeader"):
        assert name in document["components"]["schemas"]
    referenced = {part.split("'")[0] for part in str(document).split("#/components/schemas/")[1:]}
    assert referenced <= set(document["components"]["schemas"])
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (path, method)
            assert operation["description"], (path, method)
            for content in operation.get("requestBody", {}).get("content", {}).values():
                assert "example" in content or content["schema"].get("format") == "binary"
