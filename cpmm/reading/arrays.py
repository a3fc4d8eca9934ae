"""NumPy arrays in .npy files: numbers of any type and byte order, axes in an order that is named.

The same code reads them to train on and to score: what trains scores, with the same answers.
"""

from __future__ import annotations

import math
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cpmm.reading.kinds import PICTURES, recognize

LARGEST = 1e30  # of a value: it and the noise added to it are trained on in float32
OURS = {3: "NHW", 4: "NCHW"}  # order of the axes of images, by their number
USUAL = ("NHW", "HWN", "NCHW", "NHWC", "HWCN", "CHWN")  # in files
PART = 4096  # rows at a time

# Kinds of values that are no real numbers, and what to do.
REFUSED = {
    "c": "complex numbers: save x.real, or np.abs(x)",
    "M": "dates: save numbers, (x - x.min()) / np.timedelta64(1, 'D') for days",
    "m": "lengths of time: save numbers, x / np.timedelta64(1, 's') for seconds",
    "U": "text: save x.astype(float) if it writes numbers",
    "S": "text: save x.astype(float) if it writes numbers",
    "V": "raw bytes, such as of bfloat16: save its source, x.astype(np.float32)",
    "O": "Python objects, which are not opened, as they may run anything: if you trust it, save "
    "np.load(path, allow_pickle=True).astype(float), or .astype(str) for labels",
}


def map_npy(path: str | Path, kinds: str = "biuf") -> np.ndarray:
    """Map a .npy file into memory, after its header has been checked against its length.

    Args:
        path: The file.
        kinds: The kinds of NumPy's types that are taken.

    Returns:
        The array, read-only, read from the disk where it is used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another kind of file or damaged, or holds other values or none.
    """
    _require_npy(Path(path))
    with _whole_npy(path) as file:
        shape, dtype = _read_header(file)
        if dtype.kind not in kinds:
            what = f"{REFUSED.get(dtype.kind, 'other values: save numbers')} (now {dtype})"
            if dtype.names:
                what = (
                    f"records with the fields {', '.join(dtype.names[:5])}: save np.stack([x[n] for"
                    " n in x.dtype.names], 1)"
                )
            raise ValueError(f"{path} of shape {shape} holds {what}")
        announced = math.prod(shape) * dtype.itemsize
        found = os.fstat(file.fileno()).st_size - file.tell()
        if found != announced:
            raise ValueError(
                f"{path} is not a whole .npy file: its header announces {dtype} of shape {shape}, "
                f"{announced} bytes, and {found} follow; write it again with np.save"
            )
        if not announced:
            raise ValueError(
                f"{path} has no rows or no values: got shape {shape}, expected at least one"
            )
        return np.load(path, mmap_mode="r", allow_pickle=False)


def arrange(
    path: str | Path, array: np.ndarray, axes: str | None, option: str = "data.options.axes="
) -> np.ndarray:
    """Bring images into the order N, C, H, W.

    Args:
        path: Of the file, for messages.
        array: Images, with 3 or 4 axes.
        axes: The order of the axes, such as NHWC; None takes N, C, H, W or N, H, W, if the sizes
            allow no other.
        option: How ``axes`` is given, for messages.

    Returns:
        A view, (N, C, H, W).

    Raises:
        ValueError: If ``axes`` does not fit, or is None where more than one order is possible.
    """
    shape = array.shape
    if axes is None:
        likely = [
            order
            for order in _orders(shape)
            if _is_upright(order) and _is_likely(_sizes(shape, order))
        ]
        if not likely or not all(_is_ours(shape, order) for order in likely):
            readings = _readings(shape, likely or _orders(shape), option)
            raise ValueError(
                f"the order of the axes of {path}, {shape}, is not certain: {readings}"
            )
        axes = likely[0]
    _require_axes(path, shape, axes, option)
    moved = array.transpose([axes.index(letter) for letter in "NCHW" if letter in axes])
    return moved if moved.ndim == 4 else moved[:, None]


