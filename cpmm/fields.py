"""Vector fields: the networks on the right-hand side of an ODE (section 2.2).

A field maps a time and a batch of states to their velocities, ``field(t, h)``, torchdiffeq's order.
States are flat, (B, S); the convolutional field folds them into image shape itself, so that
solvers, trajectories and the teacher see one layout.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector


class Sine(nn.Module):
    """The sine as an activation; the paper finds its ODEs less prone to stiffness than tanh's."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the sine elementwise."""
        return torch.sin(x)


ACTIVATIONS = {"sin": Sine, "tanh": nn.Tanh, "softplus": nn.Softplus, "silu": nn.SiLU}


def make_activation(name: str) -> nn.Module:
    """Build the activation called ``name``.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: choose one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


class TimeFeatures(nn.Module):
    """Time as ``1 + 2 n`` numbers: t itself, and n sines and cosines of growing frequency."""

    frequencies: Tensor

    def __init__(self, n_frequencies: int = 0) -> None:
        super().__init__()
        self.register_buffer(
            "frequencies", math.pi * 2.0 ** torch.arange(n_frequencies), persistent=False
        )

    @property
    def size(self) -> int:
        """Number of features."""
        return 1 + 2 * len(self.frequencies)

    def forward(self, t: Tensor) -> Tensor:
        """Map times, (B,), to features, (B, size)."""
        angles = t.unsqueeze(-1) * self.frequencies
        return torch.cat([t.unsqueeze(-1), angles.sin(), angles.cos()], -1)


def stack_layers(
    owner: str,
    layer: Callable[[int, int], nn.Module],
    n_in: int,
    width: int,
    depth: int,
    n_out: int,
    activation: str,
    last_scale: float = 1.0,
) -> nn.Sequential:
    """Stack ``depth`` hidden layers, and a last one whose weights are scaled.

    Raises:
        ValueError: If there are no layers or no units; it names the ``owner``.
    """
    if depth < 1 or width < 1:
        raise ValueError(f"a {owner} needs depth >= 1 and width >= 1: got {depth} and {width}")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([n_in, *[width] * depth]):
        layers += [layer(inputs, outputs), make_activation(activation)]
    last = layer(width, n_out)
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.mul_(last_scale)
    return nn.Sequential(*layers, last)


def _batch_of_times(t: Tensor, h: Tensor) -> Tensor:
    return t.to(h).expand(len(h))


class MLPField(nn.Module):
    """Multilayer perceptron on the flat state with an explicit dependence on time (tabular data).

    Args:
        size: Size S of the state.
        width: Units of a hidden layer.
        depth: Number of hidden layers, at least 1.
        activation: A key of :data:`ACTIVATIONS`.
        n_frequencies: Sines and cosines of time beside time itself.
        last_layer_scale: The last layer's initial weights are multiplied by this; small values
            start the ODE near the identity.
    """

    def __init__(
        self,
        size: int,
        width: int,
        depth: int,
        activation: str = "sin",
        n_frequencies: int = 0,
        last_layer_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.time = TimeFeatures(n_frequencies)
        sizes = (size + self.time.size, width, depth, size)
        self.layers = stack_layers("field", nn.Linear, *sizes, activation, last_layer_scale)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """Velocity of states ``h``, (B, S), at time ``t``, a scalar or (B,)."""
        return self.layers(torch.cat([h, self.time(_batch_of_times(t, h))], 1))


@dataclass(frozen=True)
class Blocks:
    """Another order of stacked images: square blocks of pixels become channels (as in RealNVP).

    Attributes:
        height: Height of an image.
        width: Width of an image.
        side: Side of a block.
    """

    height: int
    width: int
    side: int

    def __post_init__(self) -> None:
        """Raise ValueError if they do not."""
        if self.side < 1 or self.height % self.side or self.width % self.side:
            raise ValueError(
                f"field.squeeze is {self.side}: expected a divisor of the image's sides, "
                f"{self.height} and {self.width}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of a channel, in blocks."""
        return self.height // self.side, self.width // self.side

    def fold(self, h: Tensor) -> Tensor:
        """Reorder stacks of images, (..., S); each image stays together, so stacks may be cut."""
        image = h.unflatten(-1, (-1, self.height, self.width))
        return nn.functional.pixel_unshuffle(image, self.side).flatten(-3)

    def unfold(self, h: Tensor) -> Tensor:
        """Undo :meth:`fold`."""
        image = h.unflatten(-1, (-1, *self.shape))
        return nn.functional.pixel_shuffle(image, self.side).flatten(-3)


