"""The code that a script reaches by its imports: what its outputs depend on, found and hashed."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import cpmm
from cpmm.pipeline.config.root import ROOT

PACKAGE = Path(cpmm.__file__).resolve().parent
SCRIPTS = ROOT / "workflows"


@cache
def reached_files(path: Path) -> dict[str, Path]:
    """Find a file and every file of ours that it imports, directly or through others.

    Imports within functions and for type checking count: they are read from the source.

    Args:
        path: A script of workflows/, or a module of cpmm/.

    Returns:
        Files by their names in the repository, in alphabetical order.
    """
    found: dict[str, Path] = {}
    left = {path.resolve()}
    while left:
        file = left.pop()
        found[_name(file)] = file
        left |= _imported_files(file) - set(found.values())
    return dict(sorted(found.items()))


def code_digests(path: Path) -> dict[str, str]:
    """Hash every file that ``path`` reaches, 16 hexadecimal digits each, by name."""
    return {name: _digest(file) for name, file in reached_files(path).items()}


def code_fingerprint(path: Path) -> str:
    """Hash all the code that ``path`` reaches, 16 hexadecimal digits."""
    text = "\n".join(f"{name} {digest}" for name, digest in code_digests(path).items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _name(file: Path) -> str:
    if file.is_relative_to(PACKAGE):  # may lie anywhere: installed, or sent to a worker
        return f"cpmm/{file.relative_to(PACKAGE).as_posix()}"
    return f"workflows/{file.name}"


@cache
def _imported_files(file: Path) -> set[Path]:
    """Files of ours that a file imports, with the ``__init__.py`` of each package above them."""
    package = ".".join(Path(_name(file)).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {found for name in names for found in _files_of(name)}


def _files_of(name: str) -> set[Path]:
    top, *parts = name.split(".")
    if top != "cpmm":
        return set()
    folders = [PACKAGE.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    candidates = [PACKAGE.joinpath(*parts).with_suffix(".py")] if parts else []
    candidates += [folder / "__init__.py" for folder in folders]
    return {path for path in candidates if path.is_file()}


@cache
def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
