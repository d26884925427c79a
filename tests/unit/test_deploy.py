"""What is deployed on other engines than Compose: rendered, and held to those engines' own schemas."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from nowcast_service.observe.metrics import Metrics
from nowcast_service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "nowcast"
HELM = os.environ.get("NOWCAST_HELM") or shutil.which("helm")
KUBERNETES = "1.31"

ALL_ON = {
    "replicas": "3",
    "keys.hashes": "{alice:%s}" % ("a" * 64),
    "ingress.enabled": "true",
    "ingress.tlsSecret": "certificate",
    "autoscaling.enabled": "true",
    "serviceMonitor.enabled": "true",
    "serviceMonitor.keySecret": "scraper",
    "gpus": "1",
    "settings.max_queue": "32",
}


def render(**values: str) -> subprocess.CompletedProcess[str]:
    if HELM is None:
        pytest.skip("needs helm on the PATH, or its path in NOWCAST_HELM")
    told = [f"--set={name}={value}" for name, value in values.items()]
    command = [HELM, "template", "prod", str(CHART), "--kube-version", f"{KUBERNETES}.0", *told]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def objects(**values: str) -> dict[str, Any]:
    """Rendered objects by kind, all of them valid."""
    done = render(**values)
    assert done.returncode == 0, done.stderr
    found = [one for one in yaml.safe_load_all(done.stdout) if one]
    for one in found:
        if one["kind"] != "ServiceMonitor":  # a kind of the Prometheus operator's, not of Kubernetes
            validate(one)
    return {one["kind"]: one for one in found}


def validate(one: dict[str, Any]) -> None:
    pytest.importorskip("kubernetes_validate").validate(one, KUBERNETES, strict=True)


def environment(deployment: Any) -> dict[str, str]:
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return {entry["name"]: entry["value"] for entry in container["env"]}


def test_chart_with_everything_on() -> None:
    found = objects(**ALL_ON)
    assert set(found) == {
        "Deployment", "Service", "Secret", "Ingress", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy",
        "ServiceMonitor",
    }  # fmt: skip
    notes = found["Ingress"]["metadata"]["annotations"]
    assert notes["nginx.ingress.kubernetes.io/upstream-hash-by"] == "$http_nowcast_session"
    (container,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["securityContext"]["readOnlyRootFilesystem"]


@pytest.mark.parametrize("values", [ALL_ON, {"keys.anonymous": "true"}], ids=["keys", "anonymous"])
def test_chart_sets_what_the_service_knows(values: dict[str, str]) -> None:
    """Every variable the chart sets is a setting, and the service would start with them."""
    told = environment(objects(**values)["Deployment"])
    fields = {name.removeprefix("NOWCAST_").lower(): value for name, value in told.items()}
    assert set(fields) <= set(Settings.model_fields)
    assert Settings.model_validate(fields).host == "0.0.0.0"
    grace = int(told["NOWCAST_SHUTDOWN_GRACE"])
    assert grace < objects(**values)["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]


def test_chart_refuses_what_is_unsafe_or_cannot_work() -> None:
    assert "keys.hashes" in render().stderr
    assert "ingress.enabled" in render(**{"keys.anonymous": "true", "replicas": "2"}).stderr


def test_sidecar_job() -> None:
    job = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "sidecar-job.yaml").read_text())
    validate(job)
    spec = job["spec"]["template"]["spec"]
    (sidecar,), (training,) = spec["initContainers"], spec["containers"]
    assert training["env"] == [{"name": "NOWCAST_URL", "value": f"unix://{sidecar['args'][-1]}"}]


def test_slurm_script_is_shell_and_speaks_one_socket() -> None:
    path = ROOT / "deploy" / "slurm" / "train.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=60)
    text = path.read_text()
    assert '--unix-socket "$socket"' in text
    assert 'NOWCAST_URL="unix://$socket"' in text


def test_alerts_speak_of_metrics_there_are() -> None:
    alerts = ROOT / "docker" / "prometheus" / "alerts.yml"
    names = {f.name + "_total" * (f.type == "counter") for f in Metrics().registry.collect()}
    expressions = [rule["expr"] for group in yaml.safe_load(alerts.read_text())["groups"] for rule in group["rules"]]
    assert {name for e in expressions for name in re.findall(r"nowcast_\w+", e)} <= names
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool, which comes with Prometheus")
    done = subprocess.run([promtool, "check", "rules", str(alerts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
