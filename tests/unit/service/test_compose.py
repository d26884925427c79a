"""What the compose files hand on and bound."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[3]


def test_the_service_is_bounded_and_takes_every_setting():
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["nowcast"]
    assert service["init"] is True
    assert {"mem_limit", "cpus", "pids_limit"} <= set(service)
    (file,) = service["env_file"]
    assert (ROOT / file.removeprefix("${NOWCAST_ENV_FILE:-").removesuffix("}")).is_file()


def test_keys_can_be_a_secret():
    laid = yaml.safe_load((ROOT / "docker-compose.keys.yml").read_text())
    service = laid["services"]["nowcast"]
    (name,) = service["secrets"]
    assert service["environment"]["NOWCAST_API_KEYS_FILE"] == f"/run/secrets/{name}"
    assert name in laid["secrets"]


def test_weights_outlive_the_container():
    """The cache folder is a volume, and the image has it with the service's user as its owner."""
    composed = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    service = composed["services"]["nowcast"]
    name, folder = service["volumes"][0].split(":")
    assert name in composed["volumes"]
    assert service["environment"]["NOWCAST_CACHE"] == folder
    assert f"install -d -o 10001 -g 10001 {folder}" in (ROOT / "docker" / "Dockerfile").read_text()


def test_the_image_says_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'org.opencontainers.image.version="{version}"' in (ROOT / "docker" / "Dockerfile").read_text()
