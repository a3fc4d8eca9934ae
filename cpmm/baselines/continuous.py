r"""A continuous mixture (Correia, Gala, Quaeghebeur, de Campos & Peharz, AAAI 2023).

.. math:: p(x) = \int N(z; 0, I) \, N(x; \mu(z), A(z) A(z)^\top + D(z)) \, dz

A network decodes a latent point z of few dimensions to a factor analyzer, and the integral is taken
by randomized quasi-Monte Carlo: that of any finite set of points is a mixture, a density itself. It
is the closest peer of a trajectory: with one latent dimension it is Eq. 2 with a decoder instead of
the ODE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from cpmm.factor_analyzers import FactorAnalyzers
from cpmm.fields import TimeFeatures, make_activation, stack_layers
from cpmm.mixture import Mixture
from cpmm.trajectory import StateLayout


class MLPDecoder(nn.Module):
    """Multilayer perceptron from the latent space to flat states (tabular data).

    Args:
        n_latent: Latent dimensions d.
        size: Size S of a state.
        width: Units of a hidden layer.
        depth: Number of hidden layers, at least 1.
        activation: A key of :data:`cpmm.fields.ACTIVATIONS`.
        n_frequencies: Sines and cosines of each latent coordinate beside itself.
    """

    def __init__(
        self,
        n_latent: int,
        size: int,
        width: int,
        depth: int,
        activation: str = "silu",
        n_frequencies: int = 0,
    ) -> None:
        super().__init__()
        self.features = TimeFeatures(n_frequencies)
        sizes = (n_latent * self.features.size, width, depth, size)
        self.layers = stack_layers("decoder", nn.Linear, *sizes, activation)

    def forward(self, z: Tensor) -> Tensor:
        """Decode latent points, (B, d), to states, (B, S)."""
        return self.layers(self.features(z).flatten(1))


class ConvDecoder(nn.Module):
    """Convolutional network from the latent space to states in image shape, coarse to fine.

    Args:
        n_latent: Latent dimensions d.
        shape: Shape of a state, (channels, height, width); S is their product.
        width: Hidden channels.
        n_doublings: Times that the image doubles its sides on the way; each has one convolution.
        activation: A key of :data:`cpmm.fields.ACTIVATIONS`.
        n_frequencies: Sines and cosines of each latent coordinate beside itself.
    """

    def __init__(
        self,
        n_latent: int,
        shape: Sequence[int],
        width: int,
        n_doublings: int = 2,
        activation: str = "silu",
        n_frequencies: int = 0,
    ) -> None:
        super().__init__()
        channels, height, columns = shape
        block = 2**n_doublings
        if n_doublings < 0 or height % block or columns % block:
            raise ValueError(
                f"a decoder of {n_doublings} doublings needs an image whose sides are multiples of "
                f"{block}: got {height} and {columns}"
            )
        if width < 1:
            raise ValueError(f"a decoder needs width >= 1: got {width}")
        self.features = TimeFeatures(n_frequencies)
        coarse = (width, height // block, columns // block)
        layers: list[nn.Module] = [
            nn.Linear(n_latent * self.features.size, 4 * width),
            make_activation(activation),
            nn.Linear(4 * width, coarse[0] * coarse[1] * coarse[2]),
            nn.Unflatten(1, coarse),
            make_activation(activation),
        ]
        for _ in range(n_doublings):
            layers += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(width, width, 3, padding=1),
                make_activation(activation),
            ]
        last = nn.Conv2d(width, channels, 3, padding=1)
        self.layers = nn.Sequential(*layers, last, nn.Flatten(1))

    def forward(self, z: Tensor) -> Tensor:
        """Decode latent points, (B, d), to states, (B, S)."""
        return self.layers(self.features(z).flatten(1))


class ContinuousMixture(nn.Module):
    """Factor analyzers decoded from a latent Gaussian, integrated out numerically.

    Trained by :class:`cpmm.training.loss.LossTraining` on its own loss, which draws the points anew
    at every step and validates on those that the extracted mixture has. Data should have about unit
    variances, as those of ``cpmm.data`` do: the decoder starts with such outputs.

    Args:
        decoder: From latent points, (B, d), to states relative to ``initial``, (B, S).
        layout: How a state is read: without augmentation or learned weights.
        initial: What is added to the decoder's output, (S,), learned like it, see
            :func:`initial_state`.
        n_latent: Latent dimensions d.
        n_points: Integration points of a training step.
        n_components: K of the extracted mixture, at validation.
    """

    def __init__(
        self,
        decoder: nn.Module,
        layout: StateLayout,
        initial: Tensor,
        n_latent: int,
        n_points: int,
        n_components: int,
    ) -> None:
        super().__init__()
        if layout.n_maps != layout.n_factors + 2:
            raise ValueError(
                "a continuous mixture has no augmented state and equal weights: expected a layout "
                f"with augmentation 0 and no learned_weight, got {layout.augmentation} and "
                f"{layout.learned_weight}"
            )
        if initial.shape != (layout.size,):
            raise ValueError(f"initial must be ({layout.size},): got {tuple(initial.shape)}")
        if n_latent < 1 or min(n_points, n_components) < n_latent:
            raise ValueError(
                f"a latent space of {n_latent} dimensions with {n_points} integration points and "
                f"{n_components} components: expected 1 <= n_latent <= n_points and n_components"
            )
        self.decoder, self.layout = decoder, layout
        self.initial = nn.Parameter(initial.clone())
        self.n_latent, self.n_points, self.n_components = n_latent, n_points, n_components

    def decode(self, z: Tensor) -> FactorAnalyzers:
        """Factor analyzers of latent points, (K, d), with equal weights; differentiable."""
        mean, loading, log_diagonal, log_weight = self.layout.read(self.initial + self.decoder(z))
        return FactorAnalyzers(log_weight.log_softmax(0), mean, loading, log_diagonal)

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Negative log-density, nats per dimension, a scalar.

        While training that of ``n_points`` freshly rotated points: its expectation bounds that of
        the integral from above. Otherwise that of the extracted mixture, whatever the generator.

        Args:
            x: Points, (N, M).
            generator: Source of the rotation.
        """
        if self.training:
            shift = torch.rand(self.n_latent, generator=generator, device=generator.device)
            mixture = self._integrate(self.n_points, shift)
        else:
            mixture = self.extract(self.n_components)
        return -mixture.log_prob(x).mean() / x.shape[1]

    def extract(self, n_components: int, separate: bool = False) -> Mixture:
        """Decode a fixed set of points: a plain mixture with no network left; differentiable.

        Args:
            n_components: K.
            separate: Whether each component is a cluster of its own, to be merged, or all are one.
        """
        mixture = self._integrate(n_components, self.initial.new_zeros(self.n_latent))
        return replace(mixture, cluster_sizes=(1,) * n_components) if separate else mixture

    def _integrate(self, n: int, shift: Tensor) -> Mixture:
        z = integration_points(n, self.n_latent, shift)
        return Mixture(self.decode(z.to(self.initial)), (n,))


