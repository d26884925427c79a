"""Settings, keys and log lines."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
from nowcast_proto.errors import InvalidRequest, Unauthorized, UnreadableFile
from nowcast_service import http
from nowcast_service.cli import build_app
from nowcast_service.observe.logs import FIELDS, JsonFormatter, TextFormatter
from nowcast_service.runtime.keys import ANONYMOUS, KeyRing, hash_key, new_key
from nowcast_service.settings import Settings, is_loopback
from pydantic import ByteSize, ValidationError
from typer.testing import CliRunner


def test_environment_and_units(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NOWCAST_BUDGET", "512MiB")
    monkeypatch.setenv("NOWCAST_API_KEY_HASHES", f"a:{'0' * 64}, b:{'1' * 64}")
    monkeypatch.setenv("NOWCAST_CHECKPOINT", "")  # what a compose file passes for a variable that is not set
    settings = Settings()
    assert settings.budget == 512 * 2**20
    assert settings.api_key_hashes == (f"a:{'0' * 64}", f"b:{'1' * 64}")
    assert settings.checkpoint is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_other_machines_need_a_key_or_a_clear_word(host: str):
    with pytest.raises(ValidationError, match="without keys"):
        Settings(host=host)
    assert Settings(host=host, allow_anonymous=True).host == host
    assert Settings(host=host, api_key="long enough").has_keys
    assert Settings(host=host, unix_socket="/tmp/x.sock").unix_socket


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(host: str):
    assert is_loopback(host)
    assert not Settings(host=host).has_keys


def test_contradictions_are_refused():
    with pytest.raises(ValidationError, match="go together"):
        Settings(tls_key="key.pem")
    with pytest.raises(ValidationError, match="8 characters"):
        Settings(api_key="short")
    with pytest.raises(ValidationError):
        Settings(port=70000)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("NOWCAST_BUDGTE", "1GiB", "NOWCAST_BUDGTE is not a setting; the nearest one is NOWCAST_BUDGET"),
        ("NOWCAST_MAX_SESSION", "1", "the nearest one is NOWCAST_MAX_SESSIONS"),
        ("NOWCAST_SESSION_EXPIRY", "inf", "NOWCAST_SESSION_EXPIRY='inf'"),
        ("NOWCAST_UPLOAD_IDLE", "nan", "NOWCAST_UPLOAD_IDLE='nan'"),
        ("NOWCAST_SHUTDOWN_GRACE", "-1", "NOWCAST_SHUTDOWN_GRACE='-1'"),
        ("NOWCAST_MAX_QUEUE", "0", "NOWCAST_MAX_QUEUE='0'"),
        ("NOWCAST_BUDGET", "0", "NOWCAST_BUDGET='0'"),
        ("NOWCAST_MAX_JSON", "much", "NOWCAST_MAX_JSON='much'"),
        ("NOWCAST_THREADS", "100000", "NOWCAST_THREADS='100000'"),
        ("NOWCAST_LOG_LEVEL", "loud", "NOWCAST_LOG_LEVEL='loud'"),
    ],
)
def test_settings_that_cannot_be_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str):
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidRequest) as caught:
        Settings.read()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_is_not_repeated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NOWCAST_API_KEY", "short")
    with pytest.raises(InvalidRequest, match="NOWCAST_API_KEY: a key needs") as caught:
        Settings.read()
    assert "short" not in str(caught.value)


def test_every_number_has_an_end():
    """No setting takes infinity, NaN or a negative size or time."""
    for name, field in Settings.model_fields.items():
        if field.annotation in (float, int, ByteSize):
            for value in ("inf", "nan", "-1"):
                with pytest.raises(ValidationError):
                    Settings(**{name: value})


def test_what_kubernetes_sets_beside_a_service_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    for name in ("NOWCAST_API_SERVICE_HOST", "NOWCAST_API_PORT", "NOWCAST_API_PORT_8500_TCP_ADDR"):
        monkeypatch.setenv(name, "tcp://10.0.0.1:8500")
    assert Settings.read().port == 8500


def test_keys_of_all_sources(tmp_path):
    one, two, three = new_key(), new_key(), "a shared secret"
    file = tmp_path / "keys"
    file.write_text(f"# keys\n\nalice:{hash_key(one)} # first\nalice:{hash_key(two)}\n")
    ring = KeyRing.of(Settings(api_keys_file=file, api_key=three, api_key_hashes=f"bob:{hash_key('b' * 20)}"))
    for key, tenant in ((one, "alice"), (two, "alice"), (three, "default"), ("b" * 20, "bob")):
        assert ring.tenant(f"Bearer {key}") == tenant
    for wrong in (None, "", "Bearer", f"Basic {one}", f"Bearer {one}x", f"Bearer {hash_key(one)}", "Bearer é"):
        with pytest.raises(Unauthorized):
            ring.tenant(wrong)
    assert KeyRing().tenant("Bearer ") == ANONYMOUS


@pytest.mark.parametrize("line", ["secret-in-the-clear", "alice:abc", f"{'0' * 64}", f"al ice:{'0' * 64}"])
def test_malformed_entries_are_refused_without_repeating_them(tmp_path, line: str):
    file = tmp_path / "keys"
    file.write_text(line + "\n")
    with pytest.raises(UnreadableFile) as caught:
        KeyRing.of(Settings(api_keys_file=file))
    assert line not in str(caught.value)


def test_missing_and_empty_key_files_are_errors(tmp_path):
    with pytest.raises(UnreadableFile, match="cannot be read"):
        KeyRing.of(Settings(api_keys_file=tmp_path / "none"))
    (tmp_path / "empty").write_text("# nobody\n")
    with pytest.raises(UnreadableFile, match="none is listed"):
        KeyRing.of(Settings(api_keys_file=tmp_path / "empty"))


def test_what_a_peer_sends_forges_no_log_line():
    record = logging.LogRecord("n", logging.INFO, "", 0, "request", None, None)
    setattr(record, FIELDS, {"session": "x\n2026 INFO forged", "step": "1 status=200"})
    line = TextFormatter().format(record)
    assert "\n" not in line
    assert line.endswith('request [session="x\\n2026 INFO forged" step="1 status=200"]')


@pytest.mark.parametrize("style", [JsonFormatter, TextFormatter])
def test_log_lines_carry_fields_and_tracebacks(style):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(style())
    log = logging.Logger("test")
    log.addHandler(handler)
    log.info("said %s", "so", extra={FIELDS: {"route": "/x", "status": 200}})
    try:
        raise ValueError("inner")
    except ValueError:
        log.exception("failed", extra={FIELDS: {"route": "/y"}})
    first, *rest = stream.getvalue().splitlines()
    if style is JsonFormatter:
        entry = json.loads(first)
        assert (entry["message"], entry["route"], entry["status"], entry["level"]) == ("said so", "/x", 200, "info")
        assert "ValueError: inner" in json.loads(rest[0])["exception"]
        assert len(rest) == 1
    else:
        assert first.endswith("said so [route=/x status=200]")
        assert rest[0].endswith("failed [route=/y]")
        assert rest[-1] == "ValueError: inner"


def test_a_file_lies_under_environment_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "nowcast.toml"
    file.write_text(
        f'budget = "1GiB"\nport = 8600\nmax_queue = 3\nhost = "::1"\nallow_anonymous = true\n'
        f'api_key = "long enough"\napi_key_hashes = ["a:{"0" * 64}"]\n'
    )
    monkeypatch.setenv("NOWCAST_PORT", "8700")
    monkeypatch.setenv("NOWCAST_MAX_QUEUE", "")  # not set, to a compose file
    monkeypatch.setenv("NOWCAST_HOST", "127.0.0.2")
    settings, origins = Settings.traced(file, host="127.0.0.3")
    assert (settings.budget, settings.port, settings.max_queue, settings.host) == (2**30, 8700, 3, "127.0.0.3")
    assert settings.allow_anonymous
    assert settings.api_key_hashes == (f"a:{'0' * 64}",)
    names = ("budget", "port", "max_queue", "host", "threads")
    assert [origins[name] for name in names] == ["file", "environment", "file", "flag", "default"]
    shown = CliRunner().invoke(build_app(), ["config", "--config", str(file), "--host", "127.0.0.3"])
    assert shown.exit_code == 0, shown.output
    lines = {line.split()[0]: line.split()[1:] for line in shown.output.splitlines()}
    assert list(lines) == list(Settings.model_fields)
    assert lines["budget"] == [str(2**30), "file"]
    assert lines["port"] == ["8700", "environment"]
    assert lines["host"] == ["127.0.0.3", "flag"]
    assert lines["api_key"] == ["********", "file"]
    assert "long enough" not in shown.output
    assert "0" * 64 not in shown.output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("budgte = 1", "budgte is not a setting; the nearest one is budget"),
        ("max_queue = 0", "nowcast.toml: max_queue='0'"),
        ("port = true", "nowcast.toml: port='true'"),
        ("port = [1]", "a setting is one value"),
        ("port 1", "is not TOML"),
        ('api_key = "hidden"', "nowcast.toml: api_key: a key needs"),
    ],
)
def test_a_file_that_cannot_be_is_refused_in_one_line(text: str, said: str, tmp_path: Path):
    file = tmp_path / "nowcast.toml"
    file.write_text(text)
    with pytest.raises(InvalidRequest) as refused:
        Settings.read(file)
    assert said in str(refused.value)
    assert "hidden" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_empty_value_of_a_file_is_not_set(tmp_path: Path):
    file = tmp_path / "nowcast.toml"
    file.write_text('unix_socket = ""\ncheckpoint = ""\n')
    settings, origins = Settings.traced(file)
    assert (settings.unix_socket, settings.checkpoint) == (None, None)
    assert origins["unix_socket"] == "default"


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UnreadableFile, match=r"none\.toml"):
        Settings.read(tmp_path / "none.toml")


def test_the_page_is_small():
    """Fetched over slow links and from inside the wheel: 300 kB is what it may grow to."""
    page = Path(http.__file__).parent / "page"
    assert 0 < sum(file.stat().st_size for file in page.iterdir()) < 300_000
