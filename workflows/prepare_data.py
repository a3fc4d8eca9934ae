"""Read raw data, split it, fit its preprocessing: data/<preset>/prepared."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cpmm.pipeline.config import Config, pick
from cpmm.pipeline.config.fingerprints import check_digests, fingerprint_prepared
from cpmm.pipeline.progress import ProgressLine
from cpmm.pipeline.stage import publish, run_stage, scratch_folder

if TYPE_CHECKING:
    from torch import Tensor

    from cpmm.data import DataSplits
    from cpmm.elementwise import ElementwiseMap
    from cpmm.pipeline.artifacts.sources import Source


def main(folder: Path, config: Config) -> str:
    """Write ``prepared`` for a preset."""
    import torch

    from cpmm.columns import Columns
    from cpmm.data import SPLITS, DataSplits, describe_split, split_indices
    from cpmm.pipeline.artifacts.sources import read_source, source_options
    from cpmm.pipeline.artifacts.store import save_prepared
    from cpmm.pipeline.scores.sizes import check_sizes
    from cpmm.preprocessing import Augmentation, Preprocessing
    from cpmm.seeds import seeded_generator

    options = config["data"]
    source = read_source(source_options(options))
    check_digests(options, "data", f"compose@{config['name']}")
    if source.found:
        print(f"prepare_data | {' | '.join(source.found)}", flush=True)
    for doubt in source.doubts:
        print(f"prepare_data: warning: {doubt}", flush=True)
    raw = torch.from_numpy(source.x)
    sizes = pick(options, "n_train", "n_validation", "n_test")
    sizes |= {"n": len(raw), "official_test": source.official_test}
    print(f"prepare_data | {describe_split(**sizes)}", flush=True)
    index = split_indices(**sizes, seed=options["split_seed"])
    raw, label = {split: raw[index[split]] for split in SPLITS}, None
    if source.columns is not None:
        raw, source = _complete(raw, source, options)
    if source.label is not None:
        label = {split: torch.from_numpy(source.label)[index[split]] for split in SPLITS}
    learned = _fit_map(raw["train"], raw["validation"], source.levels, options)
    preprocessing = Preprocessing.fit(
        raw["train"], source.levels, **pick(options, "alpha", "standardize"),
        generator=seeded_generator(options["noise_seed"], len(SPLITS)),
        feature_names=source.feature_names, map=learned,
    )  # fmt: skip
    data = DataSplits(
        raw, label, preprocessing,
        Augmentation(**options["augmentation"], image_shape=source.image_shape),
        options["noise_seed"], source.image_shape, source.feature_names, source.class_names,
        source.columns or Columns(),
    )  # fmt: skip
    check_sizes(config, data, ood=True)  # before anything is trained
    fingerprint = fingerprint_prepared(config)
    scratch = scratch_folder(folder, "prepare_data", fingerprint)
    save_prepared(scratch / "prepared", data, fingerprint)
    publish(scratch, "prepared", folder / "prepared")
    sizes = ", ".join(f"{len(index[split])} {split}" for split in SPLITS)
    return f"{sizes} points, {_describe(data)} -> {folder / 'prepared'}"


def _complete(
    raw: dict[str, Tensor], source: Source, options: Config
) -> tuple[dict[str, Tensor], Source]:
    """Fill gaps of a table, and see to columns of one value, by its training split; say what."""
    import torch

    from cpmm.reading.tables import complete_splits

    parts, names, columns, done = complete_splits(
        {split: part.numpy() for split, part in raw.items()}, source.feature_names, source.columns,
        **pick(options, "missing", "constant"),
    )  # fmt: skip
    for said in done:
        print(f"prepare_data | {said}", flush=True)
    raw = {split: torch.from_numpy(part) for split, part in parts.items()}
    return raw, replace(source, feature_names=names, columns=columns)


def _describe(data: DataSplits) -> str:
    """Say what was read, so that a table that was meant for images, or axes astray, are seen."""
    if data.image_shape is None:
        return f"a table of {data.n_features} features"
    channels, height, width = data.image_shape
    named = f"{channels} channels of " * (channels > 1)
    return f"images of {named}{height} x {width} and {data.preprocessing.levels} grey levels"


def _fit_map(
    raw: Tensor, validation: Tensor, levels: int | None, options: Config
) -> ElementwiseMap | None:
    """Fit the elementwise map that is asked for, with a progress line; None for the plain logit."""
    from cpmm.data import SPLITS
    from cpmm.map_fitting import MapOptions, fit_elementwise_map
    from cpmm.seeds import seeded_generator

    if options["map"]["kind"] == "none":
        return None
    line = ProgressLine("prepare_data")

    def show(row: dict[str, float]) -> None:
        train, validation = (
            row[name] / math.log(2) + math.log2(levels) for name in ("train", "validation")
        )
        bits = f"train {train:.4f} val {validation:.4f}"
        step, n_steps = row["step"], row["n_steps"]
        if step == n_steps or line.is_due():
            line.show(
                f"step {step}/{n_steps}", "elementwise map", f"{bits} bits/dim",
                *line.pace(step, n_steps), last=step == n_steps,
            )  # fmt: skip

    chosen = {name: value for name, value in options["map"].items() if name != "kind"}
    return fit_elementwise_map(
        raw, validation, levels, options["alpha"], options["standardize"], MapOptions(**chosen),
        generator=seeded_generator(options["noise_seed"], len(SPLITS) + 1), listener=show,
    )  # fmt: skip


if __name__ == "__main__":
    run_stage(main, __doc__)
