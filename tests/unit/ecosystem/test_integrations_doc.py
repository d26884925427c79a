"""The tables of integrations and corners name tests that exist, and every test of a corner is in them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = (ROOT / "docs" / "integrations.md").read_text()
OTHERS = {"test_all_examples_are_run", "test_first_nowcasts", "test_bench_integrations", "test_bench_hook"}
"""Tests that are about no corner."""


def names_in(*folders: str) -> set[str]:
    found = set()
    for folder in folders:
        for path in (ROOT / "tests" / folder).rglob("test_*.py"):
            found |= {
                node.name
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            }
    return found


def rows() -> list[list[str]]:
    """Cells of every table row that names a test."""
    lines = [line for line in DOCUMENT.splitlines() if line.startswith("|") and "`test_" in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named() -> set[str]:
    return set(re.findall(r"`(test_\w+)`", DOCUMENT))


def test_every_named_test_exists() -> None:
    missing = named() - names_in("unit/client", "unit/ecosystem", "integration/ecosystem")
    assert not missing


def test_every_corner_is_in_a_table() -> None:
    forgotten = names_in("integration/ecosystem") - named() - OTHERS
    corners = (ROOT / "tests" / "unit" / "ecosystem").glob("test_corners*.py")
    nodes = [node for path in corners for node in ast.parse(path.read_text()).body]
    here = {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    assert not forgotten | (here - named())


def test_a_cell_is_a_test_or_says_why_not() -> None:
    """Six columns of integrations; a cell names tests, or is the plain column's, or does not apply to one process."""
    wide = [row for row in rows() if len(row) == 7]
    assert len(wide) >= 10
    for name, plain, *others in wide:
        for cell in (plain, *others):
            assert re.fullmatch(r"`test_\w+`|the same hook|", cell), (name, cell)
        if "the same hook" in others:
            assert "`test_" in plain or "`test_" in "".join(others), name
