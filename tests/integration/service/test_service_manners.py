"""Small manners of HTTP, of the log and of the process, seen from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .service_harness import Serve, Server, Training, eventually, send, sequential

pytestmark = pytest.mark.socket


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory):
    """A service that logs for machines."""
    running = Server(tmp_path_factory.mktemp("talkative"), {"NOWCAST_LOG_FORMAT": "json"}).start()
    yield running
    running.stop()


@pytest.mark.parametrize("path", ["/healthz", "/v1/models", "/metrics", "/docs", "/openapi.json", "/v1/sessions/none"])
def test_head_is_get_without_a_body(talkative: Server, path: str):
    with talkative.client() as client:
        head, get = client.head(path), client.get(path)
        assert head.status_code == get.status_code
        assert head.headers["content-type"] == get.headers["content-type"]
        assert head.content == b""
        assert client.get("/healthz").status_code == 200  # on the same connection: nothing was left in it


def test_head_where_there_is_no_get(talkative: Server):
    with talkative.client() as client:
        assert client.head("/nowcast").status_code == 405


def test_a_trailing_slash_is_forgiven(talkative: Server):
    with talkative.client(follow_redirects=True) as client:
        assert client.get("/v1/models/").json()["models"]


def test_the_documentation_loads_nothing(talkative: Server):
    with talkative.client() as client:
        page = client.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        assert "/v1/sessions/{session}" in page.text
        for loads in ("<script", "<link", "src=", "@import", "url(", "https://", "http://"):
            assert loads not in page.text


def test_ids_of_the_caller_are_in_the_log_and_the_answer(talkative: Server):
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace}-{parent}-01", "X-Request-ID": "req-77"}
    with talkative.client() as client:
        assert client.get("/v1/sessions/traced", headers=headers).headers["x-request-id"] == "req-77"
        minted = client.get("/v1/sessions/traced", headers={"X-Request-ID": "two words", "traceparent": "00-x-y-01"})
    assert minted.headers["x-request-id"] not in ("", "two words")

    def logged() -> list[dict[str, object]]:
        lines = [json.loads(line) for line in talkative.log.read_text().splitlines()]
        return [line for line in lines if line.get("session") == "traced"]

    assert eventually(lambda: len(logged()) == 2)
    first, second = logged()
    assert (first["request"], first["trace"], first["parent"]) == ("req-77", trace, parent)
    assert second["request"] == minted.headers["x-request-id"]
    assert "trace" not in second


def test_nowcasts_are_counted_under_their_predictors_name(talkative: Server):
    training = Training(sequential(8, 16, 4))
    with talkative.client() as client:
        assert send(client, "POST", "/nowcast", training.request()).status_code == 200
        assert eventually(lambda: 'predictor="linear",result="ok"' in client.get("/metrics").text)


def test_a_setting_that_cannot_be_ends_in_one_line():
    for name, value in (("NOWCAST_BUDGTE", "1GiB"), ("NOWCAST_MAX_QUEUE", "0"), ("NOWCAST_DEVICE", "cuda:99")):
        environment = {**os.environ, "NOWCAST_PORT": "0", name: value}
        command = [sys.executable, "-m", "nowcast_service", "serve"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert name in done.stderr


@pytest.mark.kill
def test_a_signal_during_the_imports_ends_it_as_process_1(tmp_path: Path):
    """A signal that process 1 of a namespace does not handle is lost: the handler is there before the rest."""
    script = tmp_path / "nowcast.py"
    script.write_text(
        "import sys, signal, os\n"
        "from nowcast_service import __main__\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'nowcast_service.cli':\n"
        "            print('importing', flush=True)\n"
        "            import time; time.sleep(600)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "sys.argv = ['nowcast', 'serve']\n"
        "__main__.main()\n"
    )
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process namespace can be made here")
    with subprocess.Popen([*unshare, sys.executable, script], stdout=subprocess.PIPE, text=True) as outer:
        assert outer.stdout is not None
        assert outer.stdout.readline() == "importing\n"
        (inner,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        os.kill(int(inner), signal.SIGTERM)
        try:
            assert outer.wait(60) == 0
        finally:
            outer.kill()


def test_a_budget_over_the_machine_is_warned_of(serve: Serve):
    server = serve(budget="100000GiB", threads=1000)
    text = server.log.read_text()
    assert "NOWCAST_BUDGET=97.7TiB is more than the" in text
    assert "NOWCAST_THREADS=1000 is more than the" in text
