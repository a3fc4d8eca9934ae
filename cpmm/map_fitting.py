"""Fit the elementwise map by likelihood, together with a small mixture that is then thrown away."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cpmm.direct import DirectMixture
from cpmm.elementwise import ElementwiseMap, spline
from cpmm.initialization import kmeans, local_factor_analyzers
from cpmm.preprocessing import Preprocessing

PER_LEVEL = 32  # points that stand for the dequantization noise of a grey level
NARROWEST = 1e-4  # bin, in units of the range
Listener = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class MapOptions:
    """How the map is fitted.

    Attributes:
        n_bins: B, bins of the spline.
        n_points: Training points that are used, drawn at random.
        n_components: K of the mixture.
        n_factors: R of the mixture.
        log_diagonal_floor: Soft lower bound of its log d.
        n_steps: Steps of Adam, each on freshly dequantized points.
        batch_size: Points of a step.
        learning_rate: Learning rate of the mixture.
        map_rate_factor: Learning rate of the map in units of the mixture's.
    """

    n_bins: int
    n_points: int
    n_components: int
    n_factors: int
    log_diagonal_floor: float
    n_steps: int
    batch_size: int
    learning_rate: float
    map_rate_factor: float


def fit_elementwise_map(
    raw: Tensor,
    validation: Tensor,
    levels: int | None,
    alpha: float | None,
    standardize: str,
    options: MapOptions,
    generator: torch.Generator,
    listener: Listener | None = None,
) -> ElementwiseMap:
    """Fit the map that makes grey levels likeliest under a mixture of factor analyzers behind it.

    The density is that of the data, the map's derivative included. The mixture lives in the space
    that ``standardize`` makes of the map's values, whose shift and scale follow the map exactly,
    step by step: so the floor of log d means there what it means later, and an affine change of the
    map changes nothing.

    Args:
        raw: Grey levels of the training split, (N, M).
        validation: The same of the validation split; a tenth of ``n_points`` chooses the state.
        levels: Number of grey levels.
        alpha: Margin of the logit.
        standardize: As for :meth:`Preprocessing.fit`.
        options: Sizes and steps of the fit.
        generator: Source of every draw.
        listener: Called twenty times with step, n_steps, and the losses train and validation,
            nats per dimension of x in [0, 1].

    Returns:
        The best of the twenty states by validation likelihood.

    Raises:
        ValueError: If the data are real-valued, or there are fewer points than components.
        FloatingPointError: If the fit diverges.
    """
    if levels is None:
        raise ValueError(
            "data.map.kind is spline, but the data are real-valued: the map follows the logit of "
            "grey levels; set data.map.kind to none"
        )
    n_features = raw.shape[1]
    logit = Preprocessing(levels, alpha, (0.0,) * n_features, (1.0,) * n_features)

    def points(part: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = logit.forward(logit.dequantize(part, generator))
        return x.float(), log_det.float()

    raw = raw[torch.randperm(len(raw), generator=generator)[: options.n_points]]
    n_held_out = max(2, options.n_points // 10)
    order = torch.randperm(len(validation), generator=generator)[:n_held_out]
    x, log_det = points(validation[order])
    parts = (values.split(options.batch_size) for values in (x, log_det))
    held_out = list(zip(*parts, strict=True))
    if options.n_components > len(raw):
        raise ValueError(
            f"data.map.n_components is {options.n_components}: expected at most {len(raw)}, the "
            "number of points that the map is fitted to"
        )
    x, _ = points(raw)
    learned = LearnedMap(initial_knots(x[:500], raw[:500], logit, options.n_bins))
    space, k, floor = (
        Space(raw, logit, standardize),
        options.n_components,
        options.log_diagonal_floor,
    )
    with torch.no_grad():
        z, _ = space.forward(learned, x)
    group = kmeans(z, k, generator, n_init=1)
    start = local_factor_analyzers(z, group, k, options.n_factors, floor)
    joint = MappedMixture(learned, DirectMixture(start, floor), space)

    def draw() -> tuple[Tensor, Tensor]:
        return points(raw[torch.randint(len(raw), (options.batch_size,), generator=generator)])

    return _fit(joint, draw, held_out, options, listener)


def _fit(
    joint: MappedMixture,
    draw: Callable[[], tuple[Tensor, Tensor]],
    held_out: list[tuple[Tensor, Tensor]],
    options: MapOptions,
    listener: Listener | None,
) -> ElementwiseMap:
    """Take the steps, each on the logits and log-determinants that ``draw`` gives; return the best.

    That is the map of the one of twenty states that makes ``held_out``, the same in batches for
    validation points, likeliest.
    """
    n_steps = options.n_steps
    optimizer, schedule = joint.optimizer(options.learning_rate, options.map_rate_factor, n_steps)
    best, best_value, seen = joint.learned.freeze(), math.inf, []
    checks = {math.ceil(n_steps * (i + 1) / 20) for i in range(20)}
    for step in range(1, n_steps + 1):
        try:
            loss = joint(*draw()).mean()
            optimizer.zero_grad()
            loss.backward()
            if not bool(torch.isfinite(nn.utils.clip_grad_norm_(joint.parameters(), 1.0))):
                raise FloatingPointError("the gradient is not finite")
            optimizer.step()
            schedule.step()
            seen.append(float(loss.detach()))
            if step not in checks:
                continue
            with torch.no_grad():
                value = float(torch.cat([joint(*part) for part in held_out]).double().mean())
            if not math.isfinite(value):
                raise FloatingPointError(f"the validation loss is {value}")
            if value < best_value:
                best, best_value = joint.learned.freeze(), value
        # A covariance that broke, a gradient, or a spline: they would name other options.
        except (FloatingPointError, ValueError) as error:
            raise FloatingPointError(
                f"the fit of the elementwise map diverged (step {step}/{n_steps}): lower "
                "data.map.learning_rate or data.map.map_rate_factor, or raise "
                "data.map.log_diagonal_floor"
            ) from error
        if listener is not None:
            train = sum(seen) / len(seen)
            listener({"step": step, "n_steps": n_steps, "train": train, "validation": value})
        seen.clear()
    return best


class LearnedMap(nn.Module):
    """The spline of :class:`ElementwiseMap` while it is fitted; it starts as the identity.

    Args:
        knot: Where the knots start, increasing, (B + 1,); the first and the last stay.
    """

    def __init__(self, knot: Tensor) -> None:
        super().__init__()
        self.low, self.span = float(knot[0]), float(knot[-1] - knot[0])
        width = (knot.diff() / self.span).log()
        self.width = nn.Parameter(width)
        self.height = nn.Parameter(width.clone())
        self.log_slope = nn.Parameter(torch.zeros(len(knot)))

    def knots(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return knots, values and logs of the slopes, (B + 1,) each; differentiable."""
        n = len(self.width)
        width = NARROWEST + (1 - n * NARROWEST) * self.width.softmax(0)
        height = NARROWEST + (1 - n * NARROWEST) * self.height.exp()
        ends = (nn.functional.pad(rise.cumsum(0), (1, 0)) for rise in (width, height))
        knot, value = (self.low + self.span * end for end in ends)
        return knot, value, self.log_slope

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map numbers of any shape; return their images and the logs of the derivatives."""
        return spline(x, *self.knots())

    @torch.no_grad()
    def freeze(self) -> ElementwiseMap:
        """Return the map as it is now."""
        return ElementwiseMap(*(tuple(row.double().tolist()) for row in self.knots()))


class Space:
    """What standardization makes of a map's values, for any map, without a pass over the data.

    A shared map sees nothing of a feature but how often it takes each grey level.

    Args:
        raw: Grey levels, (N, M).
        logit: The map from grey levels to where the learned map starts.
        standardize: As for :meth:`Preprocessing.fit`.
    """

    def __init__(self, raw: Tensor, logit: Preprocessing, standardize: str) -> None:
        assert logit.levels is not None
        levels = torch.arange(logit.levels)
        self.standardize = standardize
        self.share = torch.stack([(raw == level).float().mean(0) for level in levels], 1)
        noise = (torch.arange(PER_LEVEL, dtype=torch.float64) + 0.5) / PER_LEVEL
        x = (levels[:, None] + noise) / logit.levels
        one = Preprocessing(logit.levels, logit.alpha, (0.0,), (1.0,))
        self.grid = one.forward(x.reshape(-1, 1))[0].reshape(x.shape).float()  # (levels, PER_LEVEL)

    def affine(self, learned: LearnedMap) -> tuple[Tensor, Tensor]:
        """Return shift and scale of each feature, (M,) each; differentiable."""
        z, _ = learned(self.grid)
        if self.standardize == "none":
            return torch.zeros(len(self.share)), torch.ones(len(self.share))
        centre = z.detach().mean()  # squares are subtracted
        mean, square = (z - centre).mean(1), (z - centre).square().mean(1)
        shift = self.share @ mean  # (M,)
        variance = self.share @ square - shift.square()
        if self.standardize != "feature":
            variance = variance.mean().expand_as(variance)
        return centre + shift, variance.sqrt()

    def forward(self, learned: LearnedMap, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map logits, (N, M), to the model's space; return the log-determinant too, nats, (N,)."""
        shift, scale = self.affine(learned)
        z, log_slope = learned(x)
        return (z - shift) / scale, log_slope.sum(1) - scale.log().sum()


