"""Read raw data, split it, fit its preprocessing: data/<preset>/prepared."""

from __future__ import annotations

from pathlib import Path

from workflows.marks import mark_prepared
from workflows.stage import Config, pick, publish, run_stage, scratch_folder


def main(folder: Path, config: Config) -> str:
    """Write ``prepared`` for a preset."""
    import torch

    from cpmm.data import SPLITS, DataSplits, split_indices
    from cpmm.preprocessing import Augmentation, Preprocessing
    from cpmm.seeds import seeded_generator
    from workflows.sources import read_source
    from workflows.store import save_prepared

    options = config["data"]
    source = read_source({"source": options["source"], **options["options"]})
    raw = torch.from_numpy(source.x)
    index = split_indices(
        len(raw), **pick(options, "n_train", "n_validation", "n_test"), official_test=source.official_test,
        seed=options["split_seed"],
    )  # fmt: skip
    data = DataSplits(
        raw={split: raw[index[split]] for split in SPLITS},
        label=None
        if source.label is None
        else {split: torch.from_numpy(source.label)[index[split]] for split in SPLITS},
        preprocessing=Preprocessing.fit(
            raw[index["train"]],
            source.levels,
            **pick(options, "alpha", "standardize"),
            generator=seeded_generator(options["noise_seed"], len(SPLITS)),
            feature_names=source.feature_names,
        ),
        augmentation=Augmentation(**options["augmentation"], image_shape=source.image_shape),
        noise_seed=options["noise_seed"],
        image_shape=source.image_shape,
        feature_names=source.feature_names,
        class_names=source.class_names,
    )
    mark = mark_prepared(config)
    scratch = scratch_folder(folder, "prepare_data", mark)
    save_prepared(scratch / "prepared", data, mark)
    publish(scratch, "prepared", folder / "prepared")
    sizes = ", ".join(f"{len(index[split])} {split}" for split in SPLITS)
    return f"{sizes} points with {data.n_features} features -> {folder / 'prepared'}"


if __name__ == "__main__":
    run_stage(main, __doc__)
