"""What holds for the whole source: the length of functions, and how many parameters they take."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 60  # of a function, its docstring not counted
MOST_PARAMETERS = 10


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the source and the file it stands in."""
    for folder in ("cpmm", "workflows", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield path.relative_to(ROOT).as_posix(), node


def n_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the last one, without the docstring."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    n = function.end_lineno - function.lineno + 1
    return n - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


def is_choice_of_options(file: str, name: str) -> bool:
    """Whether it is where scikit-learn wants all the options of an estimator, by name."""
    return file.startswith("cpmm/estimators/") and name == "__init__"


def n_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters but ``self`` and ``cls``."""
    arguments = function.args
    named = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
    rest = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return len([argument for argument in named + rest if argument.arg not in {"self", "cls"}])


def test_no_function_is_too_long():
    long = {(file, f.name): n_lines(f) for file, f in functions()}
    assert {k: n for k, n in long.items() if n > MOST_LINES} == {}


def test_no_function_has_too_many_parameters():
    found = [(file, f) for file, f in functions() if not is_choice_of_options(file, f.name)]
    many = {(file, f.name): n_parameters(f) for file, f in found}
    assert {k: n for k, n in many.items() if n > MOST_PARAMETERS} == {}


def test_lines_and_parameters_are_counted():
    source = (
        '@decorated\ndef f(self, a, /, b, *c, d, **e):\n    """Two\n    lines."""\n\n    return 1\n'
    )
    (function,) = ast.parse(source).body
    assert n_lines(function) == 3
    assert n_parameters(function) == 5
