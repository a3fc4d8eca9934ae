"""Options as people write them on a command line, for messages that say what to write."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any


def quote(value: Any) -> str:
    """Write a value as Hydra reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        taken = value.lower() in ("null", "true", "false", "nan", "inf")
        if value.isascii() and value.isidentifier() and not taken:
            return value
        # Hydra takes backslashes as they are, but for those before a quote.
        return "'" + re.sub(r"(\\*)'", r"\1\1\\'", value + "'")[:-2] + "'"
    if isinstance(value, list):
        return f"[{','.join(map(quote, value))}]"
    if isinstance(value, Mapping):
        return "{}"
    return str(value)


def write_options(prefix: str, **values: Any) -> str:
    """Write options for a shell: ``--delimiter ';'``, or ``'data.options.delimiter='"';'"``.

    Args:
        prefix: ``--``, or the section of an override with its dot.
        values: By name.
    """
    if prefix == "--":
        return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in values.items())
    return " ".join(quote_word(f"{prefix}{name}={quote(value)}") for name, value in values.items())


def quote_word(word: str) -> str:
    """Quote a word for a shell, by double quotes where it has single ones."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)
