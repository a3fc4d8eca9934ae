"""The spaces of the curriculum, a zarr store, and how far their extraction has got."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from safetensors.torch import load_file, save_file
from torch import Tensor
from zarr.codecs import Crc32cCodec

from cpmm.artifact import (
    REMEDY,
    describe_tensor,
    digest_folder,
    file_digest,
    load_header,
    seal_folder,
    verify_files,
)
from cpmm.files import replace_file


@dataclass(frozen=True)
class Spaces:
    """The zarr store of the curriculum, one shard a space, training rows before validation rows.

    Attributes:
        folder: The store.
        array: (V, rows, M), from the latent space to the input.
        n_train: Training rows: draws times training points.
        train_index: Which training points went through the spaces, ascending; None: all did.
        positions: v of each space, (V,).
        header: With a sha256 of each shard, which is checked when its space is first read.
    """

    folder: Path
    array: zarr.Array
    n_train: int
    train_index: Tensor | None
    positions: Tensor
    header: dict[str, Any]
    _verified: set[int] = field(default_factory=set)

    @property
    def fingerprint(self) -> str:
        """Of the teacher, the data and the options the spaces were built from."""
        return self.header["fingerprint"]

    def __len__(self) -> int:
        """V."""
        return len(self.positions)

    def train(self, index: int) -> Tensor:
        """Training rows of a space, float32, (n_train, M)."""
        return self._read(index, slice(None, self.n_train))

    def validation(self, index: int) -> Tensor:
        """Validation rows of a space, float32, (rows - n_train, M)."""
        return self._read(index, slice(self.n_train, None))

    def _read(self, index: int, rows: slice) -> Tensor:
        if index not in self._verified:
            verify_files(self.folder, self.header, {f"u/c/{index}/0/0"})
            self._verified.add(index)
        try:
            values = self.array[index, rows]
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(
                f"space {index + 1}/{len(self)} of {self.folder} is damaged ({error}): {REMEDY}"
            ) from error
        values = torch.from_numpy(np.asarray(values)).float()
        # One pass, where isfinite takes several; NaN comes through it.
        if values.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):
            raise ValueError(
                f"space {index + 1}/{len(self)} of {self.folder} has missing or non-finite values: "
                f"{REMEDY}"
            )
        return values


def create_spaces(
    folder: Path,
    positions: Tensor,
    n_train: int,
    n_validation: int,
    n_features: int,
    dtype: str,
    chunk_rows: int,
    train_index: Tensor | None = None,
) -> None:
    """Make an empty store of spaces; :func:`seal_spaces` completes it.

    Args:
        folder: Must not exist.
        positions: v of each space, (V,).
        n_train: Training rows of a space.
        n_validation: Validation rows of a space.
        n_features: M.
        dtype: "float32", or "float16" for half the size.
        chunk_rows: Rows of a chunk within a space's shard.
        train_index: Which training points they are drawn from; None: all.

    Raises:
        ValueError: If ``dtype`` is not one of the two.
    """
    if dtype not in ("float32", "float16"):
        raise ValueError(f"spaces.dtype is {dtype!r}: choose float32 or float16")
    rows = n_train + n_validation
    chunk = min(chunk_rows, rows)
    shard = -(-rows // chunk) * chunk  # a chunk must divide its shard
    group = zarr.open_group(folder, mode="w-", zarr_format=3)
    # A checksum for each chunk, as floats like these do not compress; NaN, so that a missing shard
    # cannot pass for data.
    group.create_array(
        "u", shape=(len(positions), rows, n_features), chunks=(1, chunk, n_features),
        shards=(1, shard, n_features), dtype=dtype, compressors=Crc32cCodec(),
        fill_value=float("nan"), dimension_names=("space", "row", "feature"),
    )  # fmt: skip
    if train_index is not None:
        group.create_array(
            "train_index", data=train_index.numpy(), chunks=(len(train_index),),
            compressors=Crc32cCodec(), dimension_names=("point",),
        )  # fmt: skip
    group.attrs.update({"n_train": n_train, "positions": positions.tolist()})


def measure_spaces(folder: Path) -> tuple[int, int]:
    """Bytes and number of files of a store that was created, once it is whole."""
    array = zarr.open_group(folder, mode="r")["u"]
    last = ("statistics.csv", "spaces.json")  # a few KB
    besides = sum(
        path.is_file() and not path.is_relative_to(folder / "u" / "c") and path.name not in last
        for path in folder.rglob("*")
    )
    n_spaces = array.shape[0]
    size = n_spaces * math.prod(array.shards) * array.dtype.itemsize
    return size, n_spaces + besides + len(last)


def write_space(folder: Path, index: int, rows: Tensor) -> dict[str, str]:
    """Write all rows of one space, (rows, M), as one shard; return its name and sha256."""
    array = zarr.open_group(folder, mode="r+")["u"]
    # Else every number is compared with the fill value first, which takes as long as the write.
    array.with_config({"write_empty_chunks": True})[index] = rows.cpu().numpy()
    name = f"u/c/{index}/0/0"
    return {name: file_digest(folder / name)}


def seal_spaces(folder: Path, fingerprint: str, shards: dict[str, str]) -> None:
    """Seal a store whose spaces have all been written.

    ``shards`` are the sha256 by :func:`write_space`: gigabytes that are not read again.
    """
    group = zarr.open_group(folder, mode="r")
    names = [name for name in ("train_index", "u") if name in group]
    tensors = {name: describe_tensor(group[name]) for name in names}
    files = digest_folder(folder, "spaces", shards)
    seal_folder(folder, "spaces", {"fingerprint": fingerprint}, tensors, files)


def open_spaces(folder: Path, fingerprint: str | None = None) -> Spaces:
    """Open a store of spaces, which must have the fingerprint; None takes any.

    Raises:
        FileNotFoundError: If there is none, or a file is missing.
        ValueError: If its metadata are damaged, or of another schema or configuration.
    """
    header = load_header(folder, "spaces", fingerprint)
    metadata = {name for name in header["files"] if not name.startswith("u/c/")}
    verify_files(folder, header, metadata | {"zarr.json", "u/zarr.json"})
    group = zarr.open_group(folder, mode="r")
    arrays = {name: group[name] for name in header["tensors"]}
    got = {name: describe_tensor(array) for name, array in arrays.items()}
    array, positions = group["u"], torch.tensor(group.attrs["positions"], dtype=torch.float64)
    if header["tensors"] != got or array.shape[0] != len(positions):
        raise ValueError(
            f"{folder} holds {got} at {len(positions)} positions, its header announces "
            f"{header['tensors']}: {REMEDY}"
        )
    index = arrays.get("train_index")
    index = None if index is None else torch.from_numpy(np.asarray(index[:]))
    return Spaces(folder, array, group.attrs["n_train"], index, positions, header)


@dataclass
class Extraction:
    """How far the extraction of the spaces has got.

    Attributes:
        done: Spaces that are written.
        state: The points where the flow goes on from, float32, (rows, M); None if not needed.
        statistics: Of each space that is done.
        shards: sha256 of each shard that is written.
    """

    done: int = 0
    state: Tensor | None = None
    statistics: list[dict[str, float]] = field(default_factory=list)
    shards: dict[str, str] = field(default_factory=dict)


def save_extraction(scratch: Path, extraction: Extraction) -> None:
    """Note how far the extraction has got; after a kill, the last note or this one is whole."""
    header = {name: getattr(extraction, name) for name in ("done", "statistics", "shards")}
    files, described = {}, {}
    if extraction.state is not None:
        name, tensors = f"state-{extraction.done}.safetensors", {"state": extraction.state}
        replace_file(scratch / name, lambda temporary: save_file(tensors, temporary))
        files[name] = file_digest(scratch / name)
        described["state"] = describe_tensor(extraction.state)
    seal_folder(scratch, "progress", header, described, files)
    for path in scratch.glob("state-*.safetensors"):
        if path.name not in files:
            path.unlink()


def load_extraction(scratch: Path) -> Extraction:
    """Read how far the extraction has got; without a whole note it starts afresh."""
    try:
        header = load_header(scratch, "progress")
        verify_files(scratch, header, header["files"])
        shards = {"kind": "progress", "files": header["shards"]}
        verify_files(scratch / "spaces", shards, header["shards"])
    except (FileNotFoundError, ValueError):
        shutil.rmtree(scratch / "spaces", ignore_errors=True)
        return Extraction()
    state = [load_file(scratch / name)["state"] for name in header["files"]]
    return Extraction(
        header["done"], state[0] if state else None, header["statistics"], header["shards"]
    )
