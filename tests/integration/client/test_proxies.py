"""The documented examples of proxies, taken from the documentation and run on real ones."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from nowcast_client import NowcastClient
from nowcast_client.errors import AttachError, ConnectFailed
from nowcast_proto.errors import TooLarge
from nowcast_proto.spec import ArchitectureSpec, ParameterSpec

from .harness import Job, Server
from .nginx import Nginx, certificate_in, example, program

pytestmark = [pytest.mark.socket, pytest.mark.kill]
SPEC = ArchitectureSpec(family="sequential", parameters=(ParameterSpec(name="0.weight", shape=(512, 300)),))
HISTORY = [{"0.weight": np.full((512, 300), float(i), np.float32)} for i in range(5)]
"""3 MB in all: more than nginx lets through unless it is told to."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate_in(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def nginx(victim: Server, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nginx]:
    monkeypatch.setenv("NOWCAST_CA_FILE", str(certificate))
    folder = tmp_path / "nginx"
    folder.mkdir()
    running = Nginx.start(folder, certificate, victim.port)
    yield running
    running.stop()


def test_nginx_passes_uploads_and_nowcasts_on(
    nginx: Nginx, certificate: Path, clean: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authorities to trust are an argument here, a variable elsewhere."""
    monkeypatch.delenv("NOWCAST_CA_FILE")
    job = Job(nginx.url, ca_file=certificate).run(70)
    job.handle.close()
    assert torch.equal(job.weights(), clean)
    with NowcastClient(nginx.url, ca_file=certificate) as client:
        future = client.nowcast(SPEC, HISTORY, 2, predictor="linear")
    np.testing.assert_allclose(future["0.weight"], 6.0, rtol=1e-5)
    with NowcastClient(nginx.url, timeout=5.0) as stranger, pytest.raises(ConnectFailed, match="certificate"):
        stranger.health()
    with pytest.raises(AttachError, match="ca_file"):
        NowcastClient(nginx.url, ca_file=nginx.folder / "missing.pem")


def test_an_outage_behind_nginx_is_waited_out(
    nginx: Nginx, victim: Server, clean: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """The service dies before the nowcast is asked for and comes back while the hook waits for it."""
    job = Job(nginx.url, wait=120.0, nowcast_timeout=120.0).run(45)
    assert job.handle.wait(60.0)
    victim.kill()
    back = threading.Timer(0.2, victim.start)
    back.start()
    job.run(25)
    back.join()
    job.handle.close()
    assert torch.equal(job.weights(), clean)
    victim.kill()
    with NowcastClient(nginx.url, timeout=0.5) as client, pytest.raises(ConnectFailed, match=r"gateway \(nginx.*502"):
        client.health()


def test_nginx_s_limit_turns_nowcasting_off_and_is_named(
    victim: Server, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOWCAST_CA_FILE", str(certificate))
    (tmp_path / "nginx").mkdir()
    running = Nginx.start(tmp_path / "nginx", certificate, victim.port, body="600")
    try:
        with pytest.warns(RuntimeWarning, match="nowcasting is off"):
            job = Job(running.url).run(70)
        assert job.handle.mode == "off"
        assert "failed: snapshot: too_large" in job.handle.state_dict()["counts"]
        assert any("proxy" in line and "nginx" in line and "413" in line for line in caplog.messages)
        with NowcastClient(running.url) as client, pytest.raises(TooLarge, match="client_max_body_size"):
            client.nowcast(SPEC, HISTORY, 2, predictor="linear")
    finally:
        running.stop()
        job.handle.close()


def test_haproxy_takes_the_documented_configuration(certificate: Path, tmp_path: Path) -> None:
    both = tmp_path / "nowcast.pem"
    both.write_text(certificate.read_text() + certificate.with_suffix(".key").read_text())
    path = tmp_path / "haproxy.cfg"
    path.write_text(example("haproxy").replace("/etc/haproxy/nowcast.pem", str(both)))
    done = subprocess.run([program("haproxy"), "-c", "-f", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_caddy_takes_the_documented_configuration(tmp_path: Path) -> None:
    path = tmp_path / "Caddyfile"
    path.write_text(example("caddy"))
    command = [program("caddy"), "validate", "--adapter", "caddyfile", "--config", str(path)]
    homes = {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **homes})
    assert done.returncode == 0, done.stderr
