"""Carry the data through the spaces of the curriculum: data/<preset>/spaces, a zarr store."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from workflows.marks import mark_prepared, mark_spaces, mark_teacher, needs_teacher
from workflows.stage import Config, publish, run_stage, scratch_folder

if TYPE_CHECKING:
    from torch import Tensor

    from cpmm.teacher import Flow


def main(folder: Path, config: Config) -> str:
    """Write ``spaces`` for a preset, one space after the other, resuming after the last one."""
    import torch

    from cpmm.seeds import seeded_generator
    from cpmm.spaces import space_positions
    from workflows.models import SPACES, choose, make_teacher
    from workflows.store import (
        clear_partial,
        create_spaces,
        load_model,
        load_prepared,
        load_progress,
        save_progress,
        seal_spaces,
        write_space,
    )

    data = load_prepared(folder / "prepared", mark_prepared(config))
    options, seed = config["spaces"], config["seed"]
    choose("spaces.kind", options["kind"], {kind: kind for kind in SPACES})
    teacher = None
    if needs_teacher(config):
        teacher = make_teacher(config["teacher"], data, seed)
        load_model(folder / "teacher", "teacher", teacher, mark_teacher(config))
        teacher = teacher.to(_device(config["trainer"]["accelerator"]))
    mark = mark_spaces(config)
    scratch = scratch_folder(folder, "build_spaces", mark)
    positions = space_positions(options["n_spaces"])
    generator = seeded_generator(seed, 20)
    train = data.draw(options["n_draws"], generator)
    rows = torch.cat([train, data.points("validation")[0].float()])
    noise = torch.randn(rows.shape, generator=generator)

    store = scratch / "spaces"
    clear_partial(scratch)
    state, done, statistics = load_progress(scratch, rows)
    if not done:
        create_spaces(
            store, positions, len(train), len(rows) - len(train), data.n_features,
            options["dtype"], options["chunk_rows"],
        )  # fmt: skip
    # The flow starts at the input, v = 0, so the last space is written first.
    ascending = positions.flip(0)
    for index in _progress(range(done, len(positions)), len(positions), store, rows.nbytes):
        v = float(ascending[index])
        if teacher is None:
            state = torch.lerp(rows, noise, v)
        elif index:
            state = _carry(teacher, state, float(ascending[index - 1]), v, options["batch_size"])
        write_space(store, len(positions) - 1 - index, state)
        statistics.append(_statistics(v, state))
        save_progress(scratch, state, index + 1, statistics)
    import pandas as pd

    pd.DataFrame(statistics[::-1]).to_csv(store / "statistics.csv", index=False)
    seal_spaces(store, mark)
    publish(scratch, "spaces", folder / "spaces")
    latent = statistics[-1]
    return (
        f"{len(positions)} spaces of {len(rows)} rows, latent mean {latent['mean']:+.3f} and "
        f"deviation {latent['deviation']:.3f} -> {folder / 'spaces'}"
    )


def _carry(teacher: Flow, state: Tensor, start: float, end: float, batch_size: int) -> Tensor:
    import torch

    device = next(teacher.parameters()).device
    with torch.no_grad():
        parts = state.to(device).split(batch_size)
        at = state.new_tensor([end], device=device)
        return torch.cat([teacher.transform(part, at, start, end)[0].cpu() for part in parts])


def _statistics(v: float, state: Tensor) -> dict[str, float]:
    by_feature = state.double().std(0)
    return {
        "v": v,
        "mean": float(state.double().mean()),
        "deviation": float(state.double().std()),
        "smallest_deviation": float(by_feature.min()),
        "largest_deviation": float(by_feature.max()),
        "largest_magnitude": float(state.abs().max()),
    }


def _progress(indices: range, n_spaces: int, store: Path, n_bytes: int) -> Iterator[int]:
    from rich.progress import track

    size = n_spaces * n_bytes / 2**20
    print(f"build_spaces | {n_spaces} spaces, {size:.0f} MiB -> {store}", flush=True)
    yield from track(
        indices,
        "build_spaces",
        total=n_spaces,
        completed=indices.start,
        disable=not sys.stdout.isatty(),
    )


def _device(accelerator: str) -> str:
    import torch

    return "cuda" if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    run_stage(main, __doc__)
