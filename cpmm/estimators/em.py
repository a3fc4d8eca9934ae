r"""Mixtures of factor analyzers by expectation and conditional maximization, for tables.

After Zhao & Yu, "Fast ML estimation for the mixture of factor analyzers via an ECM algorithm"
(2008). A step takes the scatter matrix of each component, M x M, then its best loadings with the
variances held, and each variance with all else held, both in closed form. On columns that nearly
follow from others it needs a tenth of the steps of EM with factors
(cpmm/baselines/expectation_maximization.py), which in turn holds no M x M matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cpmm.conditioning import factor_posterior, order_by_pattern
from cpmm.factor_analyzers import FactorAnalyzers, prepare_density

BLOCK = 1 << 22  # numbers held at a time for the scatter matrices


@dataclass(frozen=True)
class EMOptions:
    """How a mixture is fitted.

    Attributes:
        log_diagonal_floor: Hard lower bound of log d.
        shrinkage: Points that the prior counts for in each component's covariance.
        n_iterations: Steps at most.
        tolerance: Gain of a step, in nats a point, below which it stops.
    """

    log_diagonal_floor: float
    shrinkage: float
    n_iterations: int = 200
    tolerance: float = 1e-4


@dataclass(frozen=True)
class EMResult:
    """Where the steps have ended.

    Attributes:
        components: The fit.
        log_likelihood: Mean log-density of the points, nats.
        history: Of each step, before it, the mean log-density of the points.
        converged: Whether the gain fell below the tolerance.
    """

    components: FactorAnalyzers
    log_likelihood: float
    history: tuple[float, ...]
    converged: bool


@torch.no_grad()
def fit_to_scatter(
    start: FactorAnalyzers,
    x: Tensor,
    weight: Tensor,
    prior: Tensor,
    options: EMOptions,
    listener: Callable[[int, float], None] | None = None,
) -> EMResult:
    r"""Fit a mixture of factor analyzers; nothing is drawn.

    Each component's covariance has an inverse Wishart prior, as if it had ``shrinkage`` points more
    of covariance ``prior``. The log-likelihood plus the log of the prior never falls:

    .. math:: \sum_n w_n \log p(x_n)
        - \tfrac{s}{2} \sum_k \log |\Sigma_k| + \operatorname{tr} \Sigma_k^{-1} \Sigma_0

    A component that answers for less than a point keeps its mean and covariance (without a prior:
    for less than R + 1), and moves its weight only.

    Args:
        start: K components, float64.
        x: Points, (N, M), float64; NaN was not observed, and the likelihood is that of the rest.
        weight: Of each point, 0 or more, (N,).
        prior: A covariance, (M, M).
        options: How far to go.
        listener: Called after each step with its number and the log-likelihood before it.

    Raises:
        FloatingPointError: If a likelihood leaves the range of numbers.
    """
    fa, history, value, converged = start, [], -math.inf, False
    for step in range(options.n_iterations + 1):
        log_likelihood, count, mean, scatter = _expect(fa, x, weight)
        if not math.isfinite(log_likelihood):
            raise FloatingPointError(
                f"the mean log-density of the points is {log_likelihood} after {step} steps: bring "
                "the columns to unit scale, or raise log_diagonal_floor (now "
                f"{options.log_diagonal_floor:g})"
            )
        penalized = log_likelihood + _log_prior(fa, prior, options.shrinkage) / float(weight.sum())
        converged = penalized - value < options.tolerance
        history.append(log_likelihood)
        value = penalized
        if converged or step == options.n_iterations:
            break
        if listener is not None:
            listener(step, log_likelihood)
        fa = _maximize(fa, count, mean, scatter, prior, options)
    return EMResult(fa, log_likelihood, tuple(history), converged)


def _expect(fa: FactorAnalyzers, x: Tensor, weight: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
    """Mean log-density; weight (K,), mean (K, M) and covariance (K, M, M) of each one's points."""
    k, m, _ = fa.loading.shape
    centre = fa.mean.mean(0)
    total, count, first = 0.0, torch.zeros_like(fa.log_weight), torch.zeros_like(fa.mean)
    second = fa.mean.new_zeros(k, m, m)
    for log_prob, w, *parts in _sums(fa, x, weight, centre):
        total += float(log_prob @ w)
        count, first, second = count + parts[0], first + parts[1], second + parts[2]
    n = count.clamp(min=torch.finfo(count.dtype).tiny)
    mean = first / n.unsqueeze(1)
    scatter = second / n[:, None, None] - mean.unsqueeze(2) * mean.unsqueeze(1)
    return total / float(weight.sum()), count, mean + centre, scatter


