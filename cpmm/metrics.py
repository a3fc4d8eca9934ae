"""Figures of merit, by the rules stated beside them in every report."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import (
    adjusted_rand_score,
    average_precision_score,
    normalized_mutual_info_score,
    roc_auc_score,
)
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor


def nats_per_dimension(log_prob: Tensor, log_det: Tensor, n_features: int) -> Tensor:
    r"""Minus log-density in units of the data, nats per feature, (N,) (rule 1 of the evaluation).

    .. math:: -(\log p(z) + \log |dz/dx|) / M

    :attr:`cpmm.preprocessing.Preprocessing.density_unit` makes bits per dimension of it for images.

    Args:
        log_prob: Log-density in the model's space, nats, (N,).
        log_det: Log-determinant of the map from data to that space, nats, (N,).
        n_features: M.
    """
    return -(log_prob + log_det) / n_features


def match_clusters(label: np.ndarray, cluster: np.ndarray, n_clusters: int) -> np.ndarray:
    """Match clusters to classes by the Hungarian method, one to one.

    Args:
        label: Class of each point, (N,), from 0.
        cluster: Cluster of each point, (N,), in [0, C).
        n_clusters: C.

    Returns:
        The class of each cluster, (C,), -1 for a cluster left over when there are more of them.
    """
    table = confusion(label, cluster, int(label.max()) + 1, n_clusters)
    rows, columns = linear_sum_assignment(table, maximize=True)
    match = np.full(n_clusters, -1)
    match[columns] = rows
    return match


def confusion(
    label: np.ndarray, cluster: np.ndarray, n_classes: int, n_clusters: int
) -> np.ndarray:
    """Count points by class and cluster, (n_classes, n_clusters)."""
    table = np.zeros((n_classes, n_clusters), dtype=np.int64)
    np.add.at(table, (label, cluster), 1)
    return table


def clustering_scores(label: np.ndarray, cluster: np.ndarray, n_clusters: int) -> dict[str, float]:
    """Compare clusters with classes; points labelled -1 belong to no class and are left out.

    Args:
        label: Class of each point, (N,).
        cluster: Cluster of each point, (N,), in [0, C).
        n_clusters: C.

    Returns:
        ``accuracy`` under the Hungarian matching, ``purity`` (each cluster to its commonest class),
        ``nmi`` (arithmetic mean) and ``ari``; all in [0, 1] but ARI, which can be negative.

    Raises:
        ValueError: If no point has a class.
    """
    member = label >= 0
    if not member.any():
        raise ValueError("clustering scores need labels, every point has label -1")
    label, cluster = label[member], cluster[member]
    match = match_clusters(label, cluster, n_clusters)
    return {
        "accuracy": float(np.mean(match[cluster] == label)),
        "purity": float(contingency_matrix(label, cluster).max(0).sum() / len(label)),
        "nmi": float(normalized_mutual_info_score(label, cluster)),
        "ari": float(adjusted_rand_score(label, cluster)),
    }


def detection_scores(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """Tell points of a distribution from others by a score that is higher inside (Table 3).

    Args:
        inside: Scores of its points, such as log-densities, (N,).
        outside: Scores of other points, (N',).

    Returns:
        ``auroc``, area under the receiver operating characteristic; ``aupr``, average precision of
        the points inside; ``aupr_out``, average precision of those outside; all in [0, 1].

    Raises:
        ValueError: If either has no point.
    """
    if not (len(inside) and len(outside)):
        raise ValueError(
            f"detection takes points inside and outside: got {len(inside)} and {len(outside)}"
        )
    score = np.concatenate([inside, outside])
    member = np.repeat([True, False], [len(inside), len(outside)])
    return {
        "auroc": float(roc_auc_score(member, score)),
        "aupr": float(average_precision_score(member, score)),
        "aupr_out": float(average_precision_score(~member, -score)),
    }
