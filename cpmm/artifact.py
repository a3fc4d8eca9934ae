"""Artifacts: folders of data files beside a JSON header that describes and seals each of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpmm import __version__
from cpmm.files import replace_file

SCHEMA = 2
SEAL = {"schema", "kind", "version", "files", "tensors", "seal"}
REMEDY = "restore it with `dvc checkout` or `dvc pull`, or make it again with `dvc repro`"


def save_artifact(
    folder: str | os.PathLike, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Write ``<kind>.safetensors`` and ``<kind>.json`` into ``folder``, each in one move.

    Other files that already lie in the folder are sealed along with the tensors.

    Args:
        folder: Made if missing.
        kind: What the artifact is: prepared, teacher, cpmm, mixture.
        tensors: By name, on any device.
        header: Anything JSON can hold, but for the names in :data:`SEAL`.

    Raises:
        ValueError: If the header states one of those, or a number that is not finite.
    """
    _require_plain(kind, header)  # what is refused is refused before a file changes
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    replace_file(folder / f"{kind}.safetensors", lambda temporary: save_file(tensors, temporary))
    seal_folder(folder, kind, header, {name: describe_tensor(t) for name, t in tensors.items()})


def seal_folder(
    folder: Path,
    kind: str,
    header: Mapping[str, Any],
    tensors: Mapping[str, list],
    files: Mapping[str, str] | None = None,
) -> None:
    """Write ``<kind>.json``: the header, with a sha256 of itself and all other files of the folder.

    Args:
        folder: Everything else that belongs to the artifact lies in it.
        kind: What the artifact is.
        header: As in :func:`save_artifact`.
        tensors: Type and shape of each array that the files hold.
        files: sha256 of the files, if it is known; None reads every one, see :func:`digest_folder`.

    Raises:
        ValueError: As in :func:`save_artifact`.
    """
    _require_plain(kind, header)
    values = {
        "schema": SCHEMA,
        "kind": kind,
        "version": __version__,
        "files": digest_folder(folder, kind) if files is None else dict(files),
        "tensors": dict(sorted(tensors.items())),
        **header,
    }
    text = _dump(values | {"seal": _seal(values)})
    replace_file(folder / f"{kind}.json", lambda temporary: temporary.write_text(text))


def digest_folder(
    folder: Path, kind: str, known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """sha256 of all files of an artifact but its header, by name; those ``known`` are not read."""
    known = known or {}
    digests = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name != f"{kind}.json" and file.suffix != ".partial":
            digests[name] = known.get(name) or file_digest(file)
    return digests


def load_artifact(
    folder: str | os.PathLike,
    kind: str,
    device: torch.device | str = "cpu",
    fingerprint: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_artifact` wrote; nothing is unpickled.

    Args:
        folder: Where the files are.
        kind: What the artifact must be.
        device: Where the tensors go.
        fingerprint: That of the configuration that it must have been made from; None takes any.

    Returns:
        The tensors by name, and the header.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or the artifact is of another kind, schema, version or
            configuration.
    """
    folder = Path(folder)
    header = load_header(folder, kind, fingerprint)
    path = folder / f"{kind}.safetensors"
    verify_files(folder, header, {path.name, *header["files"]})
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}): {REMEDY}") from error
    got = {name: describe_tensor(value) for name, value in sorted(tensors.items())}
    if got != header["tensors"]:
        raise ValueError(
            f"{path} holds {got}, its header {kind}.json announces {header['tensors']}: {REMEDY}"
        )
    return tensors, header


def load_header(
    folder: str | os.PathLike, kind: str, fingerprint: str | None = None
) -> dict[str, Any]:
    """Read an artifact's header and check what it says of itself; arguments and errors as above."""
    path = Path(folder) / f"{kind}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {REMEDY}")
    try:
        text = path.read_bytes().decode()
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {REMEDY}") from error
    header = header if isinstance(header, dict) else {}
    got = (header.get("kind"), header.get("schema"))
    if got != (kind, SCHEMA):
        raise ValueError(
            f"{path}: expected kind {kind!r} of schema {SCHEMA}, got kind {got[0]!r} of schema "
            f"{got[1]}: {REMEDY}"
        )
    values = {name: value for name, value in header.items() if name != "seal"}
    if header.get("seal") != _seal(values) or text != _dump(header):
        raise ValueError(
            f"{path} is damaged or was edited: its seal is {header.get('seal')}, its content has "
            f"{_seal(values)}: {REMEDY}"
        )
    if _series(header["version"]) != _series(__version__):
        raise ValueError(
            f"{path} was written by cpmm {header['version']}, this is cpmm {__version__}, which "
            f"reads {_series(__version__)}.*: use that version, or make it again with `dvc repro`"
        )
    if fingerprint is not None and header.get("fingerprint") != fingerprint:
        raise ValueError(
            f"{path} has the configuration's fingerprint {header.get('fingerprint')}, expected "
            f"{fingerprint}: it was made from other options, or belongs to another preset: {REMEDY}"
        )
    return header


def verify_files(folder: Path, header: Mapping[str, Any], names: Iterable[str]) -> None:
    """Compare files of an artifact with the sha256 in its header.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If one is damaged, or not of this artifact.
    """
    for name in sorted(names):
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{folder}: its header names a file outside of it, {name}: {REMEDY}")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {REMEDY}")
        digest = file_digest(path)
        if digest != header["files"].get(name):
            raise ValueError(
                f"{path} is damaged, or belongs to another artifact: its sha256 is {digest}, "
                f"{header['kind']}.json says {header['files'].get(name)}: {REMEDY}"
            )


def describe_tensor(value: Any) -> list:
    """Type and shape of a tensor or array, as headers state them."""
    return [str(value.dtype).removeprefix("torch."), list(value.shape)]


def file_digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_plain(kind: str, header: Mapping[str, Any]) -> None:
    if clash := SEAL & set(header):
        raise ValueError(f"the header of a {kind} cannot state {sorted(clash)}: they are its seal")
    json.dumps(dict(header), allow_nan=False)


def _dump(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"


def _seal(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump(values).encode()).hexdigest()


def _series(version: str) -> str:
    return ".".join(str(version).split(".")[:2])
