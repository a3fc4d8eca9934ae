r"""Maps between data as it comes and the space that densities are modelled in.

Grey levels k are dequantized, :math:`x = (k + u) / \text{levels}`, and squeezed through the logit,
:math:`z = \operatorname{logit}(\alpha + (1 - 2 \alpha) x)`; a learned monotone map may follow, the
same for all pixels. Real-valued tables are taken as they are. An affine map may come last: of each
feature by itself, or one that whitens them together. Every log-determinant is kept, so densities of
any space can be compared in units of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from cpmm.elementwise import ElementwiseMap

STANDARDIZATIONS = ("none", "shared", "feature", "whitened")
WHITENING = "preprocessing.whitening"  # its name among the tensors of an artifact


@dataclass(frozen=True)
class Preprocessing:
    """An invertible map from data to the model's space, elementwise but for the whitening.

    Attributes:
        levels: Number of grey levels of dequantized data; None for real-valued tables.
        alpha: Margin of the logit; it moves bits per dimension by more than one bit, so every
            figure states it. None for real-valued tables.
        shift: Subtracted after that, M numbers.
        scale: Divided by after that, M positive numbers.
        map: Applied after the logit, before shift and scale; None leaves the plain logit.
        whitening: Multiplied by last, the symmetric root of the inverse covariance of the training
            points, (M, M), float64; None leaves the features to themselves. Factor analyzers behind
            it share what covariance all points have (semi-tied covariances; Gales, 1999).
    """

    levels: int | None
    alpha: float | None
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    map: ElementwiseMap | None = None
    whitening: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Raise ValueError if grey levels have no margin in (0, 0.5), or real values have a map."""
        if self.levels is not None and (self.alpha is None or not 0 < self.alpha < 0.5):
            raise ValueError(
                f"data.alpha, the margin of the logit, is {self.alpha}: grey levels need 0 < alpha "
                "< 0.5, such as 1e-6, the paper's, or 0.01"
            )
        if self.levels is None and self.map is not None:
            raise ValueError(
                "real-valued data take no elementwise map, which follows the logit of grey levels: "
                "set data.map.kind to none"
            )

    @classmethod
    def fit(
        cls,
        raw: Tensor,
        levels: int | None,
        alpha: float | None,
        standardize: str,
        generator: torch.Generator,
        feature_names: tuple[str, ...] = (),
        map: ElementwiseMap | None = None,
    ) -> Preprocessing:
        """Choose the affine part from training data.

        Args:
            raw: Grey levels or real values, (N, M).
            levels: Number of grey levels, None for real-valued data.
            alpha: Margin of the logit, in [0, 0.5); None for real-valued data.
            standardize: "none"; "feature", zero mean and unit deviation for each feature; "shared",
                the mean of each feature and one deviation for all; "whitened", as shared, and then
                the symmetric root of the inverse covariance, so that it is the identity.
            generator: Source of the dequantization noise.
            feature_names: Used in messages.
            map: Comes between the logit and the affine part.

        Raises:
            ValueError: If an option is unknown or out of range, a feature has no variance or is not
                finite, or the covariance that is to be whitened is singular.
        """
        if standardize not in STANDARDIZATIONS:
            raise ValueError(
                f"data.standardize is {standardize!r}: choose one of {', '.join(STANDARDIZATIONS)}"
            )
        m = raw.shape[1]
        plain = cls(levels, None if levels is None else alpha, (0.0,) * m, (1.0,) * m, map)
        z, _ = plain.forward(plain.dequantize(raw, generator))
        spread, size = z.std(0), z.abs().amax(0)
        # By distinct values, whatever their size; less than 1e-14 of it is rounding. NaN is idle.
        usable = (z.amax(0) > z.amin(0)) & (spread > 1e-14 * size) & size.isfinite()
        if not bool(usable.all()):
            idle = (~usable).nonzero().flatten().tolist()
            names = [feature_names[i] if feature_names else str(i) for i in idle[:5]]
            raise ValueError(
                f"{len(idle)} of {m} features have no variance, or values that are not "
                f"finite, in the training split ({', '.join(names)}"
                f"{', ...' if len(idle) > 5 else ''}): drop them, their density is not defined"
            )
        if standardize == "none":
            return plain
        scale = spread if standardize == "feature" else spread.square().mean().sqrt().expand(m)
        shifted = replace(plain, shift=tuple(z.mean(0).tolist()), scale=tuple(scale.tolist()))
        if standardize == "whitened":
            return replace(shifted, whitening=_inverse_root(torch.cov(((z - z.mean(0)) / scale).T)))
        return shifted

    @property
    def n_features(self) -> int:
        """M."""
        return len(self.shift)

    @property
    def _margin(self) -> float:
        """``alpha`` of grey levels."""
        assert self.alpha is not None  # checked above
        return self.alpha

    @property
    def density_unit(self) -> tuple[str, float, float]:
        """Unit of reported densities, and the factor and offset from nats per dimension."""
        if self.levels is None:
            return "nats per dimension", 1.0, 0.0
        return "bits per dimension", 1 / math.log(2), math.log2(self.levels)

    @property
    def description(self) -> str:
        """The way from data to the model's space, in one sentence without its full stop."""
        affine = "each feature shifted and scaled"
        if self.whitening is not None:
            affine += ", then all whitened together by the covariance of training data"
        if self.levels is None:
            return f"z = x as it comes, {affine}"
        logit = f"logit(a + (1 - 2a) x) with x = (k + u)/{self.levels}, a = {self.alpha:g}"
        if self.map is None:
            return f"z = {logit}, {affine}"
        return (
            f"z = f({logit}), f a monotone rational-quadratic spline of {self.map.n_bins} bins "
            f"shared by all features, fitted to training data by likelihood, {affine}"
        )

    @property
    def is_affine(self) -> bool:
        """Whether means go through it."""
        return self.levels is None and self.map is None

    def select(self, features: Sequence[int]) -> Preprocessing:
        """Return the preprocessing of some of the M features, in the order given.

        Raises:
            ValueError: If they are whitened together.
        """
        self.require_elementwise()
        return replace(
            self,
            shift=tuple(self.shift[feature] for feature in features),
            scale=tuple(self.scale[feature] for feature in features),
        )

    def require_elementwise(self) -> None:
        """Raise ValueError if the features are whitened together.

        Behind a whitening every feature is a mix of all: what is known of some of them is no set of
        its features, and the rest is no factor analyzer of as few factors.
        """
        if self.whitening is not None:
            raise ValueError(
                "marginals, conditionals and missing values cannot be had behind a whitening, "
                "which mixes all features: train with data.standardize=feature or shared"
            )

    def dequantize(self, raw: Tensor, generator: torch.Generator | None) -> Tensor:
        """Add uniform noise to grey levels and rescale to [0, 1] (Appendix B), float64.

        Args:
            raw: Integer grey levels, or real values, which pass through, (N, M). NaN stays NaN.
            generator: On the device of ``raw``; None takes the middle of each level's cell in place
                of a place drawn in it.

        Returns:
            (N, M), float64: at alpha 1e-6 float32 has too few digits near one.

        Raises:
            ValueError: If a grey level is out of range.
        """
        if self.levels is None:
            return raw.double()
        known = raw.nan_to_num(nan=0.0) if raw.is_floating_point() else raw
        if int(known.min()) < 0 or int(known.max()) >= self.levels:
            levels = raw.double()  # uint8 knows no 256
            n, m = ((levels < 0) | (levels >= self.levels)).nonzero()[0].tolist()
            raise ValueError(
                f"grey levels must be 0 to {self.levels - 1}: feature {m + 1} of point {n + 1} is "
                f"{levels[n, m].item():.6g}"
            )
        if generator is None:
            return (raw.double() + 0.5) / self.levels
        noise = torch.rand(raw.shape, generator=generator, dtype=torch.float64, device=raw.device)
        return (raw.double() + noise) / self.levels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map dequantized data to the model's space.

        .. math:: \log |dz/dx| = \sum \log(1 - 2\alpha) - \log s - \log(1 - s)
            + \log f'(\operatorname{logit} s) - \log \text{scale} + \log |W|

        with :math:`s = \alpha + (1 - 2\alpha) x` (rule 1 of the evaluation), the map f and the
        whitening W, if any. NaN, if elementwise, stays NaN and adds nothing to the
        log-determinant: that is of the map of the others.

        Args:
            x: In [0, 1] for grey levels, real values otherwise, (N, M).

        Returns:
            z, (N, M), and the log-determinant, nats, (N,).

        Raises:
            ValueError: If ``x`` has another number of features.
        """
        self._require_features(x)
        total = _total(x)
        log_det = total(-x.new_tensor(self.scale).log())
        if self.levels is not None:
            s = self._margin + (1 - 2 * self._margin) * x
            log_det = log_det + total(math.log1p(-2 * self._margin) - s.log() - torch.log1p(-s))
            x = torch.logit(s)
        if self.map is not None:
            x, log_slope = self.map.forward(x)
            log_det = log_det + total(log_slope)
        if self.whitening is not None:
            log_det = log_det + torch.linalg.slogdet(self.whitening).logabsdet.to(x)
        return self._align(x), log_det

    def transform(self, x: Tensor) -> Tensor:
        """Map as :meth:`forward` does, without the log-determinant, in half the time: z, (N, M)."""
        self._require_features(x)
        if self.levels is not None:
            x = torch.logit(self._margin + (1 - 2 * self._margin) * x)
        if self.map is not None:
            x = self.map.transform(x)
        return self._align(x)

    def _require_features(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.n_features:
            raise ValueError(
                f"x must be (N, {self.n_features}) for this preprocessing: got shape "
                f"{tuple(x.shape)}"
            )

    def _align(self, x: Tensor) -> Tensor:
        """Shift and scale each feature, and whiten if asked for: the last, linear part."""
        x = (x - x.new_tensor(self.shift)) / x.new_tensor(self.scale)
        return x if self.whitening is None else x @ self.whitening.to(x)

    def unwhiten(self, z: Tensor) -> Tensor:
        """Undo the whitening alone, (N, M): there Euclidean distances tell groups apart."""
        return z if self.whitening is None else z @ self._coloring.to(z)

    @cached_property
    def _coloring(self) -> Tensor:
        return torch.linalg.inv(self.whitening)

    def inverse(self, z: Tensor) -> Tensor:
        """Map back from the model's space: to [0, 1] for grey levels, to real values otherwise."""
        z = self.unwhiten(z)
        x = z * z.new_tensor(self.scale) + z.new_tensor(self.shift)
        if self.levels is None:
            return x
        if self.map is not None:
            x = self.map.inverse(x)
        return ((torch.sigmoid(x) - self._margin) / (1 - 2 * self._margin)).clamp(0, 1)

    def to_dict(self) -> dict:
        """Return what JSON can hold; with :attr:`tensors` it is all :meth:`from_dict` needs."""
        return {
            "levels": self.levels,
            "alpha": self.alpha,
            "shift": list(self.shift),
            "scale": list(self.scale),
            "map": None if self.map is None else self.map.to_dict(),
            "whitened": self.whitening is not None,
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is too large for JSON, by the name that it has in an artifact."""
        return {} if self.whitening is None else {WHITENING: self.whitening}

    @classmethod
    def from_dict(cls, values: Mapping, tensors: Mapping[str, Tensor]) -> Preprocessing:
        """Build from what :meth:`to_dict` returned and the tensors of the same artifact.

        Raises:
            ValueError: If the whitening is missing, or does not fit the features.
        """
        # Artifacts from before there were maps and whitening have no word of them.
        values = dict(values)
        learned, whitening, m = values.get("map"), None, len(values["shift"])
        if values.get("whitened"):
            whitening = tensors.get(WHITENING)
            if whitening is None or whitening.shape != (m, m):
                got = "none" if whitening is None else f"one of shape {tuple(whitening.shape)}"
                raise ValueError(f"expected a tensor {WHITENING} of shape {(m, m)}: got {got}")
        return cls(
            values["levels"],
            values["alpha"],
            tuple(values["shift"]),
            tuple(values["scale"]),
            None if learned is None else ElementwiseMap.from_dict(learned),
            whitening,
        )


def _total(x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what sums (N, M), or (M,) for every point, over the features that ``x`` has, (N,)."""
    missing = x.isnan()
    if not bool(missing.any()):
        return lambda slope: slope.sum(-1).expand(len(x))
    return lambda slope: slope.expand(x.shape).masked_fill(missing, 0).sum(1)


def _inverse_root(covariance: Tensor) -> Tensor:
    """Symmetric root of the inverse of a covariance, (M, M)."""
    value, vector = torch.linalg.eigh(covariance)
    if not bool(value[0] > 1e-10 * value[-1]):
        raise ValueError(
            f"the covariance of the training points has eigenvalues from {value[0]:.3g} to "
            f"{value[-1]:.3g} and cannot be whitened: take more training points than features, "
            "drop features that follow from others, or set data.standardize to shared"
        )
    return (vector * value.rsqrt()) @ vector.T


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training data that leave its meaning alone (Appendix B).

    Attributes:
        noise: Deviation of Gaussian noise on real-valued features in units of each feature's
            deviation; the paper uses 0.01 to 0.1 for tables.
        translate: Largest shift of an image in pixels, along each axis; gaps take the edge's
            values.
        flip: Whether images are mirrored left to right with probability one half.
        image_shape: (channels, height, width); None for tables.
    """

    noise: float = 0.0
    translate: int = 0
    flip: bool = False
    image_shape: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if one is out of range, or an image's is asked of a table."""
        if self.noise < 0 or self.translate < 0:
            raise ValueError(
                f"augmentation: noise and translate must be 0 or more: got {self.noise}, "
                f"{self.translate}"
            )
        if self.image_shape is None and (self.translate or self.flip):
            raise ValueError(
                "augmentation: translate and flip need images, this data set is a table"
            )

    def __call__(self, raw: Tensor, spread: Tensor, generator: torch.Generator) -> Tensor:
        """Change a copy of ``raw``, (N, M); ``spread`` is each feature's deviation, (M,)."""
        if self.noise and raw.is_floating_point():
            noise = torch.randn(raw.shape, generator=generator, dtype=raw.dtype, device=raw.device)
            raw = raw + self.noise * spread.to(raw) * noise
        if self.flip and self.image_shape:
            image = raw.unflatten(1, self.image_shape)
            mirror = torch.rand(len(raw), generator=generator, device=raw.device) < 0.5
            raw = torch.where(mirror[:, None, None, None], image.flip(-1), image).flatten(1)
        if self.translate and self.image_shape:
            raw = self._translate(raw, self.image_shape, generator)
        return raw

    def _translate(
        self, raw: Tensor, image_shape: tuple[int, int, int], generator: torch.Generator
    ) -> Tensor:
        _, height, width = image_shape
        d = self.translate
        offsets = torch.randint(-d, d + 1, (2, len(raw)), generator=generator, device=raw.device)
        rows = (torch.arange(height, device=raw.device) + offsets[0, :, None]).clamp(0, height - 1)
        columns = (torch.arange(width, device=raw.device) + offsets[1, :, None]).clamp(0, width - 1)
        image = raw.unflatten(1, image_shape)
        n = torch.arange(len(raw), device=raw.device)[:, None, None]
        shifted = image.movedim(1, -1)[n, rows[:, :, None], columns[:, None, :]]
        return shifted.movedim(-1, 1).flatten(1)
