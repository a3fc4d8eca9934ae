"""What evaluate and the baselines both fit: mixtures without an ODE, and k-means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpmm.pipeline.config import Config, pick

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

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
        options: The section ``evaluation.direct``, or one like it.
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
        options: The section ``evaluation.direct``, or one like it.
        model: Where it starts.
        seed: Of every draw.
    """
    from cpmm.pipeline.models.flows import drawn_rows
    from cpmm.spaces import Curriculum
    from cpmm.training.mixture import MixtureOptions, MixtureTraining

    steps = MixtureOptions(**pick(options, "noise", "learning_rate", "n_warmup_epochs"), seed=seed)
    module = MixtureTraining(model, Curriculum(0, 0, options["epochs"]), steps)
    return module, drawn_rows(data, **pick(options, "n_draws", "batch_size"), seed=seed)


class KMeansModel:
    """k-means in the models' space, before any whitening, fitted to the training points.

    Args:
        data: The splits.
        n_clusters: C.
        n_starts: Starts, of which the best is kept.
        seed: Of the starts.

    Attributes:
        centre: (C, M), float64.
    """

    def __init__(self, data: DataSplits, n_clusters: int, n_starts: int, seed: int) -> None:
        import torch
        from sklearn.cluster import KMeans

        self._data = data
        self._model = KMeans(n_clusters, n_init=n_starts, random_state=seed)
        self._model.fit(self._points("train"))
        self.centre = torch.from_numpy(self._model.cluster_centers_)

    def predict(self, split: str) -> Tensor:
        """Cluster of each point of a split, (N,)."""
        import torch

        return torch.from_numpy(self._model.predict(self._points(split))).long()

    def _points(self, split: str) -> np.ndarray:
        return self._data.preprocessing.unwhiten(self._data.points(split)[0]).numpy()
