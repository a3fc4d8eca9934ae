"""Files of NumPy arrays, checked before memory is asked for them."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np


@contextmanager
def whole_npy(path: str | Path) -> Iterator[BinaryIO]:
    """Open a .npy file, and check its header against its length, before memory is asked for it.

    Raises:
        ValueError: If it is damaged, does not hold plain numbers or text, or if what is done with
            it fails.
    """
    with open(path, "rb") as file:
        try:
            with warnings.catch_warnings(action="ignore"):  # of a header that Python 2 wrote
                _require_whole_npy(file)
                yield file
        except (OSError, MemoryError):
            raise
        except Exception as error:  # NumPy evaluates the header: damaged ones fail in any way
            raise ValueError(
                f"{path} is not a whole .npy file of plain numbers: {error}; write it again with "
                "np.save, from an array whose dtype is not object"
            ) from error


def _require_whole_npy(file: BinaryIO) -> None:
    # The third version differs from the second in names of fields alone.
    first = np.lib.format.read_magic(file) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject or dtype.subdtype or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"Object or other unusual values, {dtype} of shape {shape}")
    announced = math.prod(shape) * dtype.itemsize
    found = os.fstat(file.fileno()).st_size - file.tell()
    if found != announced:
        raise ValueError(
            f"its header announces {dtype} of shape {shape}, {announced} bytes, and {found} follow"
        )
    file.seek(0)
