"""Rows of large tables, a part at a time: CSV and NumPy arrays in, CSV and NumPy arrays out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import pandas as pd

from cpmm.files import replace_file
from cpmm.reading.arrays import (
    arrange_like,
    grey_levels,
    map_npy,
    real_values,
    require_more_than_one,
)
from cpmm.reading.kinds import recognize

if TYPE_CHECKING:
    from cpmm.fitted import FittedMixture


class PointReader:
    """Points of a file, ``batch_size`` at a time, (n, M), in bounded memory.

    It is a CSV file whose header names the M features, in any order and among others, or a .npy
    file, (N, M), (N, H, W) or (N, C, H, W), or of images in an order of the axes that is named.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is neither, or its columns or shape are not those of the features.
    """

    def __init__(
        self,
        path: Path,
        fitted: FittedMixture,
        batch_size: int,
        delimiter: str = ",",
        axes: str | None = None,
    ) -> None:
        self.path, self.names, self.batch_size = path, list(fitted.feature_names), batch_size
        self.image_shape, self.levels = fitted.image_shape, fitted.preprocessing.levels
        self.axes = axes
        self.options: dict[str, Any] = {"sep": delimiter, "skipinitialspace": True, "engine": "c"}
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}: give a .csv or .npy file of points")
        readers = {
            ".npy": (self._open_npy, self._read_npy),
            ".npz": (self._open_npy, self._read_npy),  # refused, with what to do
            ".csv": (self._open_csv, self._read_csv),
        }
        if path.suffix not in readers:
            got = path.suffix or "no ending"
            with path.open("rb") as file:
                known = recognize(path, file.read(512))
            said = f"; it {known}" if known else ""
            raise ValueError(f"{path} must be a .csv or .npy file: got {got!r}{said}")
        if axes is not None and path.suffix == ".csv":
            raise ValueError(f"--axes is of images in .npy files, {path} is a table: leave it out")
        open_file, self._read = readers[path.suffix]
        self.total = open_file()

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yield points, (n, M), and how far the file has been read, of :attr:`total`."""
        return self._read()

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

    def _open_csv(self) -> int:
        try:
            names = pd.read_csv(self.path, nrows=0, **self.options).columns.tolist()
        except pd.errors.EmptyDataError as error:
            raise ValueError(f"{self.path} is empty: expected a header and rows") from error
        except (pd.errors.ParserError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} is not UTF-8 text with a header: {error}") from error
        lacking = [name for name in self.names if name not in names]
        if lacking:
            raise ValueError(
                f"{self.path} lacks {len(lacking)} of the mixture's {len(self.names)} features: "
                f"{_first(lacking)}; its header has {_first(names)} "
                f"(delimiter {self.options['sep']!r})"
            )
        return self.path.stat().st_size

    def _read_csv(self) -> Iterator[tuple[np.ndarray, int]]:
        # As text first: a cell that is no number is named, and none passes for a missing one.
        n_before = 0
        try:
            with self.path.open("rb") as file, warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)
                for table in pd.read_csv(
                    file, dtype=str, keep_default_na=False, index_col=False,
                    chunksize=self.batch_size, **self.options,
                ):  # fmt: skip
                    if table.empty:
                        break
                    yield self._to_numbers(table, n_before), file.tell()
                    n_before += len(table)
        except (pd.errors.ParserError, pd.errors.ParserWarning, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.path} is not UTF-8 text with as many fields in every row as in its header, "
                f"after row {n_before}: {str(error).strip()}"
            ) from error
        if not n_before:
            raise ValueError(f"{self.path} has a header and no rows: expected at least one")

    def _to_numbers(self, table: pd.DataFrame, n_before: int) -> np.ndarray:
        x = np.empty((len(table), len(self.names)))
        for m, name in enumerate(self.names):
            number = pd.to_numeric(table[name], errors="coerce").to_numpy(float)
            bad = ~np.isfinite(number)
            if bad.any():
                row = int(bad.argmax())
                raise ValueError(
                    f"column {name!r} of {self.path} must hold finite numbers: got "
                    f"{table[name].iloc[row]!r} in row {n_before + row + 1} (row 1 follows the "
                    "header)"
                )
            x[:, m] = number
        return x


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


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
