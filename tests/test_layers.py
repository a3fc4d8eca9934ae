"""No import runs upward from room to room, and none in a circle from file to file.

What is imported within a function counts as what is imported at the top: it only hides a circle.
Imports for type checking count as running upward, but close no circle: nothing is loaded.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    p for room in ("cpmm", "workflows", "benchmarks") for p in (ROOT / room).rglob("*.py")
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}
# From the ground up; a file stands on the floor of the longest name that it begins with.
FLOORS = (
    ("cpmm",),
    ("cpmm.training", "cpmm.baselines", "cpmm.reading"),
    ("cpmm.estimators",),
    ("cpmm.pipeline",),  # errors and progress, which know nothing of a pipeline
    ("cpmm.pipeline.config",),
    ("cpmm.pipeline.artifacts", "cpmm.pipeline.stage"),
    ("cpmm.pipeline.models",),
    ("cpmm.pipeline.scores",),
    ("cpmm.pipeline.sweeps",),
    ("cpmm.cli", "cpmm.__main__"),
    ("workflows",),
    ("benchmarks",),
)


@cache
def imported(module: str, for_types: bool) -> frozenset[str]:
    """Modules of ours that a module imports anywhere, those for type checking if asked for."""
    path, found = MODULES[module], set()
    package = ".".join(path.relative_to(ROOT).parent.parts)
    left: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            left += [*node.orelse, *(node.body if for_types else [])]
            continue
        left += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names if names <= MODULES.keys() else names | {base}
    return frozenset(found & MODULES.keys() - {module})


def floor(module: str) -> int:
    places = {name: i for i, names in enumerate(FLOORS) for name in names}
    return places[max((n for n in places if f"{module}.".startswith(f"{n}.")), key=len)]


def upward() -> set[tuple[str, str]]:
    pairs = {(module, other) for module in MODULES for other in imported(module, True)}
    return {(module, other) for module, other in pairs if floor(other) > floor(module)}


def circles() -> set[tuple[str, ...]]:
    """Modules that reach each other, group by group."""
    reached = {}
    for module in MODULES:
        seen, left = set(), {module}
        while left:
            seen |= left
            left = {other for name in left for other in imported(name, False)} - seen
        reached[module] = seen
    groups = (tuple(sorted(n for n in reached[m] if m in reached[n])) for m in MODULES)
    return {group for group in groups if len(group) > 1}


def test_no_import_runs_upward():
    assert upward() == set()


def test_no_files_import_each_other_in_a_circle():
    assert circles() == set()


def test_no_script_imports_another():
    scripts = {module for module in MODULES if module.startswith("workflows.")}
    assert scripts
    assert not {s: found for s in scripts if (found := imported(s, True) & scripts)}


def test_what_is_looked_for_is_found():
    assert "cpmm.mixture" in imported("cpmm.fitted", True)  # at the top
    assert "cpmm.fitted" in imported("cpmm.cli.main", False)  # in a function
    assert floor("cpmm.pipeline.errors") < floor("cpmm.pipeline.stage") < floor("cpmm.cli.main")
    assert floor("cpmm.training.loss") == floor("cpmm.baselines.direct") > floor("cpmm.mixture")