def integration_points(n: int, n_latent: int, shift: Tensor) -> Tensor:
    """Quasi-Monte Carlo points of a standard Gaussian: Hammersley's set, rotated.

    The first coordinate is evenly spaced, for any ``n``; the others are Sobol's. All lie in the
    middle of their cells, are rotated around the unit cube (Cranley & Patterson, 1976), which makes
    every point uniform if the shift is, and go through the inverse of the normal distribution
    function.

    Args:
        n: Number of points.
        n_latent: Latent dimensions d.
        shift: In the unit cube, (d,); only its fractional part counts.

    Returns:
        (n, d), float64.

    Raises:
        ValueError: If ``n`` is less than 1.
    """
    if n < 1:
        raise ValueError(f"the number of integration points must be at least 1: got {n}")
    cube = torch.arange(n, dtype=torch.float64)[:, None] / n
    if n_latent > 1:
        sobol = torch.quasirandom.SobolEngine(n_latent - 1).draw(n, dtype=torch.float64)
        cube = torch.cat([cube, sobol], 1)
    cube = (cube.to(shift.device) + 0.5 / n + shift.double()) % 1
    return torch.special.ndtri(cube.clamp(1e-9, 1 - 1e-9))  # six deviations: zero and one have no z


def initial_state(
    layout: StateLayout, x: Tensor, generator: torch.Generator, loading_scale: float = 0.1
) -> Tensor:
    """State to start from: mean and variances of the data, small random loadings.

    Args:
        layout: How a state is read, without augmentation.
        x: Training points, (N, M).
        generator: Source of the loadings.
        loading_scale: Deviation of the loadings, in units of the data's.

    Returns:
        (S,), float32.
    """
    spread = x.std(0, correction=0).clamp(min=1e-6).float()
    noise = torch.randn(layout.n_features, layout.n_factors, generator=generator)
    variance = spread.square()
    if layout.diagonal == "constant":
        variance = variance.mean().expand_as(variance)
    log_diagonal = variance.log().clamp(min=layout.log_diagonal_floor + 0.1)
    loading = loading_scale * spread[:, None] * noise.to(spread)
    return layout.write(x.mean(0).float(), loading, log_diagonal, spread.new_zeros(0, len(spread)))
