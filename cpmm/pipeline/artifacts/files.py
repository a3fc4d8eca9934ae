"""Single files: written in one move, checked before they are used."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpmm.files import write_text


def write_json(path: Path, value: object) -> None:
    """Write a JSON file in one move, into a folder that is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=2) + "\n")


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
