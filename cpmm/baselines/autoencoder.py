"""An autoencoder and k-means on its codes: clusters by a representation, without a density."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cpmm.initialization import kmeans, require_clusters

LIKELIHOODS = ("gaussian", "bernoulli")
BATCH = 4096  # points that go through at a time where no gradient is kept


class Autoencoder(nn.Module):
    """Two multilayer perceptrons, to a code and back: M-500-500-2000-d-2000-500-500-M in VaDE.

    Args:
        n_features: M.
        hidden: Units of the encoder's hidden layers, ReLU; the decoder has them in reverse. Without
            any both are linear.
        code_size: d.
        likelihood: Of a point given its code. "gaussian": a linear output and the mean squared
            error, for points in any range; "bernoulli": a sigmoid and the cross-entropy, for grey
            levels in [0, 1].
        generator: Source of the initial weights (He et al., 2015), on the CPU.

    Raises:
        ValueError: If a size is not positive, or the likelihood unknown.
    """

    def __init__(
        self,
        n_features: int,
        hidden: Sequence[int],
        code_size: int,
        likelihood: str,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        sizes = (n_features, *hidden, code_size)
        if min(sizes) < 1:
            raise ValueError(f"the autoencoder's layers are {sizes}: expected positive sizes")
        if likelihood not in LIKELIHOODS:
            known = ", ".join(LIKELIHOODS)
            raise ValueError(f"likelihood is {likelihood!r}: choose one of {known}")
        self.n_features, self.code_size, self.likelihood = n_features, code_size, likelihood
        self.encoder = _hidden_layers(sizes[:-1], generator)
        self.code = _linear(sizes[-2], code_size, "linear", generator)
        self.decoder = _hidden_layers(sizes[:0:-1], generator)
        self.output = _linear(sizes[1], n_features, "linear", generator)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of points, (N, M) to (N, d)."""
        return self.code(self.encoder(self.checked(x)))

    def decode(self, h: Tensor) -> Tensor:
        """Points of codes, (N, d) to (N, M); of "bernoulli" in (0, 1)."""
        if h.shape[-1] != self.code_size:
            raise ValueError(
                f"codes have {h.shape[-1]} numbers, the autoencoder's {self.code_size}: got shape "
                f"{tuple(h.shape)}"
            )
        output = self.output(self.decoder(h))
        return output.sigmoid() if self.likelihood == "bernoulli" else output

    def loss(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Error of reconstruction, averaged over points and features, a scalar.

        Args:
            x: Points, (N, M).
            generator: Not used; :class:`cpmm.training.loss.LossTraining` hands one to every model.

        Returns:
            The squared error in units of ``x``, or nats of cross-entropy.
        """
        output = self.output(self.decoder(self.encode(x)))
        if self.likelihood == "bernoulli":
            return functional.binary_cross_entropy_with_logits(output, x)
        return functional.mse_loss(output, x)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Codes of many points, in batches and without gradients, on the CPU, (N, d).

        Raises:
            FloatingPointError: If a code is not finite.
        """
        codes = in_batches(lambda part: self.encode(part).cpu(), x)
        bad = int((~torch.isfinite(codes).all(1)).sum())
        if bad:
            raise FloatingPointError(
                f"the codes of {bad} of {len(x)} points are not finite: the autoencoder has "
                "diverged; lower the learning rate or the gradient clip"
            )
        return codes

    def cluster(
        self, x: Tensor, n_clusters: int, generator: torch.Generator, n_init: int = 20
    ) -> CodeClusters:
        """Cluster points by k-means on their codes.

        Args:
            x: Points, (N, M).
            n_clusters: C.
            generator: Source of every draw, on the CPU.
            n_init: Starts of k-means, of which that of the least inertia is taken.

        Raises:
            TooFewPointsError: If there are fewer points, or distinct codes, than clusters.
        """
        require_clusters(n_clusters, len(x))
        codes = self.codes(x)
        group = kmeans(codes, n_clusters, generator, n_init)
        centre = torch.stack([codes[group == c].mean(0) for c in range(n_clusters)])
        return CodeClusters(self, centre.to(x.device))

    def checked(self, x: Tensor) -> Tensor:
        """Return points as they are.

        Raises:
            ValueError: If they are not (N, M), not in the type of the weights, or, for "bernoulli",
                not in [0, 1].
        """
        if x.ndim != 2 or x.shape[1] != self.n_features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: expected (N, {self.n_features}), the autoencoder's "
                "features"
            )
        if x.dtype != self.output.weight.dtype:
            raise ValueError(
                f"x is {x.dtype}, the autoencoder {self.output.weight.dtype}: convert it (whole "
                "grey levels are divided by the largest, 255)"
            )
        if self.likelihood == "bernoulli":
            outside = ~((x >= 0) & (x <= 1))  # so that NaN is outside
            if bool(outside.any()):
                raise ValueError(
                    f"{int(outside.sum())} of {x.numel()} values of x are outside [0, 1], which "
                    "the Bernoulli likelihood needs: divide grey levels by the largest and add no "
                    'noise, or make the autoencoder with likelihood "gaussian"'
                )
        return x


class CodeClusters(nn.Module):
    """Clusters in the codes of an autoencoder; a point belongs to the nearest centre.

    Args:
        autoencoder: Gives the codes; it is held, not copied.
        centre: Centre of each cluster, a code, (C, d).
    """

    centre: Tensor

    def __init__(self, autoencoder: Autoencoder, centre: Tensor) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.register_buffer("centre", centre)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Cluster of each point, (N,), integers in [0, C)."""

        def nearest(part: Tensor) -> Tensor:
            codes = self.autoencoder.encode(part)
            return (codes[:, None] - self.centre).square().sum(2).argmin(1)

        return in_batches(nearest, x)


def in_batches(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply ``function`` to rows of points, batch by batch, so that memory is bounded."""
    return torch.cat([function(part) for part in x.split(BATCH)])


def _hidden_layers(sizes: Sequence[int], generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [_linear(inputs, outputs, "relu", generator), nn.ReLU()]
    return nn.Sequential(*layers)


def _linear(
    inputs: int, outputs: int, follows: Literal["linear", "relu"], generator: torch.Generator
) -> nn.Linear:
    """Make a layer that keeps the variance of what goes through, given what ``follows`` it."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)  # torch's own draws have no generator
    nn.init.kaiming_normal_(layer.weight, nonlinearity=follows, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
