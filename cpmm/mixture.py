"""The hierarchical mixture of factor analyzers (Eq. 1 and 7), usable without any ODE."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from cpmm import conditioning
from cpmm.artifact import load_artifact, save_artifact
from cpmm.conditioning import (
    ConditionValues,
    ObservedDensity,
    prepare_observed_density,
    single,
    stack_conditions,
)
from cpmm.factor_analyzers import (
    FactorAnalyzers,
    PreparedDensity,
    prepare_density,
    sample_components,
)


@dataclass(frozen=True)
class Mixture:
    """K factor analyzers in C clusters.

    Attributes:
        components: The factor analyzers, cluster by cluster; their weights are eta_c pi_c(t_j).
        cluster_sizes: Number of components of each cluster, C numbers that sum to K.
        batch_size: Points that go through at a time without gradients; bounds memory.
        nan_is_missing: Whether NaN in a point stands for what was not observed, as
            :meth:`allow_missing` sets it: densities and posteriors are then of the rest. Otherwise
            NaN is a broken number, and its density is NaN.
    """

    components: FactorAnalyzers
    cluster_sizes: tuple[int, ...]
    batch_size: int = 2048
    nan_is_missing: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError if the sizes of the clusters do not sum to K."""
        if sum(self.cluster_sizes) != self.components.n_components or min(self.cluster_sizes) < 0:
            raise ValueError(
                f"cluster_sizes must sum to K = {self.components.n_components}, the number of "
                f"components: got {self.cluster_sizes}"
            )

    @property
    def n_clusters(self) -> int:
        """C."""
        return len(self.cluster_sizes)

    @property
    def n_features(self) -> int:
        """M."""
        return self.components.n_features

    @property
    def cluster(self) -> Tensor:
        """Cluster of each component, (K,), integers in [0, C)."""
        sizes = torch.tensor(self.cluster_sizes, device=self.components.mean.device)
        return torch.arange(self.n_clusters, device=sizes.device).repeat_interleave(sizes)

    def to(self, *args, **kwargs) -> Mixture:
        """Move to a device or floating-point type, as ``Tensor.to`` does."""
        return replace(self, components=self.components.to(*args, **kwargs))

    def allow_missing(self) -> Mixture:
        """Return the same mixture, for which NaN in a point stands for what was not observed.

        Its densities are those of the observed values alone; a point of nothing but NaN has the
        log-density 0, and the weights for its posterior.
        """
        return replace(self, nan_is_missing=True)

    def joint_log_prob(self, x: Tensor) -> Tensor:
        r"""Log of weight times density, :math:`\log \pi_k N(x; \mu_k, \Sigma_k)`, nats, (N, K)."""
        return self._density().component_log_prob(x) + self.components.log_weight

    def cluster_joint_log_prob(self, x: Tensor) -> Tensor:
        r"""Log of :math:`\eta_c p(x | c)` of Eq. 7, nats, (N, C)."""
        return self._by_cluster(self.joint_log_prob(x))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of points in the mixture's space (Eq. 1), nats, (N,).

        Without gradients the points go through in batches, so memory is bounded.

        Raises:
            ValueError: If ``x`` is not (N, M).
        """
        return self._batched(lambda joint: joint.logsumexp(1), x)

    def component_responsibilities(self, x: Tensor) -> Tensor:
        """Posterior of the components given the points, (N, K), rows sum to one; for users."""
        return self._batched(lambda joint: joint.softmax(1), x)

    def cluster_responsibilities(self, x: Tensor) -> Tensor:
        """Posterior of the clusters given the points, p(y = c | x) of section 3.2, (N, C)."""
        return self._batched(lambda joint: self._by_cluster(joint).softmax(1), x)

    def predict(self, x: Tensor) -> Tensor:
        """Most likely cluster of each point, (N,), integers in [0, C)."""
        return self._batched(lambda joint: self._by_cluster(joint).argmax(1), x)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw points and the components they come from.

        Args:
            n: Number of points.
            generator: On the device of the mixture.

        Returns:
            Points, (n, M), and component indices, (n,); ``cluster[index]`` gives clusters.
        """
        weight = self.components.log_weight.softmax(0)
        index = torch.multinomial(weight, n, replacement=True, generator=generator)
        return sample_components(self.components, index, generator), index

    @torch.no_grad()
    def impute(self, x: Tensor, image: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Fill what is NaN in points, (N, M), with its mean given the rest, (N, M).

        Args:
            x: Points.
            image: A function of each feature, (n, M) to (n, M): both what is observed and the means
                are then those of its values, see :func:`cpmm.conditioning.impute_image`.
        """
        if image is None:
            return conditioning.impute(x, self.components)
        return conditioning.impute_image(x, self.components, image)

    @torch.no_grad()
    def sample_missing(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Fill what is NaN in points, (N, M), with one draw given the rest, (N, M)."""
        return conditioning.sample_missing(x, self.components, generator)

    def marginal(self, features: Sequence[int]) -> Mixture:
        """Mixture of some features alone, in the order given; the clusters stay.

        Raises:
            ValueError: If there are none, one is out of range, or one comes twice.
        """
        self.require_features(features)
        return replace(self, components=conditioning.marginal(self.components, features))

    def conditional(self, observed: Mapping[int, float | Tensor]) -> Mixture:
        """Mixture of the other features given one value of each of some; the clusters stay.

        Raises:
            ValueError: As :meth:`conditionals`.
        """
        return single(self.conditionals(observed), "conditionals")

    def conditionals(self, observed: Mapping[int, ConditionValues]) -> list[Mixture]:
        """Return mixtures of the other features for B conditions at once; the clusters stay.

        Args:
            observed: For each feature that is given its B values, or one number for all. Loadings
                and variances are the same for all B and lie in memory once.

        Raises:
            ValueError: If a feature is out of range, none is given or none is left, a value is not
                a finite number, their numbers differ, or they have no density in numbers.
        """
        self.require_features(observed)
        if len(observed) == self.n_features:
            raise ValueError(
                f"all {self.n_features} features are given: leave out those that are asked for"
            )
        values = stack_conditions(observed).to(self.components.mean)
        found = conditioning.condition(self.components, list(observed), values)
        return [replace(self, components=components) for components in found]

    def require_features(self, features: Iterable[int]) -> None:
        """Raise ValueError if these are not one or more different features of the mixture."""
        features = list(features)
        in_range = all(0 <= feature < self.n_features for feature in features)
        if not features or not in_range or len(set(features)) < len(features):
            raise ValueError(
                f"expected one or more different features of 0 to {self.n_features - 1}: got "
                f"{features}"
            )

    def without_idle_components(self, x: Tensor) -> Mixture:
        """Drop the components that are the most likely one for none of the points ``x``, (N, M)."""
        best = self._batched(lambda joint: joint.argmax(1), x)
        keep = best.unique()
        sizes = torch.bincount(self.cluster[keep], minlength=self.n_clusters)
        return replace(
            self, components=self.components.select(keep), cluster_sizes=tuple(sizes.tolist())
        )

    def save(
        self,
        folder: str | os.PathLike,
        header: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write ``mixture.safetensors`` and ``mixture.json`` into ``folder``.

        Args:
            folder: Made if missing.
            header: Anything JSON can hold, kept beside the sizes.
            tensors: Tensors of the preprocessing, kept beside those of the components; their names
                have a dot.
        """
        fa = self.components
        sizes = {
            "n_components": fa.n_components,
            "n_features": fa.n_features,
            "n_factors": fa.n_factors,
            "cluster_sizes": list(self.cluster_sizes),
        }
        save_artifact(folder, "mixture", vars(fa) | dict(tensors or {}), sizes | dict(header or {}))

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        device: torch.device | str = "cpu",
        fingerprint: str | None = None,
    ) -> Mixture:
        """Read what :meth:`save` wrote, without any ODE; nothing is unpickled.

        Args:
            folder: Where it is.
            device: Where it goes.
            fingerprint: That of the configuration it must be of; None takes any.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, of another schema or configuration, or not a mixture.
        """
        tensors, header = load_artifact(folder, "mixture", device, fingerprint)
        names = {field.name for field in fields(FactorAnalyzers)}
        tensors = {name: value for name, value in tensors.items() if "." not in name}
        if set(tensors) != names:
            raise ValueError(f"{folder} holds tensors {sorted(tensors)}: expected {sorted(names)}")
        if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
            again = "extract the mixture again"
            raise ValueError(f"{folder} holds values that are not finite: {again}")
        sizes = header.get("cluster_sizes")
        if not isinstance(sizes, list) or not all(isinstance(size, int) for size in sizes):
            raise ValueError(
                f"{folder}: mixture.json states cluster_sizes {sizes!r}: expected C integers"
            )
        return cls(FactorAnalyzers(**tensors), tuple(sizes))

    def _density(self) -> PreparedDensity | ObservedDensity:
        prepare = prepare_observed_density if self.nan_is_missing else prepare_density
        return prepare(self.components)

    def _by_cluster(self, joint: Tensor) -> Tensor:
        if set(self.cluster_sizes) == {1}:  # nothing to sum, and hundreds of operations to do it
            return joint.contiguous()  # as the stack below is: sums over it round alike
        # A cluster that lost all its components gets the log of zero.
        parts = joint.split(self.cluster_sizes, 1)
        return torch.stack([part.logsumexp(1) for part in parts], 1)

    def _batched(self, reduce: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        # What ``reduce`` makes of the joint log-densities of the points, (N, K).
        if torch.is_grad_enabled() or len(x) <= self.batch_size:
            return reduce(self.joint_log_prob(x))
        density, log_weight = self._density(), self.components.log_weight
        joint = (density.component_log_prob(part) + log_weight for part in x.split(self.batch_size))
        return torch.cat([reduce(part) for part in joint])
