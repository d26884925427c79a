"""The notebook of the documentation runs, and what it shows happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[3] / "docs" / "notebooks" / "first-nowcasts.ipynb"


def _data(cell: Any, kind: str) -> list[str]:
    return [output["data"][kind] for output in cell.get("outputs", []) if kind in output.get("data", {})]


@pytest.mark.slow
@pytest.mark.socket
def test_first_nowcasts(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shown = [_data(cell, "image/png") for cell in notebook.cells]
    assert any(shown), "the saved notebook shows no picture"
    for cell in notebook.cells:
        cell.outputs = []
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources=resources).execute()
    told = "".join(text for cell in notebook.cells for text in _data(cell, "text/plain"))
    assert "'patched'" in told, told
    assert [bool(_data(cell, "image/png")) for cell in notebook.cells] == [bool(picture) for picture in shown]
