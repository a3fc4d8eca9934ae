"""Artifacts of the pipeline: the prepared data, the weights of models, a sealed evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from cpmm.artifact import (
    REMEDY,
    file_digest,
    load_artifact,
    load_header,
    save_artifact,
    seal_folder,
    verify_files,
)
from cpmm.columns import Columns
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
    if (columns := data.columns.to_dict()) is not None:
        header["columns"] = columns
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
        columns=Columns.from_dict(header.get("columns")),
    )


def save_model(folder: Path, kind: str, model: nn.Module, header: dict[str, Any]) -> None:
    """Write a model's weights."""
    save_artifact(folder, kind, model.state_dict(), header)


def load_model(folder: Path, kind: str, model: nn.Module, fingerprint: str | None = None) -> None:
    """Load weights, which must have the fingerprint, into a model of the same configuration.

    Raises:
        ValueError: If the weights do not fit the model.
    """
    tensors, _ = load_artifact(folder, kind, fingerprint=fingerprint)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    got = {name: tuple(value.shape) for name, value in tensors.items()}
    if expected != got:
        differing = {name for name, _ in expected.items() ^ got.items()}
        name = min(differing)
        raise ValueError(
            f"{folder} does not fit the configured {kind}: {len(differing)} tensors differ, {name} "
            f"has shape {got.get(name)}, expected {expected.get(name)}: {REMEDY}"
        )
    model.load_state_dict(tensors)


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
            f"{path} is not what was evaluated with {folder / 'evaluation'}: it is missing, "
            "damaged, edited, or of another run; restore it with `git checkout`, or make both "
            "again with `dvc repro`"
        )


def sweep_command(folder: Path) -> str:
    """The command that makes the folder ``data/<preset>/sweep/<sweep>``, as messages show it."""
    return f"`python workflows/sweep.py preset={folder.parents[1].name} sweep={folder.name}`"


def seal_sweep(folder: Path, fingerprint: str, beside: Iterable[Path]) -> None:
    """Seal the folder of a sweep, with the sha256 of the tables that git keeps beside it.

    Its fingerprint is that of what was searched, and of all trials.
    """
    digests = {path.name: file_digest(path) for path in beside}
    seal_folder(folder, "sweep", {"fingerprint": fingerprint, "beside": digests}, {})


def verify_sweep(folder: Path) -> None:
    """Check the folder of a sweep and the tables beside it against the seal of the sweep.

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
