"""Where records and checkpoints of trials are kept: a folder, a network file system, or S3.

Only an actor on the driver's node writes to the archive; every worker calls that actor, and needs
no access of its own. A trial's folder is named by its fingerprint: whoever asks for the same trial
again, after a kill or in another sweep, finds what it left there.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyarrow import fs

ROOT_MARK = "sweep-archive.json"
RECORD = "record.json"
CHECKPOINT = "last.ckpt"
SCHEMA = 1


class ArchiveError(OSError):
    """The archive cannot be read or written: the sweep must stop, and can go on later."""


class Archive:
    """Files below a root, each written in one move.

    Args:
        uri: A folder, or a URI such as ``s3://bucket/folder?endpoint_override=...``.
        create: Make the root if it is not there; otherwise writing there is an error.

    Raises:
        ArchiveError: If the root cannot be reached.
    """

    def __init__(self, uri: str, create: bool = True) -> None:
        self.uri = uri
        try:
            if "://" in uri:
                self.files, self.root = fs.FileSystem.from_uri(uri)
            else:
                self.files, self.root = fs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
            if create:
                self.files.create_dir(self.root, recursive=True)
                if not self._is_file(ROOT_MARK):
                    self._write(ROOT_MARK, json.dumps({"schema": SCHEMA}).encode())
        except (OSError, ValueError) as error:
            raise ArchiveError(f"ray.storage {uri!r} cannot be used: {_reason(error)}") from error

    def read(self, name: str) -> bytes | None:
        """Read a file, None if there is none."""
        path, opened = f"{self.root}/{name}", self.files.open_input_stream
        with self._saying("reading", name), suppress(FileNotFoundError), opened(path) as stream:
            return stream.read()
        return None

    def write(self, name: str, content: bytes) -> None:
        """Write a file; an :class:`ArchiveError` if that fails, or the archive has gone."""
        with self._saying("writing", name):
            if not self._is_file(ROOT_MARK):
                raise FileNotFoundError("the archive is no longer there")
            self.files.create_dir(f"{self.root}/{name}".rpartition("/")[0], recursive=True)
            self._write(name, content)

    def delete(self, name: str) -> None:
        """Delete a file if it is there."""
        with self._saying("deleting", name):
            if self._is_file(name):
                self.files.delete_file(f"{self.root}/{name}")

    def names(self, folder: str) -> list[str]:
        """List the files below a folder, as names for :meth:`read`."""
        below = fs.FileSelector(f"{self.root}/{folder}", recursive=True, allow_not_found=True)
        with self._saying("listing", folder):
            found = self.files.get_file_info(below)
        paths = [f.path for f in found if f.type == fs.FileType.File]
        return sorted(p[len(self.root) + 1 :] for p in paths if not p.endswith(".partial"))

    def read_json(self, name: str) -> Any:
        """Read JSON, None if there is none or it is damaged: what it says is then made again."""
        with suppress(ValueError):
            return json.loads(self.read(name) or b"null")
        return None

    def write_json(self, name: str, value: Any) -> None:
        """Write JSON."""
        self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def record(self, fingerprint: str) -> dict[str, Any] | None:
        """Record of a trial that has ended."""
        record = self.read_json(f"trials/{fingerprint}/{RECORD}")
        return record if isinstance(record, dict) and record.get("schema") == SCHEMA else None

    def save_record(
        self, fingerprint: str, record: dict[str, Any], files: Mapping[str, bytes] | None = None
    ) -> None:
        """Keep what a trial leaves, its files first, then its record; its checkpoint goes."""
        for name, content in (files or {}).items():
            self.write(f"trials/{fingerprint}/{name}", content)
        self.write_json(f"trials/{fingerprint}/{RECORD}", {"schema": SCHEMA, **record})
        self.delete(f"trials/{fingerprint}/{CHECKPOINT}")

    def delete_record(self, fingerprint: str) -> None:
        """Forget how a trial ended, so that it is run again."""
        self.delete(f"trials/{fingerprint}/{RECORD}")

    def has(self, name: str) -> bool:
        """Whether there is a file."""
        with self._saying("looking for", name):
            return self._is_file(name)

    def fetch(self, folder: str, target: Path) -> None:
        """Copy the files below a folder of the archive."""
        for name in self.names(folder):
            path = target / Path(name).relative_to(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            content = self.read(name)
            with self._saying("reading", name):
                if content is None:
                    raise FileNotFoundError("it has just gone")
            path.write_bytes(content)

    def _is_file(self, name: str) -> bool:
        return self.files.get_file_info(f"{self.root}/{name}").type == fs.FileType.File

    def _write(self, name: str, content: bytes) -> None:
        path = f"{self.root}/{name}"
        local = isinstance(self.files, fs.LocalFileSystem)
        # An object store shows an object whole or not at all; a file system needs the second step.
        target = f"{path}.{uuid.uuid4().hex[:8]}.partial" if local else path
        try:
            with self.files.open_output_stream(target) as stream:
                stream.write(content)
            if local:
                self.files.move(target, path)
        except OSError:
            if local:
                Path(target).unlink(missing_ok=True)
            raise

    @contextmanager
    def _saying(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArchiveError(
                f"{verb} {name} in ray.storage {self.uri!r} failed: {_reason(error)}; put that "
                "right, and the same command goes on from the last checkpoints"
            ) from error


def _reason(error: Exception) -> str:
    strerror = getattr(error, "strerror", None)
    return strerror or (str(error).splitlines() or [type(error).__name__])[0]