def _sums(
    fa: FactorAnalyzers, x: Tensor, weight: Tensor, centre: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Log-densities and weights, and the sums over points of each component, batch by batch."""
    k, m, _ = fa.loading.shape
    gaps = x.isnan().any(1)
    whole, broken = (~gaps).nonzero().squeeze(1), gaps.nonzero().squeeze(1)
    density = prepare_density(fa)
    for index in whole.split(max(64, BLOCK // (k * m))):  # of one part at least, empty or not
        joint = density.component_log_prob(x[index]) + fa.log_weight
        log_prob, w = joint.logsumexp(1), weight[index]
        share = ((joint - log_prob.unsqueeze(1)).exp() * w.unsqueeze(1)).T  # (K, N)
        deviation = x[index] - centre
        second = (share.unsqueeze(1) * deviation.T).flatten(0, 1) @ deviation
        yield log_prob, w, share.sum(1), share @ deviation, second.unflatten(0, (k, m))
    if not len(broken):
        return
    broken = broken[order_by_pattern(x[broken])]
    for index in broken.split(max(1, BLOCK // (k * m * m))):
        yield _sums_with_gaps(fa, x[index], weight[index], centre)


def _sums_with_gaps(
    fa: FactorAnalyzers, x: Tensor, weight: Tensor, centre: Tensor
) -> tuple[Tensor, ...]:
    """The same of points whose NaN are gaps: what is missing has its mean and covariance."""
    posterior = factor_posterior(x, fa)
    joint = posterior.log_prob + fa.log_weight
    log_prob = joint.logsumexp(1)
    share = ((joint - log_prob.unsqueeze(1)).exp() * weight.unsqueeze(1)).T  # (K, N)
    expected = fa.mean.unsqueeze(1) + posterior.mean.permute(2, 1, 0) @ fa.loading.mT  # (K, N, M)
    deviation = torch.where(x.isnan(), expected, x) - centre
    weighted = share.unsqueeze(2) * deviation
    # The loading of what is missing given the rest, (P, K, M, R), and the weight of each pattern.
    loading = fa.loading @ posterior.root.permute(2, 3, 1, 0)
    covariance = loading @ loading.mT + torch.diag_embed(fa.log_diagonal.exp())
    of_pattern = share.new_zeros(len(posterior.seen), len(share))
    of_pattern.index_add_(0, posterior.pattern, share.T)
    missing = 1 - posterior.seen
    second = torch.einsum("pk,pi,pj,pkij->kij", of_pattern, missing, missing, covariance)
    return log_prob, weight, share.sum(1), weighted.sum(1), second + weighted.mT @ deviation


def _maximize(
    fa: FactorAnalyzers,
    count: Tensor,
    mean: Tensor,
    scatter: Tensor,
    prior: Tensor,
    options: EMOptions,
) -> FactorAnalyzers:
    """Take the step from the sums of the points."""
    fed = count >= (1 if options.shrinkage else fa.n_factors + 1)
    n = count[fed, None, None]
    target = (n * scatter[fed] + options.shrinkage * prior) / (n + options.shrinkage)
    loading, log_diagonal = fit_covariance(
        target, fa.log_diagonal[fed], fa.n_factors, options.log_diagonal_floor
    )
    new = {
        "mean": mean[fed],
        "loading": loading,
        "log_diagonal": log_diagonal,
    }
    moved = {name: getattr(fa, name).clone() for name in new}
    for name, value in new.items():
        moved[name][fed] = value
    log_weight = count.clamp(min=torch.finfo(count.dtype).tiny).log().log_softmax(0)
    return FactorAnalyzers(log_weight, **moved)


def fit_covariance(
    target: Tensor, log_diagonal: Tensor, n_factors: int, log_diagonal_floor: float
) -> tuple[Tensor, Tensor]:
    r"""Bring :math:`A A^\top + D` nearer to covariances: one step, in the Gaussian likelihood.

    First the best loadings with D held (Lawley, 1940), by the largest eigenvalues of the target in
    units of D; then each variance with all else held, :math:`d \leftarrow d + (c - b) / b^2` with
    :math:`b = [\Sigma^{-1}]_{ii}` and :math:`c = [\Sigma^{-1} S \Sigma^{-1}]_{ii}`.

    Args:
        target: S, (K, M, M).
        log_diagonal: Log of D to start from, (K, M).
        n_factors: R.
        log_diagonal_floor: Lower bound of log d.

    Returns:
        Loadings, (K, M, R), and log of D, (K, M).
    """
    # Many small steps one after the other: numpy takes a fifth of torch's time for them.
    s, d = target.cpu().numpy(), log_diagonal.exp().cpu().numpy()
    root = np.sqrt(d)[:, :, None]
    value, vector = np.linalg.eigh(s / root / root.swapaxes(1, 2))
    value, vector = value[:, None, -n_factors:], vector[:, :, -n_factors:]
    loading = root * vector * np.sqrt((value - 1).clip(min=0))
    inverse = np.linalg.inv(loading @ loading.swapaxes(1, 2) + d[:, :, None] * np.eye(d.shape[1]))
    floor = math.exp(log_diagonal_floor)
    for i in range(d.shape[1]):
        row = inverse[:, i].copy()  # (K, M)
        b = row[:, i]
        c = (row[:, None] @ s @ row[:, :, None])[:, 0, 0]
        change = np.maximum((c - b) / b**2, floor - d[:, i])
        d[:, i] += change
        inverse -= (row * (change / (1 + change * b))[:, None])[:, :, None] * row[:, None]
    return torch.from_numpy(loading).to(target), torch.from_numpy(np.log(d)).to(target)


@torch.no_grad()
def with_factors(
    fa: FactorAnalyzers,
    x: Tensor,
    weight: Tensor,
    n_factors: int,
    prior: Tensor,
    options: EMOptions,
) -> FactorAnalyzers:
    """Fit components of R factors to the points that those of another number answer for."""
    _, count, mean, scatter = _expect(fa, x, weight)
    empty = fa.mean.new_zeros(*fa.mean.shape, n_factors)
    plain = replace(fa, loading=empty, log_diagonal=fa.covariance().diagonal(dim1=1, dim2=2).log())
    return _maximize(plain, count, mean, scatter, prior, options)


@torch.no_grad()
def pooled_covariance(fa: FactorAnalyzers, x: Tensor, weight: Tensor) -> Tensor:
    """Covariance of points about the means of the components that answer for them, (M, M)."""
    _, count, _, scatter = _expect(fa, x, weight)
    return torch.einsum("k,kij->ij", count / count.sum(), scatter)


def _log_prior(fa: FactorAnalyzers, prior: Tensor, shrinkage: float) -> float:
    """Log of the prior density of the covariances, up to a constant, nats."""
    if not shrinkage:
        return 0.0
    cholesky = torch.linalg.cholesky(fa.covariance())
    log_det = 2 * cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
    trace = torch.cholesky_solve(prior.expand_as(cholesky), cholesky)
    trace = trace.diagonal(dim1=1, dim2=2).sum(1)
    return -0.5 * shrinkage * float((log_det + trace).sum())
