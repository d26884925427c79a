"""The numbers of the house: how large a part may be, and that a rule is written down once.

A newcomer finds things by their names and reads them whole; both end where files grow, classes gather duties, imports
run in circles and a rule has a second copy.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

from tests.unit.test_imports import PACKAGES, ROOT, imports, modules

FILE_LINES = 450
CLASS_LINES = 300
PARAMETERS = 12
DOCS_BYTES = 1 << 20
HANDLE_PARAMETERS = 9
HANDLE_ATTRIBUTES = 14
ATTACH_PARAMETERS = 14
TOP_OF_SERVICE = {"__init__", "__main__", "cli", "settings", "history"}
COPIED_STATEMENTS = 3
"""A body shorter than this says too little to be a rule."""
RULES = {
    "verdict on a nowcast": "judge",
    "best level of the loss": "best_?level",
    "horizon of each nowcast": "horizons|horizon_schedule",
}
"""Rule -> the names it goes by."""

ALL_FILES = sorted(
    path for folder in ("proto", "client", "service", "lab", "tests") for path in ROOT.glob(f"{folder}/**/*.py")
)
SOURCES = [path for package in PACKAGES.values() for path in sorted(package.rglob("*.py"))]

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def length(node: ast.ClassDef | Function) -> int:
    """Lines of a definition, its decorators left out."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters(function: Function) -> list[str]:
    """Names of what a caller may pass; ``self`` and ``cls`` are not passed."""
    args = function.args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    names += [arg.arg for arg in (args.vararg, args.kwarg) if arg is not None]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def attributes(node: ast.ClassDef) -> set[str]:
    """Names a class binds on its instances, in its methods or as annotated fields."""
    found = {
        child.attr
        for child in ast.walk(node)
        if isinstance(child, ast.Attribute)
        and isinstance(child.ctx, ast.Store)
        and isinstance(child.value, ast.Name)
        and child.value.id == "self"
    }
    fields = (child for child in node.body if isinstance(child, ast.AnnAssign))
    return found | {
        field.target.id
        for field in fields
        if isinstance(field.target, ast.Name) and "ClassVar" not in ast.unparse(field.annotation)
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes each of which is reached from every other (Tarjan), single nodes left out."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(found)


def import_graph() -> dict[str, set[str]]:
    """Module -> modules of ours it imports, at whatever time; a package counts only where nothing finer is named."""
    files = {name: path for package in PACKAGES for name, path in modules(package).items()}
    graph = {}
    for name, path in files.items():
        targets = imports(name, path) & set(files) - {name}
        graph[name] = {target for target in targets if not any(other.startswith(f"{target}.") for other in targets)}
    return graph


@cache
def definitions(path: Path) -> list[tuple[str, ast.ClassDef | Function]]:
    """Every class and function of a file, nested ones too."""
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def class_named(name: str) -> ast.ClassDef:
    found = [
        node
        for path in SOURCES
        for _, node in definitions(path)
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    assert len(found) == 1, f"{len(found)} classes {name}"
    return found[0]


def test_imports_run_in_no_circle() -> None:
    assert circles(import_graph()) == []


def test_files_are_short() -> None:
    long = [str(path.relative_to(ROOT)) for path in ALL_FILES if len(path.read_text().splitlines()) > FILE_LINES]
    assert not long


def test_classes_are_short() -> None:
    long = {
        node.name
        for path in ALL_FILES
        for _, node in definitions(path)
        if isinstance(node, ast.ClassDef) and length(node) > CLASS_LINES
    }
    assert not long


def test_the_documentation_is_small() -> None:
    """Results are tables and one compressed file of raw runs per page."""
    assert sum(path.stat().st_size for path in (ROOT / "docs").rglob("*") if path.is_file()) <= DOCS_BYTES


def test_functions_take_few_parameters() -> None:
    """Beyond ``attach``, the front door, and the subcommands, whose parameters are their options."""
    many = {
        where: len(parameters(node))
        for path in SOURCES
        if path.parent.name != "commands"
        for where, node in definitions(path)
        if not isinstance(node, ast.ClassDef) and node.name != "attach" and len(parameters(node)) > PARAMETERS
    }
    assert not many


def test_attach_takes_few_parameters() -> None:
    doors = {where: node for path in SOURCES for where, node in definitions(path) if node.name == "attach"}
    assert doors
    many = {
        where: len(parameters(node))
        for where, node in doors.items()
        if not isinstance(node, ast.ClassDef)
        # Single settings by name, typed as a whole, count as none.
        and len(parameters(node)) - (node.args.kwarg is not None) > ATTACH_PARAMETERS
    }
    assert not many


def test_handle_is_built_of_few_parts() -> None:
    (init,) = (
        node for node in class_named("Handle").body if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    assert len(parameters(init)) <= HANDLE_PARAMETERS


def test_handle_holds_few_attributes() -> None:
    held = attributes(class_named("Handle"))
    assert len(held) <= HANDLE_ATTRIBUTES, sorted(held)


def test_top_of_the_service() -> None:
    assert {path.stem for path in PACKAGES["nowcast_service"].glob("*.py")} == TOP_OF_SERVICE


def rules_of(package: str) -> dict[str, list[str]]:
    """Rule -> where the top of a module defines something that goes by its name."""
    found: dict[str, list[str]] = {rule: [] for rule in RULES}
    for path in modules(package).values():
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                for rule, names in RULES.items():
                    if re.fullmatch(names, node.name.strip("_"), re.IGNORECASE):
                        found[rule].append(f"{path.relative_to(ROOT)} {node.name}")
    return found


def test_rules_are_written_once() -> None:
    rules = [rules_of(package) for package in PACKAGES]
    homes = {rule: [home for found in rules for home in found[rule]] for rule in RULES}
    assert {rule: found for rule, found in homes.items() if len(found) != 1} == {}


def test_experiments_use_the_rules_that_ship() -> None:
    """What an evaluation reports is what a user gets only where both follow the same rule."""
    own = [
        f"{path.relative_to(ROOT)} {node.name}"
        for path in modules("nowcast_lab").values()
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        and node.name.strip("_").lower() in {"trial", "judge", "best", "bestlevel"}
    ]
    assert own == []


def test_one_shot_requests_are_encoded_once() -> None:
    """Who asks for a nowcast outside a session goes through the client's API, or encodes the request a second time."""
    encoders = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for package in ("nowcast_client", "nowcast_lab")
        for path in modules(package).values()
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and "Encoder(NowcastRequest.KIND" in ast.unparse(node)
    ]
    assert len(encoders) == 1, encoders


def test_no_function_is_copied() -> None:
    """Two functions with the same statements are one function with two homes."""
    homes = defaultdict(list)
    for path in SOURCES:
        for where, node in definitions(path):
            if isinstance(node, ast.ClassDef):
                continue
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if (
                sum(isinstance(child, ast.stmt) for statement in body for child in ast.walk(statement))
                >= COPIED_STATEMENTS
            ):
                homes[ast.dump(ast.Module(body, []))].append(where)
    assert not [copies for copies in homes.values() if len(copies) > 1]


PART = """\
class Part:
    fixed: ClassVar[int] = 1
    size: int
    def __init__(self, a, *, b=1, **c):
        self.x, self.y = a, b
"""


def test_measures_would_notice() -> None:
    """Each measure on a case small enough to count by eye."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    part = ast.parse(PART).body[0]
    assert isinstance(part, ast.ClassDef)
    assert attributes(part) == {"size", "x", "y"}
    init = part.body[2]
    assert isinstance(init, ast.FunctionDef)
    assert parameters(init) == ["a", "b", "c"]
    assert length(part) == 5
    long = ast.parse("\n".join(["class Long:", *["    x = 1"] * CLASS_LINES])).body[0]
    assert isinstance(long, ast.ClassDef)
    assert length(long) > CLASS_LINES
