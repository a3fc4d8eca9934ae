"""Trajectories: the ODE that moves factor analyzers through pseudotime (section 3.1 and 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cpmm.factor_analyzers import FactorAnalyzers
from cpmm.fields import Blocks
from cpmm.mixture import Mixture
from cpmm.odes import Solver

DIAGONALS = ("variable", "constant")


@dataclass(frozen=True)
class StateLayout:
    """Where the parameters of a factor analyzer lie in the state of the ODE (Eq. 5 and 6).

    The state is a stack of maps of M features: one mean, R loadings, one log-diagonal, one
    log-weight if it is learned, and the augmentation. For image data a map has the shape of an
    image and the stack lies along the channels.

    Attributes:
        n_features: M.
        n_factors: R.
        augmentation: Size L of the free state in units of the size J of the others; the paper uses
            2 to 4.
        diagonal: "variable", log d for each feature, or "constant", one log d for each component:
            the mean of its map.
        learned_weight: Whether log pi is part of the state (the mean of a map of its own) or
            constant.
        log_diagonal_floor: Soft lower bound of log d (-6 in the paper).
    """

    n_features: int
    n_factors: int
    augmentation: float = 4.0
    diagonal: str = "variable"
    learned_weight: bool = False
    log_diagonal_floor: float = -6.0

    def __post_init__(self) -> None:
        """Raise ValueError if one is out of range."""
        if not 1 <= self.n_factors <= self.n_features:
            raise ValueError(
                f"cpmm.n_factors (R) is {self.n_factors}: expected 1 <= R <= M = "
                f"{self.n_features}, the number of features; set it to {self.n_features} or less"
            )
        if self.diagonal not in DIAGONALS:
            raise ValueError(f"cpmm.diagonal is {self.diagonal!r}: choose one of {DIAGONALS}")
        if self.augmentation < 0:
            raise ValueError(f"cpmm.augmentation is {self.augmentation}: expected 0 or more")

    @property
    def n_joint(self) -> int:
        """Maps of the joint state; J is this times M."""
        return self.n_factors + 2 + self.learned_weight

    @property
    def n_maps(self) -> int:
        """Maps of the augmented state; its size S is this times M."""
        return self.n_joint + round(self.augmentation * self.n_joint)

    @property
    def size(self) -> int:
        """Size S of the augmented state."""
        return self.n_maps * self.n_features

    def read(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Split states into the parameters of factor analyzers.

        Args:
            state: (..., S), or their joint part alone, (..., J).

        Returns:
            Mean (..., M), loading (..., M, R), log-diagonal (..., M) and unnormalized log-weight
            (...).
        """
        maps = state.unflatten(-1, (-1, self.n_features))
        # One split: the gradient of each slice by itself would be as large as all maps.
        sizes = [1, self.n_factors, 1, int(self.learned_weight)]
        parts = maps.split([*sizes, maps.shape[-2] - sum(sizes)], -2)
        mean, loading, log_diagonal, weight, _ = parts
        mean, log_diagonal = mean.squeeze(-2), log_diagonal.squeeze(-2)
        if self.diagonal == "constant":
            log_diagonal = log_diagonal.mean(-1, keepdim=True).expand_as(mean)
        log_weight = maps.new_zeros(maps.shape[:-2])
        if self.learned_weight:
            log_weight = weight.squeeze(-2).mean(-1)
        return mean, loading.mT, soft_floor(log_diagonal, self.log_diagonal_floor), log_weight

    def write(self, mean: Tensor, loading: Tensor, log_diagonal: Tensor, free: Tensor) -> Tensor:
        """Compose states from parameters, the inverse of :meth:`read` on the joint part.

        Args:
            mean: (..., M).
            loading: (..., M, R).
            log_diagonal: Above the floor, (..., M).
            free: What fills the other maps, (..., n_maps - R - 2, M).

        Returns:
            (..., S).
        """
        raw = inverse_soft_floor(log_diagonal, self.log_diagonal_floor)
        maps = torch.cat([mean.unsqueeze(-2), loading.mT, raw.unsqueeze(-2), free], -2)
        return maps.flatten(-2)


def soft_floor(x: Tensor, floor: float) -> Tensor:
    """Bound ``x`` from below smoothly: ``floor + softplus(x - floor)``."""
    return floor + functional.softplus(x - floor)


def inverse_soft_floor(y: Tensor, floor: float) -> Tensor:
    """Undo :func:`soft_floor`.

    Raises:
        ValueError: If some of ``y`` do not lie above ``floor``.
    """
    above = y - floor
    if not bool((above > 0).all()):
        raise ValueError(f"expected values above the floor of {floor}: got {y.min().item():.3g}")
    return floor + above + torch.log(-torch.expm1(-above))


