"""Mixtures without an ODE: where they start, and how they are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpmm.pipeline.config import Config, pick

if TYPE_CHECKING:
    from cpmm.baselines.direct import DirectMixture
    from cpmm.data import DataSplits
    from cpmm.mixture import Mixture
    from cpmm.training.epochs import EpochData
    from cpmm.training.mixture import MixtureTraining


def start_direct(
    data: DataSplits, options: Config, n_components: int, n_factors: int, floor: float, seed: int
) -> DirectMixture:
    """Start a direct mixture by k-means and local factor analysis.

    Of the shrinkages of the local covariances, the one with the best validation likelihood is taken.

    Args:
        data: The splits.
        options: The section ``baselines.direct``, or one like it.
        n_components: K.
        n_factors: R.
        floor: Lower bound of log d.
        seed: Of k-means.
    """
    import torch

    from cpmm.baselines.direct import DirectMixture
    from cpmm.initialization import group_axes, kmeans, shrunk_factor_analyzers
    from cpmm.seeds import seeded_generator

    x = data.points("train")[0].float()
    validation = data.points("validation")[0].float()
    generator = seeded_generator(seed, 30)
    label = kmeans(x, n_components, generator, options["kmeans_restarts"], options["kmeans_points"])
    groups = group_axes(x, label, n_components, n_factors)
    starts = [
        DirectMixture(shrunk_factor_analyzers(groups, floor, shrinkage), floor)
        for shrinkage in options["shrinkages"]
    ]
    with torch.no_grad():
        return max(starts, key=lambda model: float(model.mixture().log_prob(validation).mean()))


def start_refined(mixture: Mixture, floor: float) -> DirectMixture:
    """Start from extracted components, each free of its trajectory."""
    from dataclasses import replace

    import torch

    from cpmm.baselines.direct import DirectMixture

    start = mixture.components.to(torch.float32)
    start = replace(start, log_diagonal=start.log_diagonal.clamp(min=floor + 1e-3))
    return DirectMixture(start, floor, mixture.cluster_sizes)


def direct_training(
    data: DataSplits, options: Config, model: DirectMixture, seed: int
) -> tuple[MixtureTraining, EpochData]:
    """Training of a direct mixture and its rows, by the likelihood that CPMM is trained by.

    Args:
        data: The splits.
        options: The section ``baselines.direct``, or one like it.
        model: Where it starts.
        seed: Of every draw.
    """
    from cpmm.pipeline.models.fit import drawn_rows
    from cpmm.spaces import Curriculum
    from cpmm.training.mixture import MixtureOptions, MixtureTraining

    steps = MixtureOptions(**pick(options, "noise", "learning_rate", "n_warmup_epochs"), seed=seed)
    module = MixtureTraining(model, Curriculum(0, 0, options["epochs"]), steps)
    return module, drawn_rows(data, **pick(options, "n_draws", "batch_size"), seed=seed)
