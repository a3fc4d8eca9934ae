"""Clusters of a mixture one by one: how heavy, and where, in the units of the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpmm.distribution import MixtureDistribution
from cpmm.mixture import Mixture

if TYPE_CHECKING:
    from cpmm.fitted import FittedMixture

N_DRAWS = 1000  # for means that have no closed form


@dataclass(frozen=True)
class Cluster:
    """One cluster.

    Attributes:
        index: Its number, as ``cluster_responsibilities`` counts.
        weight: Its share of the probability.
        fitted: The mixture of its components alone.
    """

    index: int
    weight: float
    fitted: FittedMixture

    @property
    def name(self) -> str:
        """Number and share, for a legend."""
        return f"cluster {self.index} ({100 * self.weight:.0f} %)"

    @torch.no_grad()
    def mean(self) -> Tensor:
        """Mean in the units of the data, (M,), float64; of grey levels not rounded.

        Behind a whitening and a logit there is no closed form: it is that of 1,000 draws.
        """
        fitted = self.fitted
        pre, mixture = fitted.preprocessing, fitted.mixture
        if pre.is_affine:
            return pre.inverse(MixtureDistribution(mixture).mean[None])[0].double()
        generator = torch.Generator(mixture.components.mean.device).manual_seed(0)
        try:
            gap = torch.full((1, fitted.n_features), torch.nan)
            return fitted.impute(gap, generator)[0]
        except ValueError:  # the preprocessing whitens
            return fitted.sample(N_DRAWS, generator)[0].double().mean(0)


def clusters_of(fitted: FittedMixture) -> list[Cluster]:
    """Clusters that have components, the heaviest first."""
    mixture = fitted.mixture
    weight = mixture.components.log_weight.softmax(0)
    found = []
    for index in range(mixture.n_clusters):
        own = (mixture.cluster == index).nonzero().flatten()
        if len(own):
            alone = Mixture(mixture.components.select(own), (len(own),), mixture.batch_size)
            share = float(weight[own].sum())
            found.append(Cluster(index, share, replace(fitted, mixture=alone)))
    return sorted(found, key=lambda cluster: -cluster.weight)


@torch.no_grad()
def standardized(fitted: FittedMixture) -> tuple[list[Cluster], Tensor, Tensor]:
    """Clusters, the heaviest first, in deviations of the whole mixture from its mean.

    Returns:
        The C clusters, their means and their deviations, (C, M), a feature in units of its
        deviation over the whole mixture, in the mixture's space: of a table's columns themselves,
        or behind the logit for grey levels.

    Raises:
        ValueError: If the preprocessing whitens, which mixes all features.
    """
    fitted.preprocessing.require_elementwise()
    whole, clusters = MixtureDistribution(fitted.mixture), clusters_of(fitted)
    centre, scale = whole.mean, whole.variance.sqrt()
    each = [MixtureDistribution(cluster.fitted.mixture) for cluster in clusters]
    mean = torch.stack([one.mean for one in each])
    deviation = torch.stack([one.variance for one in each]).sqrt()
    return clusters, (mean - centre) / scale, deviation / scale


def telling(clusters: list[Cluster], mean: Tensor, n: int) -> list[int]:
    """Features whose standardized means, (C, M), differ most; n at most, in their order."""
    weight = mean.new_tensor([cluster.weight for cluster in clusters])
    spread = weight @ mean.square()
    return sorted(spread.argsort(descending=True, stable=True)[:n].tolist())
