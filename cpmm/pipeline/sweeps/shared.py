"""Inputs in Ray's object store, which holds them once on each node for all trials there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch

from cpmm.pipeline.sweeps.inputs import Located, open_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from cpmm.data import DataSplits


@dataclass(frozen=True)
class SharedSpaces:
    """The spaces in the object store, each fetched when its turn comes: like ``store.Spaces``."""

    arrays: tuple[Any, ...]  # a reference to each space, (rows, M)
    n_train: int  # training rows of a space
    train_index: Tensor | None  # which training points went through the spaces; None: all did
    fingerprint: str  # of the store they were read from

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
        # The object store's memory is read-only and shared: a trial works on a copy of one space.
        return torch.from_numpy(ray.get(self.arrays[index])[rows].astype(np.float32, copy=True))


@dataclass(frozen=True)
class SharedInputs:
    """References to the data and the spaces of a trial."""

    data: Any
    spaces: SharedSpaces | None

    def load(self) -> tuple[DataSplits, SharedSpaces | None]:
        """Get them on any node of the cluster."""
        return ray.get(self.data), self.spaces


def share(located: Located) -> SharedInputs:
    """Read inputs, check them and put them into Ray's object store."""
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
