"""Artifacts: named tensors in safetensors beside a JSON header that describes and seals them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

SCHEMA = 1
SEAL = {"schema", "kind", "sha256", "tensors"}
REMEDY = "restore it with `dvc checkout` or `dvc pull`, or make it again with `dvc repro`"


def save_artifact(
    folder: str | os.PathLike, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Write ``<kind>.safetensors`` and ``<kind>.json`` into ``folder``, each in one move.

    Args:
        folder: Made if missing.
        kind: What the artifact is: prepared, teacher, cpmm, mixture.
        tensors: By name, on any device.
        header: Anything JSON can hold, but for the names in :data:`SEAL`.

    Raises:
        ValueError: If the header states one of those, or a number that is not finite.
    """
    if clash := SEAL & set(header):
        raise ValueError(f"the header of a {kind} cannot state {sorted(clash)}: they are its seal")
    json.dumps(dict(header), allow_nan=False)  # what JSON refuses, it refuses before a file changes
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    path = folder / f"{kind}.safetensors"
    replace_file(path, lambda temporary: save_file(tensors, temporary))
    sealed = {
        "schema": SCHEMA,
        "kind": kind,
        "sha256": _sha256(path),
        "tensors": {name: [str(t.dtype), list(t.shape)] for name, t in sorted(tensors.items())},
        **header,
    }
    text = json.dumps(sealed, indent=2, allow_nan=False) + "\n"
    replace_file(folder / f"{kind}.json", lambda temporary: temporary.write_text(text))


def load_artifact(
    folder: str | os.PathLike, kind: str, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_artifact` wrote; nothing is unpickled.

    Args:
        folder: Where the two files are.
        kind: What the artifact must be.
        device: Where the tensors go.

    Returns:
        The tensors by name, and the header.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, of another kind or schema, or the two do not match.
    """
    folder = Path(folder)
    header = load_header(folder, kind)
    path = folder / f"{kind}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {REMEDY}")
    digest = _sha256(path)
    if digest != header.get("sha256"):
        raise ValueError(
            f"{path} is damaged, or belongs to another header: its sha256 is {digest}, "
            f"{kind}.json beside it says {header.get('sha256')}: {REMEDY}"
        )
    try:
        return load_file(path, device=str(device)), header
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}): {REMEDY}") from error


def load_header(folder: str | os.PathLike, kind: str) -> dict[str, Any]:
    """Read the header of an artifact and check its kind and schema; errors as above."""
    path = Path(folder) / f"{kind}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {REMEDY}")
    try:
        header = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): {REMEDY}") from error
    header = header if isinstance(header, dict) else {}
    got = (header.get("kind"), header.get("schema"))
    if got != (kind, SCHEMA):
        raise ValueError(
            f"{path}: expected kind {kind!r} of schema {SCHEMA}, got kind {got[0]!r} of schema "
            f"{got[1]}: {REMEDY}"
        )
    return header


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file and move it onto ``path`` in one step."""
    temporary = path.with_name(path.name + ".partial")
    write(temporary)
    os.replace(temporary, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
