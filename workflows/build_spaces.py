"""Carry the data through the spaces of the curriculum: data/<preset>/spaces, a zarr store."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmm.pipeline.config import Config
from cpmm.pipeline.config.fingerprints import (
    fingerprint_prepared,
    fingerprint_spaces,
    fingerprint_teacher,
    needs_teacher,
)  # fmt: skip
from cpmm.pipeline.progress import ProgressLine, duration
from cpmm.pipeline.stage import publish, run_stage, scratch_folder

if TYPE_CHECKING:
    from torch import Tensor

    from cpmm.data import DataSplits
    from cpmm.pipeline.artifacts.spaces import Extraction
    from cpmm.teacher import Flow

PROBE = 256  # rows that are carried on trial, to say how long all will take


def main(folder: Path, config: Config) -> str:
    """Write ``spaces`` for a preset, one space after the other, resuming after the last one."""
    import pandas as pd

    from cpmm.pipeline.artifacts.spaces import save_extraction, seal_spaces, write_space
    from cpmm.pipeline.artifacts.store import load_prepared
    from cpmm.spaces import space_positions

    data = load_prepared(folder / "prepared", fingerprint_prepared(config))
    options = config["spaces"]
    teacher = _load_teacher(folder, config, data)
    fingerprint = fingerprint_spaces(config)
    scratch = scratch_folder(folder, "build_spaces", fingerprint)
    # The flow starts at the input, v = 0, so the last space is written first.
    positions = space_positions(options["n_spaces"])
    ascending = positions.flip(0).tolist()
    drawn = _draw(data, options, config["seed"], with_noise=teacher is None)
    store, n_rows = scratch / "spaces", len(drawn.rows)
    extraction = _go_on(scratch, positions, drawn, options)
    n_left = len(positions) - max(extraction.done, 0 if teacher is None else 1)
    seconds = None  # noise costs next to nothing beside the disk
    if teacher is not None and n_left:
        probe = (drawn.rows if extraction.state is None else extraction.state)[:PROBE]
        seconds = n_rows * n_left * _seconds_per_row(teacher, probe, ascending[:2])
    _announce(store, drawn.rows, extraction.done, len(positions), seconds)
    progress = _Progress(len(positions), n_rows, n_left)

    def keep(state: Tensor) -> None:
        space = extraction.done
        extraction.shards |= write_space(store, len(positions) - 1 - space, state)
        extraction.statistics.append(_statistics(ascending[space], state))
        extraction.done, extraction.state = space + 1, None if teacher is None else state
        save_extraction(scratch, extraction)
        if teacher is None:
            progress.tell(space, n_rows)

    def carried(space: int, n: int) -> None:
        keeper.check()
        progress.tell(space, n)

    with _Keeper(keep) as keeper:
        for state in _states(teacher, drawn, extraction, ascending, options["batch_size"], carried):
            keeper.put(state)
    pd.DataFrame(extraction.statistics[::-1]).to_csv(store / "statistics.csv", index=False)
    seal_spaces(store, fingerprint, extraction.shards)
    publish(scratch, "spaces", folder / "spaces")
    latent = extraction.statistics[-1]
    return (
        f"{len(positions)} spaces of {n_rows} rows, latent mean {latent['mean']:+.3f} and "
        f"deviation {latent['deviation']:.3f} -> {folder / 'spaces'}"
    )


def _load_teacher(folder: Path, config: Config, data: DataSplits) -> Flow | None:
    """Load the teacher onto the device that computes; None for spaces of noise."""
    from cpmm.pipeline.artifacts.store import load_model
    from cpmm.pipeline.models.flows import make_teacher
    from cpmm.pipeline.models.mixtures import SPACES
    from cpmm.pipeline.models.runtime import choose, compute_device

    choose("spaces.kind", config["spaces"]["kind"], {kind: kind for kind in SPACES})
    if not needs_teacher(config):
        return None
    teacher = make_teacher(config["teacher"], data, config["seed"])
    load_model(folder / "teacher", "teacher", teacher, fingerprint_teacher(config))
    return teacher.to(compute_device(config["trainer"]))


def _go_on(
    scratch: Path, positions: Tensor, drawn: _Drawn, options: Mapping[str, Any]
) -> Extraction:
    """Say how far the extraction has got; begin with an empty store if it has not."""
    from cpmm.pipeline.artifacts.spaces import create_spaces, load_extraction

    for path in scratch.rglob("*.partial"):  # what a killed write left
        path.unlink()
    extraction = load_extraction(scratch)
    if not extraction.done:
        n_rows, n_features = drawn.rows.shape
        create_spaces(
            scratch / "spaces", positions, drawn.n_train, n_rows - drawn.n_train, n_features,
            options["dtype"], options["chunk_rows"], drawn.train_index,
        )  # fmt: skip
    return extraction


@dataclass(frozen=True)
class _Drawn:
    """What goes through the spaces: rows of the input space, training before validation."""

    rows: Tensor  # (rows, M), float32
    noise: Tensor | None  # where they go without a teacher, of their shape
    n_train: int
    train_index: Tensor | None  # of the points that training rows were drawn from; None: all


def _draw(data: DataSplits, options: Mapping[str, Any], seed: int, with_noise: bool) -> _Drawn:
    import torch

    from cpmm.seeds import seeded_generator
    from cpmm.spaces import require_validation, training_subset

    n_validation = options["n_validation"]
    require_validation(len(data.raw["validation"]), n_validation)
    generator = seeded_generator(seed, 20)
    index = training_subset(len(data.raw["train"]), options["n_train"], seed)
    train = data.draw(options["n_draws"], generator, index)
    # The first of a split in random order, with the noise that all of it is evaluated with.
    rows = torch.cat([train, data.points("validation")[0][:n_validation].float()])
    noise = torch.randn(rows.shape, generator=generator) if with_noise else None
    return _Drawn(rows, noise, len(train), index)


class _Keeper:
    """Keeps states in a thread, each while the next is computed; no more than one waits."""

    def __init__(self, keep: Callable[[Tensor], None]) -> None:
        self._keep = keep
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> _Keeper:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait until all is kept; if that fails after another error, note it on that one."""
        self._thread.shutdown()
        failed = self._last and self._last.exception()
        if error is None and failed:
            raise failed
        if failed and failed is not error:
            error.add_note(f"and the space before could not be kept: {failed}")

    def check(self) -> None:
        """Raise what went wrong as soon as it is known, not when the next space is computed."""
        if self._last is not None and self._last.done():
            self._last.result()

    def put(self, state: Tensor) -> None:
        """Keep a state, once the one before is kept."""
        if self._last is not None:
            self._last.result()
        self._last = self._thread.submit(self._keep, state)


