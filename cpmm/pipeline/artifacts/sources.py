"""Raw data of every kind, read into one form.

The options of each source are the keyword arguments of its function. They have no default value
here: conf/data/ holds every one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cpmm import datasets
from cpmm.columns import Columns
from cpmm.pipeline.artifacts.idx import read_idx_files
from cpmm.pipeline.config import pick
from cpmm.reading.arrays import (
    PART,
    arrange,
    grey_levels,
    map_npy,
    real_values,
    require_more_than_one,
)
from cpmm.reading.labels import describe_labels, index_classes
from cpmm.reading.tables import Choice, FeatureReader, read_table
from cpmm.reading.text import TextFormat

TABLE = ("columns", "drop", "missing", "constant", "text")  # options of data for tables as text


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
        columns: How the features came about, of a table written as text.
        found: What was found out about the data, for people.
        doubts: What looks wrong.
    """

    x: np.ndarray
    label: np.ndarray | None
    official_test: int
    image_shape: tuple[int, int, int] | None
    levels: int | None
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...]
    columns: Columns | None = None
    found: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def source_options(section: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`read_source` takes of the section ``data``."""
    options = {"source": section["source"], **section["options"]}
    if section["source"] == "csv":
        options["table"] = pick(section, *TABLE)
    return options


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
    class_names: Sequence[str] | None,
    axes: str | None,
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
        class_names: Names of labels 0, 1, ...; None takes the labels that there are.
        axes: Order of the axes of images, such as NHWC; None takes N, H, W, and with channels
            N, C, H, W where the shape allows no other.

    Returns:
        Training rows, then the test rows.

    Raises:
        ValueError: If an option is wrong or a file is damaged, of another format, or not the one
            whose digest was given.
        FileNotFoundError: If a file is nowhere and there is no mirror.
        ConnectionError: If a download fails.
    """
    part = read_idx_files(folder, mirror, cache, files, md5 or {}, axes)
    label = np.concatenate([part["train_labels"], part["test_labels"]])
    if class_names is None:
        label, class_names = index_classes(files["train_labels"], map(str, label))
    elif not -1 <= label.min() <= label.max() < len(class_names):
        raise ValueError(
            f"labels are {label.min()} to {label.max()}, data.options.class_names has "
            f"{len(class_names)} names, of 0 to {len(class_names) - 1}: give {label.max() + 1}, or "
            "null for the numbers themselves"
        )
    image = np.concatenate([part["train_images"], part["test_images"]])  # (N, C, H, W)
    n_test = len(part["test_images"])
    return _images(image, label, 256, tuple(class_names), image.shape[1:], n_test)


def read_csv(
    path: str,
    label_column: str | None,
    delimiter: str | None,
    decimal: str | None,
    encoding: str | None,
    header: str | None,
    table: Mapping[str, Any],
) -> Source:
    """Read a table that is written as text.

    Args:
        path: The file, packed or not.
        label_column: Column of class labels, see :func:`cpmm.reading.labels.index_classes`. None
            without labels.
        delimiter: One character between fields; as the next three, None to have it found out, see
            :class:`cpmm.reading.text.TextFormat`.
        decimal: What is before decimals.
        encoding: Of the text.
        header: What the first line is.
        table: What becomes of its columns, see :class:`cpmm.reading.tables.Choice`.

    Returns:
        The features as real values, NaN for gaps that are to be filled; classes in sorted order.

    Raises:
        ValueError: If the file or a column is not as described; says what to write.
        FileNotFoundError: If there is no such file.
    """
    _require_file(path, "data.options.path")
    form = TextFormat(delimiter, decimal, encoding, header)
    found = read_table(Path(path), form, label_column, Choice(**table))
    return Source(
        found.x, found.label, 0, None, None, found.feature_names, found.class_names,
        found.columns, found.found, found.doubts,
    )  # fmt: skip


def read_like(
    options: Mapping[str, Any], feature_names: Sequence[str], columns: Columns
) -> np.ndarray:
    """Read another table written as text, (N, M), as one was read before.

    Args:
        options: Of the source ``csv``; its labels are not read.
        feature_names: M of them.
        columns: How they came about.

    Raises:
        ValueError: If it is no such table.
        FileNotFoundError: If there is no such file.
    """
    _require_file(options["path"], "data.options.path")
    form = TextFormat(*(options[n] for n in ("delimiter", "decimal", "encoding", "header")))
    path = Path(options["path"])
    return FeatureReader(path, feature_names, columns, form, prefix="data.options.").read()


def read_npy(path: str, label_path: str | None, levels: int, axes: str | None) -> Source:
    """Read NumPy arrays: a table of real values, or images.

    Args:
        path: A table, (N, M), or images of whole grey levels, 3 or 4 axes; numbers of any type.
        label_path: Class of each row, (N,) or (N, 1), numbers or text; -1 and NaN are not a member
            of any class. None without labels.
        levels: Number of grey levels of images, up to 256; a table has none.
        axes: Order of the axes of images: each of N, C, H, W, or of N, H, W. None takes these two
            orders where the shape allows no other.

    Returns:
        The table or the flattened images, channel by channel; classes in sorted order.

    Raises:
        ValueError: If an array is not as described.
        FileNotFoundError: If there is no such file.
    """
    x = _map_npy(path, "data.options.path")
    if x.ndim not in (2, 3, 4):
        how = "save x[:, None] for one column" if x.ndim == 1 else "reshape it"
        raise ValueError(
            f"{path} must be a table, (N, M), or images, (N, H, W) or (N, C, H, W): got {x.dtype} "
            f"of shape {x.shape}; {how}"
        )
    if x.ndim == 2 and axes is not None:
        raise ValueError(
            f"data.options.axes is {axes}, of images, but {path} is a table, of shape {x.shape}: "
            "set it to null, or save x.reshape(len(x), height, width) for images"
        )
    images = None if x.ndim == 2 else arrange(path, x, axes)
    label, class_names, found, doubts = None, (), [], []
    if label_path is not None:
        value = _read_labels(label_path, len(x if images is None else images), path)
        label, class_names = index_classes(label_path, value)
        found, doubts = describe_labels(value, label, class_names)
    told = {"found": tuple(found), "doubts": tuple(doubts)}
    if images is None:
        names = tuple(f"x{m}" for m in range(x.shape[1]))
        x = real_values(path, x, names)
        return Source(x, label, 0, None, None, names, class_names, **told)
    require_more_than_one(path, images, levels or 256, "data.options.levels")
    x = _grey_levels(path, images)
    top = int(x.max())
    if levels is None or not top < levels <= 256:
        raise ValueError(
            f"{path} holds grey levels up to {top}: data.options.levels must be one of {top + 1} "
            f"to 256, and is {levels}"
        )
    return replace(_images(x, label, levels, class_names, images.shape[1:]), **told)


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": read_digits,
    "rings": read_rings,
    "spiral": read_spiral,
    "idx": read_idx,
    "csv": read_csv,
    "npy": read_npy,
}


