"""A mixture of factor analyzers whose parameters are optimized directly, without an ODE."""

from __future__ import annotations

from torch import Tensor, nn

from cpmm.factor_analyzers import FactorAnalyzers
from cpmm.mixture import Mixture
from cpmm.trajectory import inverse_soft_floor, soft_floor


class DirectMixture(nn.Module):
    """K disconnected factor analyzers, each parameter free.

    Args:
        initial: The factor analyzers to start from.
        log_diagonal_floor: Soft lower bound of log d.
        cluster_sizes: Components of each cluster; one cluster for each component if None.
    """

    def __init__(
        self,
        initial: FactorAnalyzers,
        log_diagonal_floor: float,
        cluster_sizes: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.log_diagonal_floor = log_diagonal_floor
        self.cluster_sizes = cluster_sizes or (1,) * initial.n_components
        self.logit = nn.Parameter(initial.log_weight.clone())
        self.mean = nn.Parameter(initial.mean.clone())
        self.loading = nn.Parameter(initial.loading.clone())
        raw = inverse_soft_floor(initial.log_diagonal, log_diagonal_floor)
        self.raw_diagonal = nn.Parameter(raw)

    def mixture(self, _times: Tensor | None = None) -> Mixture:
        """Return the mixture of the current parameters; differentiable."""
        log_weight = self.logit.log_softmax(0)
        log_diagonal = soft_floor(self.raw_diagonal, self.log_diagonal_floor)
        components = FactorAnalyzers(log_weight, self.mean, self.loading, log_diagonal)
        return Mixture(components, self.cluster_sizes)
