from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from cpmm.estimators.em import (
    EMOptions,
    _expect,
    _log_prior,
    fit_covariance,
    fit_to_scatter,
    with_factors,
)
from cpmm.factor_analyzers import FactorAnalyzers

K, M, R, N = 2, 4, 2, 60
FLOOR = -13.8


def analyzers(generator):
    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weight = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
    return FactorAnalyzers(weight, normal(K, M), normal(K, M, R), normal(K, M))


@pytest.fixture
def holed(generator):
    x = torch.randn(N, M, generator=generator, dtype=torch.float64)
    return x.masked_fill(torch.rand(N, M, generator=generator) < 0.3, torch.nan)


def test_sums_over_points_with_gaps_are_those_of_dense_conditionals(generator, holed):
    fa = analyzers(generator)
    weight = torch.rand(N, generator=generator, dtype=torch.float64)
    covariance, mean = fa.covariance().numpy(), fa.mean.numpy()
    total, count = 0.0, np.zeros(K)
    first, second = np.zeros((K, M)), np.zeros((K, M, M))
    for x, w in zip(holed.numpy(), weight.numpy(), strict=True):
        o, joint, filled = ~np.isnan(x), [], []
        u = ~o
        for k in range(K):
            inner, v, rest = covariance[k][np.ix_(o, o)], x.copy(), np.zeros((M, M))
            density = multivariate_normal.logpdf(x[o], mean[k][o], inner) if o.any() else 0.0
            joint.append(float(fa.log_weight[k]) + density)
            b = covariance[k][np.ix_(u, o)] @ np.linalg.inv(inner)
            v[u] = mean[k][u] + b @ (x[o] - mean[k][o])
            rest[np.ix_(u, u)] = covariance[k][np.ix_(u, u)] - b @ covariance[k][np.ix_(o, u)]
            filled.append((v, rest))
        log_prob = np.logaddexp.reduce(joint)
        total += w * log_prob
        for k, (v, rest) in enumerate(filled):
            share = w * np.exp(joint[k] - log_prob)
            count[k] += share
            first[k] += share * v
            second[k] += share * (np.outer(v, v) + rest)
    centre = first / count[:, None]
    scatter = second / count[:, None, None] - centre[:, :, None] * centre[:, None]
    expected = total / float(weight.sum()), count, centre, scatter
    for got, value in zip(_expect(fa, holed, weight), expected, strict=True):
        np.testing.assert_allclose(np.asarray(got), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shrinkage", [0.0, 3.0])
def test_likelihood_and_prior_never_fall(generator, holed, shrinkage):
    weight, prior = torch.ones(N, dtype=torch.float64), torch.eye(M, dtype=torch.float64)
    fa, values = analyzers(generator), []
    options = EMOptions(FLOOR, shrinkage, n_iterations=1, tolerance=-np.inf)
    for _ in range(30):
        result = fit_to_scatter(fa, holed, weight, prior, options)
        values.append(result.history[0] + _log_prior(fa, prior, shrinkage) / N)
        fa = result.components
    assert min(np.diff(values)) > -1e-10


def test_a_full_covariance_and_a_factor_model_are_fitted_exactly(generator):
    true = analyzers(generator)
    target = true.covariance()
    flat = torch.zeros(K, M, dtype=torch.float64)
    for n_factors in (R, M - 1):
        log_diagonal = flat
        for _ in range(500):
            loading, log_diagonal = fit_covariance(target, log_diagonal, n_factors, FLOOR)
        fitted = loading @ loading.mT + torch.diag_embed(log_diagonal.exp())
        torch.testing.assert_close(fitted, target, rtol=0.02, atol=3e-3)  # slowly at the end


def test_the_floor_holds_and_other_numbers_of_factors_start_well(generator):
    true = analyzers(generator)
    x = torch.randn(500, 1, generator=generator, dtype=torch.float64).expand(-1, M).contiguous()
    weight, prior = torch.ones(500, dtype=torch.float64), torch.eye(M, dtype=torch.float64)
    options = EMOptions(-6.0, 0.0)
    result = fit_to_scatter(true, x, weight, prior, options)
    assert float(result.components.log_diagonal.min()) == pytest.approx(-6.0)
    wide = with_factors(result.components, x, weight, 3, prior, options)
    assert wide.n_factors == 3
    assert fit_to_scatter(wide, x, weight, prior, options).log_likelihood == pytest.approx(
        result.log_likelihood, abs=0.05
    )
