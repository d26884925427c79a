"""Where everything is required, a skip is a failure; GPU tests and those of the reference material may skip."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CASES = """
import pytest

@pytest.mark.container
def test_container():
    pytest.skip("no container engine")

@pytest.mark.gpu
def test_gpu():
    pytest.skip("no CUDA device")

def test_reference():
    pytest.skip("../shared is absent")

@pytest.mark.skipif(True, reason="not today")
def test_marked():
    pass
"""


def _run(folder: Path, required: str) -> str:
    (folder / "conftest.py").write_text((Path(__file__).parents[1] / "conftest.py").read_text())
    (folder / "test_cases.py").write_text(CASES)
    (folder / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module_at_all')\n")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    container\n    gpu\n")
    environment = {**os.environ, "NOWCAST_REQUIRE": required, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--continue-on-collection-errors", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120, check=False
    )
    return done.stdout


def test_skips_pass_where_nothing_is_required(tmp_path: Path) -> None:
    assert "5 skipped in" in _run(tmp_path, "")


def test_skips_fail_where_required(tmp_path: Path) -> None:
    out = _run(tmp_path, "containers,sockets,kills")
    assert "1 failed, 2 skipped, 2 errors in" in out, out
    assert "FAILED test_cases.py::test_container - skipped where NOWCAST_REQUIRE" in out
    assert "ERROR test_cases.py::test_marked - skipped where NOWCAST_REQUIRE" in out
    assert "ERROR test_module.py - skipped where NOWCAST_REQUIRE" in out
