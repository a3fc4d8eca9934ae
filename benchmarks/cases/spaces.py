"""Reading and writing the spaces beside plain numpy files, and how fast a teacher makes them.

Everything that is read lies in the page cache, and nothing that is written is flushed to the disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cases.timing import Row, time_in_turns
from cpmm.artifact import file_digest
from cpmm.fields import ConvField
from cpmm.odes import Solver
from cpmm.pipeline.artifacts.spaces import create_spaces, open_spaces, seal_spaces, write_space
from cpmm.spaces import space_positions
from cpmm.teacher import Flow

CHUNK_ROWS = 1024
NUMPY = ".npy, memory-mapped"
NUMPY_FLOAT32 = ".npy to float32, found finite"


def time_reading(quick: bool, repeats: int) -> list[Row]:
    """Read one space, float16, one shard, and the same bytes in a memory-mapped .npy file."""
    n, m = (2048 if quick else 16384), 784
    generator = torch.Generator().manual_seed(0)
    space = torch.randn(n, m, generator=generator).half()
    with tempfile.TemporaryDirectory() as temporary:
        folder, file = Path(temporary) / "spaces", Path(temporary) / "space.npy"
        create_spaces(folder, space_positions(2), n, 0, m, "float16", CHUNK_ROWS)
        shards = write_space(folder, 0, space) | write_space(folder, 1, space)
        seal_spaces(folder, "benchmark", shards)
        np.save(file, space.numpy())
        spaces = open_spaces(folder)
        if not np.array_equal(spaces.array[0], np.load(file)):
            raise ValueError("the zarr store and the .npy file differ")
        calls = {
            NUMPY: lambda: np.array(np.load(file, mmap_mode="r")),
            "zarr": lambda: spaces.array[0],
            NUMPY_FLOAT32: lambda: _float32(np.load(file, mmap_mode="r")),
            "Spaces.train, read before": lambda: replace(spaces, _verified={0}).train(0),
            "Spaces.train, first time, with sha256": lambda: replace(spaces, _verified=set()).train(
                0
            ),
            "sha256 alone": lambda: file_digest(folder / "u/c/0/0/0"),
        }
        seconds = time_in_turns(calls, repeats)
    rows = _rates("one space", space, seconds)
    ours = list(calls)
    for name, reference in ((ours[1], NUMPY), (ours[3], NUMPY_FLOAT32), (ours[4], NUMPY_FLOAT32)):
        ratio = seconds[name] / seconds[reference]
        rows.append(Row(name, seconds[name], ratio, f"x time of {reference}"))
    return rows


def time_writing(quick: bool, repeats: int) -> list[Row]:
    """Carry points to the next space with a small convolutional teacher, and write a space."""
    n, m = (2048 if quick else 16384), 784
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(128 if quick else 512, m, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = ConvField((1, 28, 28), 32, 2, "tanh", 3, coordinates=True)
    flow = Flow(field, Solver("rk4", 50))
    start, end = space_positions(51).flip(0)[:2].tolist()
    at, v = batch.new_tensor([end]), batch.new_tensor(start)

    def evaluate_field() -> None:
        for _ in range(4):
            field(v, batch)

    carry: dict[str, Callable[[], object]] = {
        "teacher to the next of 51 spaces, rk4": lambda: flow.transform(batch, at, start, end),
        "its four evaluations of the field": evaluate_field,
    }
    with torch.no_grad():
        seconds = time_in_turns(carry, repeats)
    whole, bare = seconds.values()
    name = next(iter(carry))
    rows = [
        Row(f"small convolutional teacher, {len(batch)} rows at a time"),
        Row(name, whole, len(batch) / whole, "rows/s of one space"),
        Row(name, whole, whole / bare, "x time of its evaluations of the field"),
    ]
    space = torch.randn(n, m, generator=generator).half()
    with tempfile.TemporaryDirectory() as temporary:
        folder, file = Path(temporary) / "spaces", Path(temporary) / "space.npy"
        create_spaces(folder, space_positions(2), n, 0, m, "float16", CHUNK_ROWS)

        def save_and_digest() -> None:
            np.save(file, space.numpy())
            file_digest(file)

        write = {
            "np.save": lambda: np.save(file, space.numpy()),
            "np.save and sha256": save_and_digest,
            "write_space: zarr and sha256": lambda: write_space(folder, 0, space),
        }
        seconds = time_in_turns(write, repeats)
    rows += _rates("writing one space", space, seconds)
    written, plain = seconds["write_space: zarr and sha256"], seconds["np.save and sha256"]
    rows.append(Row("write_space", written, written / plain, "x time of np.save and sha256"))
    return rows


def _rates(what: str, space: torch.Tensor, seconds: dict[str, float]) -> list[Row]:
    n, m, size = *space.shape, space.nbytes / 1e6
    rates = [Row(name, value, size / value, "MB/s") for name, value in seconds.items()]
    return [Row(f"{what} of {n} x {m} in float16, {size:.0f} MB"), *rates]


def _float32(values: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(values)).float()
    if not bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
        raise ValueError("values that are not finite")
    return tensor
