"""The import rules of the code base: who may know whom, and what the thin client runs without.

``proto <- client``, ``proto <- service``; client and service never meet but in the lab, which nobody imports; the
neural graph and NiNo know nothing of sessions or HTTP; proto and client import where torch, fastapi and
torch_geometric cannot be had.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "nowcast_proto": ROOT / "proto" / "nowcast_proto",
    "nowcast_client": ROOT / "client" / "nowcast_client",
    "nowcast_service": ROOT / "service" / "nowcast_service",
    "nowcast_lab": ROOT / "lab" / "nowcast_lab",
}
HEAVY = ("torch", "fastapi", "torch_geometric", "starlette", "uvicorn", "scipy", "matplotlib", "typer", "transformers")
"""What a thin client's machine need not have: blocked, not merely absent, so that the test cannot pass by luck."""
SERVED = {"fastapi", "starlette", "uvicorn", "httpx", "requests", "urllib", "http", "socket", "aiohttp"}
"""Nothing that computes may talk to the network."""
OUTER = {"http", "runtime", "observe", "settings", "cli", "commands"}
"""Modules of the service around the core."""

IMPORT_BLOCKED = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
for module in {modules!r}:
    # Each as if it were the first import of ours: what an earlier one pulled in must not help it.
    for loaded in [name for name in sys.modules if name.startswith("nowcast_")]:
        del sys.modules[loaded]
    try:
        importlib.import_module(module)
    except ImportError as error:
        sys.exit(f"{{module}}: {{error}}")
    heavy = sorted(set({heavy!r}) & set(sys.modules))
    if heavy:
        sys.exit(f"{{module}} loaded {{heavy}}")
"""


def modules(package: str) -> dict[str, Path]:
    """Every module of a package: dotted name -> file."""
    folder = PACKAGES[package]
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _statements(body: list[ast.stmt], *, everywhere: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _statements(node.orelse, everywhere=everywhere)
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                inner = getattr(node, field, [])
                for child in inner if isinstance(inner, list) else []:
                    nested = child.body if isinstance(child, ast.ExceptHandler | ast.match_case) else [child]
                    yield from _statements(nested, everywhere=everywhere)


def imports(name: str, path: Path, *, everywhere: bool = True) -> set[str]:
    """Absolute names a module imports at run time, `from a import b` as both ``a`` and ``a.b``.

    Args:
        name: Dotted name of the module.
        path: Its file.
        everywhere: Count imports inside functions too, not only those run when the module is imported.
    """
    found = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in _statements(ast.parse(path.read_text()).body, everywhere=everywhere):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, base] if base else above)
        found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def tops(names: set[str]) -> set[str]:
    """First parts of dotted names."""
    return {name.partition(".")[0] for name in names}


def torch_leaves() -> set[str]:
    """Client modules that import torch (or a training framework) when loaded: they belong to the user's own process."""
    return {
        name
        for name, path in modules("nowcast_client").items()
        if tops(imports(name, path, everywhere=False)) & {"torch", "transformers", "lightning", "accelerate"}
    }


TRAINING = ("nowcast_client.loop.", "nowcast_client.tensors.", "nowcast_client.ranks.")
"""Rooms that exist in a training only, where torch is: their modules may reach it through one another."""

THIN = sorted(
    name
    for name in set(modules("nowcast_proto")) | set(modules("nowcast_client")) - torch_leaves()
    if not name.startswith(TRAINING)
)


@pytest.mark.parametrize("package", ["nowcast_proto", "nowcast_client"])
def test_imports_without_torch_or_server(package: str) -> None:
    """A module that does not itself ask for torch must not reach it through another either."""
    thin = [module for module in THIN if module.startswith(package)]
    script = IMPORT_BLOCKED.format(heavy=HEAVY, modules=thin)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_front_doors_are_thin() -> None:
    """The packages themselves, and so ``import nowcast_client``, are not among the modules that need torch."""
    assert {"nowcast_proto", "nowcast_client"} <= set(THIN)


def test_proto_never_imports_torch() -> None:
    for name, path in modules("nowcast_proto").items():
        assert not tops(imports(name, path)) & set(HEAVY), name


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("nowcast_proto", {"nowcast_client", "nowcast_service", "nowcast_lab"}),
        ("nowcast_client", {"nowcast_service", "nowcast_lab"}),
        ("nowcast_service", {"nowcast_client", "nowcast_lab"}),
    ],
)
def test_packages_keep_apart(package: str, forbidden: set[str]) -> None:
    for name, path in modules(package).items():
        assert not tops(imports(name, path)) & forbidden, f"{name} imports {tops(imports(name, path)) & forbidden}"


def reached(start: str) -> dict[str, str]:
    """Service modules a module imports, directly or through others: name -> the module that imports it."""
    files = modules("nowcast_service")
    found, todo = {start: start}, [start]
    while todo:
        name = todo.pop()
        for target in imports(name, files[name]) & set(files) - set(found):
            found[target] = name
            todo.append(target)
    return found


@pytest.mark.parametrize("part", ["graph", "nino"])
def test_core_knows_no_sessions_or_http(part: str) -> None:
    """The core is a library: neither it nor anything it pulls in is served, or knows who is."""
    files = modules("nowcast_service")
    for name in files:
        if not name.startswith(f"nowcast_service.{part}"):
            continue
        for module, via in reached(name).items():
            assert module.split(".")[1] not in OUTER, f"{name} reaches {module} through {via}"
            served = tops(imports(module, files[module])) & SERVED
            assert not served, f"{name} reaches {module} (through {via}), which imports {sorted(served)}"


def test_thin_client_depends_on_four_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in project["dependencies"]}
    assert names == {"numpy", "httpx", "msgpack", "pydantic"}


def test_rules_would_notice(tmp_path: Path) -> None:
    """The reader of imports sees relative, late and conditional ones; those for types only do not count."""
    module = tmp_path / "probe.py"
    module.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "try:\n    import lightning\nexcept ImportError:\n    import accelerate\n"
        "def late():\n    from nowcast_service import app\n"
        "class Body:\n    import fastapi\n"
        "from . import errors\nfrom ..graph.blocks import Block\n"
    )
    at_load = imports("a.b.probe", module, everywhere=False)
    assert tops(at_load) == {"typing", "lightning", "accelerate", "fastapi", "a"}
    assert {"a.b.errors", "a.graph.blocks"} <= at_load
    assert "nowcast_service.app" in imports("a.b.probe", module)
