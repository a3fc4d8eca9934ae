"""Rows of large tables, a part at a time: CSV and NumPy arrays in, CSV and NumPy arrays out."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cpmm.pipeline.artifacts.sources import whole_npy


class PointReader:
    """Points of a file, (n, M) at a time, in bounded memory.

    Args:
        path: A CSV file whose header names the features, in any order and among others, or a .npy
            file, (N, M), (N, H, W) or (N, C, H, W).
        feature_names: M names.
        batch_size: Rows of a part.
        delimiter: Of the CSV file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is neither, or its columns or shape are not those of the features.
    """

    def __init__(
        self, path: Path, feature_names: Sequence[str], batch_size: int, delimiter: str = ","
    ) -> None:
        self.path, self.names, self.batch_size = path, list(feature_names), batch_size
        self.delimiter = delimiter
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}: give a .csv or .npy file of points")
        readers = {
            ".npy": (self._open_npy, self._read_npy),
            ".csv": (self._open_csv, self._read_csv),
        }
        if path.suffix not in readers:
            raise ValueError(
                f"{path} must be a .csv or .npy file: got {path.suffix or 'no ending'!r}"
            )
        open_file, self._read = readers[path.suffix]
        self.total = open_file()

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yield points, (n, M), and how far the file has been read, of :attr:`total`."""
        return self._read()

    def _open_npy(self) -> int:
        with whole_npy(self.path):
            array = self._map()
        m = len(self.names)
        if array.dtype.kind not in "fiu" or array.ndim < 2 or np.prod(array.shape[1:]) != m:
            raise ValueError(
                f"{self.path} must hold numbers of {m} features, (N, {m}) or images of as many pixels: got "
                f"{array.dtype} of shape {array.shape}"
            )
        if not len(array):
            raise ValueError(f"{self.path} has no rows: expected at least one")
        return len(array)

    def _map(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r", allow_pickle=False)

    def _read_npy(self) -> Iterator[tuple[np.ndarray, int]]:
        for start in range(0, self.total, self.batch_size):
            # Mapped anew each time: what was read before does not stay in memory.
            part = self._map()[start : start + self.batch_size]
            yield np.array(part).reshape(len(part), -1), start + len(part)

    def _open_csv(self) -> int:
        try:
            names = pd.read_csv(self.path, nrows=0, **self._options()).columns.tolist()
        except pd.errors.EmptyDataError as error:
            raise ValueError(f"{self.path} is empty: expected a header and rows") from error
        except (pd.errors.ParserError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} is not UTF-8 text with a header: {error}") from error
        lacking = [name for name in self.names if name not in names]
        if lacking:
            shown = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
            raise ValueError(
                f"{self.path} lacks {len(lacking)} of the mixture's {len(self.names)} features: {shown}; its "
                f"header has {', '.join(names[:5])}{', ...' if len(names) > 5 else ''} (delimiter {self.delimiter!r})"
            )
        return self.path.stat().st_size

    def _options(self) -> dict[str, Any]:
        return {"sep": self.delimiter, "skipinitialspace": True, "engine": "c"}

    def _read_csv(self) -> Iterator[tuple[np.ndarray, int]]:
        # As text first: a cell that is no number is named, and none is taken for one that is missing.
        n_before = 0
        try:
            with self.path.open("rb") as file, warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)
                for table in pd.read_csv(
                    file, dtype=str, keep_default_na=False, index_col=False,
                    chunksize=self.batch_size, **self._options(),
                ):  # fmt: skip
                    if table.empty:
                        break
                    yield self._to_numbers(table, n_before), file.tell()
                    n_before += len(table)
        except (pd.errors.ParserError, pd.errors.ParserWarning, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.path} is not UTF-8 text with as many fields in every row as in its header, after row "
                f"{n_before}: {str(error).strip()}"
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
                    f"{table[name].iloc[row]!r} in row {n_before + row + 1} (row 1 follows the header)"
                )
            x[:, m] = number
        return x


@contextmanager
def csv_writer(path: Path | None) -> Iterator[Any]:
    """Yield a function that appends tables to a CSV file; None is the standard output.

    The file appears under its name once it is whole.
    """
    if path is None:
        yield _appender(sys.stdout)
        sys.stdout.flush()
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", newline="") as file:
            yield _appender(file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _appender(file: Any) -> Any:
    first = True

    def append(table: pd.DataFrame) -> None:
        nonlocal first
        table.to_csv(file, index=False, header=first, lineterminator="\n")
        first = False

    return append


@contextmanager
def npy_writer(path: Path, n: int, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Any]:
    """Yield a function that appends rows to a .npy file of shape (n, *shape).

    The file appears under its name once it is whole.
    """
    partial = path.with_name(path.name + ".partial")
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (n, *shape),
    }
    try:
        with partial.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            yield lambda rows: file.write(np.ascontiguousarray(rows, dtype).tobytes())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Any]:
    """Yield a function that sets how much of ``total`` is done; a bar on a terminal, else nothing."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
