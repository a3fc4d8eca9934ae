"""Read every table of some folders as training does, and follow the remedy of each error.

    python benchmarks/reading.py FOLDER...

Prints each file that is not read, with its last error, and how many were read at the first, second,
... try. What an error says to set is set, nothing else; a traceback ends the run.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from cpmm.pipeline.errors import command
from cpmm.reading.tables import Choice, Table, read_table
from cpmm.reading.text import TextFormat

ENDS = (".csv", ".csv.gz", ".tsv", ".dat", ".txt.gz")


def options_in(message: str) -> dict[str, Any]:
    """Overrides that a message says to set, by name: words of a shell, values as YAML has them."""
    found = {}
    words = shlex.shlex(re.split(r"\bset ", message, flags=re.IGNORECASE)[-1], posix=True)
    words.whitespace_split, words.commenters = True, ""
    for word in iter(words.get_token, None):
        name, equals, value = word.partition("=")
        if not equals or not name.startswith("data."):
            break
        found[name] = yaml.safe_load(value.rstrip(";.,"))
    return found


def follow(path: Path, most: int = 2) -> tuple[Table, list[str]]:
    """Read a table, doing what each error says to do, at most ``most`` times.

    Returns:
        The table, and the errors on the way.

    Raises:
        ValueError: The last error, where it is still not read, or says nothing to set.
    """
    label, choice, form, said = None, Choice(), TextFormat(), []
    for _ in range(most):
        try:
            return read_table(path, form, label, choice), said
        except ValueError as error:
            said.append(str(error))
            options = options_in(said[-1])
            if not options:
                raise
        for name, value in options.items():
            section, _, option = name.rpartition(".")
            if option == "label_column":
                label = value
            elif section == "data.options":
                form = replace(form, **{option: value})
            else:
                choice = replace(choice, **{option: value})
    return read_table(path, form, label, choice), said


def _tables(folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.name.lower().endswith(ENDS) and not path.name.startswith("._"):
                yield path


def main() -> None:
    """Read every table, and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    tries: Counter[str] = Counter()
    for path in _tables(parser.parse_args().folders):
        try:
            _, said = follow(path, most=4)
        except ValueError as error:
            tries["not read"] += 1
            print(f"{path.name}: {str(error).replace(str(path), path.name)[:500]}", flush=True)
        else:
            tries[f"read at try {len(said) + 1}"] += 1
    print(f"{tries.total()} tables: " + ", ".join(f"{n} {how}" for how, n in sorted(tries.items())))


if __name__ == "__main__":
    with command("reading", resumes=False):
        main()
