r"""Mixtures of factor analyzers by expectation maximization: the classical fit, without gradients.

After Ghahramani & Hinton, "The EM algorithm for mixtures of factor analyzers" (1997), with a
diagonal for each component in place of a shared one, as in McLachlan & Peel (2000). Their AECM
moves the means before a second pass over the points; here one regression on the factors and a
constant gives means and loadings together, so that a pass is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cpmm.factor_analyzers import FactorAnalyzers, capacitance_cholesky, prepare_density
from cpmm.mixture import Mixture


@dataclass(frozen=True)
class EMRun:
    """Where expectation maximization stands; with it as its start, :func:`fit_by_em` goes on.

    Attributes:
        current: The next iterate, not measured yet.
        best: The iterate with the highest validation log-likelihood, the first if several have it.
        history: An entry for the start and for each iterate after it: ``train`` and ``validation``,
            mean log-likelihoods in nats a point, and ``starved``, the number of components that had
            too few points to be fitted. The training value is measured before the step.
    """

    current: FactorAnalyzers
    best: FactorAnalyzers
    history: tuple[dict[str, float], ...] = ()

    @property
    def best_iteration(self) -> int:
        """Position of the best iterate in the history, 0 for the start, -1 if it is empty."""
        values = [entry["validation"] for entry in self.history]
        return values.index(max(values)) if values else -1

    def has_ended(self, n_iterations: int, patience: int) -> bool:
        """Say if the iterations are done, or the last ``patience`` of them were without gain."""
        last = len(self.history) - 1
        return last >= n_iterations or last - self.best_iteration >= patience


@torch.no_grad()
def fit_by_em(
    start: FactorAnalyzers | EMRun,
    x: Tensor,
    validation: Tensor,
    log_diagonal_floor: float,
    n_iterations: int,
    patience: int,
    batch_size: int,
    listener: Callable[[EMRun], None] | None = None,
) -> EMRun:
    r"""Fit a mixture of factor analyzers by expectation maximization; nothing is drawn.

    With responsibilities h and the factors z of each component, the regression of x on [z, 1]:

    .. math::
        [A_k \; \mu_k] = \Big(\sum_n h_{nk} x_n E[\tilde z]^\top\Big)
            \Big(\sum_n h_{nk} E[\tilde z \tilde z^\top]\Big)^{-1}, \quad
        D_k = \max\Big(e^{f}, \tfrac{1}{n_k} \operatorname{diag} \sum_n h_{nk}
            (x_n - [A_k \; \mu_k] E[\tilde z]) x_n^\top\Big)

    The training likelihood never falls, with a floor either: each feature is a regression of its
    own, whose best coefficients do not depend on its variance, and given them the expected
    likelihood falls on either side of its best variance, so that the floor is the best one allowed
    where that lies below. The step is thus the exact optimum under the floor.

    A component that answers for less than R + 1 points, the unknowns of one feature's regression,
    keeps its mean and covariance and moves its weight only, which lowers no likelihood; it is
    fitted again once it has the points. A loading of zeros stays so: that factor's start must not
    be zero.

    The products over points are in the type of ``x``, their sums and the regressions in float64. In
    float32 a variance is as exact as 1e-6 times the squared distance of its points to the centre of
    the means: give float64 where that is not small.

    Args:
        start: K components, none below the floor, or a run to go on with, which then ends as if it
            had not been interrupted.
        x: Training points, (N, M), float32 or float64 as the components are.
        validation: Points that choose the iterate, (N', M).
        log_diagonal_floor: Hard lower bound f of log d.
        n_iterations: Steps at most, those of a run gone on with included.
        patience: Steps without a higher validation log-likelihood after which it stops.
        batch_size: Points at a time: memory grows as K (R + 2) times it. The result depends on it
            by rounding only.
        listener: Called with the run after each iterate is measured, to show or to keep.

    Returns:
        The run; its ``best`` is the fit.

    Raises:
        ValueError: If shapes, types or numbers do not fit, or values are not finite.
        FloatingPointError: If a likelihood or a parameter leaves the range of numbers.
    """
    run = start if isinstance(start, EMRun) else EMRun(start, start)
    counts = {"n_iterations": n_iterations, "patience": patience, "batch_size": batch_size}
    for name, number in counts.items():
        if number < 1:
            raise ValueError(f"{name} is {number}: expected 1 or more")
    _check_components(run.current, log_diagonal_floor)
    _check_points("x", x, run.current)
    _check_points("validation", validation, run.current)
    while not run.has_ended(n_iterations, patience):
        run = _iterate(run, x, validation, log_diagonal_floor, batch_size)
        if listener is not None:
            listener(run)
    return run


@dataclass(frozen=True)
class _Moments:
    """Sums over the points, weighted by responsibility, of each component, float64.

    Attributes:
        count: (K,).
        x: Of x - centre, (K, M).
        square: Of its square, (K, M).
        factor: Of E[z], (K, R).
        factor_square: Of E[z] E[z]^T, (K, R, R).
        cross: Of E[z] (x - centre)^T, (K, R, M).
        posterior: Covariance of z given x, the same for every point, (K, R, R); not a sum.
        centre: What x is taken relative to, against cancellation, (M,).
    """

    count: Tensor
    x: Tensor
    square: Tensor
    factor: Tensor
    factor_square: Tensor
    cross: Tensor
    posterior: Tensor
    centre: Tensor


def _iterate(
    run: EMRun, x: Tensor, validation: Tensor, log_diagonal_floor: float, batch_size: int
) -> EMRun:
    """Measure the current iterate and take the step from it."""
    fa = run.current
    try:
        log_prob, moments = _expect(fa, x, batch_size)
    except FloatingPointError as error:  # whose advice is for gradient ascent
        raise FloatingPointError(
            f"the components of iteration {len(run.history)} have no density in {fa.mean.dtype}: "
            f"raise log_diagonal_floor (now {log_diagonal_floor:g}), lower R (now {fa.n_factors}) "
            f"or give float64. {error}"
        ) from error
    validation_log_prob = Mixture(fa, (fa.n_components,), batch_size).log_prob(validation)
    measured = {
        "train": _mean_log_prob("x", log_prob, run),
        "validation": _mean_log_prob("validation", validation_log_prob, run),
        "starved": int((~_is_fed(moments, fa)).sum()),
    }
    is_best = all(measured["validation"] > entry["validation"] for entry in run.history)
    return EMRun(
        current=_maximize(fa, moments, log_diagonal_floor),
        best=fa if is_best else run.best,
        history=(*run.history, measured),
    )


def _expect(fa: FactorAnalyzers, x: Tensor, batch_size: int) -> tuple[Tensor, _Moments]:
    """Log-density of each point, nats, (N,), and the sums that the step from ``fa`` needs."""
    density = prepare_density(fa)
    wide = fa.to(torch.float64)
    centre = density.centre.double()
    cholesky, scaled = capacitance_cholesky(wide)
    regression = torch.cholesky_solve(scaled, cholesky)  # of z on x, (K, R, M)
    constant = torch.linalg.vecdot(regression, (wide.mean - centre).unsqueeze(1))  # (K, R)
    like = wide.log_weight, wide.mean, wide.mean, constant, cholesky, regression
    sums = map(torch.zeros_like, like)
    moments = _Moments(*sums, posterior=torch.cholesky_inverse(cholesky), centre=centre)
    rows, offset = regression.to(x).flatten(0, 1), constant.to(x).flatten().unsqueeze(1)
    log_prob = []
    for part in x.split(batch_size):
        joint = density.component_log_prob(part) + fa.log_weight
        log_prob.append(joint.logsumexp(1))
        share = (joint - log_prob[-1].unsqueeze(1)).exp().T  # (K, N)
        deviation = part - density.centre
        factor = torch.addmm(offset, rows, deviation.T, beta=-1).unflatten(0, constant.shape)
        weighted = factor * share.unsqueeze(1)  # (K, R, N)
        moments.cross.add_((weighted.flatten(0, 1) @ deviation).unflatten(0, constant.shape))
        moments.x.add_(share @ deviation)
        moments.square.add_(share @ deviation.square())
        # Small sums, and in float64 their difference in the step is sure to be positive definite.
        share, factor = share.double(), factor.double()
        weighted = factor * share.unsqueeze(1)
        moments.count.add_(share.sum(1))
        moments.factor.add_(weighted.sum(2))
        moments.factor_square.add_(weighted @ factor.mT)
    return torch.cat(log_prob), moments


def _is_fed(moments: _Moments, fa: FactorAnalyzers) -> Tensor:
    """Say which components have the points to be fitted, (K,)."""
    return moments.count >= fa.n_factors + 1


def _maximize(fa: FactorAnalyzers, moments: _Moments, log_diagonal_floor: float) -> FactorAnalyzers:
    """Take the step: the regressions of x on [z, 1], solved for deviations from the means."""
    fed = _is_fed(moments, fa)
    count = moments.count[fed, None]
    x, factor = moments.x[fed] / count, moments.factor[fed] / count  # means, (K, M), (K, R)
    spread = (
        moments.factor_square[fed] / count.unsqueeze(2)
        - factor.unsqueeze(2) * factor.unsqueeze(1)
        + moments.posterior[fed]
    )
    cross = moments.cross[fed] / count.unsqueeze(2) - factor.unsqueeze(2) * x.unsqueeze(1)
    cholesky, info = torch.linalg.cholesky_ex(spread)
    loading = torch.cholesky_solve(cross, cholesky)  # (K, R, M)
    variance = moments.square[fed] / count - x.square() - (loading * cross).sum(1)
    mean = moments.centre + x - torch.linalg.vecdot(loading.mT, factor.unsqueeze(1))
    solved = (info == 0) & torch.isfinite(loading).all((1, 2))
    solved = solved & torch.isfinite(mean).all(1) & torch.isfinite(variance).all(1)
    if not bool(solved.all()):
        raise FloatingPointError(
            f"{int((~solved).sum())} of {fa.n_components} components have no finite regression on "
            f"their factors: smallest log-variance {fa.log_diagonal.min().item():.3g}, largest "
            f"loading {fa.loading.abs().max().item():.3g}; raise log_diagonal_floor (now "
            f"{log_diagonal_floor:g}), lower R (now {fa.n_factors}) or give float64"
        )
    # A weight of zero has no finite logarithm, and mixtures are kept with finite values only.
    points = moments.count.clamp(min=torch.finfo(fa.mean.dtype).tiny)
    # Rounding may leave a variance of zero or less: the floor stands for it.
    log_diagonal = variance.clamp(min=0).log().clamp(min=log_diagonal_floor)
    return FactorAnalyzers(
        log_weight=points.log().log_softmax(0).to(fa.mean),
        mean=_replaced(fa.mean, fed, mean),
        loading=_replaced(fa.loading, fed, loading.mT),
        log_diagonal=_replaced(fa.log_diagonal, fed, log_diagonal),
    )


def _replaced(old: Tensor, where: Tensor, new: Tensor) -> Tensor:
    result = old.clone()
    result[where] = new.to(old)
    return result


def _mean_log_prob(name: str, log_prob: Tensor, run: EMRun) -> float:
    finite = torch.isfinite(log_prob)
    if not bool(finite.all()):
        raise FloatingPointError(
            f"{int((~finite).sum())} of {len(log_prob)} log-densities of {name} are not finite "
            f"(iteration {len(run.history)}); smallest log-variance "
            f"{run.current.log_diagonal.min().item():.3g}: raise log_diagonal_floor, bring the "
            "points to unit scale or give float64"
        )
    return log_prob.double().mean().item()


def _check_components(fa: FactorAnalyzers, log_diagonal_floor: float) -> None:
    for name, value in vars(fa).items():
        if value.dtype not in (torch.float32, torch.float64) or value.dtype != fa.mean.dtype:
            raise ValueError(
                f"start.{name} is {value.dtype}, start.mean {fa.mean.dtype}: expected both float32 "
                "or both float64"
            )
        if not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise ValueError(
                f"start.{name} has {bad} of {value.numel()} values that are not finite"
            )
    if not log_diagonal_floor < torch.inf:
        raise ValueError(f"log_diagonal_floor is {log_diagonal_floor}: expected a number")
    if bool((fa.log_diagonal < log_diagonal_floor).any()):
        raise ValueError(
            f"start.log_diagonal must not lie below log_diagonal_floor = {log_diagonal_floor:g}: "
            f"got {fa.log_diagonal.min().item():.3g}"
        )


def _check_points(name: str, points: Tensor, fa: FactorAnalyzers) -> None:
    if points.ndim != 2 or points.shape[1] != fa.n_features or len(points) == 0:
        raise ValueError(
            f"{name} must be (N, {fa.n_features}) with N > 0, the mixture has {fa.n_features} "
            f"features: got shape {tuple(points.shape)}"
        )
    if (points.dtype, points.device) != (fa.mean.dtype, fa.mean.device):
        raise ValueError(
            f"{name} is {points.dtype} on {points.device}, the mixture {fa.mean.dtype} on "
            f"{fa.mean.device}: expected the same"
        )
    finite = torch.isfinite(points)
    if not bool(finite.all()):
        raise ValueError(
            f"{name} has {int((~finite).sum())} of {points.numel()} values that are not finite, in "
            f"{int((~finite).any(1).sum())} of {len(points)} points"
        )