def _map_npy(path: str, option: str, kinds: str = "biuf") -> np.ndarray:
    if path is None or not Path(path).is_dir():  # a folder is named by what follows
        _require_file(path, option)
    return map_npy(path, kinds)


def _grey_levels(path: str, images: np.ndarray) -> np.ndarray:
    """Copy images of any type and order of axes, part by part, (N, M), uint8."""
    x = np.empty((len(images), math.prod(images.shape[1:])), np.uint8)
    for start in range(0, len(x), PART):
        x[start : start + PART] = grey_levels(path, images[start : start + PART], 256, start)
    return x


def _read_labels(path: str, n: int, beside: str) -> list[str]:
    value = _map_npy(path, "data.options.label_path", "biufUS")
    if value.shape not in ((n,), (n, 1)):
        how = "; save x.argmax(1) if a column is a class" if value.ndim == 2 else ""
        raise ValueError(
            f"{path} must hold a label for each of the {n} rows of {beside}: got {value.dtype} of "
            f"shape {value.shape}{how}"
        )
    if value.dtype.kind == "S":
        value = np.strings.decode(value, "utf-8", "replace")
    return value.ravel().astype(str).tolist()


def _require_file(path: str, option: str) -> None:
    if path is None or not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}: set {option} to an existing file")


def _images(
    x: np.ndarray, label: np.ndarray | None, levels: int, class_names: tuple[str, ...],
    shape: tuple[int, int, int], official_test: int = 0,
) -> Source:  # fmt: skip
    names = tuple(
        f"pixel_{h}_{w}" if shape[0] == 1 else f"pixel_{c}_{h}_{w}" for c, h, w in np.ndindex(shape)
    )
    x = x.reshape(len(x), -1)
    return Source(x, label, official_test, shape, levels, names, class_names)
