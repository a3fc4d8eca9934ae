"""Scores of a model on one split, by the rules that the report states."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from cpmm.metrics import clustering_scores, nats_per_dimension
from cpmm.pipeline.progress import ProgressLine

if TYPE_CHECKING:
    import numpy as np
    from torch import Generator, Tensor

    from cpmm.data import DataSplits
    from cpmm.teacher import Flow


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
        self.label = None if data.label is None else data.label[split][:n_points].numpy()
        _, self.factor, self.offset = data.preprocessing.density_unit

    def density(self, log_prob: Tensor) -> dict[str, float]:
        """Mean density in units of the data and its standard error, from the points' nats, (N,)."""
        nats = nats_per_dimension(log_prob, self.log_det, self.data.n_features)
        value = self.factor * nats + self.offset
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


def flow_log_prob(
    flow: Flow,
    z: Tensor,
    generator: Generator,
    batch_size: int,
    title: str | None = None,
    what: str = "points",
    alive: Callable[[], None] = lambda: None,
) -> Tensor:
    """Log-density of points by a flow, batch by batch, with one progress line.

    Args:
        flow: With the solver that it is scored by.
        z: (N, M).
        generator: Of Hutchinson's vectors, on the flow's device.
        batch_size: Points of a batch.
        title: How the progress line begins; None prints none.
        what: The points, for the progress line.
        alive: Called with every evaluation of the field.

    Returns:
        Nats, (N,), float64, on the CPU.
    """
    import torch

    n, done, n_calls = len(z), 0, 0
    line = ProgressLine(title or "")

    def count(*_: object) -> None:
        nonlocal n_calls
        n_calls += 1
        alive()

    hook = flow.field.register_forward_hook(count)
    log_prob = []
    for i, batch in enumerate(z.float().split(batch_size), 1):
        log_prob.append(flow.log_prob(batch.to(generator.device), generator).double().cpu())
        done += len(batch)
        if title is not None and (done == n or line.is_due()):
            calls = f"{math.ceil(n_calls / i)} calls of the field a batch"
            _, eta = line.pace(done, n)
            line.show(f"{done}/{n} {what}", calls, eta, last=done == n)
    hook.remove()
    return torch.cat(log_prob)
