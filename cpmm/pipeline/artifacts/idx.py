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

IDX_ROLES = {"train_images": 3, "train_labels": 1, "test_images": 3, "test_labels": 1}  # dimensions
TIMEOUT = 30  # seconds without an answer before a download is given up


def read_idx_files(
    folder: str | None,
    mirror: str | None,
    cache: str | None,
    files: Mapping[str, str],
    md5: Mapping[str, str | None],
) -> dict[str, np.ndarray]:
    """Read the four files of a data set; arguments and errors as of ``sources.read_idx``.

    Returns:
        Images, (N, H, W), and labels, (N,), uint8, by their roles in :data:`IDX_ROLES`.
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
    part = {
        role: _find_idx(files[role], folder, mirror, cache, n_dims, md5.get(role))
        for role, n_dims in IDX_ROLES.items()
    }
    _require_one_set(files, part)
    return part


def _find_idx(
    name: str, folder: str | None, mirror: str | None, cache: str | None, n_dims: int,
    md5: str | None,
) -> np.ndarray:  # fmt: skip
    other = name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz"
    places = [Path(place) / n for place in (folder, cache) if place for n in (name, other)]
    for path in places:
        if path.is_file():
            return _decode_idx(path.read_bytes(), str(path), n_dims, md5)
    nowhere = "nowhere, as data.options.folder and data.options.cache are null"
    missing = f"{name} is missing, looked for: {', '.join(map(str, places)) or nowhere};"
    if not mirror:
        raise FileNotFoundError(
            f"{missing} set data.options.folder to the folder that holds it, or "
            "data.options.mirror to an address to download it from"
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
    array = _decode_idx(data, url, n_dims, md5)
    path = Path(cache) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_bytes(data), f".{os.getpid()}.partial")
    return array


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
            f"training images are {shapes[0]}, test images {shapes[1]} (height, width), in "
            f"{files['train_images']} and {files['test_images']}: take all four files from one "
            "data set"
        )


def _decode_idx(data: bytes, origin: str, n_dims: int, md5: str | None) -> np.ndarray:
    remedy = "replace the file, or delete it and set data.options.mirror to download it"
    if "://" in origin:
        remedy = "set data.options.mirror to another address"
    if data[:2] == b"\x1f\x8b":  # by content: the extension may lie
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{origin} is damaged, gzip says: {error}; {remedy}") from error
    magic = bytes([0, 0, 8, n_dims])  # 8 stands for uint8
    start = 4 + 4 * n_dims
    if data[:4] != magic or len(data) < start:
        raise ValueError(
            f"{origin} must start with the IDX magic number {magic.hex()} and {n_dims} sizes: got "
            f"{data[:4].hex() or 'nothing'} in a payload of {len(data)} bytes; {remedy}"
        )
    shape = tuple(np.frombuffer(data, ">u4", n_dims, offset=4).tolist())
    if len(data) - start != math.prod(shape) or 0 in shape:
        raise ValueError(
            f"{origin} announces shape {shape}, {math.prod(shape)} bytes: got "
            f"{len(data) - start} bytes of values; {remedy}"
        )
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if md5 and found != md5:
        raise ValueError(
            f"{origin} must have the payload md5 {md5}: got {found}; {remedy}, or correct "
            "data.options.md5"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
