"""Slow, obvious versions of what cpmm/ computes; they share no code with it."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from scipy.linalg import expm
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch import Tensor, nn
from torch.distributions import Categorical, LowRankMultivariateNormal, MixtureSameFamily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpmm.factor_analyzers import FactorAnalyzers


def random_factor_analyzers(
    generator: torch.Generator, k: int, m: int, r: int, offset: float = 0.0
) -> FactorAnalyzers:
    """Draw factor analyzers with unequal weights, float64."""

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return FactorAnalyzers(
        log_weight=normal(k).log_softmax(0),
        mean=offset + 2 * normal(k, m),
        loading=normal(k, m, r),
        log_diagonal=0.5 * normal(k, m) - 1,
    )


def dense_covariance(fa: FactorAnalyzers) -> np.ndarray:
    """Covariances as A A^T + D with loops, (K, M, M)."""
    loading, diagonal = fa.loading.numpy(), np.exp(fa.log_diagonal.numpy())
    return np.stack([a @ a.T + np.diag(d) for a, d in zip(loading, diagonal, strict=True)])


def dense_component_log_prob(x: Tensor, fa: FactorAnalyzers) -> np.ndarray:
    """Log-density of each point under each component by scipy, (N, K)."""
    columns = [
        multivariate_normal(mean, covariance).logpdf(x.numpy()).reshape(len(x))
        for mean, covariance in zip(fa.mean.numpy(), dense_covariance(fa), strict=True)
    ]
    return np.stack(columns, 1)


def dense_log_prob(x: Tensor, fa: FactorAnalyzers) -> np.ndarray:
    """Log-density of a mixture by scipy, (N,)."""
    return logsumexp(dense_component_log_prob(x, fa) + fa.log_weight.numpy(), axis=1)


def torch_mixture(fa: FactorAnalyzers) -> MixtureSameFamily:
    """Return the same mixture made of torch's distributions."""
    return MixtureSameFamily(
        Categorical(logits=fa.log_weight),
        LowRankMultivariateNormal(fa.mean, fa.loading, fa.log_diagonal.exp()),
    )


def assert_moments(
    points: Tensor, mean: np.ndarray, covariance: np.ndarray, n_errors: float = 5
) -> None:
    """Check that sample mean and covariance lie within so many standard errors of the truth.

    The standard error of a covariance is estimated from the fourth moments of the sample.
    """
    x = points.double().numpy()
    n = len(x)
    error = np.sqrt(np.diag(covariance) / n)
    assert (np.abs(x.mean(0) - mean) < n_errors * error).all()
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    error = products.std(0) / np.sqrt(n)
    assert (np.abs(products.mean(0) - covariance) < n_errors * error).all()


def mixture_moments(fa: FactorAnalyzers) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of a mixture by the laws of total expectation and variance."""
    weight, means = np.exp(fa.log_weight.numpy()), fa.mean.numpy()
    mean = weight @ means
    spread = np.einsum("k,ki,kj->ij", weight, means - mean, means - mean)
    return mean, np.einsum("k,kij->ij", weight, dense_covariance(fa)) + spread


class LinearField(nn.Module):
    """dh/dt = A h, whose solution is a matrix exponential."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return h @ self.matrix.T


def linear_solution(matrix: Tensor, initial: Tensor, times: Tensor, start: float = 0.0) -> Tensor:
    """States of :class:`LinearField` at ``times`` from ``initial`` at ``start``, (T, B, S)."""
    a = matrix.detach().numpy()
    states = [initial.detach().numpy() @ expm((float(t) - start) * a).T for t in times]
    return torch.from_numpy(np.stack(states))


def log_abs_det_jacobian(function, x: Tensor) -> Tensor:
    """Log-determinant of a map of single points, one full Jacobian for each point, (N,)."""
    rows = [torch.autograd.functional.jacobian(function, row).slogdet()[1] for row in x]
    return torch.stack(rows)


def best_accuracy(label: np.ndarray, cluster: np.ndarray, n_classes: int, n_clusters: int) -> float:
    """Largest share of points whose cluster goes with their class, over all matchings."""
    size = max(n_classes, n_clusters)
    return max(
        float(np.mean([match[c] == y for y, c in zip(label, cluster, strict=True)]))
        for match in itertools.permutations(range(size))
    )


class SubnormalNumbers(TorchDispatchMode):
    """While entered, collects the names of operations with a subnormal number in their result."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_floating_point():
                size = value.detach().abs()
                if bool(((size > 0) & (size < torch.finfo(value.dtype).tiny)).any()):
                    self.operations.append(str(function))
        return result


def dense_observed_log_prob(x: Tensor, fa: FactorAnalyzers) -> np.ndarray:
    """Log-density of what is not NaN in each point under each component by scipy, (N, K)."""
    result = np.zeros((len(x), fa.n_components))
    for n, point in enumerate(x.numpy()):
        seen = np.flatnonzero(~np.isnan(point))
        for k, covariance in enumerate(dense_covariance(fa)):
            if len(seen):
                normal = multivariate_normal(fa.mean[k].numpy()[seen], covariance[seen][:, seen])
                result[n, k] = normal.logpdf(point[seen])
    return result


def dense_conditional(point: Tensor, fa: FactorAnalyzers) -> tuple[np.ndarray, ...]:
    """Weights, (K,), means, (K, U), covariances, (K, U, U), of what is NaN given the rest."""
    x = point.numpy()
    seen, rest = np.flatnonzero(~np.isnan(x)), np.flatnonzero(np.isnan(x))
    joint = dense_observed_log_prob(point[None], fa)[0] + fa.log_weight.numpy()
    means, covariances = [], []
    for mean, s in zip(fa.mean.numpy(), dense_covariance(fa), strict=True):
        gain = s[rest][:, seen] @ np.linalg.inv(s[seen][:, seen])
        means.append(mean[rest] + gain @ (x - mean)[seen])
        covariances.append(s[rest][:, rest] - gain @ s[seen][:, rest])
    return np.exp(joint - logsumexp(joint)), np.stack(means), np.stack(covariances)
