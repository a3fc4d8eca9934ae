"""The loss of a mixture's training step, without the loop around it, which may be Lightning's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpmm.mixture import Mixture
from cpmm.trajectory import draw_pseudotimes


def path_cost(mixture: Mixture, times: Tensor | None = None) -> Tensor:
    r"""Kinetic cost of the means, straight between pseudotimes, averaged over the trajectories.

    .. math:: \frac{1}{C M} \sum_c \int \|d \mu_c / dt\|^2 dt

    Args:
        mixture: Its clusters are trajectories at G pseudotimes.
        times: These pseudotimes, ascending, (G,); None if they go evenly from 0 to 1.
    """
    means = mixture.components.mean.split(mixture.cluster_sizes)
    if times is None:
        lengths = [mean.diff(dim=0).square().sum(0) for mean in means]
        costs = [(x * max(1, len(mean) - 1)).mean() for x, mean in zip(lengths, means, strict=True)]
    else:
        step = times.diff()[:, None].clamp(min=1e-6)
        costs = [(mean.diff(dim=0).square() / step).sum(0).mean() for mean in means]
    return torch.stack(costs).mean()


def posterior_disagreement(own: Tensor, seen: Tensor, temperature: float) -> Tensor:
    r"""How far the clusters' posterior of points is from the posterior of their views.

    .. math:: \frac{1}{2 N} \sum_n KL(p_n \| q_n) + KL(q_n \| p_n), \quad
        p_n \propto \exp(\log \eta_c p(x_n | c) / T)

    with q of the views. At T = 1 posteriors in hundreds of dimensions are zero or one, and their
    gradients nothing or huge.

    Args:
        own: Log of weight times density of the points, nats, (N, C).
        seen: The same for their views.
        temperature: T, in nats.

    Returns:
        Nats, a scalar.
    """
    p, q = (own / temperature).log_softmax(1), (seen / temperature).log_softmax(1)
    return 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(1).mean()


@dataclass(frozen=True)
class MixtureOptions:
    """How a mixture is trained; the defaults switch off all but the likelihood.

    Attributes:
        noise: Deviation of the Gaussian noise added to training points (0.01 in the paper).
        learning_rate: Learning rate of Adam.
        n_warmup_epochs: Epochs of linear warm-up.
        seed: Seed of every random draw.
        n_pseudotimes: G of a training step.
        pseudotimes: How they are chosen, see :func:`draw_pseudotimes`.
        n_extracted: G at validation: that of the extracted mixture.
        pseudo_label_spaces: In the first spaces maximize log eta_c p(x | c) of each point's own
            group c, used as a pseudo-label; afterwards log p(x).
        pseudo_label_weight: Weight, afterwards, of the cross-entropy of the pseudo-labels under the
            clusters' posterior at ``temperature``.
        entropy_weight: Weight of the entropy of the clusters' mean responsibilities, nats.
        path_weight: Weight of the kinetic cost of the means, see :func:`path_cost`; keeps a
            trajectory from wandering over several groups of the data.
        consistency_weight: Weight of :func:`posterior_disagreement` between points and their views.
        temperature: Temperature of the posteriors in both, nats.
        initial_rate_factor: The initial states' learning rate in units of the field's.
        patience: Epochs on the input space without a better validation loss that end the training;
            None: none do.
        nan_is_missing: Whether NaN in the points stands for what was not observed: the likelihood
            is then that of the rest, still divided by M. Otherwise NaN ends the training.
    """

    noise: float
    learning_rate: float
    n_warmup_epochs: int
    seed: int
    n_pseudotimes: int = 1
    pseudotimes: str = "grid"
    n_extracted: int = 1
    pseudo_label_spaces: int = 0
    pseudo_label_weight: float = 0.0
    entropy_weight: float = 0.0
    path_weight: float = 0.0
    consistency_weight: float = 0.0
    temperature: float = 1.0
    initial_rate_factor: float = 1.0
    patience: int | None = None
    nan_is_missing: bool = False


def mixture_at(model: Any, times: Tensor, options: MixtureOptions) -> Mixture:
    """Mixture of a model at pseudotimes, (G,), which takes gaps if the options say so."""
    mixture = model.mixture(times)
    return mixture.allow_missing() if options.nan_is_missing else mixture


def mixture_loss(
    model: nn.Module,
    x: Tensor,
    options: MixtureOptions,
    generator: torch.Generator,
    group: Tensor | None = None,
    labelled: bool = False,
    view: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a training step.

    Args:
        model: The trajectories, or a direct mixture: ``mixture(times)`` is that at pseudotimes.
        x: Points, (N, M).
        options: Weights of what the loss consists of.
        generator: Source of the noise and of the pseudotimes.
        group: Pseudo-label of each point, (N,), integers in [0, C).
        labelled: Maximize the likelihood of points and groups, not of points alone.
        view: A view of each point, (N, M), for the consistency of their posteriors.

    Returns:
        The loss, a scalar, and its parts by name: ``train`` is the negative log-likelihood, nats
        per dimension.

    Raises:
        FloatingPointError: If a log-density is not finite.
    """
    if options.noise:
        x = x + options.noise * torch.randn(x.shape, generator=generator, device=x.device)
    times = draw_pseudotimes(options.pseudotimes, options.n_pseudotimes, generator)
    mixture = mixture_at(model, times.to(x), options)
    by_cluster = mixture.cluster_joint_log_prob(x)
    log_prob = by_cluster.logsumexp(1)
    if labelled and group is not None:  # of points and groups
        log_prob = by_cluster.gather(1, group[:, None]).squeeze(1)
    loss = -log_prob.mean() / x.shape[1]
    if not bool(torch.isfinite(loss)):
        raise FloatingPointError(_diagnosis(log_prob, mixture))
    parts = {"train": loss}
    if options.entropy_weight:
        share = by_cluster.log_softmax(1).logsumexp(0) - math.log(len(x))
        entropy = -(share.exp() * share).sum()
        loss = loss - options.entropy_weight * entropy
    if options.path_weight:
        drawn = None if options.pseudotimes == "grid" else times.to(x)
        loss = loss + options.path_weight * path_cost(mixture, drawn)
    if group is not None and not labelled:
        scores = by_cluster / options.temperature
        parts["cross_entropy"] = nn.functional.cross_entropy(scores, group)
        loss = loss + options.pseudo_label_weight * parts["cross_entropy"]
    if view is not None:
        seen = mixture.cluster_joint_log_prob(view)
        parts["disagreement"] = posterior_disagreement(by_cluster, seen, options.temperature)
        loss = loss + options.consistency_weight * parts["disagreement"]
    return loss, parts


def _diagnosis(log_prob: Tensor, mixture: Mixture) -> str:
    fa = mixture.components
    broken = [name for name, value in vars(fa).items() if not bool(torch.isfinite(value).all())]
    cause = f"{', '.join(broken)} not finite"
    if not broken:
        cause = (
            f"smallest diagonal variance {fa.log_diagonal.min().exp().item():.2g}, largest "
            f"mean {fa.mean.abs().max().item():.2g}"
        )
    bad = int((~torch.isfinite(log_prob)).sum())
    return (
        f"{bad} of {len(log_prob)} log-densities are not finite; {cause}: lower "
        "cpmm.learning_rate or cpmm.gradient_clip, or raise cpmm.log_diagonal_floor"
    )
