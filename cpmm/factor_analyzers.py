r"""Factor analyzers: Gaussians with covariance :math:`A A^\top + D` (section 2.1.1).

Every density of this package is computed here, once: training, extraction, evaluation and the
baselines all call :func:`component_log_prob`, or its two halves, :func:`prepare_density` and
:meth:`PreparedDensity.component_log_prob`, where batches share the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FactorAnalyzers:
    """K weighted factor analyzers.

    Attributes:
        log_weight: Log of the weights, normalized to sum to one, (K,).
        mean: (K, M).
        loading: The low-rank factor A, (K, M, R).
        log_diagonal: Log of the variances D, (K, M).
    """

    log_weight: Tensor
    mean: Tensor
    loading: Tensor
    log_diagonal: Tensor

    def __post_init__(self) -> None:
        """Raise ValueError if their shapes do not fit together."""
        got = {name: tuple(value.shape) for name, value in vars(self).items()}
        k, m, r = got["loading"] if len(got["loading"]) == 3 else ("K", "M", "R")
        matrix = (k, m)
        expected = {
            "log_weight": (k,),
            "mean": matrix,
            "loading": (k, m, r),
            "log_diagonal": matrix,
        }
        if got != expected:
            raise ValueError(
                f"factor analyzers must agree on K, M and R: expected {expected}, got {got}"
            )

    @property
    def n_components(self) -> int:
        """K."""
        return self.mean.shape[0]

    @property
    def n_features(self) -> int:
        """M."""
        return self.mean.shape[1]

    @property
    def n_factors(self) -> int:
        """R."""
        return self.loading.shape[2]

    @property
    def n_parameters(self) -> int:
        """Numbers stored: weights, means, loadings and log-diagonals."""
        return sum(value.numel() for value in vars(self).values())

    def to(self, *args, **kwargs) -> FactorAnalyzers:
        """Move every tensor to a device or floating-point type, as ``Tensor.to`` does."""
        moved = {name: value.to(*args, **kwargs) for name, value in vars(self).items()}
        return FactorAnalyzers(**moved)

    def select(self, index: Tensor) -> FactorAnalyzers:
        """Return the components at ``index``, their weights normalized anew."""
        chosen = FactorAnalyzers(**{name: value[index] for name, value in vars(self).items()})
        return replace(chosen, log_weight=chosen.log_weight.log_softmax(0))

    def covariance(self) -> Tensor:
        """Dense covariances, (K, M, M); costs O(K M^2) memory."""
        return self.loading @ self.loading.mT + torch.diag_embed(self.log_diagonal.exp())


@dataclass(frozen=True)
class PreparedDensity:
    """All that the log-density needs of K factor analyzers, so that batches of points share it.

    Attributes:
        centre: Mean of the component means, (M,): points and means are taken relative to it.
        precision: 1 / D, (K, M).
        weighted_mean: D^-1 mu, (K, M).
        whitened: L^-1 A^T D^-1 with the Cholesky factor L of the capacitance matrix, (K, R, M): the
            low-rank part of the Mahalanobis distance is a plain square of it.
        whitened_mean: L^-1 A^T D^-1 mu, (K, R).
        constant: Mahalanobis distance's part without x, and the log-determinant, (K,).
    """

    centre: Tensor
    precision: Tensor
    weighted_mean: Tensor
    whitened: Tensor
    whitened_mean: Tensor
    constant: Tensor

    def component_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of points, (N, M), under each factor analyzer, nats, (N, K).

        Raises:
            ValueError: If ``x`` is not (N, M).
        """
        require_points(x, len(self.centre))
        with torch.autocast(x.device.type, enabled=False):  # as in prepare_density
            # Points along the columns: a CPU multiplies a third faster that way, and the sum over R
            # runs along memory.
            x = (x - self.centre).T  # (M, N)
            low_rank = torch.addmm(
                -self.whitened_mean.flatten().unsqueeze(1), self.whitened.flatten(0, 1), x
            ).unflatten(0, self.whitened_mean.shape)  # (K, R, N)
            diagonal = torch.addmm(
                self.precision @ x.square(), self.weighted_mean, x, alpha=-2
            )  # (K, N)
            distance = diagonal - _SquaredLength.apply(low_rank) + self.constant.unsqueeze(1)
            log_prob = -0.5 * distance.T
        if log_prob.requires_grad:
            log_prob.register_hook(without_subnormal)
        return log_prob


def require_points(x: Tensor, n_features: int) -> None:
    """Raise ValueError if ``x`` is not (N, M)."""
    if x.ndim != 2 or x.shape[1] != n_features:
        raise ValueError(
            f"x must be (N, {n_features}), the mixture has {n_features} features: "
            f"got shape {tuple(x.shape)}"
        )


def require_positive_definite(cholesky: Tensor, info: Tensor, fa: FactorAnalyzers) -> None:
    """Raise FloatingPointError if the capacitance matrices, (..., K, R, R), had no factors."""
    pivots = cholesky.diagonal(dim1=-2, dim2=-1)  # what is broken in a row breaks its pivot
    if bool(info.any()) or not bool(torch.isfinite(pivots).all()):
        bad = int(((info != 0) | ~torch.isfinite(pivots).all(-1)).sum())
        raise FloatingPointError(
            f"{bad} of {info.numel()} capacitance matrices I + A^T D^-1 A are not "
            f"positive definite: smallest log-variance {fa.log_diagonal.min().item():.3g}, largest "
            f"loading {fa.loading.abs().max().item():.3g}; the run has diverged: lower "
            "cpmm.learning_rate or cpmm.gradient_clip, or raise cpmm.log_diagonal_floor"
        )


