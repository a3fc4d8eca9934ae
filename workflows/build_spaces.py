"""Carry the data through the spaces of the curriculum: data/<preset>/spaces, a zarr store."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmm.pipeline.config import Config
from cpmm.pipeline.config.fingerprints import (
    fingerprint_prepared,
    fingerprint_spaces,
    fingerprint_teacher,
    needs_teacher,
)
from cpmm.pipeline.stage import publish, run_stage, scratch_folder

if TYPE_CHECKING:
    from torch import Tensor

    from cpmm.data import DataSplits
    from cpmm.pipeline.artifacts.store import Extraction
    from cpmm.teacher import Flow

SECONDS = 15.0  # between two lines where there is no terminal
PROBE = 256  # rows that are carried on trial, to say how long all will take


def main(folder: Path, config: Config) -> str:
    """Write ``spaces`` for a preset, one space after the other, resuming after the last one."""
    from cpmm.pipeline.artifacts.store import (
        clear_partial,
        create_spaces,
        load_extraction,
        load_model,
        load_prepared,
        measure_spaces,
        save_extraction,
        seal_spaces,
        write_space,
    )
    from cpmm.pipeline.models.flows import make_teacher
    from cpmm.pipeline.models.mixtures import SPACES
    from cpmm.pipeline.models.runtime import choose, compute_device
    from cpmm.spaces import space_positions

    data = load_prepared(folder / "prepared", fingerprint_prepared(config))
    options, seed = config["spaces"], config["seed"]
    choose("spaces.kind", options["kind"], {kind: kind for kind in SPACES})
    teacher = None
    if needs_teacher(config):
        teacher = make_teacher(config["teacher"], data, seed)
        load_model(folder / "teacher", "teacher", teacher, fingerprint_teacher(config))
        teacher = teacher.to(compute_device(config["trainer"]))
    fingerprint = fingerprint_spaces(config)
    scratch = scratch_folder(folder, "build_spaces", fingerprint)
    # The flow starts at the input, v = 0, so the last space is written first.
    positions = space_positions(options["n_spaces"])
    ascending = positions.flip(0).tolist()
    drawn = _draw(data, options, seed, with_noise=teacher is None)
    rows = drawn.rows

    store = scratch / "spaces"
    clear_partial(scratch)
    extraction = load_extraction(scratch)
    if not extraction.done:
        create_spaces(
            store, positions, drawn.n_train, len(rows) - drawn.n_train, data.n_features,
            options["dtype"], options["chunk_rows"], drawn.train_index,
        )  # fmt: skip
    n_left = len(positions) - max(extraction.done, 0 if teacher is None else 1)
    seconds = None  # noise costs next to nothing beside the disk
    if teacher is not None and n_left:
        probe = rows[:PROBE] if extraction.state is None else extraction.state[:PROBE]
        seconds = len(rows) * n_left * _seconds_per_row(teacher, probe, ascending[:2])
    _announce(store, rows, *measure_spaces(store), extraction.done, len(positions), seconds)
    progress = _Progress(len(positions), len(rows), n_left)

    def keep(state: Tensor) -> None:
        space = extraction.done
        extraction.shards |= write_space(store, len(positions) - 1 - space, state)
        extraction.statistics.append(_statistics(ascending[space], state))
        extraction.done, extraction.state = space + 1, None if teacher is None else state
        save_extraction(scratch, extraction)
        if teacher is None:
            progress.of_space(space)(len(rows))

    with _Keeper(keep) as keeper:
        progress.check = keeper.check
        batch_size = options["batch_size"]
        for state in _states(teacher, drawn, extraction, ascending, batch_size, progress):
            keeper.put(state)
    import pandas as pd

    pd.DataFrame(extraction.statistics[::-1]).to_csv(store / "statistics.csv", index=False)
    seal_spaces(store, fingerprint, extraction.shards)
    publish(scratch, "spaces", folder / "spaces")
    latent = extraction.statistics[-1]
    return (
        f"{len(positions)} spaces of {len(rows)} rows, latent mean {latent['mean']:+.3f} and "
        f"deviation {latent['deviation']:.3f} -> {folder / 'spaces'}"
    )


@dataclass(frozen=True)
class _Drawn:
    """What goes through the spaces: rows of the input space, training before validation, (rows, M).

    Attributes:
        rows: float32.
        noise: Where the rows go without a teacher, of their shape; None with one.
        n_train: Training rows.
        train_index: Which training points they were drawn from; None: all.
    """

    rows: Tensor
    noise: Tensor | None
    n_train: int
    train_index: Tensor | None


def _draw(data: DataSplits, options: Mapping[str, Any], seed: int, with_noise: bool) -> _Drawn:
    import torch

    from cpmm.seeds import seeded_generator
    from cpmm.spaces import training_subset

    n, n_validation = len(data.raw["validation"]), options["n_validation"]
    if n_validation is not None and not 2 <= n_validation <= n:
        raise ValueError(
            f"spaces.n_validation is {n_validation}: expected 2 to {n}, the validation points, or "
            "null for all"
        )
    generator = seeded_generator(seed, 20)
    index = training_subset(len(data.raw["train"]), options["n_train"], seed)
    train = data.draw(options["n_draws"], generator, index)
    # The first of a split in random order, with the noise that all of it is evaluated with.
    rows = torch.cat([train, data.points("validation")[0][:n_validation].float()])
    noise = torch.randn(rows.shape, generator=generator) if with_noise else None
    return _Drawn(rows, noise, len(train), index)


class _Keeper:
    """Keeps one state after the other in a thread, each while the next is computed; no more than one waits.

    Args:
        keep: Does it with one state.
    """

    def __init__(self, keep: Callable[[Tensor], None]) -> None:
        self._keep = keep
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> _Keeper:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait until all is kept; if something else went wrong too, that error is noted on the other."""
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
    progress: _Progress,
) -> Iterator[Tensor]:
    """The rows at each position that is not done yet, the first of which is the input."""
    import torch

    left, state = range(extraction.done, len(positions)), extraction.state
    for space in left:
        if teacher is None:
            yield torch.lerp(drawn.rows, drawn.noise, positions[space])
            continue
        if space == 0:
            state = drawn.rows
        else:
            told = progress.of_space(space)
            state = _carry(teacher, state, *positions[space - 1 : space + 1], batch_size, told)
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


