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
    return _of_covariance(x, torch.cov(x.T, correction=0).reshape(m, m), f"{n} points")


def fit_shrunk_gaussian(x: Tensor) -> tuple[MultivariateNormal, float]:
    """Fit the shrunk covariance of Ledoit and Wolf (2004), for points that do not span the space.

    Args:
        x: Training points, (N, M).

    Returns:
        The Gaussian, and the share of its covariance that is a multiple of the identity.

    Raises:
        ValueError: If the shrunk covariance is singular as well.
    """
    from sklearn.covariance import ledoit_wolf

    x = x.double()
    covariance, share = ledoit_wolf(x.numpy())
    covariance = torch.from_numpy(covariance).reshape(x.shape[1], x.shape[1])
    return _of_covariance(x, covariance, f"{len(x)} points, though shrunk,"), float(share)


def _of_covariance(x: Tensor, covariance: Tensor, what: str) -> MultivariateNormal:
    """The Gaussian of the points' mean and a covariance, unless that is singular."""
    m = x.shape[1]
    cholesky, info = torch.linalg.cholesky_ex(covariance)
    # What a feature varies given those before it, as a share; rounding can hide that it is zero.
    share = cholesky.diagonal().square() / covariance.diagonal()
    if int(info) or not bool((share > 10 * m * torch.finfo(x.dtype).eps).all()):
        raise ValueError(
            f"the covariance of {what} in {m} dimensions is singular: a full Gaussian needs "
            "more points than features and no redundant feature"
        )
    return MultivariateNormal(x.mean(0), scale_tril=cholesky)