def capacitance_cholesky(fa: FactorAnalyzers) -> tuple[Tensor, Tensor]:
    r"""Cholesky factor of the capacitance matrix :math:`I + A^\top D^{-1} A`.

    Returns:
        The factor, (K, R, R), and :math:`A^\top D^{-1}`, (K, R, M).

    Raises:
        FloatingPointError: If a capacitance matrix is not finite and positive definite.
    """
    scaled = fa.loading.mT * torch.exp(-fa.log_diagonal).unsqueeze(1)  # (K, R, M)
    identity = torch.eye(fa.n_factors, dtype=scaled.dtype, device=scaled.device)
    capacitance = scaled @ fa.loading + identity
    cholesky, info = torch.linalg.cholesky_ex(capacitance)
    require_positive_definite(cholesky, info, fa)
    return cholesky, scaled


def prepare_density(fa: FactorAnalyzers) -> PreparedDensity:
    """Do once what the log-density of any number of points has in common.

    Raises:
        FloatingPointError: If a covariance is not finite and positive definite.
    """
    # No half precision for an expanded square.
    with torch.autocast(fa.mean.device.type, enabled=False):
        cholesky, scaled = capacitance_cholesky(fa)
        centre = fa.mean.detach().mean(0)
        mean = fa.mean - centre
        precision = torch.exp(-fa.log_diagonal)
        # L^-1 is R x R: a product with it takes a quarter of the time of M triangular solves.
        identity = torch.eye(fa.n_factors, dtype=cholesky.dtype, device=cholesky.device)
        inverse = torch.linalg.solve_triangular(cholesky, identity.expand_as(cholesky), upper=False)
        whitened = inverse @ scaled
        weighted_mean = mean * precision
        constant = (
            (mean * weighted_mean).sum(1)
            + fa.log_diagonal.sum(1)
            + 2 * cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
            + fa.n_features * math.log(2 * math.pi)
        )
        return PreparedDensity(
            centre=centre,
            precision=precision,
            weighted_mean=weighted_mean,
            whitened=whitened,
            whitened_mean=torch.linalg.vecdot(whitened, mean.unsqueeze(1)),
            constant=constant,
        )


def component_log_prob(x: Tensor, fa: FactorAnalyzers) -> Tensor:
    r"""Log-density of each point under each factor analyzer (section 2.1.1).

    .. math:: \log N(x; \mu_k, A_k A_k^\top + D_k)

    Three matrix products over the points, O(N K M R), through the capacitance matrix; no M x M
    matrix is formed. The points are centred on the mean of the component means first, since the
    square is expanded: in float32 the absolute error grows with :math:`\|x - c\|^2 / \min d`.

    Args:
        x: Points in the mixture's own space, (N, M).
        fa: K factor analyzers; ``log_diagonal`` is the log of a variance, (K, M).

    Returns:
        Nats, (N, K), without the weights.

    Raises:
        ValueError: If ``x`` and ``fa`` disagree on M.
        FloatingPointError: If a covariance is not finite and positive definite.
    """
    return prepare_density(fa).component_log_prob(x)


def without_subnormal(gradient: Tensor | None) -> Tensor | None:
    """Set to zero what products would take below the normal numbers: a CPU is slow over those.

    That is far below the last digit of the gradients of the components that the points are near to.
    """
    if gradient is None:  # undefined, as autograd may leave it
        return None
    info = torch.finfo(gradient.dtype)
    return nn.functional.hardshrink(gradient, info.tiny / info.eps)


class _SquaredLength(torch.autograd.Function):
    """``x.square().sum(1)``, (K, R, N) to (K, N), whose gradient passes over x once, not twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square().sum(1)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        return (2 * gradient).unsqueeze(1) * x


def sample_components(fa: FactorAnalyzers, index: Tensor, generator: torch.Generator) -> Tensor:
    r"""Draw one point from each component named by ``index``: :math:`\mu + A z + \sqrt{d} e`.

    Args:
        fa: K factor analyzers.
        index: Component of each draw, (N,).
        generator: On the device of ``fa``.

    Returns:
        (N, M).

    Raises:
        FloatingPointError: If a sample leaves the range of floating-point numbers.
    """
    like = fa.mean

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=like.dtype, device=like.device)

    factors = normal(len(index), fa.n_factors, 1)
    noise = normal(len(index), fa.n_features)
    deviation = torch.exp(0.5 * fa.log_diagonal[index]) * noise
    x = fa.mean[index] + (fa.loading[index] @ factors).squeeze(-1) + deviation
    if not bool(torch.isfinite(x).all()):
        raise FloatingPointError(
            f"{int((~torch.isfinite(x)).sum())} of {x.numel()} sampled values are not finite: "
            f"largest log-variance {fa.log_diagonal.max().item():.3g}; the run has diverged: lower "
            "cpmm.learning_rate, cpmm.initial_rate_factor or cpmm.gradient_clip"
        )
    return x
