"""Where the mixtures of the estimators start, and which start is taken."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from cpmm.estimators.em import (
    EMOptions,
    EMResult,
    fit_to_scatter,
    pooled_covariance,
    with_factors,
)
from cpmm.factor_analyzers import FactorAnalyzers
from cpmm.initialization import fill_gaps, kmeans, local_factor_analyzers
from cpmm.mixture import Mixture

N_POINTS = 5000  # that starts are looked for in
N_SHORT = 10  # steps of each start
N_KEPT = 3  # starts that go on to the end
MANY = 16  # components, of more than which there are two starts, and one goes on


@dataclass(frozen=True)
class Fit:
    """A mixture that has been fitted.

    Attributes:
        result: The likeliest.
        prior: The covariance that its prior has, (M, M).
        agreed: Whether another start has come to the same clusters, or to a likelihood as good.
    """

    result: EMResult
    prior: Tensor
    agreed: bool


def fit_from_starts(
    x: Tensor,
    weight: Tensor,
    n_components: int,
    n_factors: int,
    options: EMOptions,
    n_init: int,
    generator: torch.Generator,
    listener: Callable[[int, float], None] | None = None,
) -> Fit:
    """Fit a mixture from several starts, of which the likeliest is taken.

    Each start goes a few steps on some of the points; the best go on with all, and then the prior
    is the covariance of points about the means of their own components.

    Args:
        x: Points, (N, M), float64.
        weight: Of each point, more than 0, (N,).
        n_components: K, no more than there are distinct points.
        n_factors: R.
        options: How far to go, and the prior's weight.
        n_init: Starts: k-means, pieces merged, k-means of whitened points, and so on.
        generator: Source of every draw, on the CPU.
        listener: As in :func:`cpmm.estimators.em.fit_to_scatter`.
    """
    some, w = x, weight
    if len(x) > N_POINTS and n_components > 1:
        index = torch.multinomial(weight.cpu(), N_POINTS, generator=generator).to(x.device)
        some, w = x[index], torch.ones_like(weight[index])
    short, floor = replace(options, n_iterations=N_SHORT), options.log_diagonal_floor
    filled, begun = fill_gaps(some, n_factors, floor), []
    n_init, n_kept = (min(n_init, 2), 1) if n_components > MANY else (n_init, N_KEPT)
    for label in partitions(filled, n_components, n_init, generator):
        start = local_factor_analyzers(filled, label, n_components, n_factors, floor, 1.0)
        prior = _within(filled, label, w)
        begun.append(fit_to_scatter(start, some, w, prior, short))
    begun.sort(key=lambda result: -result.log_likelihood)
    fits = []
    for result in begun[:n_kept]:
        prior = pooled_covariance(result.components, some, w)
        ended = fit_to_scatter(result.components, x, weight, prior, options, listener)
        fits.append(Fit(ended, prior, True))
    fits.sort(key=lambda fit: -fit.result.log_likelihood)
    results = [fit.result for fit in fits]
    agreed = _agree([result.components for result in results], some) or _as_good(results)
    return replace(fits[0], agreed=agreed)


def fit_again(
    fit: Fit, x: Tensor, weight: Tensor, n_factors: int, options: EMOptions, **more: Any
) -> Fit:
    """Fit a mixture that starts at the components of another, of any number of factors."""
    fa = fit.result.components
    prior = pooled_covariance(fa, x, weight)
    if fa.n_factors != n_factors:
        fa = with_factors(fa, x, weight, n_factors, prior, options)
    return replace(fit, result=fit_to_scatter(fa, x, weight, prior, options, **more), prior=prior)


def _as_good(ended: list[EMResult]) -> bool:
    return len(ended) > 1 and ended[0].log_likelihood - ended[1].log_likelihood < 1e-3


def _agree(fits: list[FactorAnalyzers], x: Tensor) -> bool:
    """Whether the first has found the clusters of another."""
    labels = [Mixture(fa, (1,) * len(fa.mean)).allow_missing().predict(x).cpu() for fa in fits]
    scores = [adjusted_rand_score(labels[0], label) for label in labels[1:]]
    return not scores or max(scores) > 0.9


def _within(x: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Pooled covariance of groups, (M, M)."""
    member = torch.nn.functional.one_hot(label).to(x) * weight.unsqueeze(1)
    mean = (member / member.sum(0)).T @ x
    deviation = x - mean[label]
    return (deviation * weight.unsqueeze(1)).T @ deviation / weight.sum()