def arrange_like(
    path: str | Path,
    array: np.ndarray,
    axes: str | None,
    image_shape: tuple[int, int, int] | None,
    n_features: int,
) -> np.ndarray:
    """Bring points into the order that a mixture knows: rows of features, or images.

    Args:
        path: Of the file, for messages.
        array: As it comes.
        axes: The order of the axes of images; None takes those of the mixture alone.
        image_shape: (channels, height, width) of the mixture, None for tables.
        n_features: M of the mixture.

    Returns:
        A view, (N, M) or (N, C, H, W).

    Raises:
        ValueError: If the sizes of the axes are not those of the mixture, one by one, or fit in
            more than one order.
    """
    shape = array.shape
    expected = " or ".join(f"(N, {sizes})" for sizes in _shapes_of(image_shape, n_features))
    refused = f"{path} must be {expected}, as the mixture: got {array.dtype} of shape {shape}"
    if shape in ((n_features,), image_shape, (image_shape or ())[1:]):
        refused += "; save x[None] for one point"
    if axes is not None and image_shape is None:
        raise ValueError(f"--axes is {axes}, but the mixture is of a table: leave it out")
    if axes is not None:
        _require_axes(path, shape, axes, "--axes ")
        if _sizes(shape, axes)[1:] != image_shape:
            raise ValueError(f"{refused}, {_describe(shape, axes)} by --axes {axes}")
        return arrange(path, array, axes, "--axes ")
    if array.ndim == 2 and shape[1] == n_features:
        return array
    if image_shape is None or array.ndim not in OURS:
        raise ValueError(refused)
    square = image_shape[1] == image_shape[2]  # no order of height and width is told from the other
    fitting = [
        order
        for order in _orders(shape)
        if _sizes(shape, order)[1:] == image_shape and not (square and not _is_upright(order))
    ]
    if not fitting:
        raise ValueError(refused)
    if not all(_is_ours(shape, order) for order in fitting):
        raise ValueError(
            f"{path} of shape {shape} may not have the order of the mixture's images, {expected}: "
            f"{_readings(shape, fitting, '--axes ')}"
        )
    return arrange(path, array, fitting[0], "--axes ")


def real_values(
    path: str | Path, x: np.ndarray, names: Sequence[str], n_before: int = 0
) -> np.ndarray:
    """Turn rows of any real type into float64, (N, M), and check each value.

    Raises:
        ValueError: If one is not finite, or larger than :data:`LARGEST`; names row and column.
    """
    with np.errstate(over="ignore"):  # of long doubles; caught below
        value = np.array(x, dtype=np.float64, order="C")
    bad = ~(np.abs(value) <= LARGEST)  # of NaN, too
    if bad.any():
        row, column = (int(i[0]) for i in bad.nonzero())
        raise ValueError(
            f"column {names[column]!r} of {path} must be finite, and at most {LARGEST:g} in size: "
            f"got {x[row, column]} in row {n_before + row + 1} (rows count from 1); fill, drop or "
            "rescale such values"
        )
    return value


def grey_levels(path: str | Path, x: np.ndarray, levels: int, n_before: int = 0) -> np.ndarray:
    """Turn images of any real type, whole grey levels, into rows of uint8, (N, M).

    Args:
        path: Of the file, for messages.
        x: (N, M) or (N, C, H, W).
        levels: How many there are, at most 256.
        n_before: Images before these.

    Raises:
        ValueError: If a value is not whole or out of range; says how to convert.
    """
    x = x.reshape(len(x), -1)
    with np.errstate(invalid="ignore"):  # of NaN
        bad = ~((x >= 0) & (x < levels)) | ((x != np.rint(x)) if x.dtype.kind == "f" else False)
    if bad.any():
        row, column = (int(i[0]) for i in bad.nonzero())
        finite = x[np.isfinite(x)] if x.dtype.kind == "f" else x
        low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
        top = levels - 1
        if not np.isfinite(x[row, column]):
            remedy = "fill or drop such values"
        elif low >= 0 and high <= 1:
            remedy = f"if 1 is the brightest, save np.round({top} * x).astype(np.uint8)"
        elif low >= -1 and high <= 1:
            remedy = (
                f"if -1 is the darkest, and 1 the brightest, save np.round({top} * (x + 1) / 2)"
                ".astype(np.uint8)"
            )
        elif low >= 0 and high < levels:
            remedy = "save np.round(x).astype(np.uint8)"
        else:
            remedy = (
                f"map its own range to 0 to {top}: save np.round({top} * ((x - float(x.min())) / "
                "(float(x.max()) - float(x.min())))).astype(np.uint8)"
            )
        raise ValueError(
            f"images in {path} must hold whole grey levels of 0 to {top}: got {x[row, column]} in "
            f"image {n_before + row + 1}, {x.dtype} of {low} to {high}; {remedy}"
        )
    return x.astype(np.uint8, order="C")  # the last digits of sums depend on it


def require_more_than_one(path: str | Path, x: np.ndarray, levels: int, option: str = "") -> None:
    """Refuse images of 0 and 1 alone where there are more grey levels: they have another scale.

    Args:
        path: Of the file, for messages.
        x: Images, (N, ...).
        levels: How many there are.
        option: What sets ``levels``, for messages.

    Raises:
        ValueError: If nothing is above 1, and 1 is not the brightest of two.
    """
    if levels <= 2 or any((x[i : i + PART] > 1).any() for i in range(0, len(x), PART)):
        return
    if all(((part := x[i : i + PART]) == np.rint(part)).all() for i in range(0, len(x), PART)):
        remedy = f"save np.uint8({levels - 1}) * x.astype(np.uint8)"
        if option:
            remedy = f"set {option}=2, or {remedy}"
        raise ValueError(
            f"images in {path} hold nothing but 0 and 1, {x.dtype}, where grey levels go from 0 "
            f"to {levels - 1}: {remedy} if 1 is the brightest"
        )


