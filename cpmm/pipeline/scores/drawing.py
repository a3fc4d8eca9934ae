"""What evaluate writes beside its scores: tables, and the figures of the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from torch import Tensor

from cpmm import figures
from cpmm.metrics import confusion, match_clusters
from cpmm.pipeline.config import Config
from cpmm.pipeline.scores.tables import SPACES
from cpmm.seeds import seeded_generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cpmm.data import DataSplits
    from cpmm.mixture import Mixture
    from cpmm.pipeline.artifacts.spaces import Spaces


def write_tables(out: Path, data: DataSplits, mixture: Mixture, metrics: Config) -> None:
    """Write discretizations, clusters, their confusion with classes and what is told apart."""
    table = pd.Series(metrics["discretization"], name="density")
    table.to_csv(out / "discretization.csv", index_label="n_pseudotimes")
    cluster = mixture.predict(data.points("test")[0]).numpy()
    points = pd.DataFrame({"cluster": cluster})
    if data.label is not None:
        points.insert(0, "label", data.label["test"].numpy())
        counts = pd.DataFrame(_confusion(data, cluster, mixture.n_clusters), data.class_names)
        counts.to_csv(out / "confusion.csv", index_label="class")
    points.to_csv(out / "clusters.csv", index=False)
    if ood := metrics.get("ood"):
        rows = [
            {"model": model, "ood": ood["name"], "space": space, **row[space]}
            for model, row in ood["models"].items()
            for space in SPACES
            if space in row
        ]
        pd.DataFrame(rows).to_csv(out / "ood.csv", index=False)


def draw_figures(
    out: Path,
    config: Config,
    data: DataSplits,
    mixture: Mixture,
    metrics: Config,
    spaces: Spaces,
    history: pd.DataFrame,
) -> None:
    """Draw what the report shows into ``out/figures``, the same bytes for the same inputs."""
    n_spaces = len(spaces) if config["cpmm"]["curriculum"] else 0
    found = {int(n): value for n, value in metrics["discretization"].items() if value is not None}
    drawn = {
        "spaces": _draw_spaces(data, spaces),
        "history": figures.plot_history(history, n_spaces),
    }
    if found:
        drawn["discretization"] = figures.plot_discretization(
            list(found), list(found.values()), metrics["unit"]
        )
    try:
        drawn |= _draw_mixture(data, mixture, config["seed"])
    except FloatingPointError as error:  # the scores are worth more than their figures
        print(f"evaluate | no figures of the mixture: {error}", flush=True)
    with rc_context({"svg.hashsalt": "cpmm"}):
        for name, figure in drawn.items():
            figure.savefig(out / "figures" / f"{name}.svg", metadata={"Date": None})


def _draw_spaces(data: DataSplits, spaces: Spaces) -> Figure:
    shown = np.unique(np.linspace(0, len(spaces) - 1, 7).round().astype(int))
    n_shown = 10 if data.image_shape else 1000
    carried = np.stack([spaces.validation(int(i))[:n_shown].numpy() for i in shown])
    n_shown = carried.shape[1]  # the first of the validation points, fewer where fewer are carried
    return figures.plot_spaces(
        carried,
        spaces.positions[shown].numpy(),
        None if data.label is None else data.label["validation"][:n_shown].numpy(),
        data.image_shape,
    )


def _draw_mixture(data: DataSplits, mixture: Mixture, seed: int) -> dict[str, Figure]:
    """Draw samples, confusion with classes, and the components where there is a picture of them."""
    z, _ = data.points("test")
    label = None if data.label is None else data.label["test"].numpy()
    label = None if label is None or (label < 0).all() else label
    cluster = mixture.predict(z)
    samples, component = mixture.sample(len(z), seeded_generator(seed, 33))
    drawn = {
        "samples": figures.plot_samples(
            _as_shown(data, z),
            _as_shown(data, samples),
            label,
            mixture.cluster[component].numpy(),
            data.image_shape,
        )
    }
    names = None
    if label is not None:
        member = label >= 0
        match = match_clusters(label[member], cluster.numpy()[member], mixture.n_clusters)
        table = _confusion(data, cluster.numpy(), mixture.n_clusters)
        drawn["confusion"] = figures.plot_confusion(table, data.class_names, match)
        names = [data.class_names[c] if c >= 0 else "-" for c in match]
    if len(set(mixture.cluster_sizes)) == 1:  # idle components dropped leave no common pseudotimes
        drawn["trajectories"] = _draw_trajectories(data, mixture, z, cluster, names)
    if data.n_features == 2:
        drawn["components"] = figures.plot_components(
            mixture.components.mean.numpy(),
            mixture.components.covariance().numpy(),
            mixture.cluster.numpy(),
            z.numpy(),
        )
    return drawn


def _draw_trajectories(
    data: DataSplits, mixture: Mixture, z: Tensor, cluster: Tensor, names: list[str] | None
) -> Figure:
    """Draw the means along each trajectory; clusters are called by the class that is matched."""
    best = torch.cat([mixture.joint_log_prob(part).argmax(1) for part in z.split(2048)])
    share = torch.bincount(best, minlength=mixture.components.n_components) / len(z)
    weight = torch.bincount(cluster, minlength=mixture.n_clusters) / len(z)
    means = mixture.components.mean.split(mixture.cluster_sizes)
    return figures.plot_trajectory_means(
        np.stack([_as_shown(data, mean) for mean in means]),
        data.image_shape,
        [
            f"cluster {c}{'' if names is None else f' = {names[c]!r}'}, {100 * weight[c]:.0f} %"
            for c in range(mixture.n_clusters)
        ],
        share.reshape(mixture.n_clusters, -1).numpy(),
        _as_shown(data, z),
    )


def _as_shown(data: DataSplits, points: Tensor) -> Any:
    """Images as grey levels; tables in the models' space."""
    return (data.preprocessing.inverse(points) if data.image_shape else points).numpy()


def _confusion(data: DataSplits, cluster: np.ndarray, n_clusters: int) -> np.ndarray:
    """Count test points by class and cluster, those of no class apart."""
    label = data.label["test"].numpy()
    member = label >= 0
    return confusion(label[member], cluster[member], len(data.class_names), n_clusters)
