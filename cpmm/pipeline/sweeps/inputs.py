"""What trials train on: found in the workspace or made, opened, and shared once with every node."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmm.pipeline.config import Config
from cpmm.pipeline.config.fingerprints import (
    fingerprint_inputs,
    fingerprint_prepared,
    fingerprint_spaces,
    fingerprint_teacher,
    needs_spaces,
)
from cpmm.pipeline.stage import threads_of

if TYPE_CHECKING:
    from torch import Tensor

    from cpmm.data import DataSplits
    from cpmm.pipeline.artifacts.spaces import Spaces


@dataclass(frozen=True)
class Located:
    """Where the inputs of a trial lie.

    Attributes:
        prepared: Folder of the data.
        spaces: The zarr store of the curriculum, None without one.
        fingerprints: Their fingerprints.
    """

    prepared: Path
    spaces: Path | None
    fingerprints: tuple[str, str | None]


def locate_inputs(config: Config, home: Path) -> Located:
    """Find the inputs of a configuration in ``data/<preset>``, or make them in its scratch folder.

    What the pipeline has made from the same options is used as it is. The rest is made by the same
    stages, and kept for other trials and sweeps.

    Args:
        config: The whole configuration of a trial.
        home: ``data/<preset>``.
    """
    from workflows import build_spaces, prepare_data, train_teacher

    prepared = fingerprint_prepared(config)
    data = _find_or_make("prepared", prepared, home, config, prepare_data.main, {})
    if not needs_spaces(config, config["model"]):
        return Located(data, None, fingerprint_inputs(config))
    inputs = {"prepared": data}
    if teacher := fingerprint_teacher(config):
        inputs["teacher"] = _find_or_make(
            "teacher", teacher, home, config, train_teacher.main, inputs
        )
    fingerprint = fingerprint_spaces(config)
    spaces = _find_or_make("spaces", fingerprint, home, config, build_spaces.main, inputs)
    return Located(data, spaces, fingerprint_inputs(config))


def open_inputs(located: Located) -> tuple[DataSplits, Spaces | None]:
    """Read the data and open the spaces.

    Raises:
        ValueError: If they are damaged, or not those that were located.
    """
    from cpmm.pipeline.artifacts.spaces import open_spaces
    from cpmm.pipeline.artifacts.store import load_prepared

    prepared, spaces = located.fingerprints
    data = load_prepared(located.prepared, prepared)
    return data, None if located.spaces is None else open_spaces(located.spaces, spaces)


def _find_or_make(
    name: str,
    fingerprint: str,
    home: Path,
    config: Config,
    make: Callable[[Path, Config], str],
    inputs: Mapping[str, Path],
) -> Path:
    """Return the folder of an input with the fingerprint ``fingerprint``."""
    made = home / ".scratch" / "inputs" / f"{name}-{fingerprint}"
    if _fingerprint_or_none(home / name, whole=False) == fingerprint:
        return home / name
    # Of what DVC does not keep, damage has no remedy but to make it again: it is read to the end.
    if _fingerprint_or_none(made / name, whole=True) == fingerprint:
        return made / name
    made.mkdir(parents=True, exist_ok=True)
    for other, path in inputs.items():
        link = made / other
        if link.is_symlink() or link.exists():
            link.unlink()
        link.symlink_to(os.path.relpath(path, made))
    print(f"inputs | making {name} {fingerprint}", flush=True)
    with threads_of(config):
        print(f"inputs | {make(made, config)}", flush=True)
    shutil.rmtree(made / ".scratch", ignore_errors=True)
    return made / name


def _fingerprint_or_none(folder: Path, whole: bool) -> str | None:
    """Fingerprint of an input, None if it is not there or unfit for use."""
    from cpmm.artifact import load_header, verify_files

    try:
        header = load_header(folder, folder.name)
        verify_files(folder, header, header["files"] if whole else ())
    except (FileNotFoundError, ValueError):
        return None
    return header["fingerprint"]


@dataclass(frozen=True)
class SharedSpaces:
    """The spaces in Ray's object store, each fetched when its turn comes: like ``spaces.Spaces``.

    Attributes:
        arrays: A reference to each space, (rows, M).
        n_train: Training rows of a space.
        train_index: Which training points went through the spaces; None: all did.
        fingerprint: Of the store they were read from.
    """

    arrays: tuple[Any, ...]
    n_train: int
    train_index: Tensor | None
    fingerprint: str

    def __len__(self) -> int:
        """V."""
        return len(self.arrays)

    def train(self, index: int) -> Tensor:
        """Training rows of a space, float32, (n_train, M)."""
        return self._read(index, slice(None, self.n_train))

    def validation(self, index: int) -> Tensor:
        """Validation rows of a space, float32, (rows - n_train, M)."""
        return self._read(index, slice(self.n_train, None))

    def _read(self, index: int, rows: slice) -> Tensor:
        import numpy as np
        import ray
        import torch

        # The object store's memory is read-only and shared: a trial works on a copy of one space.
        return torch.from_numpy(ray.get(self.arrays[index])[rows].astype(np.float32, copy=True))


@dataclass(frozen=True)
class SharedInputs:
    """Inputs in Ray's object store, which holds them once on each node."""

    data: Any
    spaces: SharedSpaces | None

    def load(self) -> tuple[DataSplits, SharedSpaces | None]:
        """Get them on any node of the cluster."""
        import ray

        return ray.get(self.data), self.spaces


def share(located: Located) -> SharedInputs:
    """Read inputs, check them and put them into Ray's object store."""
    import numpy as np
    import ray

    data, spaces = open_inputs(located)
    if spaces is None:
        return SharedInputs(ray.put(data), None)
    dtype = spaces.array.dtype
    arrays = []
    for index in range(len(spaces)):
        parts = [spaces.train(index).numpy(), spaces.validation(index).numpy()]
        arrays.append(ray.put(np.concatenate(parts).astype(dtype)))
    shared = SharedSpaces(tuple(arrays), spaces.n_train, spaces.train_index, spaces.fingerprint)
    return SharedInputs(ray.put(data), shared)


def size_of(located: Located) -> int:
    """Bytes of the inputs on disk."""
    folders = [located.prepared, *([located.spaces] if located.spaces else [])]
    return sum(p.stat().st_size for folder in folders for p in folder.rglob("*") if p.is_file())


def share_all(
    located: Mapping[tuple[str, str | None], Located], options: Mapping[str, Any]
) -> dict[tuple[str, str | None], Any]:
    """Share every input of a sweep, by the way that ``ray.inputs`` says."""
    if options["inputs"] == "driver":
        return {fingerprints: share(item) for fingerprints, item in located.items()}
    from cpmm.pipeline.sweeps.remote import offer

    # What DVC does not version, such as the spaces of an ablation, still travels from here.
    return {
        fingerprints: offer(item, options["cache"]) or share(item)
        for fingerprints, item in located.items()
    }