def _orders(shape: tuple[int, ...]) -> list[str]:
    """All orders of the axes of images, the usual ones first."""
    orders = map("".join, permutations(OURS[len(shape)]))
    return sorted(orders, key=lambda o: USUAL.index(o) if o in USUAL else len(USUAL))


def _is_upright(order: str) -> bool:
    return order.index("H") < order.index("W")


def _is_likely(sizes: tuple[int, ...]) -> bool:
    """Whether N, C, H, W are plausible: many images, of few channels and of no thin strips."""
    n, c, h, w = sizes
    return c <= 4 and n > max(h, w) and (c > 1 or min(h, w) > 4)


def _is_ours(shape: tuple[int, ...], order: str) -> bool:
    """Whether the axes are in the order N, C, H, W, those of 1 left out."""
    moved = [letter for letter, n in zip(order, shape, strict=True) if n > 1]
    return moved == [letter for letter in "NCHW" if letter in moved]


def _sizes(shape: tuple[int, ...], order: str) -> tuple[int, ...]:
    """N, C, H and W of an array in this order."""
    return tuple(shape[order.index(letter)] if letter in order else 1 for letter in "NCHW")


def _describe(shape: tuple[int, ...], order: str) -> str:
    n, channels, height, width = _sizes(shape, order)
    pixels = (
        f"{height} x {width}" if channels == 1 else f"{channels} channels of {height} x {width}"
    )
    return f"{n} images of {pixels}"


def _readings(shape: tuple[int, ...], orders: list[str], option: str) -> str:
    shown = [order for order in orders if order in USUAL] or orders
    said = [f"{_describe(shape, order)} with {option}{order}" for order in shown[:4]]
    return f"{', or '.join(said)}; say which, or name another order of {OURS[len(shape)]}"


def _shapes_of(image_shape: tuple[int, int, int] | None, n_features: int) -> list[str]:
    sizes = [] if image_shape is None else [str(image_shape)[1:-1]]
    if image_shape is not None and image_shape[0] == 1:
        sizes.insert(0, str(image_shape[1:])[1:-1])
    return [*sizes, str(n_features)]


def _require_axes(path: str | Path, shape: tuple[int, ...], axes: str, option: str) -> None:
    if sorted(axes) not in (sorted("NCHW"), sorted("NHW")) or len(axes) != len(shape):
        raise ValueError(
            f"{option}{axes} does not fit {path} of shape {shape}: name each of its axes once, N "
            "(images), C (channels), H (height) and W (width), such as NHWC, or NHW without "
            "channels; a table, (N, M), has none"
        )


def _require_npy(path: Path) -> None:
    """Say what a file is that is no .npy file."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file; {PICTURES}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"\x93NUMPY"):
        return
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
        if names:
            if {"format", "shape", "data"} <= set(names):
                raise ValueError(
                    f"{path} is a sparse matrix: write it in full, np.save('x.npy', "
                    f"scipy.sparse.load_npz({str(path)!r}).toarray())"
                )
            name = next((n for n in names if n in ("x", "X", "x_train", "train_images")), names[0])
            raise ValueError(
                f"{path} is an archive of arrays ({', '.join(names[:8])}), not one: write the one "
                f"that you want, np.save('{name}.npy', np.load({str(path)!r})[{name!r}])"
            )
    known = recognize(path, head, path.stat().st_size)
    if known:
        raise ValueError(f"{path} is not a whole .npy file, but {known.removeprefix('is ')}")


@contextmanager
def _whole_npy(path: str | Path) -> Iterator[BinaryIO]:
    """Open a .npy file; whatever NumPy finds wrong with it is a ValueError that names it."""
    with open(path, "rb") as file:
        try:
            with warnings.catch_warnings(action="ignore"):  # of a header that Python 2 wrote
                yield file
        except (OSError, MemoryError):
            raise
        except Exception as error:  # NumPy evaluates the header: damaged ones fail in any way
            if isinstance(error, ValueError) and str(error).startswith(str(path)):
                raise
            raise ValueError(
                f"{path} is not a whole .npy file of numbers: {error}; write it again with np.save"
            ) from error


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    # The third version differs from the second in names of fields alone.
    first = np.lib.format.read_magic(file) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.subdtype or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"its header announces {dtype} of shape {shape}, which no array has")
    return shape, dtype
