"""``nowcast weights`` on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from nowcast_service.nino.checkpoint import load_checkpoint
from nowcast_service.weights import registry as weights
from nowcast_service.weights.registry import Published, blob_id

from .command import nowcast
from .nino.made import checkpoint

SHARED = Path(os.environ.get("NOWCAST_SHARED", Path(__file__).parents[2] / ".." / "shared")) / "checkpoints"


def _serve(folder: Path):
    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder served over HTTP, registered as where the published files are."""
    folder = tmp_path / "published"
    folder.mkdir()
    server = _serve(folder)
    monkeypatch.setenv("NOWCAST_WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NOWCAST_CACHE", str(tmp_path / "cache"))
    yield folder
    server.shutdown()
    server.server_close()


@pytest.fixture
def made(published, monkeypatch):
    made = checkpoint()
    torch.save({"state_dict": dict(made.state), "model_args": {"hid": 8, "wte_pos_enc": False}}, published / "made.pt")
    monkeypatch.setitem(weights.PUBLISHED, "made", Published("made", blob_id(published / "made.pt"), "for tests"))
    return made


@pytest.mark.socket
def test_list_pull_convert(capfd, tmp_path, made):
    rows = {row["name"]: row for row in json.loads(nowcast(capfd, "weights", "list", "--json").out)}
    assert set(rows) == set(weights.names())
    assert not rows["made"]["at_hand"]
    assert "made           -" in nowcast(capfd, "weights", "list").out
    pulled = nowcast(capfd, "weights", "pull", "made")
    assert (pulled.status, pulled.err) == (0, "")
    assert load_checkpoint(pulled.out.strip()).digest == made.digest
    assert "made           here" in nowcast(capfd, "weights", "list").out
    target = tmp_path / "made.safetensors"
    converted = nowcast(capfd, "weights", "convert", "made", target)
    assert (converted.status, converted.out) == (0, f"{made.digest}\n")
    assert load_checkpoint(target).digest == made.digest


@pytest.mark.socket
def test_failures_end_with_status_2(capfd, tmp_path, published, made):
    (published / "made.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    for args, word in (
        (("pull", "made"), "Git LFS pointer"),
        (("pull", "nino"), "does not exist"),
        (("pull", "unheard"), "no published weights 'unheard'"),
        (("pull",), "no weights are named"),
        (("convert", tmp_path / "absent.pt", tmp_path / "a.safetensors"), "No such file"),
        (("convert", tmp_path / "absent.pt", tmp_path / "a.pt"), "suffix '.pt'"),
    ):
        outcome = nowcast(capfd, "weights", *args)
        assert (outcome.status, outcome.out) == (2, "")
        assert word in outcome.err
        assert "Traceback" not in outcome.err
    assert not list((tmp_path / "cache").glob("*.pt"))


@pytest.mark.socket
@pytest.mark.skipif(not SHARED.exists(), reason="published files are in ../shared/checkpoints, which is absent")
def test_published_files_have_the_ids_they_are_known_by(tmp_path):
    server = _serve(SHARED)
    cache = tmp_path / "cache"
    environment = os.environ | {
        "NOWCAST_WEIGHTS_URL": f"http://127.0.0.1:{server.server_port}",
        "NOWCAST_CACHE": str(cache),
    }
    script = Path(sys.executable).with_name("nowcast")
    names = ("nino_no_posw", "nino_mlp", "nino_mlp_h32")
    done = subprocess.run(
        [script, "weights", "pull", *names], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    server.shutdown()
    server.server_close()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [str(cache / f"{name}.pt") for name in names]
    for name in names:
        assert (cache / f"{name}.pt").read_bytes() == (SHARED / f"{name}.pt").read_bytes()
