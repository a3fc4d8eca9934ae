"""Scores of a model on one split, by the rules that the report states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpmm.metrics import clustering_scores, nats_per_dimension

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from cpmm.data import DataSplits
    from cpmm.mixture import Mixture


class Scorer:
    """Density in the units of the data, and clustering scores where there are labels.

    Args:
        data: The splits.
        split: Which of them is scored.
        n_points: The first so many points of it, with the noise that they have among all; None: all.
    """

    def __init__(self, data: DataSplits, split: str, n_points: int | None = None) -> None:
        self.data = data
        self.split = split
        self.z, self.log_det = (part[:n_points] for part in data.points(split))
        self.label = None if data.label is None else data.label[split][:n_points].numpy()
        _, self.factor, self.offset = data.preprocessing.density_unit

    def density(self, log_prob: Tensor) -> dict[str, float]:
        """Mean density in units of the data and its standard error, from the points' nats, (N,)."""
        nats = nats_per_dimension(log_prob, self.log_det, self.data.n_features)
        value = self.factor * nats + self.offset
        return {
            "density": float(value.mean()),
            "density_standard_error": float(value.std() / len(value) ** 0.5),
        }

    def clusters(self, cluster: np.ndarray, n_clusters: int) -> dict[str, float]:
        """Clustering scores, nothing without labels."""
        return {} if self.label is None else clustering_scores(self.label, cluster, n_clusters)

    def mixture(self, mixture: Mixture) -> dict[str, float]:
        """Both, of a mixture in float64."""
        return {
            **self.density(mixture.log_prob(self.z)),
            **self.clusters(mixture.predict(self.z).numpy(), mixture.n_clusters),
            "n_components": mixture.components.n_components,
            "n_parameters": mixture.components.n_parameters,
        }
