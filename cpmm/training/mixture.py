"""Training of a mixture by gradient ascent through a curriculum of spaces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpmm.mixture import Mixture
from cpmm.spaces import Curriculum
from cpmm.training.epochs import Recorded
from cpmm.trajectory import draw_pseudotimes, pseudotime_grid


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


class MixtureTraining(Recorded):
    """Train a mixture by maximum likelihood through a curriculum of spaces (section 3.3).

    Args:
        model: The trajectories, or a direct mixture: ``mixture(times)`` is that at pseudotimes.
        curriculum: Which space each epoch trains on.
        options: Weights of the loss, and how to step.
    """

    def __init__(self, model: nn.Module, curriculum: Curriculum, options: MixtureOptions) -> None:
        super().__init__(
            model,
            options.learning_rate,
            curriculum.n_epochs,
            curriculum.n_guided_epochs,
            options.n_warmup_epochs,
            options.seed,
        )
        self.patience = options.patience
        self.curriculum = curriculum
        self.options = options
        n_spaces = min(options.pseudo_label_spaces, curriculum.n_spaces)
        self.pseudo_label_epochs = n_spaces * curriculum.epochs_per_space

    def describe_epoch(self) -> dict[str, float]:
        """Index of the epoch's space, V while fine-tuning."""
        space = self.curriculum.space(self.current_epoch)
        return {"space": float(self.curriculum.n_spaces if space is None else space)}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The initial states may learn faster than the field: they carry whole trajectories."""
        named = dict(self.named_parameters())
        fast = named.pop("model.initial", None)
        slow = {"params": [parameter for parameter in named.values() if parameter.requires_grad]}
        rate = self.options.learning_rate * self.options.initial_rate_factor
        return [slow] if fast is None else [slow, {"params": [fast], "lr": rate}]

    def describe_phase(self) -> str:
        """Say which space is being trained on."""
        space = self.curriculum.space(self.current_epoch)
        if space is None:
            return "fine-tuning"
        return f"space {space + 1}/{self.curriculum.n_spaces}"

    def is_candidate(self) -> bool:
        """Only weights trained on the input space may be chosen."""
        return self.measures_density(self.current_epoch)

    def measures_density(self, epoch: int) -> bool:
        """In the spaces of a curriculum a likelihood says nothing of the data's density."""
        return self.curriculum.space(epoch) is None

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """One step up the likelihood.

        A batch holds points ``x``; if they have pseudo-labels, their ``group``; and if consistency
        has a weight, a ``view`` of each.
        """
        options, x = self.options, batch["x"]
        if options.noise:
            x = x + options.noise * torch.randn(x.shape, generator=self._generator, device=x.device)
        times = draw_pseudotimes(options.pseudotimes, options.n_pseudotimes, self._generator)
        with self.located():
            mixture = self._mixture_at(times.to(x))
            by_cluster = mixture.cluster_joint_log_prob(x)
            log_prob = by_cluster.logsumexp(1)
            labelled = self.current_epoch < self.pseudo_label_epochs
            if labelled:  # of points and groups
                log_prob = by_cluster.gather(1, batch["group"][:, None]).squeeze(1)
            loss = -log_prob.mean() / x.shape[1]
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(self._diagnosis(log_prob, mixture))
        self._record("train", loss, len(x))
        if options.entropy_weight:
            share = by_cluster.log_softmax(1).logsumexp(0) - math.log(len(x))
            entropy = -(share.exp() * share).sum()
            loss = loss - options.entropy_weight * entropy
        if options.path_weight:
            drawn = None if options.pseudotimes == "grid" else times.to(x)
            loss = loss + options.path_weight * path_cost(mixture, drawn)
        if "group" in batch and not labelled:
            cross_entropy = nn.functional.cross_entropy(
                by_cluster / options.temperature, batch["group"]
            )
            self._record("cross_entropy", cross_entropy, len(x))
            loss = loss + options.pseudo_label_weight * cross_entropy
        if "view" in batch:
            seen = mixture.cluster_joint_log_prob(batch["view"])
            disagreement = posterior_disagreement(by_cluster, seen, options.temperature)
            self._record("disagreement", disagreement, len(x))
            loss = loss + options.consistency_weight * disagreement
        return loss

    def on_validation_epoch_start(self) -> None:
        """Solve the ODE once for all validation rows."""
        like = next(self.parameters())
        with self.located():
            self._mixture = self._mixture_at(pseudotime_grid(self.options.n_extracted, like))

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Nats per dimension of held-out rows, without noise."""
        x = batch["x"]
        with self.located():
            log_prob = self._mixture.log_prob(x)
        self._record("validation", -log_prob.mean() / x.shape[1], len(x))

    def _mixture_at(self, times: Tensor) -> Mixture:
        mixture = self.model.mixture(times)
        return mixture.allow_missing() if self.options.nan_is_missing else mixture

    def _diagnosis(self, log_prob: Tensor, mixture: Mixture) -> str:
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
