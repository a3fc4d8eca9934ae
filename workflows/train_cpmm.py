"""Train the CPMM through the curriculum: data/<preset>/cpmm."""

from __future__ import annotations

from pathlib import Path

from cpmm.pipeline.config import Config
from cpmm.pipeline.config.fingerprints import (
    fingerprint_cpmm,
    fingerprint_prepared,
    fingerprint_spaces,
)  # fmt: skip
from cpmm.pipeline.stage import publish, run_stage, scratch_folder


def main(folder: Path, config: Config) -> str:
    """Write ``cpmm`` for a preset."""
    from cpmm.pipeline.artifacts.spaces import open_spaces
    from cpmm.pipeline.artifacts.store import load_prepared
    from cpmm.pipeline.models.fit import fit, save_trained
    from cpmm.pipeline.models.mixtures import make_mixture_training

    data = load_prepared(folder / "prepared", fingerprint_prepared(config))
    options = config["cpmm"]
    spaces = None
    if options["curriculum"]:
        spaces = open_spaces(folder / "spaces", fingerprint_spaces(config))
    fingerprint = fingerprint_cpmm(config)
    scratch = scratch_folder(folder, "train_cpmm", fingerprint)
    module, rows = make_mixture_training(options, config["mixture"], data, spaces)
    fit("train_cpmm", module, rows, config["trainer"], scratch, options["gradient_clip"])
    save_trained(scratch / "cpmm", "cpmm", module, fingerprint)
    publish(scratch, "cpmm", folder / "cpmm")
    return (
        f"best validation {module.best['value']:.4f} nats/dim of the model's space after epoch "
        f"{module.best['epoch'] + 1} -> {folder / 'cpmm'}"
    )


if __name__ == "__main__":
    run_stage(main, __doc__)
