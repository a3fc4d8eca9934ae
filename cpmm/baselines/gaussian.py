"""One Gaussian with a full covariance, in closed form: the sanity row of every table."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal


def fit_full_gaussian(x: Tensor) -> MultivariateNormal:
    """Fit by maximum likelihood in float64.

    Args:
        x: Training points, (N, M) with N > M.

    Raises:
        ValueError: If the points do not span the space.
    """
    x = x.double()
    n, m = x.shape
    covariance = torch.cov(x.T, correction=0).reshape(m, m)
    cholesky, info = torch.linalg.cholesky_ex(covariance)
    # What a feature varies given those before it, as a share; rounding can hide that it is zero.
    share = cholesky.diagonal().square() / covariance.diagonal()
    if int(info) or not bool((share > 10 * m * torch.finfo(x.dtype).eps).all()):
        raise ValueError(
            f"the covariance of {n} points in {m} dimensions is singular: a full Gaussian needs "
            "more points than features and no redundant feature"
        )
    return MultivariateNormal(x.mean(0), scale_tril=cholesky)
