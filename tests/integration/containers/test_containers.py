"""The image and the compose file on a real engine: built, brought up, trained against, killed, brought down."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import urllib.request

import pytest

from .container_harness import ROOT, Stack, Trainer, docker, get

pytestmark = [pytest.mark.container, pytest.mark.socket, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_image_is_bare(stack: Stack) -> None:
    """Not root, labelled, nothing to build or install with, and a health check of its own."""
    config = json.loads(docker("image", "inspect", stack.image))[0]["Config"]
    assert config["User"] == "10001:10001"
    assert config["Healthcheck"]["Test"]
    labels = {name.removeprefix("org.opencontainers.image.") for name in config["Labels"]}
    assert {"title", "description", "version", "licenses"} <= labels
    tools = "pip pip3 apt apt-get dpkg gcc g++ cc make cmake git curl wget"
    found = docker(
        "run", "--rm", "--entrypoint", "sh", stack.image, "-c", f"command -v {tools}; python3 -m pip --version; true"
    )
    assert found == ""
    assert docker("run", "--rm", "--entrypoint", "id", stack.image, "-u") == "10001"


def test_root_file_system_is_read_only(stack: Stack) -> None:
    inside = (
        "for d in / /opt/nowcast /usr /var /home; do touch $d/x 2>/dev/null && echo $d; done; touch /tmp/x && echo ok"
    )
    assert docker("exec", stack.container(), "sh", "-c", inside) == "ok"
    state = json.loads(docker("inspect", stack.container()))[0]["HostConfig"]
    assert state["ReadonlyRootfs"] is True
    assert state["CapDrop"] == ["ALL"]
    assert [binding["HostIp"] for binding in state["PortBindings"]["8500/tcp"]] == ["127.0.0.1"]


def test_weights_have_a_volume(stack: Stack) -> None:
    inside = "touch $NOWCAST_CACHE/x && rm $NOWCAST_CACHE/x && echo $NOWCAST_CACHE"
    assert docker("exec", stack.container(), "sh", "-c", inside) == "/var/cache/nowcast"


@pytest.mark.kill
def test_a_signal_right_after_the_start_ends_it(stack: Stack) -> None:
    """Process 1 hears it although the service has not begun yet; else the engine would have to kill it (137)."""
    told = ("run", "-d", "-e", "NOWCAST_ALLOW_ANONYMOUS=1", "--read-only", "--tmpfs", "/tmp", stack.image)
    for _ in range(3):
        container = docker(*told)
        try:
            docker("stop", "-t", "60", container, timeout=120)
            assert docker("inspect", "-f", "{{.State.ExitCode}}", container) in ("0", "143")
        finally:
            docker("rm", "-f", container, check=False)


def test_serves_nobody_by_accident(stack: Stack) -> None:
    """Started by hand, without a key and without saying that none is wanted, it refuses and says why."""
    done = subprocess.run(
        ["docker", "run", "--rm", "--read-only", "--tmpfs", "/tmp", stack.image],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "NOWCAST_API_KEY" in done.stderr


def test_ready_and_measured(stack: Stack) -> None:
    for route in ("/healthz", "/readyz", "/v1/models", "/metrics"):
        status, body = get(stack.url + route)
        assert status == 200, (route, body)
    # What Prometheus sends where no key is set: the file it reads the key from is empty.
    bare = urllib.request.Request(stack.url + "/metrics", headers={"Authorization": "Bearer "})
    with urllib.request.urlopen(bare, timeout=30) as reply:
        assert reply.status == 200


def test_training_from_outside(stack: Stack) -> None:
    trainer = Trainer(stack.url, task="text", steps=160, period=40, predictor="linear")
    assert trainer.status == 0, trainer.errors
    report = trainer.report
    assert report["steps"] == 160
    assert report["arrived"] >= 1, report
    assert report["bytes_sent"] > 120_000 * 4 * 5, report
    assert not report["failed"], report


def test_training_from_a_second_container(stack: Stack) -> None:
    out = stack(
        *("--profile", "train", "run", "--rm", "-T", "train"),
        *("--events", "--steps", "160", "--period", "40", "--predictor", "linear"),
        timeout=300,
    )
    events = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    report = events[-1]["report"]
    assert events[-1]["event"] == "end"
    assert report["arrived"] >= 1, report
    assert not report["failed"], report


@pytest.mark.kill
def test_killed_and_restarted_half_way(stack: Stack) -> None:
    """The training neither stops nor fails; once the service is back it is nowcast again, its history sent anew.

    The predictor is the one that cannot harm, so that no trial ends the nowcasting for reasons of its own. The training
    goes on for 120 steps without a service; if that is not back by then, it is held, so that there is training left.
    """
    killed_at: list[int] = []
    back_at: list[int] = []
    seen = [0]

    def restart() -> None:
        stack("up", "-d", "nowcast")
        stack.wait_ready()
        back_at.append(seen[0])

    restarting = threading.Thread(target=restart)

    def watch(event: dict[str, object]) -> threading.Thread | None:
        if event["event"] == "progress":
            seen[0] = int(str(event["step"]))
        if seen[0] >= 100 and not killed_at:
            killed_at.append(seen[0])
            docker("kill", "--signal", "KILL", stack.container())
            restarting.start()
        return restarting if killed_at and seen[0] >= killed_at[0] + 120 else None

    trainer = Trainer(stack.url, watch, task="text", steps=400, period=40, every=10, predictor="identity")
    restarting.join()
    assert trainer.status == 0, trainer.errors
    assert trainer.report["steps"] == 400
    lost = [reason for reason in trainer.report["skipped"] if "did not come within" in reason]
    assert trainer.report["failed"] or trainer.report["resent"] or lost, f"the kill went unnoticed: {trainer.report}"
    assert back_at, "the service did not come back"
    before = [step for step in trainer.steps_of("nowcast") if step <= killed_at[0]]
    after = [step for step in trainer.steps_of("nowcast") if step > back_at[0]]
    assert before, "no nowcast before the kill"
    assert after, f"no nowcast after step {back_at[0]}: {trainer.report}"


def test_key_is_asked_for(stack: Stack) -> None:
    key = "a-key-for-this-test"
    name = f"{stack.name}-keyed"
    docker(
        "run",
        "-d",
        "--rm",
        "--name",
        name,
        "--read-only",
        "--tmpfs",
        "/tmp",
        "-e",
        f"NOWCAST_API_KEY={key}",
        stack.image,
    )
    try:
        ask = (
            "import sys, time, urllib.request as r, urllib.error as e\n"
            "def status(path, key):\n"
            "    q = r.Request('http://127.0.0.1:8500' + path, headers={'Authorization': f'Bearer {key}'})\n"
            "    try: return r.urlopen(q, timeout=10).status\n"
            "    except e.HTTPError as x: return x.code\n"
            "for _ in range(300):\n"
            "    try: status('/healthz', ''); break\n"
            "    except OSError: time.sleep(0.2)\n"
            "print(status('/healthz', ''), status('/v1/models', ''), status('/v1/models', 'wrong'), "
            f"status('/v1/models', '{key}'), status('/metrics', ''))"
        )
        assert docker("exec", name, "python3", "-c", ask, timeout=120) == "200 401 401 200 401"
    finally:
        docker("rm", "-f", name, check=False)


@pytest.mark.kill
def test_stops_cleanly_and_goes_down(stack: Stack) -> None:
    """SIGTERM ends it in time with status 0; ``down`` leaves nothing behind and it comes up again."""
    container = stack.container()
    stack("stop", "-t", "35", "nowcast", timeout=90)
    assert docker("inspect", "-f", "{{.State.ExitCode}} {{.State.OOMKilled}}", container) == "0 false"
    stack("down", timeout=120)
    label = f"label=com.docker.compose.project={stack.name}"
    assert docker("ps", "-aq", "--filter", label) == ""
    assert docker("network", "ls", "-q", "--filter", label) == ""
    stack("up", "-d", timeout=120)
    stack.wait_healthy()


def test_gpu_override_reserves_a_gpu(compose: list[str]) -> None:
    """The override is valid on top of the base file; running it needs a GPU host."""
    import yaml

    files = ("-f", "docker-compose.yml", "-f", "docker-compose.gpu.yml")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NOWCAST_")}
    told = subprocess.run(
        [*compose, *files, "config"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert told.returncode == 0, told.stderr
    service = yaml.safe_load(told.stdout)["services"]["nowcast"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert service["environment"]["NOWCAST_DEVICE"] == "cuda"
    assert not service["build"]["args"]["TORCH_ARGS"], "an index of CPU wheels would leave CUDA out"
    assert service["read_only"] is True
