from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from cpmm.baselines.gaussian import fit_full_gaussian


def test_it_is_the_maximum_likelihood_fit(generator):
    x = torch.randn(200, 4, generator=generator) @ torch.randn(4, 4, generator=generator)
    points = x.double().numpy()
    expected = multivariate_normal(points.mean(0), np.cov(points.T, ddof=0))
    np.testing.assert_allclose(fit_full_gaussian(x).log_prob(x.double()), expected.logpdf(points))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "m"), [(2, 2), (4, 5), (5, 5), (20, 30)])
def test_points_that_do_not_span_the_space_raise(n, m, seed):
    x = torch.randn(n, m, generator=torch.Generator().manual_seed(seed))
    with pytest.raises(ValueError, match="is singular: a full Gaussian needs more points"):
        fit_full_gaussian(x)


@pytest.mark.parametrize("seed", range(5))
def test_a_redundant_feature_raises(seed):
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with pytest.raises(ValueError, match="is singular"):
        fit_full_gaussian(torch.cat([x, x.sum(1, keepdim=True)], 1))