def _announce(
    store: Path,
    rows: Tensor,
    size: int,
    n_files: int,
    done: int,
    n_spaces: int,
    seconds: float | None,
) -> None:
    """Say what is to come: how many bytes and files, and how long it will take, None if nobody knows."""
    if done:
        print(f"build_spaces | resuming after space {done}/{n_spaces}", flush=True)
    parts = [
        f"{n_spaces} spaces of {len(rows)} rows and {rows.shape[1]} features",
        f"{_bytes(size)} in {n_files} files",
    ]
    if seconds is not None:
        parts.append(f"about {_duration(seconds)} to go")
    free = shutil.disk_usage(store).free
    if free < size * (n_spaces - done) / n_spaces:
        parts.append(f"but only {_bytes(free)} are free there")
    print(f"build_spaces | {', '.join(parts)} -> {store}", flush=True)


class _Progress:
    """One line that a person can follow, rewritten on a terminal, now and then printed elsewhere.

    Args:
        n_spaces: V.
        n_rows: Rows of a space.
        n_left: Spaces that are still to be computed.
    """

    def __init__(self, n_spaces: int, n_rows: int, n_left: int) -> None:
        self.n_spaces, self.n_rows = n_spaces, n_rows
        self.n_left = n_left * n_rows
        self.n_carried = 0
        self.terminal = sys.stdout.isatty()
        self.every = 0.2 if self.terminal else SECONDS
        self.check: Callable[[], None] = lambda: None  # called with each batch
        self.started = self.printed = time.monotonic()

    def of_space(self, space: int) -> Callable[[int], None]:
        """Give what is to be called with the size of each batch of a space, 0 for the input."""
        n_before = self.n_carried

        def told(n: int) -> None:
            self.check()
            self.n_carried += n
            now = time.monotonic()
            last = self.n_carried == self.n_left
            if now - self.printed < self.every and not last:
                return
            self.printed = now
            rate = self.n_carried / max(1e-9, now - self.started)
            line = (
                f"build_spaces | space {space + 1}/{self.n_spaces} | "
                f"row {self.n_carried - n_before}/{self.n_rows} | {rate:.0f} rows/s | "
                f"eta {_duration((self.n_left - self.n_carried) / rate)}"
            )
            end = "\n" if last or not self.terminal else "\r"
            print(f"\x1b[2K{line}" if self.terminal else line, end=end, flush=True)

        return told


def _bytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f}m" if seconds < 7200 else f"{seconds / 3600:.1f}h"


if __name__ == "__main__":
    run_stage(main, __doc__)
