"""Sample the trajectories and throw the ODE away: data/<preset>/mixture."""

from __future__ import annotations

from pathlib import Path

from cpmm.pipeline.config import Config
from cpmm.pipeline.config.fingerprints import fingerprint_mixture, fingerprint_prepared
from cpmm.pipeline.stage import publish, run_stage, scratch_folder


def main(folder: Path, config: Config) -> str:
    """Write ``mixture`` for a preset."""
    from cpmm.pipeline.artifacts.store import load_prepared
    from cpmm.pipeline.models.trajectories import extract, load_trajectories, mixture_header

    data = load_prepared(folder / "prepared", fingerprint_prepared(config))
    trajectories = load_trajectories(folder, config, data)
    options, fingerprint = config["mixture"], fingerprint_mixture(config)
    scratch = scratch_folder(folder, "extract_mixture", fingerprint)
    mixture = extract(trajectories, options, data)
    header = mixture_header(config, data, fingerprint)
    mixture.save(scratch / "mixture", header, data.preprocessing.tensors)
    n_all = config["cpmm"]["n_clusters"] * options["n_pseudotimes"]
    publish(scratch, "mixture", folder / "mixture")
    return (
        f"{mixture.components.n_components} of {n_all} components in {mixture.n_clusters} clusters "
        f"-> {folder / 'mixture'}"
    )


if __name__ == "__main__":
    run_stage(main, __doc__)
