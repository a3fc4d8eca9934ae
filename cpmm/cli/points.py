"""Rows of large tables, a part at a time: CSV and NumPy arrays in, CSV and NumPy arrays out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import pandas as pd

from cpmm.columns import Columns
from cpmm.files import replace_file
from cpmm.reading.arrays import (
    arrange_like,
    grey_levels,
    map_npy,
    real_values,
    require_more_than_one,
)
from cpmm.reading.tables import FeatureReader
from cpmm.reading.text import TextFormat

if TYPE_CHECKING:
    from cpmm.fitted import FittedMixture


class PointReader:
    """Points of a file, ``batch_size`` at a time, (n, M), in bounded memory.

    It is a table written as text whose header names the columns of the M features, in any order
    and among others, read as the data were that the mixture was trained on; or a .npy file, (N, M),
    (N, H, W) or (N, C, H, W), or of images in an order of the axes that is named.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is neither, or its columns or shape are not those of the features.
    """

    def __init__(
        self,
        path: Path,
        fitted: FittedMixture,
        batch_size: int,
        form: TextFormat,
        axes: str | None = None,
    ) -> None:
        self.path, self.names, self.batch_size = path, list(fitted.feature_names), batch_size
        self.image_shape, self.levels = fitted.image_shape, fitted.preprocessing.levels
        self.axes = axes
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no file {path}: give a table or a .npy file of points"
            )
        self.table = None
        if path.suffix in (".npy", ".npz"):  # the second is refused, with what to do
            self.total = self._open_npy()
            return
        if axes is not None:
            raise ValueError(f"--axes is of images in .npy files, {path} is a table: leave it out")
        columns = Columns.from_dict(fitted.header.get("columns"))
        self.table = FeatureReader(path, self.names, columns, form, batch_size)
        self.total = self.table.total

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yield points, (n, M), and how far the file has been read, of :attr:`total`."""
        return self._read_npy() if self.table is None else iter(self.table)

    def _open_npy(self) -> int:
        rows = self._map()
        if self.levels is not None and rows.dtype.kind in "bf":
            require_more_than_one(self.path, rows, self.levels)
        return len(rows)

    def _map(self) -> np.ndarray:
        array = map_npy(self.path)
        return arrange_like(self.path, array, self.axes, self.image_shape, len(self.names))

    def _read_npy(self) -> Iterator[tuple[np.ndarray, int]]:
        for start in range(0, self.total, self.batch_size):
            # Mapped anew each time: what was read before does not stay in memory.
            part = self._map()[start : start + self.batch_size]
            if self.levels is None:
                part = real_values(self.path, part, self.names, start)
            else:
                part = grey_levels(self.path, part, self.levels, start)
            yield part, start + len(part)


def write_csv(path: Path | None, tables: Iterable[pd.DataFrame]) -> int:
    """Write tables below each other, to the standard output if ``path`` is None.

    A file appears under its name once it is whole.

    Returns:
        The number of rows.
    """
    n_rows = 0

    def append_all(file: TextIO) -> None:
        nonlocal n_rows
        for table in tables:
            table.to_csv(file, index=False, header=not n_rows, lineterminator="\n")
            n_rows += len(table)
        file.flush()

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            append_all(file)

    if path is None:
        append_all(sys.stdout)
    else:
        replace_file(path, write)
    return n_rows


def write_npy(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, parts: Iterable[np.ndarray]
) -> None:
    """Write the parts of an array of this shape; the file appears once it is whole."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.ascontiguousarray(part, dtype).tobytes())

    replace_file(path, write)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Any]:
    """Yield a function that sets how much of ``total`` is done: a bar, if on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
