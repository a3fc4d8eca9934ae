"""Every artifact of the pipeline, written and read: safetensors with JSON headers, and zarr spaces."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor, nn
from zarr.codecs import Crc32cCodec

from cpmm.artifact import REMEDY, load_artifact, load_header, replace_file, save_artifact
from cpmm.data import SPLITS, DataSplits
from cpmm.preprocessing import Augmentation, Preprocessing

SPACES_SCHEMA = 1


def save_prepared(folder: Path, data: DataSplits, mark: str) -> None:
    """Write the splits; ``mark`` is their fingerprint."""
    tensors = {f"raw_{split}": data.raw[split] for split in SPLITS}
    if data.label is not None:
        tensors |= {f"label_{split}": data.label[split] for split in SPLITS}
    header = {
        "fingerprint": mark,
        "preprocessing": data.preprocessing.to_dict(),
        "augmentation": asdict(data.augmentation),
        "noise_seed": data.noise_seed,
        "image_shape": data.image_shape,
        "class_names": list(data.class_names),
    }
    save_artifact(folder, "prepared", tensors, header)


def load_prepared(folder: Path) -> tuple[DataSplits, str]:
    """Read the splits and their fingerprint."""
    tensors, header = load_artifact(folder, "prepared")
    shape = tuple(header["image_shape"]) if header["image_shape"] else None
    labelled = "label_train" in tensors
    data = DataSplits(
        raw={split: tensors[f"raw_{split}"] for split in SPLITS},
        label={split: tensors[f"label_{split}"] for split in SPLITS} if labelled else None,
        preprocessing=Preprocessing.from_dict(header["preprocessing"]),
        augmentation=Augmentation(**header["augmentation"] | {"image_shape": shape}),
        noise_seed=header["noise_seed"],
        image_shape=shape,
        class_names=tuple(header["class_names"]),
    )
    return data, header["fingerprint"]


def save_model(folder: Path, kind: str, model: nn.Module, header: dict[str, Any]) -> None:
    """Write a model's weights."""
    save_artifact(folder, kind, model.state_dict(), header)


def load_model(folder: Path, kind: str, model: nn.Module) -> dict[str, Any]:
    """Load weights into a model built from the same configuration, and return the header.

    Raises:
        ValueError: If the weights do not fit the model.
    """
    tensors, header = load_artifact(folder, kind)
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
    return header


def artifact_fingerprint(folder: Path, kind: str) -> str:
    """Read the fingerprint of an artifact without its tensors."""
    return load_header(folder, kind)["fingerprint"]


@dataclass(frozen=True)
class Spaces:
    """The zarr store of the curriculum, one shard a space, training rows before validation rows.

    Attributes:
        folder: The store.
        array: (V, rows, M), from the latent space to the input.
        n_train: Training rows: draws times training points.
        positions: v of each space, (V,).
        fingerprint: Of the teacher, the data and the options it was built from.
    """

    folder: Path
    array: zarr.Array
    n_train: int
    positions: Tensor
    fingerprint: str

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
        try:
            values = self.array[index, rows]
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(
                f"space {index + 1}/{len(self)} of {self.folder} is damaged ({error}): {REMEDY}"
            ) from error
        values = torch.from_numpy(np.asarray(values, dtype=np.float32))
        if not bool(torch.isfinite(values).all()):
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
    mark: str,
) -> None:
    """Make an empty store of spaces.

    Args:
        folder: Must not exist.
        positions: v of each space, (V,).
        n_train: Training rows of a space.
        n_validation: Validation rows of a space.
        n_features: M.
        dtype: "float32", or "float16" for half the size.
        chunk_rows: Rows of a chunk within a space's shard.
        mark: Fingerprint of what the spaces are built from.

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
    group.attrs.update(
        {
            "schema": SPACES_SCHEMA,
            "kind": "spaces",
            "fingerprint": mark,
            "n_train": n_train,
            "positions": positions.tolist(),
        }
    )


def write_space(folder: Path, index: int, rows: Tensor) -> None:
    """Write all rows of one space, (rows, M), as one shard."""
    zarr.open_group(folder, mode="r+")["u"][index] = rows.cpu().numpy()


def open_spaces(folder: Path) -> Spaces:
    """Open a store of spaces.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If its metadata are damaged or of another schema.
    """
    if not (folder / "zarr.json").is_file():
        raise FileNotFoundError(f"{folder} is no zarr store: {REMEDY}")
    try:
        group = zarr.open_group(folder, mode="r")
        array, attributes = group["u"], dict(group.attrs)
    except (ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"the metadata of {folder} are damaged ({error}): {REMEDY}") from error
    if (attributes.get("kind"), attributes.get("schema")) != ("spaces", SPACES_SCHEMA):
        raise ValueError(
            f"{folder}: expected spaces of schema {SPACES_SCHEMA}, got {attributes.get('kind')} of "
            f"schema {attributes.get('schema')}: {REMEDY}"
        )
    positions = torch.tensor(attributes["positions"], dtype=torch.float64)
    if array.ndim != 3 or array.shape[0] != len(positions):
        raise ValueError(
            f"{folder} has shape {array.shape}, its positions are {len(positions)}: {REMEDY}"
        )
    return Spaces(folder, array, attributes["n_train"], positions, attributes["fingerprint"])


def save_progress(
    scratch: Path, state: Tensor, done: int, statistics: list[dict[str, float]]
) -> None:
    """Note how many spaces are done, and the points where the flow goes on from."""
    header = {"done": done, "statistics": statistics}
    save_artifact(scratch, "progress", {"state": state}, header)


def load_progress(scratch: Path, start: Tensor) -> tuple[Tensor, int, list[dict[str, float]]]:
    """Read the points, the number of spaces done and their statistics; ``start`` if none is."""
    try:
        tensors, header = load_artifact(scratch, "progress")
    except (FileNotFoundError, ValueError):  # nothing done yet, or killed between the two files
        shutil.rmtree(scratch / "spaces", ignore_errors=True)
        return start, 0, []
    return tensors["state"], header["done"], header["statistics"]


def write_json(path: Path, value: object) -> None:
    """Write JSON in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text))


def clear_partial(folder: Path) -> None:
    """Remove what a killed write left behind in ``folder``."""
    for path in folder.rglob("*.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
