"""Raw data of every kind, read into one form.

The options of each source are the keyword arguments of its function. They have no default value
here: conf/data/ holds every one.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cpmm import datasets
from cpmm.pipeline.artifacts.idx import read_idx_files
from cpmm.pipeline.artifacts.npy import whole_npy

LARGEST = 1e30  # of a value: it and the noise added to it are trained on in float32


@dataclass(frozen=True)
class Source:
    """Raw data, before any split or preprocessing.

    Attributes:
        x: (N, M); uint8 grey levels, or float64 for real-valued tables.
        label: Class index of each row, (N,), int64; -1 is not a member of any class. None without
            labels.
        official_test: The last ``official_test`` rows are the source's own test split; 0 if it has
            none.
        image_shape: (channels, height, width), with M their product; None if not an image.
        levels: Number of grey levels of data to be dequantized; None for real values.
        feature_names: M names.
        class_names: Names by class index.
    """

    x: np.ndarray
    label: np.ndarray | None
    official_test: int
    image_shape: tuple[int, int, int] | None
    levels: int | None
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...]


def read_source(config: Mapping[str, Any]) -> Source:
    """Read the data that a config asks for.

    Args:
        config: ``source``, one of :data:`SOURCES`, and every option of that source.

    Returns:
        The data in the order of the source.

    Raises:
        ValueError: If the source or an option is unknown or missing, or the data is broken.
        FileNotFoundError: If a file is missing.
        ConnectionError: If a download fails.
    """
    options = dict(config)
    name = options.pop("source", None)
    if name not in [*SOURCES]:  # a list, as what came may not be hashable
        raise ValueError(f"data.source is {name!r}: choose one of {', '.join(SOURCES)}")
    known = inspect.signature(SOURCES[name]).parameters
    for problem, wrong in (
        ("does not know", options.keys() - known.keys()),
        ("needs", known.keys() - options.keys()),
    ):
        if wrong:
            raise ValueError(
                f"source {name!r} {problem} {', '.join(f'data.{o}' for o in sorted(wrong))}: "
                f"its options are {', '.join(known) or 'none'}"
            )
    return SOURCES[name](**options)


def read_digits() -> Source:
    """Read the 1797 8 x 8 digits of scikit-learn, 17 grey levels.

    Returns:
        The digits; they have no test split of their own.
    """
    from sklearn.datasets import load_digits  # a second that no other source has to wait

    digits = load_digits()
    class_names = tuple(str(c) for c in digits.target_names)
    x, label = digits.data.astype(np.uint8), digits.target.astype(np.int64)
    return _images(x, label, 17, class_names, (1, 8, 8))


def read_rings(
    n: int, seed: int, radius: float, ratio: float, thickness: float, gaps: Sequence[float],
    gap_width: float,
) -> Source:  # fmt: skip
    """Draw N points of the broken circles of :func:`cpmm.datasets.rings`, labelled by ring."""
    generator = np.random.default_rng(seed)
    x, label = datasets.rings(n, generator, radius, ratio, thickness, gaps, gap_width)
    return Source(x, label, 0, None, None, ("x0", "x1"), ("inner", "outer"))


def read_spiral(
    n: int, seed: int, arms: int, start: float, twist: float, noise: float, outlier_fraction: float
) -> Source:
    """Draw N points of :func:`cpmm.datasets.spiral`, labelled by arm, -1 for the outliers."""
    generator = np.random.default_rng(seed)
    x, label = datasets.spiral(n, generator, arms, start, twist, noise, outlier_fraction)
    names = tuple(f"arm {a}" for a in range(arms))
    return Source(x, label, 0, None, None, ("x0", "x1"), names)


def read_idx(
    folder: str | None,
    mirror: str | None,
    cache: str | None,
    files: Mapping[str, str],
    md5: Mapping[str, str | None] | None,
    class_names: Sequence[str],
) -> Source:
    """Read images and labels in the IDX format of MNIST, 256 grey levels.

    A file is looked for in ``folder``, then in ``cache``, with and without ``.gz``, and is last
    downloaded from ``mirror`` into ``cache``. A download that fails a check is not kept.

    Args:
        folder: Where the files lie.
        mirror: http or https address of the folder to download from.
        cache: Where downloads are kept.
        files: File name of each role of :data:`cpmm.pipeline.artifacts.idx.IDX_ROLES`.
        md5: Digest of each role's uncompressed payload; null where it is not to be checked.
        class_names: Names of labels 0, 1, ...

    Returns:
        Training rows, then the test rows.

    Raises:
        ValueError: If an option is wrong or a file is damaged, of another format, or not the one
            whose digest was given.
        FileNotFoundError: If a file is nowhere and there is no mirror.
        ConnectionError: If a download fails.
    """
    part = read_idx_files(folder, mirror, cache, files, md5 or {})
    label = np.concatenate([part["train_labels"], part["test_labels"]]).astype(np.int64)
    if label.max() >= len(class_names):
        raise ValueError(
            f"labels go up to {label.max()}, data.options.class_names has {len(class_names)} "
            f"names: give {label.max() + 1}"
        )
    image = np.concatenate([part["train_images"], part["test_images"]])  # (N, H, W)
    shape = (1, *image.shape[1:])
    return _images(image, label, 256, tuple(class_names), shape, len(part["test_images"]))


def read_csv(path: str, label_column: str | None, delimiter: str) -> Source:
    """Read a table of numbers with a header.

    Args:
        path: The file, UTF-8.
        label_column: Column of class labels, integers or text; an empty cell or -1 is not a member
            of any class. None without labels.
        delimiter: One character between fields.

    Returns:
        All other columns as real values; classes in sorted order.

    Raises:
        ValueError: If the header or a value is not as described; the message names column and row.
        FileNotFoundError: If there is no such file.
    """
    _require_file(path, "data.options.path")
    delimiter = "\t" if delimiter == r"\t" else delimiter
    if len(delimiter) != 1:
        raise ValueError(f"data.options.delimiter must be one character: got {delimiter!r}")
    table = _read_table(path, label_column, delimiter)
    features = [name for name in table.columns if name != label_column]
    x = np.empty((len(table), len(features)))
    for m, name in enumerate(features):
        column = table[name]
        try:
            number = pd.to_numeric(column, errors="coerce")
        except OverflowError:  # a whole number of hundreds of digits, of Python's own type
            number = pd.to_numeric(column.astype(str), errors="coerce")
        is_text = (number.isna() & column.notna()).to_numpy()
        if is_text.any():
            row = is_text.argmax()
            raise ValueError(
                f"column {name!r} of {path} must hold numbers: got {column[row]!r} in row "
                f"{row + 1} (row 1 follows the header); encode or drop the column, name it as "
                f"data.options.label_column, or check data.options.delimiter (now {delimiter!r})"
            )
        x[:, m] = number
    _require_finite(path, x, features)
    if label_column is None:
        return Source(x, None, 0, None, None, tuple(features), ())
    label, class_names = _index_classes(path, table[label_column].str.strip())
    return Source(x, label, 0, None, None, tuple(features), class_names)


def read_npy(path: str, label_path: str | None, levels: int) -> Source:
    """Read NumPy arrays: a table of real values, or images.

    Args:
        path: A table (N, M) of floats, or images (N, H, W) or (N, C, H, W) of uint8.
        label_path: Class of each row, (N,), integers or text, -1 is not a member of any class.
            None without labels.
        levels: Number of grey levels of images, up to 256; a table has none.

    Returns:
        The table or the flattened images; classes in sorted order.

    Raises:
        ValueError: If an array is not as described.
        FileNotFoundError: If there is no such file.
    """
    x = _load_npy(path, "data.options.path")
    is_table = x.ndim == 2 and x.dtype.kind == "f"
    if not is_table and not (x.ndim in (3, 4) and x.dtype == np.uint8):
        raise ValueError(
            f"{path} must hold floats of shape (N, M), or uint8 images of shape (N, H, W) or "
            f"(N, C, H, W): got {x.dtype} of shape {x.shape}; convert it and save it again"
        )
    if x.size == 0:
        raise ValueError(f"{path} has no values: got shape {x.shape}, expected N and M above 0")
    if x.ndim == 4 and x.shape[1] > 4 >= x.shape[3]:
        raise ValueError(
            f"{path} must hold images of shape (N, C, H, W): got {x.shape}, which looks like "
            "(N, H, W, C); save x.transpose(0, 3, 1, 2)"
        )
    label, class_names = None, ()
    if label_path is not None:
        label, class_names = _read_classes(label_path, len(x), path)
    if is_table:
        x = x.astype(np.float64)
        names = tuple(f"x{m}" for m in range(x.shape[1]))
        _require_finite(path, x, names)
        return Source(x, label, 0, None, None, names, class_names)
    top = int(x.max())
    if levels is None or not top < levels <= 256:
        raise ValueError(
            f"{path} holds grey levels up to {top}: data.options.levels must be one of {top + 1} "
            f"to 256, and is {levels}"
        )
    image_shape = x.shape[1:] if x.ndim == 4 else (1, *x.shape[1:])
    return _images(x, label, levels, class_names, image_shape)


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": read_digits,
    "rings": read_rings,
    "spiral": read_spiral,
    "idx": read_idx,
    "csv": read_csv,
    "npy": read_npy,
}


def _load_npy(path: str, option: str) -> np.ndarray:
    _require_file(path, option)
    with whole_npy(path) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _read_classes(path: str, n: int, beside: str) -> tuple[np.ndarray, tuple[str, ...]]:
    value = _load_npy(path, "data.options.label_path")
    if value.shape != (n,) or value.dtype.kind not in "iuU":
        raise ValueError(
            f"{path} must hold an integer or a text for each of the {n} rows of {beside}: got "
            f"{value.dtype} of shape {value.shape}"
        )
    return _index_classes(path, value.astype(str))


def _read_table(path: str, label_column: str | None, delimiter: str) -> pd.DataFrame:
    """Read a CSV file with a header: labels as text, anything else as pandas finds it."""
    # A class may be called "None" or "NA".
    options: dict[str, Any] = {"sep": delimiter, "skipinitialspace": True, "keep_default_na": False}
    try:
        names = pd.read_csv(path, header=None, nrows=1, dtype=str, **options).iloc[0].tolist()
        _require_header(path, names, label_column, delimiter)
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            table = pd.read_csv(
                path,
                index_col=False,  # else pandas takes spare fields for an index
                dtype=None if label_column is None else {label_column: str},
                na_values={n: ["", "NA", "NaN", "nan"] for n in names if n != label_column},
                low_memory=False,
                **options,
            )
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"{path} is empty: expected a header and a row of numbers") from error
    except (pd.errors.ParserError, pd.errors.ParserWarning, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not UTF-8 text with as many fields in every row as in its header: {error}; "
            f"check the file and data.options.delimiter (now {delimiter!r})"
        ) from error
    if table.empty:
        raise ValueError(f"{path} has a header and no rows: expected at least one row of numbers")
    return table


def _require_file(path: str, option: str) -> None:
    if path is None or not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}: set {option} to an existing file")


def _require_header(
    path: str, names: Sequence[str], label_column: str | None, delimiter: str
) -> None:
    if "" in names:
        raise ValueError(
            f"column {names.index('') + 1} of {path} has no name: name every column, and save a "
            "table without its index"
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"{path} has more than one column named {', '.join(map(repr, repeated))}: give each "
            "column a name of its own"
        )
    numeric = pd.to_numeric(pd.Series(names), errors="coerce").notna().all()
    if numeric and names != [str(m) for m in range(len(names))]:
        raise ValueError(
            f"the first row of {path} must name the columns: got {', '.join(names[:5])}, which "
            "look like data; add a header"
        )
    if label_column is not None and label_column not in names:
        raise ValueError(
            f"{path} has no column {label_column!r}: set data.options.label_column to null or to "
            f"one of {', '.join(map(repr, names))} (data.options.delimiter is {delimiter!r})"
        )
    if not set(names) - {label_column}:
        raise ValueError(f"{path} has no column but the labels: expected at least one of numbers")


def _require_finite(path: str, x: np.ndarray, names: Sequence[str]) -> None:
    bad = ~(np.abs(x) <= LARGEST)  # of NaN, too
    if bad.any():
        m = bad.any(axis=0).argmax()
        raise ValueError(
            f"column {names[m]!r} of {path} must be finite, and at most {LARGEST:g} in size: got "
            f"{bad[:, m].sum()} missing, NaN or infinite values, or larger ones, the first in row "
            f"{bad[:, m].argmax() + 1} (rows count from 1, without a header); fill, drop or "
            "rescale them"
        )


def _index_classes(path: str, value: Iterable[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    value = list(value)
    names = sorted(set(value) - {"", "-1"})
    if not names:
        raise ValueError(
            f"{path} has no label but empty ones and -1: set its label option to null to go without"
        )
    with suppress(ValueError):  # text stays in alphabetical order
        names = sorted(names, key=int)
    index = {name: c for c, name in enumerate(names)}
    return np.array([index.get(v, -1) for v in value], dtype=np.int64), tuple(names)


def _images(
    x: np.ndarray, label: np.ndarray | None, levels: int, class_names: tuple[str, ...],
    shape: tuple[int, int, int], official_test: int = 0,
) -> Source:  # fmt: skip
    names = tuple(
        f"pixel_{h}_{w}" if shape[0] == 1 else f"pixel_{c}_{h}_{w}" for c, h, w in np.ndindex(shape)
    )
    x = x.reshape(len(x), -1)
    return Source(x, label, official_test, shape, levels, names, class_names)
