"""Artifacts by path, or by the address of a DVC repository and a revision."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpmm.pipeline.artifacts.files import temporary_files_in

PREFIX = "dvc+"
FORM = (
    "dvc+REPOSITORY[@REVISION]#PATH, such as dvc+https://host/project.git@v1#data/digits/mixture "
    "or dvc+.@v1#data/digits/mixture"
)


@contextmanager
def mixture_folder(address: str) -> Iterator[Path]:
    """Yield the folder of a mixture; one that lies elsewhere is fetched and then deleted.

    Args:
        address: A folder, a file in it, or ``dvc+REPOSITORY[@REVISION]#PATH`` in the manner of
            pip's addresses; the repository is a path or what git takes, its DVC remote holds the
            files.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the address is malformed, DVC is not installed, or the repository, revision
            or path cannot be had.
    """
    if not address.startswith(PREFIX):
        path = Path(address)
        path = path.parent if path.suffix in (".json", ".safetensors") else path
        if not path.is_dir():
            raise FileNotFoundError(
                f"there is no mixture {address}: give its folder, such as data/digits/mixture "
                f"(`dvc pull` or `dvc repro` brings what git does not hold), or {FORM}"
            )
        if not (path / "mixture.json").exists():
            inside = sorted(found.parent for found in path.glob("*/mixture.json"))
            if inside:
                raise FileNotFoundError(f"{path} is no mixture, but holds one: give {inside[0]}")
        yield path
        return
    repository, revision, path = split_address(address)
    with tempfile.TemporaryDirectory(prefix="cpmm-") as folder:
        from cpmm.pipeline.artifacts.fetch import fetch_artifact

        target = Path(folder) / (Path(path).name or "mixture")
        with temporary_files_in(Path(folder) / ".clones"):  # which DVC may leave behind
            fetch_artifact(repository, revision, path, target)
        yield target


def split_address(address: str) -> tuple[str, str | None, str]:
    """Take an address apart: repository, revision (None is the newest), and path in it.

    Raises:
        ValueError: If it is malformed.
    """
    rest, _, path = address.removeprefix(PREFIX).partition("#")
    scheme, separator, place = rest.rpartition("://")
    # An @ before the path is a user, as in ssh://git@host: a revision follows the last slash.
    head, slash, tail = place.rpartition("/")
    tail, _, revision = tail.partition("@")
    repository = f"{scheme}{separator}{head}{slash}{tail}"
    if not repository or not path:
        raise ValueError(f"{address!r} is no address of a mixture: expected {FORM}")
    return repository, revision or None, path.strip("/")
