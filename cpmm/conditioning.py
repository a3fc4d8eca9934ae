r"""Points with gaps: the density of what is observed, and what follows from it for the rest.

NaN in a point stands for what was not observed. Given the entries o that were, the factors of a
component are Gaussian, with the capacitance matrix of these entries alone:

.. math::
    z | x_o \sim N(C^{-1} b, C^{-1}), \quad C = L L^\top = I + A_o^\top D_o^{-1} A_o, \quad
    b = A_o^\top D_o^{-1} (x_o - \mu_o)

and the others are :math:`x_u = \mu_u + A_u z + \sqrt{d_u} e`: a factor analyzer again, with the
loading :math:`A_u L^{-\top}`. Everything here follows from that; no M x M matrix is formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cpmm.factor_analyzers import (
    FactorAnalyzers,
    PreparedDensity,
    prepare_density,
    require_points,
    require_positive_definite,
    without_subnormal,
)

ConditionValues = float | Sequence[float] | Tensor  # one for all conditions, or one for each
Found = TypeVar("Found")
MOST_NUMBERS = 2**20  # in a tensor of a batch: 8 MiB in float64


@dataclass(frozen=True)
class ObservedDensity:
    """A density as :class:`PreparedDensity`, of what is observed of each point.

    Attributes:
        components: K factor analyzers.
        complete: The density of points without gaps, which go the usual way.
    """

    components: FactorAnalyzers
    complete: PreparedDensity

    def component_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of the entries of points, (N, M), that are not NaN, nats, (N, K).

        It is that of the marginal, and 0 where nothing is observed. Costs O(N K M R) and O(K M R^2)
        for each pattern of gaps.

        Raises:
            ValueError: If ``x`` is not (N, M).
            FloatingPointError: If a covariance is not finite and positive definite.
        """
        require_points(x, self.components.n_features)
        gaps = x.isnan().any(1)
        if not bool(gaps.any()):
            return self.complete.component_log_prob(x)
        whole, broken = (~gaps).nonzero().squeeze(1), gaps.nonzero().squeeze(1)
        broken = broken[order_by_pattern(x[broken])]
        batches = x[broken].split(points_at_a_time(self.components))
        parts = [factor_posterior(part, self.components).log_prob for part in batches]
        log_prob = torch.cat([self.complete.component_log_prob(x[whole]), *parts])
        return log_prob[torch.cat([whole, broken]).argsort()]


def prepare_observed_density(fa: FactorAnalyzers) -> ObservedDensity:
    """Do once what the log-density of any number of points with gaps has in common.

    Raises:
        FloatingPointError: If a covariance is not finite and positive definite.
    """
    return ObservedDensity(fa, prepare_density(fa))


@dataclass(frozen=True)
class FactorPosterior:
    """The factors of each component given what is observed of each of N points.

    The factors come first and the components last: sums over the few factors run along memory.

    Attributes:
        log_prob: Log-density of what is observed, nats, (N, K), without the weights.
        pattern: Which of the P patterns of gaps a point has, (N,).
        seen: What is observed in each pattern, (P, M), of the type of the points: 1 or 0.
        root: L^-1 of each pattern, (R, R, P, K): the covariance is L^-T L^-1.
        whitened: L^-1 b of each point, (R, N, K): the mean is L^-T times it.
    """

    log_prob: Tensor
    pattern: Tensor
    seen: Tensor
    root: Tensor
    whitened: Tensor

    @property
    def mean(self) -> Tensor:
        """E[z | x_o], (R, N, K)."""
        return (self.root.index_select(2, self.pattern) * self.whitened.unsqueeze(1)).sum(0)


def order_by_pattern(x: Tensor) -> Tensor:
    """Order of points, (N, M), in which those with the same gaps follow each other, (N,)."""
    return _patterns(~x.isnan())[1].argsort()


