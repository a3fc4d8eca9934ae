"""Initial states of trajectories, and k-means with local factor analysis for direct mixtures."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, eigsh
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import Tensor, nn

from cpmm.conditioning import impute
from cpmm.expectation_maximization import fit_by_em
from cpmm.factor_analyzers import FactorAnalyzers, component_log_prob
from cpmm.trajectory import StateLayout

PARTITIONS = ("kmeans", "analyzers", "linkage")
GROUPINGS = (*PARTITIONS, "neighbours")  # the last is of images, see cpmm/neighbours.py
INITIALIZATIONS = ("gaussian", "random", *GROUPINGS)


class TooFewPointsError(ValueError):
    """There are fewer distinct points than groups asked for; ``n_found`` says how many."""

    def __init__(self, message: str, n_found: int) -> None:
        super().__init__(message)
        self.n_found = n_found


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
        known = ", ".join(INITIALIZATIONS)
        raise ValueError(f"cpmm.initialization.kind is {kind!r}: choose one of {known}")
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
        TooFewPointsError: If it is not between 1 and the number of points.
    """
    if not 1 <= n_clusters <= n:
        raise TooFewPointsError(
            f"cpmm.n_clusters (C) is {n_clusters}: expected 1 <= C <= N = {n} points; set it to "
            f"{n} or less",
            n,
        )


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
            analyzers, see :func:`local_analyzer_groups`; "linkage", single linkage, which follows
            curved groups, see :func:`linkage_groups`.
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


def fill_gaps(
    x: Tensor, n_factors: int, log_diagonal_floor: float, n_iterations: int = 50
) -> Tensor:
    """Fill what is NaN in points, (N, M), to find groups and starts in them, and for nothing else.

    By its mean given the rest, under one factor analyzer fitted to all points by EM: distances then
    know what the features say of each other, which means of columns would blur. Nothing is drawn,
    and points without gaps stay as they are.

    Args:
        x: Points.
        n_factors: R of that factor analyzer.
        log_diagonal_floor: Lower bound of its log d.
        n_iterations: Steps of EM at most.

    Raises:
        ValueError: If a feature is missing in every point, or a value is infinite.
    """
    if not bool(x.isnan().any()):
        return x
    wide = x.double()
    rough = torch.where(wide.isnan(), wide.nanmean(0), wide).nan_to_num(nan=0.0)
    label = torch.zeros(len(x), dtype=torch.long)
    start = local_factor_analyzers(rough, label, 1, n_factors, log_diagonal_floor)
    run = fit_by_em(start, wide, wide, log_diagonal_floor, n_iterations, 3, batch_size=2048)
    return impute(wide, run.best).to(x)


