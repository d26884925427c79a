"""The documented examples of proxies, taken from the documentation and run on real ones."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from nowcast_client import NowcastClient
from nowcast_client.errors import AttachError, ConnectFailed
from nowcast_proto.errors import TooLarge
from nowcast_proto.spec import ArchitectureSpec, ParameterSpec

from ...ports import free_port
from .harness import Job, Server

pytestmark = [pytest.mark.socket, pytest.mark.kill]
DOCUMENT = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
SPEC = ArchitectureSpec(family="sequential", parameters=(ParameterSpec(name="0.weight", shape=(512, 300)),))
HISTORY = [{"0.weight": np.full((512, 300), float(i), np.float32)} for i in range(5)]
"""3 MB in all: more than nginx lets through unless it is told to."""


def example(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found is not None
    return found[1]


def program(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        pytest.skip(f"needs {name}: apt-get install {name}")
    return path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of this machine's own, its key beside it."""
    folder = tmp_path_factory.mktemp("tls")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = [
        "-keyout",
        folder / "nowcast.key",
        "-out",
        folder / "nowcast.pem",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    subprocess.run([*make.split(), *names], check=True, capture_output=True)
    return folder / "nowcast.pem"


@dataclass
class Nginx:
    """A real nginx with the documented configuration."""

    folder: Path
    process: subprocess.Popen[bytes]
    url: str

    @classmethod
    def start(cls, folder: Path, certificate: Path, *ports: int, body: str = "0") -> Nginx:
        port = free_port()
        servers = "".join(f"server 127.0.0.1:{one} max_fails=0;\n" for one in ports)
        site = re.sub(r"server 127\.0\.0\.1:8500 max_fails=0;", servers, example("nginx"))
        site = site.replace("listen 8443", f"listen 127.0.0.1:{port}").replace(
            "/etc/nginx/nowcast", str(certificate)[:-4]
        )
        site = site.replace("client_max_body_size 0", f"client_max_body_size {body}")
        places = "".join(
            f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        whole = (
            f"daemon off; pid {folder}/pid; error_log {folder}/error.log;\n"
            f"events {{ worker_connections 128; }}\nhttp {{ access_log off;\n{places}{site}\n}}\n"
        )
        (folder / "nginx.conf").write_text(whole)
        command = [program("nginx"), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
        subprocess.run([*command, "-t"], check=True, capture_output=True)
        process = subprocess.Popen(command, start_new_session=True)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return cls(folder, process, f"https://127.0.0.1:{port}")
            time.sleep(0.02)
        raise RuntimeError((folder / "error.log").read_text())

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


@pytest.fixture
def nginx(victim: Server, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nginx]:
    monkeypatch.setenv("NOWCAST_CA_FILE", str(certificate))
    folder = tmp_path / "nginx"
    folder.mkdir()
    running = Nginx.start(folder, certificate, victim.port)
    yield running
    running.stop()


def test_nginx_passes_uploads_and_nowcasts_on(
    nginx: Nginx, clean: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(nginx.url).run(70)
    job.handle.close()
    assert torch.equal(job.weights(), clean)
    with NowcastClient(nginx.url) as client:
        future = client.nowcast(SPEC, HISTORY, 2, predictor="linear")
    np.testing.assert_allclose(future["0.weight"], 6.0, rtol=1e-5)
    monkeypatch.delenv("NOWCAST_CA_FILE")
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
