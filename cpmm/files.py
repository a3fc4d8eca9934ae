"""Files that are written in one move."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object], suffix: str = ".partial") -> None:
    """Let ``write`` fill a temporary file beside ``path``, and move it there in one step.

    Whatever goes wrong, ``path`` stays as it was, and no temporary file is left.

    Args:
        path: The file.
        write: Writes a file of the name that it is given.
        suffix: Of the temporary file's name; processes that may write the same file at
            once need one each.

    Raises:
        OSError: If the file cannot be written; it names ``path``.
    """
    temporary = path.with_name(path.name + suffix)
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or str(error.filename) not in ("None", str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file in one move."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
