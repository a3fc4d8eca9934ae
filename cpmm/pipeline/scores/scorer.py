"""Scores of a model on one split, by the rules that the report states."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from cpmm.metrics import clustering_scores, nats_per_dimension

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from cpmm.data import DataSplits
    from cpmm.pipeline.models.fitted import Fitted, LogProb
    from cpmm.pipeline.scores.ood import OodPoints


class Scorer:
    """Density in the units of the data, and clustering scores where there are labels.

    Args:
        data: The splits.
        split: Which of them is scored.
        n_points: Score only the first n_points of the split; their noise is the same as when all
            are scored. None scores all.
        n_first: Say the density of the first n_first of them too, to compare with a flow's.
    """

    def __init__(
        self,
        data: DataSplits,
        split: str,
        n_points: int | None = None,
        n_first: int | None = None,
    ) -> None:
        self.data = data
        self.split = split
        self.n_first = n_first
        self.z, self.log_det = (part[:n_points] for part in data.points(split))
        label = None if data.label is None else data.label[split][:n_points].numpy()
        self.label = None if label is None or (label < 0).all() else label
        _, self.factor, self.offset = data.preprocessing.density_unit

    def density(self, log_prob: Tensor) -> dict[str, float]:
        """Mean density in units of the data and its standard error, from the points' nats, (N,).

        Raises:
            FloatingPointError: If the mean is not finite.
        """
        nats = nats_per_dimension(log_prob, self.log_det, self.data.n_features)
        value = self.factor * nats + self.offset
        if not math.isfinite(value.mean()):
            bad = int((~log_prob.isfinite()).sum())
            raise FloatingPointError(
                f"the density of the trained model is not finite on the {self.split} split: "
                f"{bad} of {len(log_prob)} log-densities are infinite or no number"
            )
        scores = {
            "density": float(value.mean()),
            "density_standard_error": float(value.std() / len(value) ** 0.5),
        }
        if self.n_first is not None and self.n_first < len(value):
            scores["density_of_first"] = float(value[: self.n_first].mean())
        return scores

    def clusters(self, cluster: np.ndarray, n_clusters: int) -> dict[str, float]:
        """Clustering scores, nothing without labels."""
        return {} if self.label is None else clustering_scores(self.label, cluster, n_clusters)


def score_baseline(
    fitted: Fitted, score: Scorer, n_clusters: int, ood: OodPoints | None = None, timed: bool = True
) -> dict[str, Any]:
    """Density and clustering scores of a model on the split of ``score``.

    Returns:
        The scores of the split; for a density, if ``timed``, ``seconds_10k``, the time that it
        takes for 10,000 points, and with ``ood`` the entry ``ood`` of
        :meth:`cpmm.pipeline.scores.ood.OodPoints.tell`.

    Raises:
        FloatingPointError: If the density is not finite.
    """
    import torch

    scores: dict[str, Any] = {}
    if fitted.log_prob is not None:
        with torch.no_grad():
            inside, seconds = _timed(fitted.log_prob, score.z, 5 if timed else 1)
            scores |= score.density(inside)
            if timed:
                scores["seconds_10k"] = seconds * 10_000 / len(score.z)
            if ood is not None:
                scores["ood"] = ood.tell(
                    score, inside, lambda: fitted.log_prob(ood.z[: fitted.n_points])
                )
    if fitted.predict is not None and score.label is not None:
        scores |= score.clusters(fitted.predict(score.split).numpy(), n_clusters)
    sizes = {"n_components": fitted.n_components, "n_parameters": fitted.n_parameters}
    return scores | {name: size for name, size in sizes.items() if size is not None}


def _timed(log_prob: LogProb, z: Tensor, most: int) -> tuple[Tensor, float]:
    """Log-densities and the seconds they take, the least of ``most`` where that is soon done."""
    seconds = math.inf
    for _ in range(most):
        started = time.perf_counter()
        found = log_prob(z)
        seconds = min(seconds, time.perf_counter() - started)
        if seconds > 1:
            break
    return found, seconds