class Trajectories(nn.Module):
    """C trajectories through the space of factor analyzers: learnable initial states and their ODE.

    Args:
        layout: How a state is read.
        field: Velocity of the states, ``field(t, h)`` with ``h`` of shape (C, S).
        initial: Initial states at pseudotime 0, (C, S).
        solver: How the ODE is solved.
        learned_cluster_weight: Whether the weights eta of Eq. 7 are learned or uniform.
        blocks: Order of the state in which the field is defined; None: that of the layout. The
            whole solve is in that order, so that not every call of the field reorders it.
    """

    def __init__(
        self,
        layout: StateLayout,
        field: nn.Module,
        initial: Tensor,
        solver: Solver,
        learned_cluster_weight: bool = True,
        blocks: Blocks | None = None,
    ) -> None:
        super().__init__()
        if initial.ndim != 2 or len(initial) < 1 or initial.shape[1] != layout.size:
            raise ValueError(
                f"initial states must be (C, {layout.size}) with C >= 1: got {tuple(initial.shape)}"
            )
        self.layout, self.field, self.solver, self.blocks = layout, field, solver, blocks
        self.initial = nn.Parameter(initial.clone())
        self.cluster_logit = nn.Parameter(torch.zeros(len(initial)), learned_cluster_weight)

    @property
    def n_clusters(self) -> int:
        """C."""
        return len(self.initial)

    def states(self, times: Tensor) -> Tensor:
        """Solve the ODE once for all trajectories.

        Args:
            times: Pseudotimes in [0, 1], ascending, (G,).

        Returns:
            (C, G, S).
        """
        return self._solve(times, self.layout.n_maps)

    def mixture(self, times: Tensor) -> Mixture:
        """Sample the components at ``times``: the hierarchical mixture of Eq. 7.

        Args:
            times: Pseudotimes in [0, 1], ascending, (G,).

        Returns:
            C clusters of G components each, cluster by cluster; differentiable.
        """
        joint = self._solve(times, self.layout.n_joint)  # what is free is read by the field alone
        mean, loading, log_diagonal, log_weight = self.layout.read(joint)
        log_eta = self.cluster_logit.log_softmax(0)
        log_pi = log_weight.log_softmax(1)  # sum_j pi_c(t_j) = 1 within each trajectory
        return Mixture(
            FactorAnalyzers(
                log_weight=(log_eta[:, None] + log_pi).flatten(),
                mean=mean.flatten(0, 1),
                loading=loading.flatten(0, 1),
                log_diagonal=log_diagonal.flatten(0, 1),
            ),
            cluster_sizes=(len(times),) * self.n_clusters,
        )

    def _solve(self, times: Tensor, n_maps: int) -> Tensor:
        """Solve the ODE for the first maps of the states, (C, G, n_maps * M)."""
        start = self.initial if self.blocks is None else self.blocks.fold(self.initial)
        keep = n_maps * self.layout.n_features
        states = self.solver.solve(self.field, start, times, keep=keep).transpose(0, 1)
        return states if self.blocks is None else self.blocks.unfold(states)


def pseudotime_grid(n: int, like: Tensor | None = None) -> Tensor:
    """Return ``n`` evenly spaced pseudotimes from 0 to 1, of the device and type of ``like``.

    Raises:
        ValueError: If ``n`` is less than 1.
    """
    if n < 1:
        raise ValueError(f"the number of pseudotimes (G) must be at least 1: got {n}")
    dtype, device = (None, None) if like is None else (like.dtype, like.device)
    start, end = (0, 1) if n > 1 else (0.5, 0.5)
    return torch.linspace(start, end, n, dtype=dtype, device=device)


def draw_pseudotimes(kind: str, n: int, generator: torch.Generator) -> Tensor:
    """Choose the pseudotimes of a training step (section 3.1).

    Args:
        kind: "grid", evenly spaced; "uniform", sorted independent draws, the paper's words;
            "stratified", one draw in each of ``n`` equal intervals.
        n: G.
        generator: Source of the draws.

    Returns:
        Ascending, (G,).

    Raises:
        ValueError: If ``kind`` is unknown, or ``n`` less than 1.
    """
    grid = pseudotime_grid(n)
    if kind == "grid":
        return grid
    u = torch.rand(n, generator=generator, device=generator.device)
    if kind == "uniform":
        return u.sort().values
    if kind == "stratified":
        return (torch.arange(n, device=u.device) + u) / n
    raise ValueError(f"cpmm.pseudotimes is {kind!r}: choose grid, uniform or stratified")
