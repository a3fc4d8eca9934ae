"""What remains after training: a mixture with its preprocessing, in the units of the data."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from cpmm.artifact import load_artifact
from cpmm.columns import Columns
from cpmm.conditioning import ConditionValues, single, stack_conditions
from cpmm.mixture import Mixture
from cpmm.preprocessing import Preprocessing


@dataclass(frozen=True)
class FittedMixture:
    """Densities, clusters and samples of data as they come: grey levels, or real values.

    Attributes:
        mixture: In its own space.
        preprocessing: The way there.
        image_shape: (channels, height, width), None for tables.
        feature_names: M of them.
        header: All that was stated when it was written.
    """

    mixture: Mixture
    preprocessing: Preprocessing
    image_shape: tuple[int, int, int] | None
    feature_names: tuple[str, ...]
    header: Mapping[str, Any]

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> FittedMixture:
        """Read an extracted mixture, such as ``data/digits/mixture``; nothing is unpickled.

        Args:
            folder: With ``mixture.json`` and ``mixture.safetensors``.
            device: Where it computes.
            dtype: float64 for figures that are reported.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged or of another version, or the mixture was saved without
                its preprocessing.
        """
        mixture = Mixture.load(folder, device).to(dtype)
        tensors, header = load_artifact(folder, "mixture", device)
        try:
            preprocessing = Preprocessing.from_dict(header["preprocessing"], tensors)
            shape, names = header["image_shape"], tuple(header["feature_names"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder} holds a mixture without its preprocessing ({error}): use "
                "cpmm.mixture.Mixture, whose points are in the mixture's own space"
            ) from error
        if not mixture.n_features == preprocessing.n_features == len(names):
            raise ValueError(
                f"{folder} holds a mixture of {mixture.n_features} features, a preprocessing of "
                f"{preprocessing.n_features} and {len(names)} names: extract the mixture again"
            )
        return cls(mixture, preprocessing, tuple(shape) if shape else None, names, header)

    @property
    def n_features(self) -> int:
        """M."""
        return self.mixture.n_features

    @property
    def unit(self) -> str:
        """Of :meth:`density`: bits per dimension for grey levels, nats per dimension for tables."""
        return self.preprocessing.density_unit[0]

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        # By name: what a notebook shows is no part of the code that stages depend on.
        return import_module("cpmm.notebook").mixture_html(self)

    def allow_missing(self) -> FittedMixture:
        """Return the same, for which NaN in a point stands for what was not observed.

        Densities and posteriors are then those of the observed values alone.

        Raises:
            ValueError: If the preprocessing whitens, which mixes all features.
        """
        self.preprocessing.require_elementwise()
        return replace(self, mixture=self.mixture.allow_missing())

    def transform(self, raw: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Map data to the mixture's space.

        Args:
            raw: Whole grey levels or real values, (N, M); NaN after :meth:`allow_missing` alone.
            generator: Source of the dequantization noise; batches get the noise of all at once.

        Returns:
            z, (N, M), and the log-determinant of the map from data, nats, (N,).

        Raises:
            ValueError: If ``raw`` has another number of features, is not finite, or holds grey
                levels that are out of range or not whole.
        """
        if raw.ndim != 2 or raw.shape[1] != self.n_features:
            raise ValueError(
                f"the mixture has {self.n_features} features: expected points (N, "
                f"{self.n_features}), got shape {tuple(raw.shape)}"
            )
        if len(raw) == 0:
            raise ValueError("no points: expected one or more")
        if raw.is_complex():
            raise ValueError(f"points must be real: got {raw.dtype}; give raw.real, or raw.abs()")
        raw = raw.to(self.mixture.components.mean.device)
        if raw.dtype != torch.uint8:  # torch cannot compare numbers of every type
            raw = raw.double()
        if raw.is_floating_point():
            bad, kind, levels = ~torch.isfinite(raw), "a finite number", self.preprocessing.levels
            if levels is not None:
                bad |= raw != raw.round()
                kind = f"a whole grey level of 0 to {levels - 1}"
            if self.mixture.nan_is_missing:
                bad &= ~raw.isnan()
            if bool(bad.any()):
                row, column = bad.nonzero()[0].tolist()
                value = raw[row, column].item()
                gap = " (missing? see allow_missing and impute)" if math.isnan(value) else ""
                raise ValueError(
                    f"feature {self.feature_names[column]!r} of point {row + 1} is {value}: "
                    f"expected {kind}{gap}"
                )
        z, log_det = self.preprocessing.forward(self.preprocessing.dequantize(raw, generator))
        like = self.mixture.components.mean
        return z.to(like), log_det.to(like)

    @torch.no_grad()
    def log_prob(self, raw: Tensor, generator: torch.Generator) -> Tensor:
        """Log-density in units of the data, nats, (N,): of a unit cube of grey levels for images.

        After :meth:`allow_missing` it is of the features of each point that are not NaN, in their
        units: 0 where there are none.

        Raises:
            ValueError: As :meth:`transform`, or if a density leaves the range of numbers.
        """
        z, log_det = self.transform(raw, generator)
        gaps = z.isnan()
        n_observed = (~gaps).sum(1).to(z) if bool(gaps.any()) else self.n_features
        levels = self.preprocessing.levels or 1
        log_prob = self.mixture.log_prob(z) + log_det - n_observed * math.log(levels)
        return self._require_finite(log_prob, raw)

    def density(self, log_prob: Tensor) -> Tensor:
        """Turn :meth:`log_prob` into bits or nats per dimension, (N,); lower is better."""
        _, factor, _ = self.preprocessing.density_unit
        return -factor * log_prob / self.n_features

    @torch.no_grad()
    def cluster_responsibilities(self, raw: Tensor, generator: torch.Generator) -> Tensor:
        """Posterior of the clusters given the points, p(y = c | x), (N, C)."""
        share = self.mixture.cluster_responsibilities(self.transform(raw, generator)[0])
        return self._require_finite(share, raw)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw data.

        Args:
            n: Number of points.
            generator: On the device of the mixture.

        Returns:
            Grey levels, uint8, or real values, (n, M), and the cluster of each, (n,).
        """
        z, component = self.mixture.sample(n, generator)
        return self._as_data(z), self.mixture.cluster[component]

    @torch.no_grad()
    def impute(self, raw: Tensor, generator: torch.Generator) -> Tensor:
        """Fill what is NaN in data with its mean given the rest of the point, (N, M), float64.

        Means of grey levels are not rounded.

        Args:
            raw: Data with gaps; without :meth:`allow_missing`, too.
            generator: Source of the dequantization noise of what is observed.

        Raises:
            ValueError: As :meth:`transform`, or if the preprocessing whitens.
        """
        z, _ = self.allow_missing().transform(raw, generator)
        inverse, levels = self.preprocessing.inverse, self.preprocessing.levels
        affine = self.preprocessing.is_affine
        x = inverse(self.mixture.impute(z)) if affine else self.mixture.impute(z, inverse)
        if levels is not None:  # level k is the cell from k to k + 1
            x = (x * levels - 0.5).clamp(0, levels - 1)
        return self._keep_observed(raw, x)

    @torch.no_grad()
    def sample_missing(self, raw: Tensor, generator: torch.Generator) -> Tensor:
        """Fill what is NaN in data with one draw given the rest of the point, (N, M).

        Args:
            raw: Data with gaps; without :meth:`allow_missing`, too.
            generator: Source of every draw, on the device of the mixture.

        Raises:
            ValueError: As :meth:`transform`, or if the preprocessing whitens.
        """
        z, _ = self.allow_missing().transform(raw, generator)
        x = self._as_data(self.mixture.sample_missing(z, generator))
        return self._keep_observed(raw, x).to(x.dtype)

    def marginal(self, features: Sequence[str | int]) -> FittedMixture:
        """Mixture of some features alone, by name or position, in the data's units.

        A column of categories, by its name, is all of its features.

        Raises:
            ValueError: If there are none, one is unknown or comes twice, or the preprocessing
                whitens.
        """
        index = self._index(part for name in features for part in self._parts(name))
        return self._of_features(index, [self.mixture.marginal(index)])[0]

    def conditional(self, observed: Mapping[str | int, float | Tensor]) -> FittedMixture:
        """Mixture of the other features given one value of each of some, in the data's units.

        Raises:
            ValueError: As :meth:`conditionals`.
        """
        return single(self.conditionals(observed), "conditionals")

    def conditionals(
        self,
        observed: Mapping[str | int, ConditionValues],
        generator: torch.Generator | None = None,
    ) -> list[FittedMixture]:
        """Return mixtures of the other features for B conditions at once, in the data's units.

        A shift, scale, logit or map of each feature is monotone, so that a condition on the data is
        one in the mixture's space. A grey level stands for a cell there, as wide as its
        dequantization noise.

        Args:
            observed: By name or position of a feature, its B values, or one number for all; by the
                name of a column of categories, one of them or B.
            generator: Draws a place in the cell of each grey level that is given; None takes the
                middle.

        Raises:
            ValueError: If a feature is unknown, none is given or none is left, a value is not a
                finite number or no grey level, their numbers differ, they have no density in
                numbers, or the preprocessing whitens.
        """
        observed = {
            part: value
            for name, values in observed.items()
            for part, value in self._encoded(name, values).items()
        }
        index = self._index(observed)
        self.mixture.require_features(index)
        preprocessing = self.preprocessing.select(index)
        raw = stack_conditions(observed)
        if preprocessing.levels is not None and bool((raw != raw.round()).any()):
            raise ValueError(
                f"the conditions must be whole grey levels of 0 to {preprocessing.levels - 1}: got "
                f"{raw[raw != raw.round()][0].item()}"
            )
        like = self.mixture.components.mean
        z = preprocessing.transform(preprocessing.dequantize(raw.to(like.device), generator))
        given = dict(zip(index, z.to(like).unbind(1), strict=True))
        rest = [feature for feature in range(self.n_features) if feature not in given]
        return self._of_features(rest, self.mixture.conditionals(given))

    @property
    def _columns(self) -> Columns:
        return Columns.from_dict(self.header.get("columns"))

    def _parts(self, name: str | int) -> list[str | int]:
        """Features of a column of categories; any other name is one."""
        known = self._columns.features(name) if isinstance(name, str) else {}
        return [part for part in known if part in self.feature_names] or [name]

    def _encoded(self, name: str | int, values: Any) -> dict[str | int, Any]:
        """Conditions on the features of a column of categories; any other is one."""
        if not isinstance(name, str) or name not in (self._columns.categories or {}):
            return {name: values}
        encoded = self._columns.encode(name, values)
        return {part: encoded[part] for part in encoded if part in self.feature_names}

    def _index(self, features: Iterable[str | int]) -> list[int]:
        place = {name: m for m, name in enumerate(self.feature_names)}
        features = list(features)
        unknown = [name for name in features if isinstance(name, str) and name not in place]
        if unknown:
            names = ", ".join(self.feature_names[:10]) + (", ..." if len(place) > 10 else "")
            raise ValueError(f"there is no feature {unknown[0]!r}: the mixture has {names}")
        return [place[name] if isinstance(name, str) else int(name) for name in features]

    def _of_features(self, index: list[int], mixtures: list[Mixture]) -> list[FittedMixture]:
        """Put the preprocessing and names of some features around mixtures of them."""
        preprocessing = self.preprocessing.select(index)
        names = tuple(self.feature_names[feature] for feature in index)
        header = {
            "preset": self.header.get("preset"),
            "preprocessing": preprocessing.to_dict(),
            "image_shape": None,
            "feature_names": list(names),
            "columns": self._columns.select(index).to_dict(),
        }
        return [FittedMixture(found, preprocessing, None, names, header) for found in mixtures]

    def _as_data(self, z: Tensor) -> Tensor:
        x, levels = self.preprocessing.inverse(z), self.preprocessing.levels
        if levels is None:
            return x
        return (x * levels).floor().clamp(0, levels - 1).to(torch.uint8)

    def _keep_observed(self, raw: Tensor, filled: Tensor) -> Tensor:
        """Take what was observed as it came, to its last digit."""
        raw = raw.to(filled.device).double()
        return self._require_finite(torch.where(raw.isnan(), filled.double(), raw), raw)

    def _require_finite(self, result: Tensor, raw: Tensor) -> Tensor:
        bad = ~torch.isfinite(result.reshape(len(result), -1)).all(1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"point {row + 1} is too far from the mixture for its numbers: largest value "
                f"{raw[row].double().nan_to_num(nan=0.0).abs().max().item():.3g}; check it, or "
                "drop it"
            )
        return result
