"""Sample the trajectories and throw the ODE away: data/<preset>/mixture."""

from __future__ import annotations

from pathlib import Path

from workflows.stage import Config, fingerprint, publish, run_stage, scratch_folder


def main(folder: Path, config: Config) -> str:
    """Write ``mixture`` for a preset."""
    import torch

    from cpmm.trajectory import pseudotime_grid
    from workflows.models import load_trajectories
    from workflows.store import load_prepared

    data, _ = load_prepared(folder / "prepared")
    trajectories, cpmm_mark = load_trajectories(folder, config, data)
    options = config["mixture"]
    mark = fingerprint("mixture", options, cpmm_mark)
    scratch = scratch_folder(folder, "extract_mixture", mark)
    with torch.no_grad():
        mixture = trajectories.mixture(pseudotime_grid(options["n_pseudotimes"]))
        n_all = mixture.components.n_components
        if options["drop_idle"]:
            mixture = mixture.without_idle_components(data.points("train")[0].float())
    n_kept = mixture.components.n_components
    header = {
        "fingerprint": mark,
        "preset": config["name"],
        "preprocessing": data.preprocessing.to_dict(),
        "image_shape": data.image_shape,
    }
    mixture.save(scratch / "mixture", header)
    publish(scratch, "mixture", folder / "mixture")
    return (
        f"{n_kept} of {n_all} components in {mixture.n_clusters} clusters -> {folder / 'mixture'}"
    )


if __name__ == "__main__":
    run_stage(main, __doc__)