class ConvField(nn.Module):
    """Convolutional network on the state in image shape, time as extra channels (section 3.1).

    Args:
        shape: Shape of a state, (channels, height, width); S is their product.
        width: Hidden channels (64 in the paper).
        depth: Number of hidden layers, at least 1; the paper's depth of 3 counts the output layer.
        activation: A key of :data:`ACTIVATIONS`.
        n_frequencies: Sines and cosines of time beside time itself.
        last_layer_scale: The last layer's initial weights are multiplied by this.
        kernel_size: Odd side of the square kernels.
        coordinates: Whether two channels carry the row and column, each in [-1, 1].
        squeeze: Side of the square blocks of pixels that become channels for the network, undone at
            its end: 2 takes a quarter of the places, so half the time or less for the same width,
            with twice the reach.
    """

    grid: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        width: int,
        depth: int,
        activation: str = "sin",
        n_frequencies: int = 0,
        last_layer_scale: float = 1.0,
        kernel_size: int = 3,
        coordinates: bool = False,
        squeeze: int = 1,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd to keep the image's size: got {kernel_size}")
        channels, height, columns = shape
        self.blocks = Blocks(height, columns, squeeze)
        channels, (height, columns) = channels * squeeze**2, self.blocks.shape
        self.inner_shape = (channels, height, columns)
        self.time = TimeFeatures(n_frequencies)
        sides = torch.linspace(-1, 1, height), torch.linspace(-1, 1, columns)
        grid = torch.stack(torch.meshgrid(*sides, indexing="ij"))
        self.register_buffer("grid", grid if coordinates else grid[:0], persistent=False)
        layer = partial(nn.Conv2d, kernel_size=kernel_size, padding=kernel_size // 2)
        sizes = (channels + self.time.size + len(self.grid), width, depth, channels)
        self.layers = stack_layers("field", layer, *sizes, activation, last_layer_scale)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """Velocity of states ``h``, (B, S), at time ``t``, a scalar or (B,)."""
        folded = h if self.blocks.side == 1 else self.blocks.fold(h)
        image = folded.unflatten(1, self.inner_shape)
        time = self.time(_batch_of_times(t, h))[:, :, None, None]
        extra = [time.expand(-1, -1, *image.shape[2:]), self.grid.expand(len(h), -1, -1, -1)]
        velocity = self.layers(torch.cat([image, *extra], 1)).flatten(1)
        return velocity if self.blocks.side == 1 else self.blocks.unfold(velocity)


class SeparateFields(nn.Module):
    """One field for each trajectory: row c of the state goes through field c (Table 2)."""

    def __init__(self, fields: Sequence[nn.Module]) -> None:
        super().__init__()
        self.fields = nn.ModuleList(fields)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """Velocity of states ``h``, (C, S), at time ``t``, a scalar."""
        rows = zip(self.fields, h.split(1), strict=True)
        return torch.cat([field(t, row) for field, row in rows])


class VaryingField(nn.Module):
    """A field whose weights vary with time, linearly between evenly spaced knots of [0, 1].

    A neural ODE of varying depth (Massaroli et al., 2020, "Dissecting neural ODEs", section 3.1,
    here with hat functions as the basis). The paper's field has one set of weights for all
    pseudotimes; with n sets a call costs little more, and there are n times as many weights to tell
    the components of a trajectory apart. All knots start from the weights of ``field``, so that
    training starts as it does without them.

    Each set is one vector, so that a call interpolates all weights at once: a tensor for each layer
    would be half as many operations of a training step again, small ones, and on a GPU their number
    is the step's time.

    Args:
        field: Gives the kind of field and the start of its weights.
        n_knots: Sets of weights, at least 2.
    """

    def __init__(self, field: nn.Module, n_knots: int) -> None:
        super().__init__()
        if n_knots < 2:
            raise ValueError(f"weights that vary with time need n_knots >= 2: got {n_knots}")
        self._shapes = {name: weight.shape for name, weight in field.named_parameters()}
        start = parameters_to_vector(field.parameters()).detach()
        self.knots = nn.ParameterList(start.clone() for _ in range(n_knots))
        self.field = copy.deepcopy(field)
        for name in self._shapes:  # each call brings its weights along
            place, _, last = name.rpartition(".")
            self.field.get_submodule(place).register_parameter(last, None)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """Velocity of states ``h``, (B, S), at time ``t`` in [0, 1], a scalar.

        Raises:
            ValueError: If ``t`` is not a scalar: a time for each state.
        """
        if t.ndim:
            raise ValueError(
                "weights that vary with time are those of one time: got times of shape "
                f"{tuple(t.shape)}"
            )
        position = min(max(float(t.detach()), 0.0), 1.0) * (len(self.knots) - 1)
        left = min(int(position), len(self.knots) - 2)
        weights = torch.lerp(self.knots[left], self.knots[left + 1], position - left)
        parts = weights.split([shape.numel() for shape in self._shapes.values()])
        shaped = zip(self._shapes.items(), parts, strict=True)
        named = {name: part.view(shape) for (name, shape), part in shaped}
        return functional_call(self.field, named, (t, h))
