"""A mixture as one of torch's distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from cpmm.mixture import Mixture


class MixtureDistribution(Distribution):
    """View of a mixture for code that takes ``torch.distributions``; the mixture computes.

    Unlike torch's ``MixtureSameFamily`` of ``LowRankMultivariateNormal`` it takes a whole batch of
    points at O(N K M R) and O(N K R) memory. Samples come from torch's global generator.

    Args:
        mixture: Checked where it was built; not copied.
        validate_args: Whether ``log_prob`` refuses points that are not real vectors; NaN among them
            even after ``allow_missing``, so that this needs False.
    """

    arg_constraints: Any = {}  # noqa: RUF012 - as in torch
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, mixture: Mixture, validate_args: bool | None = None) -> None:
        self.mixture = mixture
        super().__init__(event_shape=torch.Size([mixture.n_features]), validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """(M,)."""
        fa = self.mixture.components
        return fa.log_weight.softmax(0) @ fa.mean

    @property
    def variance(self) -> Tensor:
        """Of each feature, (M,)."""
        fa = self.mixture.components
        within = fa.log_diagonal.exp() + fa.loading.square().sum(2)
        return fa.log_weight.softmax(0) @ (within + (fa.mean - self.mean).square())

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw points, (*sample_shape, M)."""
        shape = torch.Size(sample_shape)
        device = self.mixture.components.mean.device
        seed = int(torch.randint(2**63 - 1, ()))
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            points, _ = self.mixture.sample(shape.numel(), generator)
        return points.reshape(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of points, (..., M), nats, (...)."""
        if self._validate_args:
            self._validate_sample(value)
        return self.mixture.log_prob(value.reshape(-1, value.shape[-1])).reshape(value.shape[:-1])
