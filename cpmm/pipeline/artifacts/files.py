"""Single files: written in one move, checked before they are used."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file in one move; of a write that fails nothing is left."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a whole checkpoint file: a zip archive, of which torch checks no CRC."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (FileNotFoundError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError):
        return False


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Let libraries put their temporary files into ``folder``, which is gone afterwards.

    Lightning moves a checkpoint from there onto the last one. From another disk, such as that of
    ``/tmp``, the move would be a copy, and one that is cut short would leave neither.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(folder.resolve())
    try:
        yield
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)
