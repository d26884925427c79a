"""Fetching published files over real HTTP: cut connections, resuming, everything that is not the file."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from nowcast_proto.errors import InvalidCheckpoint, NotFound, TooLarge, Unavailable, UnreadableFile
from nowcast_service.nino.checkpoint import save_checkpoint
from nowcast_service.weights import download
from nowcast_service.weights import registry as weights
from nowcast_service.weights.registry import Published, blob_id, pull, resolve_checkpoint

from .nino.made import checkpoint

pytestmark = pytest.mark.socket


@dataclass
class Shelf:
    """What the server answers, and what it was asked.

    Attributes:
        content: Body of the file.
        cuts: Bytes after which each of the next connections breaks off.
        statuses: Status codes of the next requests, before the file itself.
        ranges: Whether the server resumes.
    """

    content: bytes = b""
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    ranges: bool = True
    length: bool = True
    content_range: str | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def shelf():
    shelf = Shelf()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            span = self.headers.get("Range")
            shelf.asked.append((self.path, span))
            if shelf.statuses:
                self.send_response(shelf.statuses.pop(0))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int(span.removeprefix("bytes=").removesuffix("-")) if span and shelf.ranges else 0
            if start and start >= len(shelf.content):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = shelf.content[start:]
            self.send_response(206 if start else 200)
            if start:
                last = len(shelf.content) - 1
                self.send_header("Content-Range", shelf.content_range or f"bytes {start}-{last}/{last + 1}")
            if shelf.length:
                self.send_header("Content-Length", str(len(body)))
            else:
                self.send_header("Connection", "close")
            self.end_headers()
            if shelf.cuts:
                self.wfile.write(body[: shelf.cuts.pop(0)])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.wfile.write(body)
            self.close_connection = not shelf.length

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    shelf.url = f"http://127.0.0.1:{server.server_port}/checkpoints"
    yield shelf
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def made(tmp_path, monkeypatch, shelf):
    """A checkpoint registered as published, on the server, with an empty cache."""
    path = tmp_path / "made.pt"
    made = checkpoint()
    torch.save({"state_dict": dict(made.state), "model_args": {"hid": 8, "wte_pos_enc": False}}, path)
    shelf.content = path.read_bytes()
    monkeypatch.setitem(weights.PUBLISHED, "made", Published("made", blob_id(path), "for tests"))
    monkeypatch.setenv("NOWCAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NOWCAST_WEIGHTS_URL", shelf.url)
    return made


def _cache():
    return sorted(path.name for path in weights.cache_folder().iterdir())


def test_the_blob_id_is_gits(tmp_path):
    path = tmp_path / "hello"
    path.write_bytes(b"hello world\n")
    assert blob_id(path) == "3b18e512dba79e4c8300dd08aeb37f8e728b8dad"  # git hash-object


def test_a_name_is_fetched_once_checked_and_loaded(made, shelf):
    seen = []
    loaded = resolve_checkpoint("made", progress=lambda *at: seen.append(at))
    assert loaded.digest == made.digest
    assert loaded.source == "made"
    assert resolve_checkpoint("made").digest == made.digest
    assert shelf.asked == [("/checkpoints/made.pt", None)]
    assert seen[-1] == (len(shelf.content), len(shelf.content))
    assert _cache() == ["made.pt"]


def test_a_cut_connection_is_resumed_where_it_broke(made, shelf):
    shelf.cuts = [1000, 5000, 1]
    path = pull("made", pause=0.01)
    assert path.read_bytes() == shelf.content
    assert [span for _, span in shelf.asked] == [None, "bytes=1000-", "bytes=6000-", "bytes=6001-"]


def test_a_later_run_goes_on_from_what_an_earlier_one_brought(made, shelf):
    shelf.cuts = [1000] + [0] * download.ATTEMPTS
    with pytest.raises(Unavailable, match="what has come so far is kept"):
        pull("made", pause=0.001)
    assert _cache() == [".made.pt.part"]
    shelf.asked.clear()
    assert pull("made").read_bytes() == shelf.content
    assert [span for _, span in shelf.asked] == ["bytes=1000-"]
    assert _cache() == ["made.pt"]


def test_a_server_without_ranges_is_read_from_the_start(made, shelf):
    shelf.cuts, shelf.ranges = [1000], False
    assert pull("made", pause=0.01).read_bytes() == shelf.content
    assert [span for _, span in shelf.asked] == [None, "bytes=1000-"]


def test_a_body_of_untold_length(made, shelf):
    shelf.length = False
    assert pull("made").read_bytes() == shelf.content


def test_remains_of_something_else_do_not_matter(made, shelf):
    part = weights.cached_path("made").with_name(".made.pt.part")
    part.parent.mkdir()
    for remains in (b"x" * 100, b"y" * (len(shelf.content) + 7)):
        part.write_bytes(remains)
        path = pull("made")
        assert path.read_bytes() == shelf.content
        path.unlink()


def test_a_busy_server_is_asked_again(made, shelf):
    shelf.statuses = [503, 429, 500]
    assert pull("made", pause=0.001).read_bytes() == shelf.content
    assert len(shelf.asked) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>Not here</html>", "is a web page"),
        (b"something else", "has git blob id"),
        (b"", "has git blob id"),
    ],
)
def test_what_is_not_the_file_is_refused_and_not_kept(made, shelf, content, message):
    shelf.content = content
    with pytest.raises(UnreadableFile, match=message):
        pull("made")
    assert _cache() == []


def test_a_corrupted_download_is_refused_and_not_kept(made, shelf):
    shelf.content = shelf.content[:500] + bytes([shelf.content[500] ^ 1]) + shelf.content[501:]
    with pytest.raises(UnreadableFile, match="what came is not the published file"):
        resolve_checkpoint("made")
    assert _cache() == []


def test_a_file_with_a_forged_blob_id_is_refused(made, shelf, monkeypatch):
    entry = weights.PUBLISHED["made"]
    right = hashlib.sha256(shelf.content).hexdigest()
    monkeypatch.setitem(weights.PUBLISHED, "made", Published("made", entry.blob, "", "0" * 64))
    with pytest.raises(UnreadableFile, match=f"SHA-256 {right}"):
        pull("made")
    monkeypatch.setitem(weights.PUBLISHED, "made", Published("made", entry.blob, "", right))
    assert pull("made").exists()


def test_a_cached_file_that_changed_is_refused(made):
    path = pull("made")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UnreadableFile, match=r"has git blob id .* delete"):
        resolve_checkpoint("made")
    assert blob_id(pull("made")) == weights.PUBLISHED["made"].blob  # pulling puts it right


def test_without_fetching(made, shelf):
    with pytest.raises(NotFound, match="run `nowcast weights pull made` first"):
        resolve_checkpoint("made", fetch=False)
    assert shelf.asked == []


def test_what_the_server_can_answer_wrongly(made, shelf, monkeypatch):
    shelf.statuses = [404]
    with pytest.raises(NotFound, match="does not exist"):
        pull("made")
    shelf.statuses = [403]
    with pytest.raises(Unavailable, match="answered 403"):
        pull("made")
    shelf.cuts, shelf.content_range = [100], "bytes 7-99/100"
    with pytest.raises(Unavailable, match="sent bytes from 7; expected from 100"):
        pull("made", pause=0.001)
    shelf.content_range = None
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    with pytest.raises(TooLarge, match="at most 1000"):
        pull("made")
    shelf.length = False
    with pytest.raises(TooLarge, match="more than 1000"):
        pull("made")


def test_addresses_that_lead_nowhere(made, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(Unavailable, match="could not be fetched"):
        pull("made", url=f"http://127.0.0.1:{port}", pause=0.001)
    with pytest.raises(Unavailable, match="is not http"):
        pull("made", url="file:///etc")
    with pytest.raises(NotFound, match="no published weights 'other'"):
        pull("other")


def test_a_cache_that_cannot_be_written(made, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UnreadableFile, match=r"cache .* cannot be written"):
        pull("made", cache=tmp_path / "file")


def test_two_at_once_fetch_it_once(made, shelf):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(pull("made"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert len(shelf.asked) == 1
    assert paths[0].read_bytes() == shelf.content


def test_names_and_paths(made, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "own.safetensors", made)
    assert resolve_checkpoint(tmp_path / "own.safetensors").digest == made.digest
    with pytest.raises(NotFound, match=r"'nimo' is neither a file nor a registered name; expected .*nino_no_posw"):
        resolve_checkpoint("nimo")
    with pytest.raises(UnreadableFile, match="No such file"):
        resolve_checkpoint("nimo.pt")
    monkeypatch.setattr(weights, "shipped_path", lambda _name: tmp_path / "own.safetensors")
    assert resolve_checkpoint(weights.DEFAULT).source == weights.DEFAULT
    (tmp_path / "bad.safetensors").write_bytes(b"")
    monkeypatch.setattr(weights, "shipped_path", lambda _name: tmp_path / "bad.safetensors")
    with pytest.raises((UnreadableFile, InvalidCheckpoint)):
        resolve_checkpoint(weights.DEFAULT)


def test_the_registry_is_complete_and_points_to_the_authors_repository():
    assert set(weights.PUBLISHED) == {"nino", "nino_h32", "nino_towers4", "nino_mlp", "nino_mlp_h32", "nino_no_posw"}
    assert all(len(entry.blob) == 40 and entry.filename == f"{name}.pt" for name, entry in weights.PUBLISHED.items())
    assert weights.BASE_URL.endswith("/SamsungSAILMontreal/nino/main/checkpoints")


@contextmanager
def _environment(**values):
    before = {name: os.environ.pop(name, None) for name in values}
    os.environ.update({name: value for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def test_the_cache_lies_in_the_home_folder_unless_told_otherwise(tmp_path):
    with _environment(NOWCAST_CACHE=None, HOME=str(tmp_path)):
        assert weights.cache_folder() == tmp_path / ".cache" / "nowcast"
    with _environment(NOWCAST_CACHE=str(tmp_path / "here")):
        assert weights.cache_folder() == tmp_path / "here"
