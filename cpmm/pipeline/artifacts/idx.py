"""Files of MNIST's IDX format: found or downloaded, and checked."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import urllib.request
import zlib
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from cpmm.files import replace_file
from cpmm.reading.arrays import arrange, grey_levels
from cpmm.reading.kinds import recognize

IDX_ROLES = ("train_images", "train_labels", "test_images", "test_labels")
TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}  # the third byte of a file
LEVELS = 256
TIMEOUT = 30  # seconds without an answer before a download is given up


def read_idx_files(
    folder: str | None,
    mirror: str | None,
    cache: str | None,
    files: Mapping[str, str],
    md5: Mapping[str, str | None],
    axes: str | None,
) -> dict[str, np.ndarray]:
    """Read the four files of a data set; arguments and errors as of ``sources.read_idx``.

    Returns:
        Images, (N, C, H, W), uint8, and labels, (N,), int64, by their roles in :data:`IDX_ROLES`.
    """
    if set(files) != set(IDX_ROLES) or not set(md5) <= set(IDX_ROLES):
        raise ValueError(
            f"data.options.files must name {', '.join(IDX_ROLES)}, and data.options.md5 no others: "
            f"got files {', '.join(files) or 'none'} and md5 {', '.join(md5) or 'none'}"
        )
    if mirror and (urlsplit(mirror).scheme not in ("http", "https") or not cache):
        raise ValueError(
            "data.options.mirror must be an http or https address, with data.options.cache set to "
            f"a folder to download into: got mirror {mirror!r}, cache {cache!r}"
        )
    part = {}
    for role in IDX_ROLES:
        origin, array = _find_idx(role, folder, mirror, cache, files, md5.get(role))
        if role.endswith("images"):
            # The format's own order, and what four axes leave no doubt of.
            order = axes or ("NHW" if array.ndim == 3 else None)
            images = arrange(origin, array, order)
            array = grey_levels(origin, images, LEVELS).reshape(images.shape)
        part[role] = array
    _require_one_set(files, part)
    return part


def _find_idx(
    role: str, folder: str | None, mirror: str | None, cache: str | None,
    files: Mapping[str, str], md5: str | None,
) -> tuple[str, np.ndarray]:  # fmt: skip
    """Find the file of a role, or download it: where it is, and its array."""
    name = files[role]
    other = name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz"
    places = [Path(place) / n for place in (folder, cache) if place for n in (name, other)]
    for path in places:
        if path.is_file():
            return str(path), _decode_idx(path.read_bytes(), str(path), role, md5)
    nowhere = "nowhere, as data.options.folder and data.options.cache are null"
    missing = f"{name} is missing, looked for: {', '.join(map(str, places)) or nowhere};"
    if not mirror:
        raise FileNotFoundError(
            f"{missing} set data.options.folder to the folder that holds it, or "
            f"data.options.mirror to an address to download it from{_look_around(folder, files)}"
        )
    url = f"{mirror.rstrip('/')}/{name}"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            data = response.read()
    except (OSError, HTTPException) as error:
        raise ConnectionError(
            f"{missing} and downloading {url} failed: {error}; set data.options.folder to the "
            "folder that holds it, or data.options.mirror to another address"
        ) from error
    array = _decode_idx(data, url, role, md5)
    path = Path(cache) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_bytes(data), f".{os.getpid()}.partial")
    return url, array


def _look_around(folder: str | None, files: Mapping[str, str]) -> str:
    """Say what the folder holds in place of the files, and what to set; "" without a folder."""
    if folder is None:
        return ""
    place = Path(folder)
    if not place.is_dir():
        return f"; there is no folder {folder}"
    names = [n for name in files.values() for n in (name, name.removesuffix(".gz"))]
    folders = [*place.glob("*/"), *place.glob("*/*/")]
    below = [path for path in folders if any((path / name).is_file() for name in names)]
    if below:
        return f"; {below[0]} has such files: set data.options.folder to that"
    found = sorted(path.name for path in place.iterdir() if path.is_file())
    others = {}
    for role in files:
        split, what = role.split("_")
        fitting = [
            name
            for name in found
            if "idx" in name and what in name and (split == "train") == ("train" in name)
        ]
        if fitting:
            others[role] = fitting[0]
    if len(others) == len(files):
        said = " ".join(f"data.options.files.{role}={name}" for role, name in others.items())
        if any("emnist" in name for name in found):
            said += " data.options.axes=NWH, as EMNIST's images lie on their side"
        return (
            "; the folder has other names: for the files that it has, set data.options.md5=null "
            f"data.options.class_names=null {said}"
        )
    for name in found[:20]:
        with (place / name).open("rb") as file:
            known = recognize(place / name, file.read(512), (place / name).stat().st_size)
        if known and " text" not in known and " gzip" not in known:
            return f"; in the folder, {name} {known}, and use preset npy for it"
    return f"; the folder holds {', '.join(found[:5]) or 'no files'}"


def _require_one_set(files: Mapping[str, str], part: Mapping[str, np.ndarray]) -> None:
    for split in ("train", "test"):
        n_images, n_labels = len(part[f"{split}_images"]), len(part[f"{split}_labels"])
        if n_images != n_labels:
            raise ValueError(
                f"{files[f'{split}_images']} has {n_images} images, {files[f'{split}_labels']} has "
                f"{n_labels} labels: take all four files from one data set"
            )
    shapes = [part[f"{split}_images"].shape[1:] for split in ("train", "test")]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"training images are {shapes[0]}, test images {shapes[1]} (channels, height, "
            f"width), in {files['train_images']} and {files['test_images']}: take all four files "
            "from one data set"
        )


def _decode_idx(data: bytes, origin: str, role: str, md5: str | None) -> np.ndarray:
    """Take a file apart: images with 3 or 4 axes, or labels, (N,), int64."""
    remedy = "replace the file, or delete it and set data.options.mirror to download it"
    if "://" in origin:
        remedy = "set data.options.mirror to another address"
    if data[:2] == b"\x1f\x8b":  # by content: the extension may lie
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{origin} is damaged, gzip says: {error}; {remedy}") from error
    n_dims = data[3] if len(data) > 3 else 0
    start = 4 + 4 * n_dims
    if not n_dims or data[:2] != b"\0\0" or data[2] not in TYPES or len(data) < start:
        known = recognize(origin, data[:512], len(data))
        what = f"it {known}" if known else f"it begins with {data[:4].hex() or 'nothing'}"
        raise ValueError(
            f"{origin} is not a file in the IDX format, of {role}: {what}, in {len(data)} bytes; "
            f"{remedy}"
        )
    shape = tuple(np.frombuffer(data, ">u4", n_dims, offset=4).tolist())
    dtype = np.dtype(TYPES[data[2]])
    announced = math.prod(shape) * dtype.itemsize
    if len(data) - start != announced or 0 in shape:
        raise ValueError(
            f"{origin} announces shape {shape}, {announced} bytes: got "
            f"{len(data) - start} bytes of values; {remedy}"
        )
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if md5 and found != md5:
        raise ValueError(
            f"{origin} must have the payload md5 {md5}: got {found}; {remedy}, or set "
            "data.options.md5=null if it is of another data set"
        )
    array = np.frombuffer(data, dtype, offset=start).reshape(shape)
    if role.endswith("images") and n_dims in (3, 4):
        return array
    if role.endswith("labels") and dtype.kind in "iu":
        if n_dims == 1:
            return array.astype(np.int64)
        if n_dims == 2 and shape[1] == 8 and dtype.itemsize == 4:  # QMNIST's: first the digit
            return array[:, 0].astype(np.int64)
    expected = "images, (N, H, W), or with channels" if "images" in role else "labels, (N,)"
    raise ValueError(
        f"{origin} must hold {expected}: got {array.dtype} of shape {shape}; let "
        f"data.options.files.{role} name a file of {role.split('_')[1]}"
    )
