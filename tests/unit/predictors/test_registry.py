"""Predictors that other packages add, by their entry point."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from nowcast_proto.errors import InternalError, InvalidRequest
from nowcast_service.predictors import make_predictor, registry
from nowcast_service.predictors.base import ahead

from ..nino.made import history, mlp

SPEC = mlp(3, 4, 2)
HALFWAY = """
import torch
from nowcast_service.predictors.registry import Entry

class Halfway:
    name, context, farthest, needs = "halfway", 0, 100, ()

    def predict(self, history, k, state=None, *, check=lambda: None):
        oldest = history.snapshots[0]
        moved = {n: (history.newest(n).float() - oldest[n].float()) / 2 for n in history.spec.shapes()}
        return moved, {}

ENTRY = Entry("halfway", lambda options: Halfway(), needs_checkpoint=False)
WRONG = 3
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as pip leaves it: a module, and metadata that name its entry points."""
    (tmp_path / "halfway.py").write_text(HALFWAY)
    metadata = tmp_path / "halfway-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: halfway\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        textwrap.dedent(
            """
            [nowcast.predictors]
            halfway = halfway:ENTRY
            wrong = halfway:WRONG
            broken = nosuchmodule:ENTRY
            linear = halfway:ENTRY
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    for cached in (registry._known, registry.entry):
        cached.cache_clear()
    yield tmp_path
    for cached in (registry._known, registry.entry):
        cached.cache_clear()


def test_a_predictor_of_another_package_is_one_among_others(installed: Path, caplog: pytest.LogCaptureFixture):
    past = history(SPEC)
    found, _ = ahead(make_predictor("halfway"), past, 3, update_scale=2.0)
    for name in SPEC.shapes():
        wanted = 2 * past.newest(name) - past.snapshots[0][name]
        torch.testing.assert_close(found[name], wanted)
    assert "halfway" in registry.names()
    assert registry.weightless() == ("linear", "lawa", "snoo", "identity", "halfway")
    assert "'linear' of halfway:ENTRY is left out" in caplog.text
    assert type(make_predictor("linear")).__name__ == "Linear"


def test_one_that_cannot_be_used_says_why(installed: Path):
    with pytest.raises(InvalidRequest, match="'broken' cannot be loaded from nosuchmodule:ENTRY"):
        make_predictor("broken")
    with pytest.raises(InvalidRequest, match="no entry of predictor 'wrong'"):
        make_predictor("wrong")
    with pytest.raises(InvalidRequest, match=r"'oracle' is not known; expected one of .*halfway"):
        make_predictor("oracle")


def test_the_command_line_knows_it(installed: Path, monkeypatch: pytest.MonkeyPatch):
    script = "from nowcast_service.predictors import make_predictor; print(make_predictor('halfway').name)"
    monkeypatch.setenv("PYTHONPATH", str(installed))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "halfway", done.stderr


def _nothing(history):
    return {}


def _flat(history):
    return {name: torch.zeros(1) for name in history.spec.shapes()}


def _double(history):
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in history.spec.shapes().items()}


@pytest.mark.parametrize(
    ("answer", "came"), [(_nothing, "nothing"), (_flat, r"float32 of shape \[1\]"), (_double, "float64")]
)
def test_one_that_breaks_the_contract_is_named(answer, came: str):
    class Wrong:
        name, context, farthest, needs = "wrong", 0, 100, ()

        def predict(self, history, k, state=None, *, check=None):
            return answer(history), {}

    with pytest.raises(InternalError, match=f"predictor wrong answered {came}"):
        ahead(Wrong(), history(SPEC), 1)
