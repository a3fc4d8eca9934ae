r"""Merge the components of a mixture into clusters: "GMM w/ S.Clust." of Table 1 (section 5.2).

Spectral clustering takes the components as its nodes. What ties two of them is either how near
their Gaussians are, by the Fréchet distance of Dowson & Landau (1982) as in the paper, or how often
they answer for the same points. The paper does not say how it turns distances into affinities; both
usual ways are here, see :func:`gaussian_affinity`. No label is used.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import torch
from scipy.sparse.csgraph import connected_components
from scipy.special import ellipk, ellipkm1
from sklearn.cluster import SpectralClustering
from torch import Tensor

from cpmm.factor_analyzers import FactorAnalyzers, prepare_density
from cpmm.mixture import Mixture

BLOCK = 1 << 22  # numbers held at a time for the distances
STARTS = 100  # of k-means on the few rows of the eigenvectors
RESOLVED = 1e-12  # affinities below this share of the largest are no tie: eigenvalues cannot tell


def merge_components(
    mixture: Mixture, affinity: Tensor, n_clusters: int, generator: torch.Generator
) -> Mixture:
    """Merge components into C clusters by normalized cuts of their affinities (Shi & Malik, 2000).

    The paper attributes a point to its likeliest component and this to its cluster; the mixture's
    own ``predict`` adds up the components of a cluster first (Eq. 7).

    Args:
        mixture: K components; the clusters that they are in do not matter.
        affinity: Symmetric, 0 or more, (K, K).
        n_clusters: C.
        generator: Source of every draw.

    Returns:
        The same density: the components in another order, cluster by cluster.

    Raises:
        ValueError: If the affinity is not one of these components, if C is not in [1, K], or if the
            affinity falls into more than C parts that nothing ties.
    """
    fa = mixture.components
    k = fa.n_components
    if affinity.shape != (k, k):
        raise ValueError(
            f"affinity must be ({k}, {k}), the mixture has {k} components: got "
            f"{tuple(affinity.shape)}"
        )
    if not bool(torch.isfinite(affinity).all()) or float(affinity.min()) < 0:
        bad = int((~(torch.isfinite(affinity) & (affinity >= 0))).sum())
        raise ValueError(f"{bad} of {k * k} affinities are not finite or negative: expected >= 0")
    if not torch.allclose(affinity, affinity.T):
        raise ValueError("affinity must be symmetric: average it with its transpose")
    if not 1 <= n_clusters <= k:
        raise ValueError(
            f"cannot merge {k} components into {n_clusters} clusters: expected 1 <= C <= K = {k}"
        )
    group = normalized_cuts(affinity.double().cpu(), n_clusters, generator)
    order = group.argsort(stable=True).to(fa.mean.device)
    sizes = torch.bincount(group, minlength=n_clusters)
    return replace(mixture, components=fa.select(order), cluster_sizes=tuple(sizes.tolist()))


def normalized_cuts(affinity: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Group nodes, (K,), integers in [0, C)."""
    n_parts, _ = connected_components(
        (affinity > RESOLVED * affinity.max()).numpy(), directed=False
    )
    if n_parts > n_clusters:
        raise ValueError(
            f"the affinity falls into {n_parts} parts that nothing ties, more than the "
            f"{n_clusters} clusters asked for, and which to merge is left open: raise the "
            "temperature of the overlap, the bandwidth of the distances, or the number of clusters"
        )
    seed = int(torch.randint(2**31, (1,), generator=generator))
    if n_clusters in (1, len(affinity)):
        return torch.arange(len(affinity)) % n_clusters
    with warnings.catch_warnings():  # parts of their own are clusters
        warnings.filterwarnings("ignore", "Graph is not fully connected", UserWarning)
        model = SpectralClustering(
            n_clusters, affinity="precomputed", n_init=STARTS, random_state=seed
        )
        return torch.from_numpy(model.fit_predict(affinity.numpy())).long()


