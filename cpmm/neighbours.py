"""Groups of images without labels: the graph of nearest neighbours under views, cut spectrally."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import SpectralClustering
from sklearn.decomposition import PCA
from torch import Tensor

from cpmm.views import AffineViews

PART = 2000  # rows of distances at a time, which bounds the memory


def neighbour_groups(
    raw: Tensor,
    views: AffineViews,
    n_groups: int,
    generator: torch.Generator,
    n_points: int = 10_000,
    n_views: int = 20,
    n_neighbours: int = 10,
    n_axes: int = 50,
) -> Tensor:
    r"""Group images by spectral clustering of a graph that knows which changes do not matter.

    The distance from one image to another is the smallest to any of the other's views, in principal
    components of the grey levels. A random part of the images makes the graph, in which each is
    tied to its nearest neighbours and normalized cuts find the groups (Shi & Malik, 2000); every
    other image joins the group that most of its nearest neighbours in the graph have.

    Args:
        raw: Whole grey levels, (N, M).
        views: Changes under which an image should keep its group.
        n_groups: C.
        generator: Source of every draw.
        n_points: Images of the graph; all if there are fewer.
        n_views: Views of each of them, beside itself.
        n_neighbours: Edges of each of them.
        n_axes: Principal components.

    Returns:
        (N,), integers in [0, C).

    Raises:
        ValueError: If there are too few images for so many groups or neighbours.
    """
    n_points = require_graph(len(raw), n_groups, n_points, n_neighbours)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    chosen = torch.randperm(len(raw), generator=generator)[:n_points]
    graph = raw[chosen]
    n_axes = min(n_axes, *graph.shape)
    pca = PCA(n_axes, random_state=seed, svd_solver="randomized").fit(graph.float().numpy())

    def project(images: Tensor) -> Tensor:
        parts = [pca.transform(part.float().numpy()) for part in images.split(PART)]
        return torch.from_numpy(np.concatenate(parts)).float()

    own = project(graph)
    seen = [own, *(project(views(graph, generator)) for _ in range(n_views))]
    # The nearest of all is the image itself.
    nearest = _nearest(own, seen, n_neighbours + 1)[:, 1:]
    rows = np.repeat(np.arange(n_points), n_neighbours)
    places = rows, nearest.numpy().ravel()
    edges = csr_matrix((np.ones(len(rows)), places), shape=(n_points, n_points))
    edges = edges + edges.T
    # Islands of a few images would each get a group of their own: they join one afterwards.
    _, island = connected_components(edges, directed=False)
    kept = np.bincount(island)[island] * 10 * n_groups >= n_points
    with warnings.catch_warnings():  # islands of many images are groups
        warnings.filterwarnings("ignore", "Graph is not fully connected", UserWarning)
        label = SpectralClustering(
            n_groups, affinity="precomputed", assign_labels="cluster_qr", random_state=seed
        ).fit_predict(edges[kept][:, kept] / 2)
    seen, chosen = [view[torch.from_numpy(kept)] for view in seen], chosen[torch.from_numpy(kept)]
    votes = torch.nn.functional.one_hot(torch.from_numpy(label).long(), n_groups)
    nearest = (_nearest(project(part), seen, n_neighbours) for part in raw.split(PART))
    group = torch.cat([votes[part].sum(1).argmax(1) for part in nearest])
    group[chosen] = votes.argmax(1)
    return group


def require_graph(n: int, n_groups: int, n_points: int, n_neighbours: int) -> int:
    """Number of the N images that make the graph; arguments as for :func:`neighbour_groups`.

    Raises:
        ValueError: If it is too small for so many groups or neighbours.
    """
    n_points = min(n_points, n)
    if n_points <= max(n_neighbours, n_groups):
        raise ValueError(
            f"a graph of {n_points} images is too small for {n_groups} groups and {n_neighbours} "
            "neighbours: raise cpmm.initialization.n_points (there are "
            f"{n}), or lower cpmm.initialization.n_neighbours and cpmm.n_clusters below it"
        )
    return n_points


def _nearest(points: Tensor, seen: list[Tensor], n: int) -> Tensor:
    """Indices of the ``n`` images nearest to each point by their nearest view, (N, n)."""
    parts = []
    for part in points.split(PART):
        distances = (torch.addmm(v.square().sum(1), part, v.T, alpha=-2) for v in seen)
        least = next(distances)
        for distance in distances:
            torch.minimum(least, distance, out=least)
        parts.append(least.topk(n, largest=False).indices)
    return torch.cat(parts)
