"""Every artifact of the pipeline, written and read: safetensors with JSON headers, and zarr spaces."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zarr.codecs import Crc32cCodec

from cpmm.artifact import (
    REMEDY,
    describe_tensor,
    digest_folder,
    file_digest,
    load_artifact,
    load_header,
    replace_file,
    save_artifact,
    seal_folder,
    verify_files,
)
from cpmm.data import SPLITS, DataSplits
from cpmm.pipeline.config.fingerprints import fingerprint_evaluation
from cpmm.preprocessing import Augmentation, Preprocessing


def save_prepared(folder: Path, data: DataSplits, fingerprint: str) -> None:
    """Write the splits; ``fingerprint`` is their fingerprint."""
    tensors = {f"raw_{split}": data.raw[split] for split in SPLITS} | data.preprocessing.tensors
    if data.label is not None:
        tensors |= {f"label_{split}": data.label[split] for split in SPLITS}
    header = {
        "fingerprint": fingerprint,
        "preprocessing": data.preprocessing.to_dict(),
        "augmentation": asdict(data.augmentation),
        "noise_seed": data.noise_seed,
        "image_shape": data.image_shape,
        "feature_names": list(data.feature_names),
        "class_names": list(data.class_names),
    }
    save_artifact(folder, "prepared", tensors, header)


def load_prepared(folder: Path, fingerprint: str | None = None) -> DataSplits:
    """Read the splits; ``fingerprint`` is the fingerprint that they must have, None takes any."""
    tensors, header = load_artifact(folder, "prepared", fingerprint=fingerprint)
    shape = tuple(header["image_shape"]) if header["image_shape"] else None
    labelled = "label_train" in tensors
    return DataSplits(
        raw={split: tensors[f"raw_{split}"] for split in SPLITS},
        label={split: tensors[f"label_{split}"] for split in SPLITS} if labelled else None,
        preprocessing=Preprocessing.from_dict(header["preprocessing"], tensors),
        augmentation=Augmentation(**header["augmentation"] | {"image_shape": shape}),
        noise_seed=header["noise_seed"],
        image_shape=shape,
        feature_names=tuple(header["feature_names"]),
        class_names=tuple(header["class_names"]),
    )


def save_model(folder: Path, kind: str, model: nn.Module, header: dict[str, Any]) -> None:
    """Write a model's weights."""
    save_artifact(folder, kind, model.state_dict(), header)


def load_model(folder: Path, kind: str, model: nn.Module, fingerprint: str | None = None) -> None:
    """Load weights into a model built from the same configuration.

    Args:
        folder: Where they are.
        kind: teacher or cpmm.
        model: Gets them.
        fingerprint: The fingerprint that they must have; None takes any.

    Raises:
        ValueError: If the weights do not fit the model.
    """
    tensors, _ = load_artifact(folder, kind, fingerprint=fingerprint)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    got = {name: tuple(value.shape) for name, value in tensors.items()}
    if expected != got:
        differing = sorted(
            name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)
        )
        name = differing[0]
        raise ValueError(
            f"{folder} does not fit the configured {kind}: {len(differing)} tensors differ, {name} "
            f"has shape {got.get(name)}, expected {expected.get(name)}: {REMEDY}"
        )
    model.load_state_dict(tensors)


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
                f"space {index + 1}/{len(self)} of {self.folder} has missing or non-finite values: {REMEDY}"
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
    group.create_array(
        "u",
        shape=(len(positions), rows, n_features),
        chunks=(1, chunk, n_features),
        shards=(1, shard, n_features),
        dtype=dtype,
        compressors=Crc32cCodec(),  # a checksum for each chunk; floats like these do not compress
        fill_value=float("nan"),  # so that a missing shard cannot pass for data
        dimension_names=("space", "row", "feature"),
    )
    if train_index is not None:
        group.create_array(
            "train_index",
            data=train_index.numpy(),
            chunks=(len(train_index),),
            compressors=Crc32cCodec(),
            dimension_names=("point",),
        )
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
    # Otherwise every number is compared with the fill value first, which takes as long as the write.
    array.with_config({"write_empty_chunks": True})[index] = rows.cpu().numpy()
    name = f"u/c/{index}/0/0"
    return {name: file_digest(folder / name)}