def overlap_affinity(mixture: Mixture, x: Tensor, temperature: float = 1.0) -> Tensor:
    r"""How often components answer for the same points: the cosine of their responsibilities.

    .. math:: \frac{\sum_n r_{nj} r_{nk}}{\sqrt{\sum_n r_{nj}^2 \sum_n r_{nk}^2}}, \quad
        r_{nk} \propto (\pi_k N(x_n; \mu_k, \Sigma_k))^{1/T}

    In hundreds of dimensions log-odds are hundreds of nats; at T = 1 each point has one component
    and hardly any two overlap. Each component's responsibilities are taken relative to its largest,
    so those of one that is nowhere the likeliest count as well.

    Args:
        mixture: K components.
        x: Points in the mixture's own space, (N, M).
        temperature: T, in nats.

    Returns:
        In [0, 1], symmetric with a diagonal of 1, (K, K), float64.

    Raises:
        ValueError: If ``temperature`` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"the temperature of the overlap is {temperature}: expected more than 0")
    with torch.no_grad():
        density = prepare_density(mixture.components)
        parts = [density.component_log_prob(part) for part in x.split(mixture.batch_size)]
        joint = torch.cat(parts) + mixture.components.log_weight
        share = (joint.double() / temperature).log_softmax(1)
        share = (share - share.max(0).values).exp_()  # (N, K)
        share /= share.square().sum(0).sqrt()
        affinity = share.T @ share
        return 0.5 * (affinity + affinity.T)


def gaussian_affinity(distance: Tensor, neighbour: int | None = None) -> Tensor:
    r"""Turn distances into affinities by a Gaussian kernel.

    .. math:: \exp(-d_{jk}^2 / (2 \sigma_j \sigma_k))

    Args:
        distance: (K, K).
        neighbour: Number n: each sigma is the distance to the n-th nearest other component, which
            follows their density (self-tuning, Zelnik-Manor & Perona, 2004, who take the 7th and
            leave out the 2). None takes one sigma for all, the median distance.

    Returns:
        In [0, 1], (K, K), float64.

    Raises:
        ValueError: If ``neighbour`` is not between 1 and K - 1.
    """
    distance, k = distance.double(), len(distance)
    if k < 2 or not 1 <= (neighbour or 1) < k:
        raise ValueError(
            f"distances of {k} components have no neighbour number {neighbour or 1}: expected from "
            f"1 to {k - 1}"
        )
    if neighbour is None:
        row, column = torch.triu_indices(k, k, 1, device=distance.device)
        scale = distance[row, column].median().expand(k)
    else:
        scale = distance.sort(1).values[:, neighbour]  # the nearest of all is the component itself
    scale = scale.clamp(min=torch.finfo(distance.dtype).tiny ** 0.5)
    return torch.exp(-0.5 * (distance / scale[:, None]) * (distance / scale))


def frechet_distances(fa: FactorAnalyzers, tolerance: float = 1e-12) -> Tensor:
    r"""Fréchet distance between each two Gaussians (Dowson & Landau, 1982), without M x M matrices.

    .. math:: d_{jk}^2 = \|\mu_j - \mu_k\|^2 + \operatorname{tr}(\Sigma_j + \Sigma_k)
        - 2 \operatorname{tr} (\Sigma_j \Sigma_k)^{1/2}

    The eigenvalues x of the product are positive, and :math:`\pi \sqrt x = \int_0^\infty \log(1 + x
    / s^2) ds`. Applied to those of :math:`\Sigma_j \Sigma_k` and of :math:`D_j D_k`, the difference
    of the log-determinants is that of a real matrix of 2R x 2R (Sylvester),

    .. math:: \pi \operatorname{tr} (\Sigma_j \Sigma_k)^{1/2}
        = \pi \operatorname{tr} (D_j D_k)^{1/2}
        + \int_0^\infty \log \det \begin{pmatrix} I + A_j^\top D_k E A_j & s A_j^\top E A_k \\
        -s A_k^\top E A_j & I + A_k^\top D_j E A_k \end{pmatrix} ds,
        \quad E = (D_j D_k + s^2 I)^{-1}

    The integral is smooth, and after the elliptic substitution of Hale, Higham & Trefethen (2008)
    the midpoint rule converges geometrically, at a rate known from bounds of the eigenvalues: the
    same nodes, 20 to 60, do for all pairs, as exact as dense roots. Costs O(K^2 M R^2) for each
    node; 100 components of 784 features and 6 factors took 4 s on one core, dense eigenvalues would
    take 400.

    Args:
        fa: K factor analyzers.
        tolerance: Relative error allowed in the trace of the root; sets the number of nodes.

    Returns:
        In the units of the features, symmetric with a diagonal of 0, (K, K), float64.

    Raises:
        ValueError: If ``tolerance`` is not in (0, 1).
        FloatingPointError: If a mean is not finite, or a covariance not finite and positive.
    """
    if not 0 < tolerance < 1:
        raise ValueError(
            f"the tolerance of the distances is {tolerance}: expected 0 < tolerance < 1"
        )
    with torch.no_grad():
        fa = fa.to(torch.float64)
        k, m, r = fa.loading.shape
        loading, diagonal = fa.loading, fa.log_diagonal.exp()
        length = loading.square().sum((1, 2))  # no less than the largest eigenvalue of A A^T
        smallest = float(diagonal.min()) ** 2
        largest = float((diagonal.max(1).values + length).max()) ** 2
        if not (0 < smallest <= largest < math.inf and bool(torch.isfinite(fa.mean).all())):
            raise FloatingPointError(
                "means or covariances are not finite and positive: smallest variance "
                f"{smallest**0.5:.3g}, largest {largest**0.5:.3g}, largest mean "
                f"{float(fa.mean.abs().max()):.3g}; the mixture has diverged: train it again"
            )
        nodes, weights = _root_quadrature(smallest, largest, tolerance)
        nodes, weights = nodes.to(diagonal), weights.to(diagonal)
        deviation = diagonal.sqrt()
        cross = deviation @ deviation.T  # tr (D_j D_k)^(1/2)
        square = (loading.unsqueeze(-1) * loading.unsqueeze(-2)).flatten(2)  # (K, M, R^2)
        step = max(1, BLOCK // (m * (len(nodes) + 3 * r * r)))
        for j in range(k - 1):
            for others in torch.arange(j + 1, k, device=cross.device).split(step):
                d = diagonal[others]  # (L, M)
                resolvent = 1 / ((diagonal[j] * d).unsqueeze(1) + nodes.square()[:, None])
                products = resolvent @ torch.cat(
                    [
                        d.unsqueeze(-1) * square[j],
                        (loading[j].unsqueeze(-1) * loading[others].unsqueeze(-2)).flatten(2),
                        diagonal[j].unsqueeze(-1) * square[others],
                    ],
                    2,
                )  # (L, n, 3 R^2)
                own, mixed, other = products.unflatten(2, (3, r, r)).unbind(2)
                mixed = mixed * nodes[:, None, None]
                rows = [own, mixed], [-mixed.mT, other]
                matrix = torch.cat([torch.cat(row, 3) for row in rows], 2)
                log_det = torch.linalg.slogdet(matrix + torch.eye(2 * r).to(matrix))[1]  # (L, n)
                cross[j, others] += log_det @ weights
        cross = cross.triu(1)
        cross = cross + cross.T
        trace = length + diagonal.sum(1)
        means = torch.cdist(fa.mean, fa.mean, compute_mode="donot_use_mm_for_euclid_dist")
        square = means.square() + (trace + trace[:, None]) - 2 * cross
        return square.fill_diagonal_(0).clamp(min=0).sqrt()


def _root_quadrature(smallest: float, largest: float, tolerance: float) -> tuple[Tensor, Tensor]:
    r"""Nodes s and weights w of a quadrature for the difference of two square roots.

    .. math:: \sqrt x - \sqrt y \approx \sum w \log((x + s^2) / (y + s^2))

    For all x and y between ``smallest`` and ``largest``, m and M. With :math:`s = \sqrt m \,
    \mathrm{sc}(v, k')` and :math:`k^2 = m / M` the integrand is analytic for :math:`|\Im v| <
    K(k)`, even and of period 2 K(k'), so N midpoints err by :math:`\exp(-2 \pi N K / K')`. The
    function is a quotient of theta series, as 1 - k^2 may round to 1; near its pole these would
    cancel, so the upper half of the nodes mirrors the lower, :math:`s \to \sqrt{m M} / s`.

    Returns:
        Each (n,), float64.
    """
    ratio = min(smallest / largest, 1 / 16)  # below it three terms of a series are exact
    quarter, other_quarter = float(ellipk(ratio)), float(ellipkm1(ratio))
    n_half = math.ceil(other_quarter * -math.log(tolerance) / (4 * math.pi * quarter))
    step = math.pi * other_quarter / (4 * quarter * n_half)  # of pi v / (2 K)
    v = step * (torch.arange(n_half, dtype=torch.float64)[:, None] + 0.5)
    n = torch.arange(3, dtype=torch.float64)
    nome, sign = math.exp(-math.pi * other_quarter / quarter), (-1) ** n
    odd, even = sign * nome ** (n * (n + 1)), 2 * sign * nome ** n.square()
    even[0] = 1
    m, k = 2 * n + 1, math.sqrt(ratio)
    top, top_slope = torch.sinh(m * v) @ odd, torch.cosh(m * v) @ (m * odd)
    bottom, bottom_slope = torch.cosh(2 * n * v) @ even, torch.sinh(2 * n * v) @ (2 * n * even)
    scale = 2 * quarter / math.pi * even.sum() / (m * odd).sum()  # a slope of 1 at v = 0
    low = scale * top / bottom
    slope = scale * (top_slope * bottom - top * bottom_slope) / bottom.square()
    nodes = torch.cat([low, 1 / (k * low)])
    weights = torch.cat([slope, slope / (k * low.square())]) * (step / math.pi)
    return nodes * math.sqrt(smallest), weights * math.sqrt(smallest)