def partitions(
    x: Tensor, n_groups: int, n_init: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Group points in several ways, (N,) each, integers in [0, K), none of the groups empty."""
    if n_groups == 1:
        yield torch.zeros(len(x), dtype=torch.long, device=x.device)
        return
    points = x.cpu()
    white = _whitened(points)
    for i in range(n_init):
        if i in (1, 4):
            label = merged_pieces(white, n_groups, generator)
        else:
            space = white if i % 2 == 0 and i else points
            label = kmeans(space, n_groups, generator, n_init=1 if i else 4)
        yield label.to(x.device)


def _whitened(x: Tensor, smallest: float = 1e-6) -> Tensor:
    """Points along the principal axes of all, each of unit variance; the largest comes last."""
    value, vector = torch.linalg.eigh(torch.cov(x.T).reshape(x.shape[1], -1))
    return (x - x.mean(0)) @ vector / value.clamp(min=smallest * value[-1]).sqrt()


def merged_pieces(
    x: Tensor, n_groups: int, generator: torch.Generator, n_points: int = 2000, n_axes: int = 20
) -> Tensor:
    r"""Group points by small pieces of k-means that are merged while their Gaussians allow it.

    The two pieces are merged that lower the likelihood of a Gaussian for each group least, as in
    model-based hierarchical clustering (Fraley, 1998), so that long, thin groups hold together
    where k-means cuts across them.

    Args:
        x: Points, (N, M), on the CPU, whitened: then the pieces of thin groups are small enough.
        n_groups: K.
        generator: Source of every draw.
        n_points: Points that are looked at; each other joins its nearest piece.
        n_axes: Last features that are looked at.

    Returns:
        (N,), integers in [0, K).
    """
    x = x[:, -n_axes:]
    n = min(len(x), n_points)
    n_pieces = min(len(x), max(2 * n_groups, min(n // 8, 150)))
    piece = kmeans(x, n_pieces, generator, n_init=1, n_points=n_points)
    member = torch.nn.functional.one_hot(piece).to(x)
    count = member.sum(0)
    mean = member.T @ x / count[:, None]
    deviation = x - mean[piece]
    scatter = torch.stack([d.T @ d for d in (deviation[piece == k] for k in range(n_pieces))])
    # As if of a point more, of the pooled spread and a trace of that of all.
    scatter = scatter + scatter.sum(0) / count.sum() + 1e-6 * torch.eye(x.shape[1]).to(x)

    def cost(count: Tensor, scatter: Tensor) -> Tensor:
        return count * torch.linalg.slogdet(scatter / (count + 1)[..., None, None])[1]

    def joined(i: Tensor | int, j: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = count[i] + count[j]
        apart = mean[i] - mean[j]
        outer = apart.unsqueeze(-1) * apart.unsqueeze(-2)
        both = scatter[i] + scatter[j] + (count[i] * count[j] / total)[..., None, None] * outer
        return total, (count[i, None] * mean[i] + count[j, None] * mean[j]) / total[:, None], both

    group = torch.arange(n_pieces)
    own = cost(count, scatter)
    loss = torch.full((n_pieces, n_pieces), torch.inf, dtype=x.dtype)
    for i in range(n_pieces - 1):
        j = torch.arange(i + 1, n_pieces)
        total, _, both = joined(torch.full_like(j, i), j)
        loss[i, j] = cost(total, both) - own[i] - own[j]
    for _ in range(n_pieces - n_groups):
        i, j = divmod(int(loss.argmin()), n_pieces)
        total, centre, both = joined(torch.tensor([i]), torch.tensor([j]))
        count[i], mean[i], scatter[i], own[i] = total[0], centre[0], both[0], cost(total, both)[0]
        group[group == j] = i
        loss[j], loss[:, j] = torch.inf, torch.inf
        others = group.unique()
        others = others[others != i]
        total, _, both = joined(torch.full_like(others, i), others)
        new = cost(total, both) - own[i] - own[others]
        low, high = others.clamp(max=i), others.clamp(min=i)
        loss[low, high] = new
    return group.unique(return_inverse=True)[1][piece]


def warn_of_disagreement(name: str, n_init: int) -> None:
    """Say that the likeliest start stands alone, and what to try."""
    warnings.warn(
        f"the best of {n_init} starts has found clusters that no other start has: raise n_init, "
        f"now {n_init}, compare other values of {name}, or fit with other values of random_state",
        UserWarning,
        stacklevel=4,
    )
