"""Running ``nowcast`` in this process, and files for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from nowcast_proto.spec import ArchitectureSpec
from nowcast_service.cli import main
from nowcast_service.history import History
from safetensors.torch import save_file


@dataclass
class Outcome:
    status: int
    out: str
    err: str


def nowcast(capfd: pytest.CaptureFixture[str], *args: object) -> Outcome:
    """Exit status and output of a command line."""
    capfd.readouterr()
    try:
        main([str(arg) for arg in args])
        status = 0
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    captured = capfd.readouterr()
    return Outcome(status, captured.out, captured.err)


def write_case(folder: Path, spec: ArchitectureSpec, past: History) -> list[Path]:
    """``spec.json`` and one ``.safetensors`` per snapshot; returns the latter."""
    (folder / "spec.json").write_text(spec.canonical())
    paths = []
    for number, snapshot in enumerate(past.snapshots):
        paths.append(folder / f"s{number}.safetensors")
        save_file(dict(snapshot), paths[-1])
    return paths