class MappedMixture(nn.Module):
    """A mixture behind the map, both free.

    Args:
        learned: The map.
        direct: In the space that standardization makes of the map's values.
        space: How it does so.
    """

    def __init__(self, learned: LearnedMap, direct: DirectMixture, space: Space) -> None:
        super().__init__()
        self.learned, self.direct, self.space = learned, direct, space

    def forward(self, x: Tensor, log_det: Tensor) -> Tensor:
        """Return minus the log-density of data, nats per dimension, (N,).

        Args:
            x: Their logits, (N, M).
            log_det: Log-determinant of the way from the data to these, (N,).
        """
        z, log_slope = self.space.forward(self.learned, x)
        return -(self.direct.mixture().log_prob(z) + log_slope + log_det) / x.shape[1]

    def optimizer(
        self, learning_rate: float, map_rate_factor: float, n_steps: int
    ) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
        """Adam, warmed up for 20 steps and decayed along a cosine to a thirtieth."""
        groups = [
            {"params": list(self.direct.parameters()), "lr": learning_rate},
            {"params": list(self.learned.parameters()), "lr": map_rate_factor * learning_rate},
        ]

        def factor(step: int) -> float:
            cosine = 0.5 * (1 + math.cos(math.pi * step / n_steps))
            return min(1.0, (step + 1) / 20) * (0.03 + 0.97 * cosine)

        adam = torch.optim.Adam(groups)
        return adam, torch.optim.lr_scheduler.LambdaLR(adam, factor)


