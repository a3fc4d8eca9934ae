"""Initial states of trajectories, and k-means with local factor analysis for direct mixtures."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import Tensor

from cpmm.factor_analyzers import FactorAnalyzers, component_log_prob
from cpmm.trajectory import StateLayout

PARTITIONS = ("kmeans", "analyzers", "linkage")
INITIALIZATIONS = ("gaussian", "random", *PARTITIONS)


def initial_states(
    kind: str,
    layout: StateLayout,
    n_clusters: int,
    x: Tensor,
    group: Tensor | None,
    generator: torch.Generator,
    mean_scale: float = 0.1,
    loading_scale: float = 0.1,
    free_scale: float = 0.1,
) -> Tensor:
    """Choose where the trajectories start.

    Args:
        kind: "gaussian", perturbations of the standard Gaussian, for a curriculum that starts there
            (section 3.3); "random", a random point and the spread of all data; a kind of
            :func:`partition`, the mean and spread of each of its groups (Table 2 has k-means).
            With a curriculum the groups, found in the input space, are carried to the space where
            training starts.
        layout: How a state is read.
        n_clusters: C.
        x: Training points in the space where training starts, (N, M).
        group: Group of each point, (N,), integers in [0, C); None for the first two kinds.
        generator: Source of every draw.
        mean_scale: Deviation of the perturbation of the means, "gaussian" only.
        loading_scale: Deviation of the loadings, in units of the spread.
        free_scale: Deviation of the augmentation.

    Returns:
        (C, S).

    Raises:
        ValueError: If ``kind`` is unknown or C is out of range.
    """
    if kind not in INITIALIZATIONS:
        raise ValueError(
            f"cpmm.initialization.kind is {kind!r}: choose one of {', '.join(INITIALIZATIONS)}"
        )
    require_clusters(n_clusters, len(x))
    shape = (n_clusters, layout.n_features)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    if kind == "gaussian":
        mean, spread = mean_scale * normal(*shape), torch.ones(shape)
    elif kind == "random":
        mean = x.mean(0) + x.std(0) * normal(*shape)
        spread = x.std(0).expand(shape)
    else:
        groups = [x[group == c] for c in range(n_clusters)]
        mean = torch.stack([rows.mean(0) for rows in groups])
        spread = torch.stack([rows.std(0, correction=0) for rows in groups]).clamp(min=1e-6)
    loading = loading_scale * spread.unsqueeze(-1) * normal(*shape, layout.n_factors)
    floor = layout.log_diagonal_floor + 0.1
    log_diagonal = (2 * spread.log()).clamp(min=floor)
    if layout.diagonal == "constant":
        log_diagonal = spread.square().mean(1, keepdim=True).log().clamp(min=floor).expand(shape)
    free = free_scale * normal(n_clusters, layout.n_maps - layout.n_factors - 2, layout.n_features)
    return layout.write(mean.float(), loading.float(), log_diagonal.float(), free)


def require_clusters(n_clusters: int, n: int) -> None:
    """Check the number of clusters.

    Raises:
        ValueError: If it is not between 1 and the number of points.
    """
    if not 1 <= n_clusters <= n:
        raise ValueError(f"cpmm.n_clusters (C) is {n_clusters}: expected 1 <= C <= N = {n} points")


def partition(
    kind: str,
    x: Tensor,
    n_groups: int,
    layout: StateLayout,
    generator: torch.Generator,
    restarts: int = 10,
    outlier_share: float = 0.0,
) -> Tensor:
    """Group points without labels, as a start for the trajectories.

    Args:
        kind: "kmeans", the best of several starts; "analyzers", the likeliest of C local factor
            analyzers, see :func:`local_analyzer_groups`; "spectral", spectral clustering of the
            graph of nearest neighbours, which follows curved groups.
        x: Points in the input space, (N, M).
        n_groups: C.
        layout: For the number of factors and the floor of log d; "analyzers" only.
        generator: Source of every draw.
        restarts: Starts of k-means.
        outlier_share: Share of points that may stand between the groups; "linkage" only.

    Returns:
        (N,), integers in [0, C).

    Raises:
        ValueError: If ``kind`` is unknown or C is out of range.
    """
    require_clusters(n_groups, len(x))
    if kind == "kmeans":
        return kmeans(x, n_groups, generator, restarts)
    if kind == "analyzers":
        return local_analyzer_groups(x, n_groups, layout, restarts, generator)
    if kind == "linkage":
        return linkage_groups(x, n_groups, outlier_share)
    raise ValueError(f"partition {kind!r} is unknown: choose one of {', '.join(PARTITIONS)}")


def kmeans(x: Tensor, n_clusters: int, generator: torch.Generator, n_init: int = 4) -> Tensor:
    """Cluster points by k-means, the best of ``n_init`` starts; (N,), integers in [0, C).

    Raises:
        ValueError: If there are fewer distinct points than clusters.
    """
    _require_distinct(n_clusters, min(n_clusters, len(x)), len(x))
    seed = int(torch.randint(2**31, (1,), generator=generator))
    model = KMeans(n_clusters, n_init=n_init, random_state=seed)
    points = np.asarray(x, dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # says the same, and goes on
        label = torch.from_numpy(model.fit_predict(points).astype(np.int64))
    _require_distinct(n_clusters, len(label.unique()), len(x))
    return label


def _require_distinct(n_clusters: int, n_found: int, n: int) -> None:
    if n_found < n_clusters:
        raise ValueError(
            f"k-means needs {n_clusters} distinct points, found {n_found} among {n}: lower the number of "
            "clusters, cpmm.n_clusters (of a direct mixture: times mixture.n_pseudotimes)"
        )


def linkage_groups(x: Tensor, n_groups: int, outlier_share: float, n_neighbors: int = 10) -> Tensor:
    """Group points by single linkage, leaving out the sparsest until the groups stand.

    Args:
        x: Points, (N, M).
        n_groups: C.
        outlier_share: Share of the points left out, those farthest from their ``n_neighbors``-th
            neighbour; each then joins the group of its nearest point.
        n_neighbors: Neighbours that density is measured by.

    Returns:
        (N,), integers in [0, C).

    Raises:
        ValueError: If the share is not in [0, 1), or leaves too few points.
    """
    if not 0 <= outlier_share < 1:
        raise ValueError(f"outlier_share is {outlier_share}: expected 0 <= outlier_share < 1")
    points = x.double().numpy()
    n_neighbors = min(n_neighbors, len(points))
    distance = NearestNeighbors(n_neighbors=n_neighbors).fit(points).kneighbors(points)[0][:, -1]
    dense = distance <= np.quantile(distance, 1 - outlier_share)
    if dense.sum() < max(2, n_groups):
        raise ValueError(
            f"linkage needs {max(2, n_groups)} points that are no outliers, outlier_share {outlier_share} "
            f"leaves {dense.sum()} of {len(x)}: lower cpmm.initialization.outlier_share"
        )
    label = AgglomerativeClustering(n_groups, linkage="single").fit_predict(points[dense])
    with warnings.catch_warnings():  # many groups may be a regression, thinks scikit-learn
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        nearest = KNeighborsClassifier(1).fit(points[dense], label)
        return torch.from_numpy(nearest.predict(points).astype(np.int64))


def local_analyzer_groups(
    x: Tensor, n_groups: int, layout: StateLayout, restarts: int, generator: torch.Generator
) -> Tensor:
    """Group points by the likeliest of C local factor analyzers, from several starts of k-means.

    Each start alternates between local factor analysis and assignment until nothing changes; the
    start whose mixture has the highest likelihood wins.

    Args:
        x: Points, (N, M).
        n_groups: C.
        layout: For the number of factors and the floor of log d.
        restarts: Number of starts.
        generator: Source of every draw.

    Returns:
        (N,), integers in [0, C).
    """
    best, best_value = None, -torch.inf
    for _ in range(restarts):
        label = kmeans(x, n_groups, generator, n_init=1)
        for _ in range(50):
            fa = local_factor_analyzers(
                x, label, n_groups, layout.n_factors, layout.log_diagonal_floor
            )
            joint = component_log_prob(x, fa) + fa.log_weight
            proposal = joint.argmax(1)
            if len(proposal.unique()) < n_groups or bool((proposal == label).all()):
                break
            label = proposal
        value = float(joint.logsumexp(1).mean())
        if value > best_value:
            best, best_value = label, value
    return best


def local_factor_analyzers(
    x: Tensor,
    label: Tensor,
    n_components: int,
    n_factors: int,
    log_diagonal_floor: float,
    shrinkage: float = 20.0,
) -> FactorAnalyzers:
    """Fit a factor analyzer to each group of points (Richardson & Weiss, 2018).

    Principal components of the group scaled as in probabilistic PCA, and what they leave over on
    the diagonal. Groups too small to have a covariance are shrunk towards the pooled variances.

    Args:
        x: Points, (N, M).
        label: Group of each point, (N,), every group non-empty.
        n_components: K.
        n_factors: R.
        log_diagonal_floor: Lower bound of log d.
        shrinkage: Weight of the pooled variances in each group's, in points.

    Returns:
        K factor analyzers, weighted by the size of their groups.

    Raises:
        ValueError: If a group is empty.
    """
    n, m = x.shape
    counts = torch.bincount(label, minlength=n_components)
    if not bool(counts.all()):
        raise ValueError(f"group {int(counts.argmin())} of {n_components} is empty: drop it")
    pooled = torch.stack([x[label == k].var(0, correction=0) for k in range(n_components)])
    pooled = (pooled * counts[:, None]).sum(0) / n  # within-group variances, (M,)
    means, loadings, diagonals = [], [], []
    for k in range(n_components):
        group = x[label == k]
        centred = group - group.mean(0)
        rank = min(n_factors, max(0, len(group) - 1), m)
        loading = x.new_zeros(m, n_factors)
        if rank:
            _, singular, axes = torch.linalg.svd(centred, full_matrices=False)
            variance = singular[:rank].square() / (len(group) + shrinkage)
            loading[:, :rank] = axes[:rank].T * variance.sqrt()
        rest = centred.square().sum(0) / (len(group) + shrinkage) - loading.square().sum(1)
        rest = rest.clamp(min=0) + pooled * shrinkage / (len(group) + shrinkage)
        means.append(group.mean(0))
        loadings.append(loading)
        diagonals.append(rest.log().clamp(min=log_diagonal_floor + 0.1))
    return FactorAnalyzers(
        log_weight=(counts / n).to(x).log(),
        mean=torch.stack(means),
        loading=torch.stack(loadings),
        log_diagonal=torch.stack(diagonals),
    )