def seal_spaces(folder: Path, fingerprint: str, shards: dict[str, str]) -> None:
    """Seal a store whose spaces have all been written.

    Args:
        folder: The store.
        fingerprint: Its fingerprint.
        shards: sha256 of each shard, from :func:`write_space`: gigabytes that are not read again.
    """
    group = zarr.open_group(folder, mode="r")
    names = [name for name in ("train_index", "u") if name in group]
    tensors = {name: describe_tensor(group[name]) for name in names}
    files = digest_folder(folder, "spaces", shards)
    seal_folder(folder, "spaces", {"fingerprint": fingerprint}, tensors, files)


def open_spaces(folder: Path, fingerprint: str | None = None) -> Spaces:
    """Open a store of spaces.

    Args:
        folder: The store.
        fingerprint: The fingerprint that it must have; None takes any.

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
        state: The points where the flow goes on from, float32, (rows, M); None where none is needed.
        statistics: Of each space that is done.
        shards: sha256 of each shard that is written.
    """

    done: int = 0
    state: Tensor | None = None
    statistics: list[dict[str, float]] = field(default_factory=list)
    shards: dict[str, str] = field(default_factory=dict)


def save_extraction(scratch: Path, extraction: Extraction) -> None:
    """Note how far the extraction has got; killed at any moment, the last note or this one is whole."""
    header = {name: getattr(extraction, name) for name in ("done", "statistics", "shards")}
    files, tensors = {}, {}
    if extraction.state is not None:
        name = f"state-{extraction.done}.safetensors"
        tensors = {"state": extraction.state}
        replace_file(scratch / name, lambda temporary: save_file(tensors, temporary))
        files[name] = file_digest(scratch / name)
    described = {name: describe_tensor(value) for name, value in tensors.items()}
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


def write_json(path: Path, value: object) -> None:
    """Write JSON in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text))


def clear_partial(folder: Path) -> None:
    """Remove what a killed write left behind in ``folder``."""
    for path in folder.rglob("*.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def verify_evaluation(folder: Path, config: dict) -> None:
    """Check the evaluation and ``metrics.json`` against the seal that evaluate has put on them.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If one is damaged, or of another configuration.
    """
    header = load_header(folder / "evaluation", "evaluation", fingerprint_evaluation(config))
    verify_files(folder / "evaluation", header, header["files"])
    path = folder / "metrics.json"
    if not path.is_file() or file_digest(path) != header["metrics"]:
        raise ValueError(
            f"{path} is not what was evaluated with {folder / 'evaluation'}: it is missing, damaged, edited, "
            "or of another run; restore it with `git checkout`, or make both again with `dvc repro`"
        )


def sweep_command(folder: Path) -> str:
    """The command that makes a sweep's folder ``data/<preset>/sweep/<sweep>``, as messages show it."""
    return f"`python workflows/sweep.py preset={folder.parents[1].name} sweep={folder.name}`"


def seal_sweep(folder: Path, fingerprint: str, beside: Iterable[Path]) -> None:
    """Seal the folder of a sweep, with the sha256 of the tables that git keeps beside it.

    Args:
        folder: Of the sweep.
        fingerprint: Of what was searched, and of all trials.
        beside: The tables.
    """
    digests = {path.name: file_digest(path) for path in beside}
    seal_folder(folder, "sweep", {"fingerprint": fingerprint, "beside": digests}, {})


def verify_sweep(folder: Path) -> None:
    """Check the folder of a sweep and the tables beside it against the seal that the sweep has put on them.

    Raises:
        FileNotFoundError: If the sweep was not run, or a file is missing.
        ValueError: If one is damaged.
    """
    again = sweep_command(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: {again} makes it")
    try:
        header = load_header(folder, "sweep")
        verify_files(folder, header, header["files"])
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{error}; its command is {again}") from error
    for name, digest in header["beside"].items():
        path = folder.with_name(name)
        if not path.is_file() or file_digest(path) != digest:
            raise ValueError(
                f"{path} is not what was written with {folder}: it is missing, damaged or edited; "
                f"restore it with `git checkout`, or make both again with {again}"
            )
