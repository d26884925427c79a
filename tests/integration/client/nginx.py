"""The documented examples of proxies, and a real nginx that runs its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from ...ports import free_port

DOCUMENT = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()


def example(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    assert found is not None
    return found[1]


def program(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        pytest.skip(f"needs {name}: apt-get install {name}")
    return path


def certificate_in(folder: Path) -> Path:
    """A certificate of this machine's own, its key beside it."""
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    files = ["-keyout", folder / "nowcast.key", "-out", folder / "nowcast.pem"]
    subprocess.run([*make.split(), *files, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
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