def _patterns(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of (N, M) booleans, (P, M), and which of them each row is, (N,)."""
    found = pattern = torch.zeros(len(seen), dtype=torch.long, device=seen.device)
    for part in seen.split(31, 1):  # as bits of an integer: sorting rows takes ten times as long
        for column in part.unbind(1):
            pattern = 2 * pattern + column
        found, pattern = pattern.unique(return_inverse=True)
    example = torch.zeros_like(pattern).scatter_(
        0, pattern, torch.arange(len(seen), device=seen.device)
    )
    return seen[example[: len(found)]], pattern


def points_at_a_time(fa: FactorAnalyzers) -> int:
    """Points of a batch of which no tensor takes more than 8 MiB in float64."""
    of_each = fa.n_components * max(1, fa.n_factors) ** 2
    return max(1, MOST_NUMBERS // max(of_each, fa.n_features))


def factor_posterior(x: Tensor, fa: FactorAnalyzers) -> FactorPosterior:
    """Observe points, (N, M), whose NaN are gaps; differentiable, and takes N K R^2 numbers.

    As in :func:`cpmm.factor_analyzers.prepare_density` the squares are expanded, about the mean of
    the component means; here each pattern of gaps has a capacitance matrix of its own.

    Raises:
        FloatingPointError: If a covariance is not finite and positive definite.
    """
    with torch.autocast(x.device.type, enabled=False):  # no half precision for an expanded square
        seen = ~x.isnan()
        patterns, pattern = _patterns(seen)  # (P, M), (N,)
        centre = fa.mean.detach().mean(0)
        mean, precision = fa.mean - centre, torch.exp(-fa.log_diagonal)
        deviation = torch.where(seen, x - centre, 0)
        seen, patterns = seen.to(deviation), patterns.to(deviation)
        root = _capacitance_root(patterns, fa)  # (R, R, P, K)
        scaled = fa.loading.movedim(2, 0) * precision  # (R, K, M)
        b = deviation @ scaled.mT - seen @ (scaled * mean).mT  # (R, N, K)
        whitened = (root.index_select(2, pattern) * b).sum(1)  # (R, N, K)
        weighted_mean = mean * precision
        log_det = patterns @ (fa.log_diagonal + math.log(2 * math.pi)).T  # (P, K)
        log_det = log_det - 2 * root.diagonal().log().sum(-1)
        distance = (
            deviation.square() @ precision.T
            - 2 * deviation @ weighted_mean.T
            + seen @ (mean * weighted_mean).T
            - whitened.square().sum(0)
        )
        log_prob = -0.5 * (distance + log_det[pattern])
    if log_prob.requires_grad:
        log_prob.register_hook(without_subnormal)
    return FactorPosterior(log_prob, pattern, patterns, root, whitened)


def triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of the T entries of a symmetric matrix that are enough, and where each is.

    Returns:
        Two of (T,), and positions among the T, (size, size).
    """
    i, j = torch.tril_indices(size, size, device=device)
    place = torch.zeros(size, size, dtype=torch.long, device=device)
    place[i, j] = place[j, i] = torch.arange(len(i), device=device)
    return i, j, place


def _capacitance_root(patterns: Tensor, fa: FactorAnalyzers) -> Tensor:
    """Inverse Cholesky factors of I + A_o^T D_o^-1 A_o, (R, R, P, K), for P sets o, 0 or 1, (P, M).

    Its entries are sums over the observed features, and so products of matrices.
    """
    scaled = (fa.loading * torch.exp(-0.5 * fa.log_diagonal).unsqueeze(-1)).movedim(2, 0)
    i, j, place = triangle(fa.n_factors, scaled.device)
    n_at_a_time = max(1, MOST_NUMBERS // max(1, fa.n_features * len(i)))
    parts = [patterns @ (part[i] * part[j]).mT for part in scaled.split(n_at_a_time, 1)]
    low_rank = torch.cat(parts, 2)[place].permute(2, 3, 0, 1)  # (T, P, K) to (P, K, R, R)
    identity = torch.eye(fa.n_factors, dtype=scaled.dtype, device=scaled.device)
    cholesky, info = torch.linalg.cholesky_ex(low_rank + identity)
    require_positive_definite(cholesky, info, fa)
    root = torch.linalg.solve_triangular(cholesky, identity.expand_as(cholesky), upper=False)
    return root.permute(2, 3, 0, 1).contiguous()


def impute(x: Tensor, fa: FactorAnalyzers) -> Tensor:
    """Fill the gaps of points, (N, M), with E[x | x_o] under the mixture, (N, M)."""

    def mean(part: Tensor, posterior: FactorPosterior, share: Tensor) -> Tensor:
        return share @ fa.mean + ((share * posterior.mean) @ fa.loading.movedim(2, 0)).sum(0)

    return _fill(x, fa, mean)


def impute_image(
    x: Tensor, fa: FactorAnalyzers, image: Callable[[Tensor], Tensor], n_nodes: int = 32
) -> Tensor:
    r"""Map points, (N, M), by a function of each feature, and fill the gaps with the image's mean.

    .. math:: E[g(x_u) | x_o] = \sum_k p(k | x_o) \int g \, dN(m_{ku}, v_{ku})

    by Gauss-Hermite quadrature over the components that have a share above 1e-9. It is not the
    image of the mean, unless g is linear.

    Args:
        x: Points; NaN are the gaps.
        fa: K factor analyzers.
        image: g, from (n, M) to (n, M), each feature by itself.
        n_nodes: Of the quadrature, which is exact for polynomials of twice the degree.
    """
    at, weight = (torch.from_numpy(a).to(x) for a in np.polynomial.hermite_e.hermegauss(n_nodes))
    weight = weight / weight.sum()

    def mean(part: Tensor, posterior: FactorPosterior, share: Tensor) -> Tensor:
        total = torch.zeros_like(part)
        pairs = (share > 1e-9).nonzero()
        for n, k in (pair.T for pair in pairs.split(max(1, MOST_NUMBERS // fa.loading[0].numel()))):
            root = posterior.root[:, :, posterior.pattern[n], k].movedim(2, 0)  # (n, R, R)
            loading = fa.loading[k] @ root.mT  # (n, M, R)
            centre = fa.mean[k] + (loading @ posterior.whitened[:, n, k].T.unsqueeze(-1)).squeeze(
                -1
            )
            spread = (fa.log_diagonal[k].exp() + loading.square().sum(2)).sqrt()
            found = sum(w * image(centre + z * spread) for z, w in zip(at, weight, strict=True))
            total.index_add_(0, n, share[n, k].unsqueeze(1) * found)
        return total

    return torch.where(x.isnan(), _fill(x, fa, mean), image(x.nan_to_num(nan=0.0)))


def sample_missing(x: Tensor, fa: FactorAnalyzers, generator: torch.Generator) -> Tensor:
    """Fill the gaps of points, (N, M), with one draw of x | x_o under the mixture, (N, M).

    Args:
        x: Points; NaN are the gaps.
        fa: K factor analyzers.
        generator: On the device of ``fa``.
    """

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=x.dtype, device=x.device)

    def draw(part: Tensor, posterior: FactorPosterior, share: Tensor) -> Tensor:
        k = torch.multinomial(share, 1, generator=generator).squeeze(1)
        n = torch.arange(len(part), device=part.device)
        root = posterior.root[:, :, posterior.pattern, k].movedim(2, 0)  # (N, R, R)
        whitened = posterior.whitened[:, n, k].T + normal(len(part), fa.n_factors)
        factors = root.mT @ whitened.unsqueeze(-1)
        noise = torch.exp(0.5 * fa.log_diagonal[k]) * normal(*part.shape)
        return fa.mean[k] + (fa.loading[k] @ factors).squeeze(-1) + noise

    return _fill(x, fa, draw)


def _fill(
    x: Tensor, fa: FactorAnalyzers, rest: Callable[[Tensor, FactorPosterior, Tensor], Tensor]
) -> Tensor:
    """Replace the gaps by what ``rest`` makes of points with gaps, in batches.

    Args:
        x: Points, (N, M).
        fa: K factor analyzers.
        rest: From points, the posterior of their factors and responsibilities to all M features.

    Raises:
        ValueError: If a point has no density in floating-point numbers.
    """
    require_points(x, fa.n_features)
    filled, rows = x.clone(), x.isnan().any(1).nonzero().squeeze(1)
    rows = rows[order_by_pattern(x[rows])]
    for some in rows.split(points_at_a_time(fa)):
        part = x[some]
        posterior = factor_posterior(part, fa)
        share = (posterior.log_prob + fa.log_weight).softmax(1)
        lost = share.isnan().any(1)
        if bool(lost.any()):
            raise ValueError(
                f"point {int(some[lost].min()) + 1} is too far from the mixture for its numbers: "
                "check it, or drop it"
            )
        filled[some] = torch.where(part.isnan(), rest(part, posterior, share), part)
    return filled


def marginal(fa: FactorAnalyzers, features: Sequence[int]) -> FactorAnalyzers:
    """Keep the given features, in their order; the weights stay."""
    index = list(features)
    return FactorAnalyzers(
        log_weight=fa.log_weight,
        mean=fa.mean[:, index],
        loading=fa.loading[:, index],
        log_diagonal=fa.log_diagonal[:, index],
    )


def stack_conditions(observed: Mapping[Any, ConditionValues]) -> Tensor:
    """Values of B conditions on some features, (B, number of features), float64.

    Args:
        observed: For each feature its B values, or one number for all.

    Raises:
        ValueError: If a value is not a finite number, or the numbers of values differ.
    """
    columns = []
    for name, values in observed.items():
        try:
            column = torch.as_tensor(values, dtype=torch.float64).cpu()
        except (TypeError, ValueError, RuntimeError):
            column = torch.tensor(torch.nan)
        if column.ndim > 1 or not column.numel() or not bool(torch.isfinite(column).all()):
            raise ValueError(f"the condition on {name!r} is {values!r}: expected finite numbers")
        columns.append(column)
    sizes = {name: len(c) for name, c in zip(observed, columns, strict=True) if c.ndim}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"conditions go together, but their numbers differ: {sizes}")
    return torch.stack(torch.broadcast_tensors(*map(torch.atleast_1d, columns)), 1)


def single(found: list[Found], plural: str) -> Found:
    """Return the only one of what was found for each condition.

    Raises:
        ValueError: If there are more; ``plural`` is the method that takes them.
    """
    if len(found) > 1:
        raise ValueError(f"{len(found)} values for a feature, expected one: {plural} takes more")
    return found[0]


def condition(
    fa: FactorAnalyzers, observed: Sequence[int], values: Tensor
) -> list[FactorAnalyzers]:
    """Factor analyzers of the other features given values of some, for each of B conditions.

    Args:
        fa: K factor analyzers.
        observed: The features that are given.
        values: Their values, (B, number of them), no NaN.

    Returns:
        B mixtures, of the other features in their order; loadings and diagonals are shared.

    Raises:
        ValueError: If a condition is so far from the mixture that it has no density.
    """
    given = set(observed)
    rest = marginal(fa, [feature for feature in range(fa.n_features) if feature not in given])
    posterior = factor_posterior(values, marginal(fa, observed))
    joint = fa.log_weight + posterior.log_prob
    lost = ~torch.isfinite(joint.logsumexp(1))
    if bool(lost.any()):
        raise ValueError(
            f"condition {int(lost.nonzero()[0]) + 1} of {len(values)} is too far from the mixture "
            "for its numbers: check its values"
        )
    mean = rest.mean + torch.einsum("kmr,rbk->bkm", rest.loading, posterior.mean)
    loading = torch.einsum("kmr,srk->kms", rest.loading, posterior.root[:, :, 0])
    return [
        FactorAnalyzers(log_weight, own, loading, rest.log_diagonal)
        for log_weight, own in zip(joint.log_softmax(1), mean, strict=True)
    ]