def initial_knots(x: Tensor, raw: Tensor, logit: Preprocessing, n_bins: int) -> Tensor:
    """Spread knots: half at quantiles of all pixels, half at those of pixels that are not black.

    Args:
        x: Logits of dequantized pixels, (N, M).
        raw: Their grey levels, (N, M).
        logit: The map that made them; all of its range is covered.
        n_bins: B.

    Returns:
        Increasing, (B + 1,), float32.

    Raises:
        ValueError: If the margin is too small for the logit to have a range.
    """
    ends = logit.forward(torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, x.shape[1]))
    low, high = ends[0][:, 0].float()
    if not bool(torch.isfinite(high - low)):
        raise ValueError(
            f"data.alpha is {logit.alpha:g}, the logit of a white pixel is {float(high):g}: raise "
            "it, to 1e-9 for instance; the map needs a range"
        )
    bright = x[raw > 0]
    bright = bright if len(bright) else x.flatten()
    n_bright = n_bins // 2
    inner = torch.cat(
        [_quantiles(bright, n_bright), _quantiles(x.flatten(), n_bins - 1 - n_bright)]
    )
    knot = torch.cat([low[None], inner.sort().values, high[None]])
    width = knot.diff().clamp(min=1e-3 * (high - low))
    return low + (high - low) * nn.functional.pad((width / width.sum()).cumsum(0), (1, 0))


def _quantiles(x: Tensor, n: int) -> Tensor:
    """Return n numbers that cut sorted ``x`` into n + 1 equal parts; not limited in size."""
    index = (torch.arange(1, n + 1) * len(x)) // (n + 1)
    return x.sort().values[index]