def kmeans(
    x: Tensor,
    n_clusters: int,
    generator: torch.Generator,
    n_init: int = 4,
    n_points: int | None = None,
) -> Tensor:
    """Cluster points by k-means.

    Args:
        x: Points, (N, M).
        n_clusters: C.
        generator: Source of every draw.
        n_init: Starts, of which the best is taken.
        n_points: Points that the centres are looked for in, drawn at random, in the type of ``x``;
            each other point then joins its nearest centre. None looks in all, in float64.

    Returns:
        (N,), integers in [0, C).

    Raises:
        TooFewPointsError: If there are fewer distinct points than clusters.
    """
    seed = int(torch.randint(2**31, (1,), generator=generator))
    points = np.asarray(x)
    if n_points is None or n_points >= len(x):
        fitted = points = points.astype(np.float64)
    else:
        fitted = points[torch.randperm(len(x), generator=generator)[:n_points].numpy()]
    _require_distinct(n_clusters, min(n_clusters, len(fitted)), len(fitted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # says the same, and goes on
        model = KMeans(n_clusters, n_init=n_init, random_state=seed).fit(fitted)
    label = model.labels_ if fitted is points else model.predict(points)
    label = torch.from_numpy(label.astype(np.int64))
    _require_distinct(n_clusters, len(label.unique()), len(fitted))
    return label


def _require_distinct(n_clusters: int, n_found: int, n: int) -> None:
    if n_found < n_clusters:
        raise TooFewPointsError(
            f"k-means needs {n_clusters} distinct points, found {n_found} among {n}: lower the "
            "number of clusters, cpmm.n_clusters (of free components: times mixture.n_pseudotimes)",
            n_found,
        )


def count_distinct(x: Tensor, most: int) -> int:
    """Count distinct points, (N, M), no further than to ``most``."""
    seen: set[bytes] = set()
    for part in x.split(4096):
        seen.update(row.tobytes() for row in (part + 0.0).numpy())  # -0.0 is 0.0
        if len(seen) >= most:
            return most
    return len(seen)


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
    dense = dense_points(points, n_groups, outlier_share, n_neighbors)
    label = AgglomerativeClustering(n_groups, linkage="single").fit_predict(points[dense])
    with warnings.catch_warnings():  # many groups may be a regression, thinks scikit-learn
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        nearest = KNeighborsClassifier(1).fit(points[dense], label)
        return torch.from_numpy(nearest.predict(points).astype(np.int64))


def dense_points(
    points: np.ndarray, n_groups: int, outlier_share: float, n_neighbors: int = 10
) -> np.ndarray:
    """Which points are no outliers, (N,); arguments as for :func:`linkage_groups`.

    Raises:
        ValueError: If they are too few.
    """
    n_neighbors = min(n_neighbors, len(points))
    distance = NearestNeighbors(n_neighbors=n_neighbors).fit(points).kneighbors(points)[0][:, -1]
    dense = distance <= np.quantile(distance, 1 - outlier_share)
    if dense.sum() < max(2, n_groups):
        raise ValueError(
            f"linkage needs {max(2, n_groups)} points that are no outliers, outlier_share "
            f"{outlier_share} leaves {dense.sum()} of {len(points)}: lower "
            "cpmm.initialization.outlier_share"
        )
    return dense


def local_analyzer_groups(
    x: Tensor, n_groups: int, layout: StateLayout, restarts: int, generator: torch.Generator
) -> Tensor:
    """Group points by the likeliest of C local factor analyzers, from several starts of k-means.

    Each start alternates between local factor analysis and assignment until nothing changes; the
    start whose mixture has the highest likelihood wins. Arguments as for :func:`partition`.
    """

    def start() -> tuple[float, Tensor]:
        label = kmeans(x, n_groups, generator, n_init=1)
        for _ in range(50):
            sizes = n_groups, layout.n_factors, layout.log_diagonal_floor
            fa = local_factor_analyzers(x, label, *sizes)
            joint = component_log_prob(x, fa) + fa.log_weight
            proposal = joint.argmax(1)
            if len(proposal.unique()) < n_groups or bool((proposal == label).all()):
                break
            label = proposal
        return float(joint.logsumexp(1).mean()), label

    _, best = max((start() for _ in range(restarts)), key=itemgetter(0))
    return best


@dataclass(frozen=True)
class GroupAxes:
    """What a factor analyzer is fitted to, for each of K groups of points.

    Attributes:
        count: Number of points, (K,).
        mean: (K, M).
        square: Sum of squared deviations from the mean, (K, M).
        axes: Principal axes, each as long as its singular value, (K, M, R); zero beyond the rank.
    """

    count: Tensor
    mean: Tensor
    square: Tensor
    axes: Tensor


def group_axes(x: Tensor, label: Tensor, n_groups: int, n_factors: int) -> GroupAxes:
    """Find the principal axes of each group of points.

    By the largest eigenvectors of the smaller of the two matrices of products, M x M or as wide as
    the group, in float64: all the singular vectors take many times as long.

    Args:
        x: Points, (N, M).
        label: Group of each point, (N,), every group non-empty.
        n_groups: K.
        n_factors: R.

    Raises:
        ValueError: If a group is empty.
    """
    m = x.shape[1]
    count = torch.bincount(label, minlength=n_groups)
    if not bool(count.all()):
        raise ValueError(f"group {int(count.argmin())} of {n_groups} is empty: drop it")
    means, squares, axes = [], [], []
    for k in range(n_groups):
        group = x[label == k]
        means.append(group.mean(0))
        centred = group - means[-1]
        squares.append(centred.square().sum(0))
        rank = min(n_factors, len(group) - 1, m)
        wide = centred.double()
        if len(group) <= m:
            longest = wide.T @ _largest_eigenpairs(wide @ wide.T, rank)[1]
        else:
            values, vectors = _largest_eigenpairs(wide.T @ wide, rank)
            longest = vectors * values.clamp(min=0).sqrt()
        axes.append(nn.functional.pad(longest.flip(1), (0, n_factors - rank)).to(x))
    return GroupAxes(count, torch.stack(means), torch.stack(squares), torch.stack(axes))


def _largest_eigenpairs(matrix: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues of a symmetric matrix, ascending, (n,), and their vectors, (size, n)."""
    if len(matrix) > max(400, 4 * n) and n:
        start = np.random.default_rng(0).standard_normal(len(matrix))  # not at random: same bytes
        with suppress(ArpackError):  # of a matrix of zeros, for one
            values, vectors = eigsh(matrix.cpu().numpy(), n, which="LA", v0=start)
            return torch.from_numpy(values).to(matrix), torch.from_numpy(vectors).to(matrix)
    values, vectors = torch.linalg.eigh(matrix)
    return values[len(matrix) - n :], vectors[:, len(matrix) - n :]


def local_factor_analyzers(
    x: Tensor,
    label: Tensor,
    n_components: int,
    n_factors: int,
    log_diagonal_floor: float,
    shrinkage: float = 20.0,
) -> FactorAnalyzers:
    """Fit a factor analyzer to each group of points (Richardson & Weiss, 2018).

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
    groups = group_axes(x, label, n_components, n_factors)
    return shrunk_factor_analyzers(groups, log_diagonal_floor, shrinkage)


def shrunk_factor_analyzers(
    groups: GroupAxes, log_diagonal_floor: float, shrinkage: float
) -> FactorAnalyzers:
    """Fit a factor analyzer to each group; arguments as in :func:`local_factor_analyzers`.

    Principal components of the group scaled as in probabilistic PCA, and what they leave over on
    the diagonal. Groups too small to have a covariance are shrunk towards the pooled variances.
    """
    n = groups.count.sum()
    pooled = groups.square.sum(0) / n  # within-group variances, (M,)
    weight = (groups.count + shrinkage)[:, None].to(pooled)  # (K, 1)
    loading = groups.axes / weight.sqrt().unsqueeze(-1)
    rest = groups.square / weight - loading.square().sum(-1)
    rest = rest.clamp(min=0) + pooled * shrinkage / weight
    return FactorAnalyzers(
        log_weight=(groups.count / n).to(pooled).log(),
        mean=groups.mean,
        loading=loading,
        log_diagonal=rest.log().clamp(min=log_diagonal_floor + 0.1),
    )
