"""From configuration to trajectories: built, read again after training, and sampled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpmm.data import DataSplits
from cpmm.fields import SeparateFields, VaryingField
from cpmm.initialization import GROUPINGS, initial_states, partition
from cpmm.mixture import Mixture
from cpmm.neighbours import neighbour_groups
from cpmm.odes import Solver
from cpmm.pipeline.artifacts.store import load_model
from cpmm.pipeline.config import pick
from cpmm.pipeline.config.fingerprints import fingerprint_cpmm
from cpmm.pipeline.config.schema import check_cpmm
from cpmm.pipeline.models.flows import make_blocks, make_field
from cpmm.pipeline.models.runtime import choose, seeded
from cpmm.seeds import seeded_generator
from cpmm.trajectory import StateLayout, Trajectories, pseudotime_grid
from cpmm.views import AffineViews


def n_factors(config: Mapping[str, Any], data: DataSplits) -> int:
    """R of the section ``cpmm``; null: by the number of features M, as tables showed best."""
    n = data.n_features
    return config["n_factors"] or min(n, 4 if n <= 15 else 8)


def make_layout(config: Mapping[str, Any], data: DataSplits) -> StateLayout:
    """Build the layout of the state from the section ``cpmm``."""
    names = ("augmentation", "diagonal", "learned_weight", "log_diagonal_floor")
    return StateLayout(data.n_features, n_factors(config, data), **pick(config, *names))


def make_groups(
    config: Mapping[str, Any], data: DataSplits, index: Tensor | None = None
) -> Tensor | None:
    """Group training points for the initialization.

    Args:
        config: The section ``cpmm``.
        data: The splits.
        index: Of the training points that are grouped; None groups all.

    Returns:
        (N,), none of the C groups empty; None if the initialization needs no groups.
    """
    options, n_clusters = config["initialization"], config["n_clusters"]
    if options["kind"] not in GROUPINGS:
        return None
    generator = seeded_generator(config["seed"], 13)
    if options["kind"] == "neighbours":
        raw = data.raw["train"] if index is None else data.raw["train"][index]
        sizes = pick(options, "n_points", "n_views", "n_neighbours")
        return neighbour_groups(raw, make_views(config, data), n_clusters, generator, **sizes)
    x = data.preprocessing.unwhiten(data.points("train")[0]).float()
    return partition(
        options["kind"], x if index is None else x[index], n_clusters, make_layout(config, data),
        generator, **pick(options, "restarts", "outlier_share"),
    )  # fmt: skip


def make_views(config: Mapping[str, Any], data: DataSplits) -> AffineViews:
    """Build the changes of the section ``cpmm.views``.

    Raises:
        ValueError: If the data are no images of grey levels.
    """
    return AffineViews(**config["views"], image_shape=data.image_shape)


def make_trajectories(
    config: Mapping[str, Any],
    data: DataSplits,
    start: Tensor | None = None,
    group: Tensor | None = None,
) -> Trajectories:
    """Build trajectories, untrained.

    Args:
        config: The section ``cpmm``.
        data: The splits.
        start: Training points in the space where training starts, (N, M); None leaves the initial
            states zero, for weights that are loaded next.
        group: Their groups, (N,), if the initialization needs them.

    Raises:
        ValueError: If an option is unknown or out of range.
    """
    layout = make_layout(config, data)
    if start is None:
        initial = torch.zeros(config["n_clusters"], layout.size)
    else:
        initial = initial_states(
            layout=layout, n_clusters=config["n_clusters"], x=start, group=group,
            generator=seeded_generator(config["seed"], 11),
            **pick(config["initialization"], "kind", "mean_scale", "loading_scale", "free_scale"),
        )  # fmt: skip

    check_cpmm(config)
    blocks = make_blocks(config["field"], data)
    n_knots = config["weight_knots"]
    solver = Solver(**config["solver"], name="cpmm.solver")

    def shared() -> nn.Module:
        field = make_field(config["field"], data, layout.n_maps, blocks)
        return field if n_knots is None else VaryingField(field, n_knots)

    def separate() -> nn.Module:
        return SeparateFields([shared() for _ in range(config["n_clusters"])])

    with seeded(config["seed"], 12):
        field = choose("cpmm.ode", config["ode"], {"shared": shared, "separate": separate})()
    return Trajectories(layout, field, initial, solver, config["learned_cluster_weight"], blocks)


def load_trajectories(folder: Path, config: Mapping[str, Any], data: DataSplits) -> Trajectories:
    """Read the trained trajectories of ``data/<preset>``."""
    trajectories = make_trajectories(config["cpmm"], data)
    load_model(folder / "cpmm", "cpmm", trajectories, fingerprint_cpmm(config))
    return trajectories


def extract(trajectories: Trajectories, options: Mapping[str, Any], data: DataSplits) -> Mixture:
    """Sample trained trajectories at the pseudotimes of the section ``mixture``."""
    with torch.no_grad():
        mixture = trajectories.mixture(pseudotime_grid(options["n_pseudotimes"]))
        if options["drop_idle"]:
            mixture = mixture.without_idle_components(data.points("train")[0].float())
    return mixture


def mixture_header(config: Mapping[str, Any], data: DataSplits, fingerprint: str) -> dict[str, Any]:
    """Header of an extracted mixture: what its points mean."""
    header = {
        "fingerprint": fingerprint,
        "preset": config["name"],
        "preprocessing": data.preprocessing.to_dict(),
        "image_shape": data.image_shape,
        "feature_names": list(data.feature_names),
    }
    columns = data.columns.to_dict()
    return header if columns is None else {**header, "columns": columns}
