"""What remains after training: a mixture with its preprocessing, in the units of the data."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpmm.artifact import load_artifact
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

    def transform(self, raw: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Map data to the mixture's space.

        Args:
            raw: Whole grey levels or real values, (N, M).
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
            if bool(bad.any()):
                row, column = bad.nonzero()[0].tolist()
                raise ValueError(
                    f"feature {self.feature_names[column]!r} of point {row + 1} is "
                    f"{raw[row, column].item()}: expected {kind}"
                )
        z, log_det = self.preprocessing.forward(self.preprocessing.dequantize(raw, generator))
        like = self.mixture.components.mean
        return z.to(like), log_det.to(like)

    @torch.no_grad()
    def log_prob(self, raw: Tensor, generator: torch.Generator) -> Tensor:
        """Log-density in units of the data, nats, (N,): of a unit cube of grey levels for images.

        Raises:
            ValueError: As :meth:`transform`, or if a density leaves the range of numbers.
        """
        z, log_det = self.transform(raw, generator)
        levels = self.preprocessing.levels or 1
        log_prob = self.mixture.log_prob(z) + log_det - self.n_features * math.log(levels)
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
        x = self.preprocessing.inverse(z)
        levels = self.preprocessing.levels
        if levels is not None:
            x = (x * levels).floor().clamp(0, levels - 1).to(torch.uint8)
        return x, self.mixture.cluster[component]

    def _require_finite(self, result: Tensor, raw: Tensor) -> Tensor:
        bad = ~torch.isfinite(result.reshape(len(result), -1)).all(1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"point {row + 1} is too far from the mixture for its numbers: largest value "
                f"{raw[row].abs().max().item():.3g}; check it, or drop it"
            )
        return result
