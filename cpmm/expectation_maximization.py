r"""Mixtures of factor analyzers by expectation maximization: the classical fit, without gradients.

After Ghahramani & Hinton, "The EM algorithm for mixtures of factor analyzers" (1997), with a
diagonal for each component in place of a shared one, as in McLachlan & Peel (2000). Their AECM
moves the means before a second pass over the points; here one regression on the factors and a
constant gives means and loadings together, so that a pass is enough.

Points may have gaps, NaN, and weights. What is missing at random need not be imputed: given the
factors the features are independent of each other, so that the factors alone are hidden, and each
feature is regressed on them over the points where it was observed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cpmm.conditioning import (
    FactorPosterior,
    factor_posterior,
    order_by_pattern,
    points_at_a_time,
    triangle,
)
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
    weight: Tensor | None = None,
    validation_weight: Tensor | None = None,
) -> EMRun:
    r"""Fit a mixture of factor analyzers by expectation maximization; nothing is drawn.

    With responsibilities h and the factors z of each component, the regression of x on [z, 1]:

    .. math::
        [A_k \; \mu_k] = \Big(\sum_n h_{nk} x_n E[\tilde z]^\top\Big)
            \Big(\sum_n h_{nk} E[\tilde z \tilde z^\top]\Big)^{-1}, \quad
        D_k = \max\Big(e^{f}, \tfrac{1}{n_k} \operatorname{diag} \sum_n h_{nk}
            (x_n - [A_k \; \mu_k] E[\tilde z]) x_n^\top\Big)

    Where x has gaps, every feature has sums of its own, over the points where it was observed, and
    h and the moments of z are those given what was observed. That is the exact step of EM whose
    hidden variables are component and factors, since the density of what was observed and z is a
    product over the features observed.

    The training likelihood never falls, with a floor either: each feature is a regression of its
    own, whose best coefficients do not depend on its variance, and given them the expected
    likelihood falls on either side of its best variance, so that the floor is the best one allowed
    where that lies below. The step is thus the exact optimum under the floor.

    A component that answers for less than R + 1 points, the unknowns of one feature's regression,
    keeps its mean and covariance and moves its weight only, which lowers no likelihood; it is
    fitted again once it has the points. With gaps that holds for each of its features. A loading of
    zeros stays so: that factor's start must not be zero.

    The products over points are in the type of ``x``, their sums and the regressions in float64. In
    float32 a variance is as exact as 1e-6 times the squared distance of its points to the centre of
    the means: give float64 where that is not small.

    Args:
        start: K components, none below the floor, or a run to go on with, which then ends as if it
            had not been interrupted.
        x: Training points, (N, M), float32 or float64 as the components are; NaN was not observed.
        validation: Points that choose the iterate, (N', M), by the likelihood of what was observed.
        log_diagonal_floor: Hard lower bound f of log d.
        n_iterations: Steps at most, those of a run gone on with included.
        patience: Steps without a higher validation log-likelihood after which it stops.
        batch_size: Points at a time: memory grows as K (R + 2) times it, and points with gaps are
            split further. The result depends on it by rounding only.
        listener: Called with the run after each iterate is measured, to show or to keep.
        weight: Number of points that each training point counts as, (N,), 0 or more; None: one.
        validation_weight: The same for validation, (N',).

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
    train = _Points.of("x", x, weight, run.current)
    held_out = _Points.of("validation", validation, validation_weight, run.current)
    while not run.has_ended(n_iterations, patience):
        run = _iterate(run, train, held_out, log_diagonal_floor, batch_size)
        if listener is not None:
            listener(run)
    return run


@dataclass(frozen=True)
class _Points:
    """Points that were checked: (N, M), and what each counts as, (N,), if they differ."""

    name: str
    x: Tensor
    weight: Tensor | None
    has_gaps: bool

    @classmethod
    def of(cls, name: str, x: Tensor, weight: Tensor | None, fa: FactorAnalyzers) -> _Points:
        """Check points and weights; points with gaps are put in the order of their patterns."""
        _check_points(name, x, fa)
        if weight is not None:
            weight = _check_weight(name, weight, x)
        has_gaps = bool(x.isnan().any())
        if has_gaps:
            order = order_by_pattern(x)
            x, weight = x[order], weight if weight is None else weight[order]
        return cls(name, x, weight, has_gaps)

    def split(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield points and weights, ``size`` at a time."""
        parts = self.x.split(size)
        weights = [None] * len(parts) if self.weight is None else self.weight.split(size)
        return zip(parts, weights, strict=True)

    def mean(self, log_prob: Tensor, run: EMRun) -> float:
        """Mean log-density, nats a point."""
        finite = torch.isfinite(log_prob)
        if not bool(finite.all()):
            raise FloatingPointError(
                f"{int((~finite).sum())} of {len(log_prob)} log-densities of {self.name} are not "
                f"finite (iteration {len(run.history)}); smallest log-variance "
                f"{run.current.log_diagonal.min().item():.3g}: raise log_diagonal_floor, bring the "
                "points to unit scale or give float64"
            )
        if self.weight is None:
            return log_prob.double().mean().item()
        weight = self.weight.double()
        return (log_prob.double() @ weight / weight.sum()).item()


@dataclass(frozen=True)
class _Moments:
    """Sums over the points, weighted by responsibility, that Q regressions need, float64.

    Without gaps a component is one regression, of its W = M features at once, Q = K. With gaps each
    feature of a component is one, over the points where it was observed: Q = K M, W = 1.

    Attributes:
        points: Of each component, (K,).
        count: Points with these features, (Q,).
        x: Of x - centre, (Q, W).
        square: Of its square, (Q, W).
        factor: Of E[z], (Q, R).
        factor_square: Of E[z] E[z]^T, (Q, R, R).
        cross: Of E[z] (x - centre)^T, (Q, R, W).
        posterior: Mean covariance of z given what was observed, (Q, R, R); not a sum.
        centre: What x is taken relative to, against cancellation, (Q, W).
    """

    points: Tensor
    count: Tensor
    x: Tensor
    square: Tensor
    factor: Tensor
    factor_square: Tensor
    cross: Tensor
    posterior: Tensor
    centre: Tensor


def _iterate(
    run: EMRun, train: _Points, validation: _Points, log_diagonal_floor: float, batch_size: int
) -> EMRun:
    """Measure the current iterate and take the step from it."""
    fa = run.current
    try:
        log_prob, moments = (_expect_observed if train.has_gaps else _expect)(fa, train, batch_size)
    except FloatingPointError as error:  # whose advice is for gradient ascent
        raise FloatingPointError(
            f"the components of iteration {len(run.history)} have no density in {fa.mean.dtype}: "
            f"raise log_diagonal_floor (now {log_diagonal_floor:g}), lower R (now {fa.n_factors}) "
            f"or give float64. {error}"
        ) from error
    mixture = Mixture(fa, (fa.n_components,), batch_size, nan_is_missing=validation.has_gaps)
    starved = ~_is_fed(moments, fa).reshape(fa.n_components, -1)
    measured = {
        "train": train.mean(log_prob, run),
        "validation": validation.mean(mixture.log_prob(validation.x), run),
        "starved": int(starved.any(1).sum()),
    }
    is_best = all(measured["validation"] > entry["validation"] for entry in run.history)
    return EMRun(
        current=_maximize(fa, moments, log_diagonal_floor),
        best=fa if is_best else run.best,
        history=(*run.history, measured),
    )


def _expect(fa: FactorAnalyzers, points: _Points, batch_size: int) -> tuple[Tensor, _Moments]:
    """Log-density of each point, nats, (N,), and the sums that the step from ``fa`` needs."""
    density = prepare_density(fa)
    wide = fa.to(torch.float64)
    centre = density.centre.double()
    cholesky, scaled = capacitance_cholesky(wide)
    regression = torch.cholesky_solve(scaled, cholesky)  # of z on x, (K, R, M)
    constant = torch.linalg.vecdot(regression, (wide.mean - centre).unsqueeze(1))  # (K, R)
    like = wide.log_weight, wide.mean, wide.mean, constant, cholesky, regression
    count, *sums = map(torch.zeros_like, like)
    posterior = torch.cholesky_inverse(cholesky)  # the same for every point
    moments = _Moments(count, count, *sums, posterior, centre.expand(wide.mean.shape))
    rows, offset = regression.to(fa.mean).flatten(0, 1), constant.to(fa.mean).flatten().unsqueeze(1)
    log_prob = []
    for part, weight in points.split(batch_size):
        joint = density.component_log_prob(part) + fa.log_weight
        log_prob.append(joint.logsumexp(1))
        share = (joint - log_prob[-1].unsqueeze(1)).exp().T  # (K, N)
        share = share if weight is None else share * weight
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


def _expect_observed(
    fa: FactorAnalyzers, points: _Points, batch_size: int
) -> tuple[Tensor, _Moments]:
    """Do what :func:`_expect` does for points with gaps, with a regression for each feature."""
    log_prob, sums = [], None
    for part, weight in points.split(min(batch_size, points_at_a_time(fa))):
        posterior = factor_posterior(part, fa)
        joint = posterior.log_prob + fa.log_weight
        log_prob.append(joint.logsumexp(1))
        share = (joint - log_prob[-1].unsqueeze(1)).exp()  # (N, K)
        share = share if weight is None else share * weight.unsqueeze(1)
        found = _observed_sums(part - fa.mean.mean(0), posterior, share)
        sums = found if sums is None else {name: sums[name] + found[name] for name in found}
    assert sums is not None  # there are points
    points_of_each = sums.pop("points")
    of = {name: value.transpose(-1, -2).flatten(-2).movedim(-1, 0) for name, value in sums.items()}
    return torch.cat(log_prob), _Moments(
        points=points_of_each,
        count=of["count"],
        x=of["x"].unsqueeze(1),
        square=of["square"].unsqueeze(1),
        factor=of["factor"],
        factor_square=of["factor_square"],
        cross=of["cross"].unsqueeze(2),
        posterior=of["covariance"] / of["count"][:, None, None],
        centre=fa.mean.mean(0).double().repeat(fa.n_components).unsqueeze(1),
    )


def _observed_sums(deviation: Tensor, posterior: FactorPosterior, share: Tensor) -> dict:
    """Sums of :class:`_Moments` over a batch for each feature, (..., M, K), float64.

    Args:
        deviation: Of the points from the centre, (N, M), NaN where nothing was observed.
        posterior: Of the factors.
        share: Responsibilities, (N, K).
    """
    seen = posterior.seen[posterior.pattern].T  # (M, N)
    deviation = deviation.nan_to_num(nan=0.0).T
    i, j, place = triangle(len(posterior.root), share.device)
    factor = posterior.mean  # (R, N, K)
    weighted = share * factor
    of_patterns = share.new_zeros(len(posterior.seen), share.shape[1]).double()
    of_patterns.index_add_(0, posterior.pattern, share.double())  # (P, K)
    root = posterior.root.double()
    covariance = (root[:, i] * root[:, j]).sum(0) * of_patterns  # (T, P, K), of z, summed
    return {
        "points": of_patterns.sum(0),
        "count": posterior.seen.double().T @ of_patterns,
        "x": (deviation @ share).double(),
        "square": (deviation.square() @ share).double(),
        "factor": (seen @ weighted).double(),
        "factor_square": (seen @ (weighted[i] * factor[j])).double()[place],
        "cross": (deviation @ weighted).double(),
        "covariance": (posterior.seen.double().T @ covariance)[place],
    }


def _is_fed(moments: _Moments, fa: FactorAnalyzers) -> Tensor:
    """Say which regressions have the points to be solved, (Q,)."""
    return moments.count >= fa.n_factors + 1


def _maximize(fa: FactorAnalyzers, moments: _Moments, log_diagonal_floor: float) -> FactorAnalyzers:
    """Take the step: the regressions of x on [z, 1], solved for deviations from the means."""
    fed = _is_fed(moments, fa)
    count = moments.count[fed, None]
    x, factor = moments.x[fed] / count, moments.factor[fed] / count  # means, (Q, W), (Q, R)
    spread = (
        moments.factor_square[fed] / count.unsqueeze(2)
        - factor.unsqueeze(2) * factor.unsqueeze(1)
        + moments.posterior[fed]
    )
    cross = moments.cross[fed] / count.unsqueeze(2) - factor.unsqueeze(2) * x.unsqueeze(1)
    cholesky, info = torch.linalg.cholesky_ex(spread)
    loading = torch.cholesky_solve(cross, cholesky)  # (Q, R, W)
    variance = moments.square[fed] / count - x.square() - (loading * cross).sum(1)
    mean = moments.centre[fed] + x - torch.linalg.vecdot(loading.mT, factor.unsqueeze(1))
    solved = (info == 0) & torch.isfinite(loading).all((1, 2))
    solved = solved & torch.isfinite(mean).all(1) & torch.isfinite(variance).all(1)
    if not bool(solved.all()):
        raise FloatingPointError(
            f"{int((~solved).sum())} of {len(moments.count)} regressions on the factors of "
            f"{fa.n_components} components are not finite: smallest log-variance "
            f"{fa.log_diagonal.min().item():.3g}, largest loading "
            f"{fa.loading.abs().max().item():.3g}; raise log_diagonal_floor (now "
            f"{log_diagonal_floor:g}), lower R (now {fa.n_factors}) or give float64"
        )
    # A weight of zero has no finite logarithm, and mixtures are kept with finite values only.
    points = moments.points.clamp(min=torch.finfo(fa.mean.dtype).tiny)
    # Rounding may leave a variance of zero or less: the floor stands for it.
    log_diagonal = variance.clamp(min=0).log().clamp(min=log_diagonal_floor)
    return FactorAnalyzers(
        log_weight=points.log().log_softmax(0).to(fa.mean),
        mean=_replaced(fa.mean, fed, mean),
        loading=_replaced(fa.loading, fed, loading.mT),
        log_diagonal=_replaced(fa.log_diagonal, fed, log_diagonal),
    )


def _replaced(old: Tensor, where: Tensor, new: Tensor) -> Tensor:
    """Replace what the regressions say: Q of them, each for W features of a component."""
    result, where = old.clone(), where.reshape(len(old), -1)  # (K, Q / K)
    result.unflatten(1, (where.shape[1], -1))[where] = new.to(old)
    return result


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
    infinite = points.isinf()
    if bool(infinite.any()):
        raise ValueError(
            f"{name} has {int(infinite.sum())} of {points.numel()} values that are infinite, in "
            f"{int(infinite.any(1).sum())} of {len(points)} points"
        )
    if name == "x" and bool((never := points.isnan().all(0)).any()):
        raise ValueError(
            f"feature {int(never.nonzero()[0])} of x is missing in every point: leave it out"
        )


def _check_weight(name: str, weight: Tensor, points: Tensor) -> Tensor:
    finite = weight.ndim == 1 and bool(torch.isfinite(weight).all())
    if len(weight) != len(points) or not finite or bool((weight < 0).any()) or not weight.any():
        raise ValueError(
            f"the weights of {name} must be {len(points)} numbers of 0 or more, not all 0: got "
            f"shape {tuple(weight.shape)}" + (f", from {weight.min()}" if finite else "")
        )
    return weight.to(points)
