"""Prometheus' configuration and every panel of the dashboard, on a real Prometheus that scrapes a real service."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from nowcast_client import NowcastClient
from nowcast_proto.spec import ArchitectureSpec

from ...ports import free_port
from .container_harness import ROOT, Trainer, get

pytestmark = [pytest.mark.socket, pytest.mark.slow, pytest.mark.timeout(300)]

KEY = "a-key-for-this-test"
DASHBOARD = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "nowcast.json").read_text())
PANELS = [
    pytest.param(panel, target["expr"], id=f"{panel['title']}-{target['refId']}")
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
]
MAY_BE_EMPTY = {"sum by (reason) (rate(nowcast_sessions_dropped_total[5m]))"}
"""Nothing is dropped in so short a time; a typo in the name is caught by `test_metrics_exist`."""


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if get(url)[0] == 200:
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"{url} did not answer: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def binary() -> str:
    """The Prometheus server program."""
    found = shutil.which("prometheus")
    if found is None:
        pytest.skip("no prometheus on this machine: on Debian or Ubuntu, apt-get install prometheus")
    return found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real service that asks for a key."""
    folder = tmp_path_factory.mktemp("service")
    port, log = free_port(), folder / "log"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NOWCAST_")}
    settings = {"NOWCAST_PORT": str(port), "NOWCAST_API_KEY": KEY, "NOWCAST_THREADS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "nowcast_service.cli", "serve"], env={**clean, **settings}, stdout=out, stderr=out
        )
    try:
        _wait(f"http://127.0.0.1:{port}/readyz", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def prometheus(binary: str, service: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prometheus with the shipped configuration, looking at that service while a training uses it."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    job = config["scrape_configs"][0]
    # Only what depends on the place: address, the key's file, and a test's patience.
    job["static_configs"][0]["targets"] = [service.removeprefix("http://")]
    job["authorization"]["credentials_file"] = str(folder / "key")
    config["global"]["scrape_interval"] = "1s"
    (folder / "key").write_text(KEY)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "alerts.yml").write_text((ROOT / "docker" / "prometheus" / "alerts.yml").read_text())
    port, log = free_port(), folder / "log"
    url = f"http://127.0.0.1:{port}"
    arguments = (
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    )
    with log.open("wb") as out:
        process = subprocess.Popen([binary, *arguments], stdout=out, stderr=out)
    try:
        _wait(f"{url}/-/ready", process, log)
        _until(lambda: query(url, 'up{job="nowcast"} == 1'), "the service is not scraped")
        get(f"{service}/v1/models")  # without the key: one failure to see
        _until(lambda: query(url, "nowcast_failures_total"), "the failure is not scraped")
        trainer = Trainer(service, api_key=KEY, task="text", steps=160, period=30, predictor="linear")
        assert trainer.status == 0, trainer.errors
        assert trainer.report["arrived"] >= 2, trainer.report
        spec = ArchitectureSpec.model_validate({"family": "sequential", "parameters": [{"name": "w", "shape": [4, 3]}]})
        with NowcastClient(service, api_key=KEY) as client:
            client.nowcast(spec, [{"w": np.full((4, 3), i, np.float32)} for i in range(5)], 2, predictor="linear")
        get(f"{service}/v1/models")
        _until(lambda: query(url, 'sum(rate(nowcast_nowcasts_total{result="ok"}[5m])) > 0'), "no nowcast is scraped")
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def query(url: str, expression: str) -> list[dict[str, Any]]:
    """Result of an instant query."""
    status, body = get(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
    assert status == 200, body
    answer = json.loads(body)
    assert answer["status"] == "success", answer
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


def _until(condition: Any, what: str, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


@pytest.mark.parametrize(("panel", "expression"), PANELS)
def test_panel_shows_something(prometheus: str, panel: dict[str, Any], expression: str) -> None:
    """The query is valid, finds series and gives numbers."""
    found = query(prometheus, expression)
    if expression in MAY_BE_EMPTY:
        return
    assert found, f"{panel['title']}: {expression} finds nothing"
    values = [float(series["value"][1]) for series in found]
    assert all(math.isfinite(value) for value in values), (expression, found)
    legend = next(t["legendFormat"] for t in panel["targets"] if t["expr"] == expression)
    for name in legend.split("{{")[1:]:
        label = name.partition("}}")[0]
        assert all(label in series["metric"] for series in found), f"{panel['title']}: no label {label!r} in {found}"


def test_metrics_exist(prometheus: str, service: str) -> None:
    """Every metric a panel names is one the service has, whether or not anything was counted yet."""
    import re

    told = get(f"{service}/metrics", KEY)[1].decode()
    known = set(re.findall(r"^# TYPE (\w+) ", told, re.MULTILINE))
    for _, expression in ((p.values[0], p.values[1]) for p in PANELS):
        for name in re.findall(r"\bnowcast_\w+", expression):
            assert name in known or name.removesuffix("_bucket") in known, name


def test_alerted_by_a_wrong_key(prometheus: str, service: str) -> None:
    """Without the key the metrics stay closed: what makes the panels work is the credentials file."""
    assert get(f"{service}/metrics")[0] == 401
    assert get(f"{service}/metrics", KEY)[0] == 200


def test_configuration_is_valid(binary: str, tmp_path: Path) -> None:
    """As Prometheus' own checker sees it, with the file of the key where the container writes it."""
    checker = shutil.which("promtool") or pytest.skip("no promtool beside prometheus")
    shipped = (ROOT / "docker" / "prometheus" / "prometheus.yml").read_text()
    (tmp_path / "key").touch()
    (tmp_path / "alerts.yml").write_text((ROOT / "docker" / "prometheus" / "alerts.yml").read_text())
    (tmp_path / "prometheus.yml").write_text(shipped.replace("/tmp/nowcast-key", str(tmp_path / "key")))
    done = subprocess.run(
        [checker, "check", "config", tmp_path / "prometheus.yml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_grafana_is_provisioned() -> None:
    """Grafana's image is not run here: its files are held to each other and to the compose file instead."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounts = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    source = yaml.safe_load((ROOT / "docker/grafana/provisioning/datasources/prometheus.yml").read_text())
    provider = yaml.safe_load((ROOT / "docker/grafana/provisioning/dashboards/nowcast.yml").read_text())
    datasource = source["datasources"][0]
    assert urllib.parse.urlsplit(datasource["url"]).hostname in compose
    assert provider["providers"][0]["options"]["path"] == mounts["./docker/grafana/dashboards"]
    for panel in DASHBOARD["panels"]:
        for place in (panel, *panel["targets"]):
            assert place["datasource"] == {"type": datasource["type"], "uid": datasource["uid"]}
    home = Path(compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (ROOT / "docker/grafana/dashboards" / home.name).exists()