def _states(
    teacher: Flow | None,
    drawn: _Drawn,
    extraction: Extraction,
    positions: list[float],
    batch_size: int,
    told: Callable[[int, int], None],
) -> Iterator[Tensor]:
    """The rows at each position that is not done yet, the first of which is the input.

    Each batch that a teacher has carried is told: its space, and how many rows it had.
    """
    import torch

    state = extraction.state
    for space in range(extraction.done, len(positions)):
        if teacher is None:
            state = torch.lerp(drawn.rows, drawn.noise, positions[space])
        elif space == 0:
            state = drawn.rows
        else:
            ends = positions[space - 1 : space + 1]
            state = _carry(teacher, state, *ends, batch_size, partial(told, space))
        yield state


def _carry(
    teacher: Flow,
    state: Tensor,
    start: float,
    end: float,
    batch_size: int,
    told: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """Carry points from one position to the next; ``told`` hears of each batch how many it had."""
    import torch

    device = next(teacher.parameters()).device
    at = state.new_tensor([end], device=device)
    carried = torch.empty_like(state)
    with torch.no_grad():
        for part, out in zip(state.split(batch_size), carried.split(batch_size), strict=True):
            out.copy_(teacher.transform(part.to(device), at, start, end)[0])
            told(len(part))
    return carried


def _seconds_per_row(teacher: Flow, probe: Tensor, ends: list[float]) -> float:
    _carry(teacher, probe[:8], *ends, batch_size=PROBE)  # the first call of all is slower
    start = time.perf_counter()
    _carry(teacher, probe, *ends, batch_size=PROBE)
    return (time.perf_counter() - start) / len(probe)


def _statistics(v: float, state: Tensor) -> dict[str, float]:
    precise = state.double()
    by_feature = precise.std(0)
    return {
        "v": v,
        "mean": float(precise.mean()),
        "deviation": float(precise.std()),
        "smallest_deviation": float(by_feature.min()),
        "largest_deviation": float(by_feature.max()),
        "largest_magnitude": float(state.abs().max()),
    }


def _announce(store: Path, rows: Tensor, done: int, n_spaces: int, seconds: float | None) -> None:
    """Say what is to come: bytes, files, and how many seconds, None if nobody knows."""
    from cpmm.pipeline.artifacts.spaces import measure_spaces

    size, n_files = measure_spaces(store)
    if done:
        print(f"build_spaces | resuming after space {done}/{n_spaces}", flush=True)
    parts = [
        f"{n_spaces} spaces of {len(rows)} rows and {rows.shape[1]} features",
        f"{_bytes(size)} in {n_files} files",
    ]
    if seconds is not None:
        parts.append(f"about {duration(seconds)} to go")
    free = shutil.disk_usage(store).free
    if free < size * (n_spaces - done) / n_spaces:
        parts.append(f"but only {_bytes(free)} are free there")
    print(f"build_spaces | {', '.join(parts)} -> {store}", flush=True)


class _Progress:
    """Counts the rows of the spaces, of which ``n_left`` are to be computed."""

    def __init__(self, n_spaces: int, n_rows: int, n_left: int) -> None:
        self.line = ProgressLine("build_spaces")
        self.n_spaces, self.n_rows, self.n_all = n_spaces, n_rows, n_left * n_rows
        self.n_done = 0

    def tell(self, space: int, n: int) -> None:
        """Count ``n`` more rows of a space."""
        self.n_done += n
        last = self.n_done == self.n_all
        if last or self.line.is_due():
            row = (self.n_done - 1) % self.n_rows + 1
            parts = [f"space {space + 1}/{self.n_spaces}", f"row {row}/{self.n_rows}"]
            pace = self.line.pace(self.n_done, self.n_all, "rows")
            self.line.show(*parts, *pace, last=last)


def _bytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


if __name__ == "__main__":
    run_stage(main, __doc__)
