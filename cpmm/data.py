"""A data set split for training, with its way into the model's space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpmm.preprocessing import Augmentation, Preprocessing
from cpmm.seeds import seeded_generator

if TYPE_CHECKING:
    from cpmm.views import AffineViews

SPLITS = ("train", "validation", "test")
PART = 4096  # points preprocessed at a time


@dataclass(frozen=True)
class DataSplits:
    """Raw data of the three splits and how to preprocess them.

    Attributes:
        raw: Grey levels or real values of each split, (N, M).
        label: Class of each point, -1 for none, (N,), by split; None without labels.
        preprocessing: Fitted on the training split.
        augmentation: Random changes of training data.
        noise_seed: Of the one dequantization draw that validation and test are evaluated with.
        image_shape: (channels, height, width), None for tables.
        feature_names: M of them.
        class_names: By class index.
    """

    raw: dict[str, Tensor]
    label: dict[str, Tensor] | None
    preprocessing: Preprocessing
    augmentation: Augmentation
    noise_seed: int
    image_shape: tuple[int, int, int] | None
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...]

    @property
    def n_features(self) -> int:
        """M."""
        return self.preprocessing.n_features

    def points(self, split: str) -> tuple[Tensor, Tensor]:
        """Points of a split with its one fixed noise draw, not augmented.

        Args:
            split: "train", "validation" or "test".

        Returns:
            z, (N, M), and the log-determinant of the map from data, nats, (N,), both float64.
        """
        generator = seeded_generator(self.noise_seed, SPLITS.index(split))
        return self.preprocessing.forward(self.preprocessing.dequantize(self.raw[split], generator))

    def draw(self, n_draws: int, generator: torch.Generator, index: Tensor | None = None) -> Tensor:
        """Draw augmented, freshly dequantized training points.

        Args:
            n_draws: Times each training point is drawn.
            generator: Source of the draws.
            index: Of the N training points that are drawn; None draws all.

        Returns:
            Draw by draw, (n_draws N, M), float32.
        """
        raw = self.raw["train"]
        # Grey levels take no noise, so their deviations are not needed.
        spread = raw.double().std(0) if raw.is_floating_point() else raw.new_ones(raw.shape[1])
        raw = raw if index is None else raw[index]
        parts = []
        for _ in range(n_draws):
            parts += self._points_in_parts(self.augmentation(raw, spread, generator), generator)
        return torch.cat(parts)

    def draw_views(
        self, views: AffineViews, generator: torch.Generator, index: Tensor | None = None
    ) -> Tensor:
        """Draw a view of each training point, freshly dequantized; not augmented otherwise.

        Args:
            views: How the images change.
            generator: Source of the draws.
            index: Of the N training points; None draws all.

        Returns:
            (N, M), float32.
        """
        raw = self.raw["train"] if index is None else self.raw["train"][index]
        return torch.cat(self._points_in_parts(views(raw, generator), generator))

    def _points_in_parts(self, raw: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Dequantize and preprocess: float64 takes eight times the memory, part by part."""
        return [
            self.preprocessing.transform(self.preprocessing.dequantize(part, generator)).float()
            for part in raw.split(PART)
        ]


def split_indices(
    n: int, n_train: int | None, n_validation: int, n_test: int, official_test: int, seed: int
) -> dict[str, Tensor]:
    """Split points at random, by a seed of its own.

    Args:
        n: Number of points.
        n_train: Size of the training split, for a cheaper run; None takes all that the others
            leave.
        n_validation: Size of the validation split.
        n_test: Size of the test split; ignored if the source has its own.
        official_test: The last so many points are the source's own test split.
        seed: Of the permutation; the same for every run on the data set.

    Returns:
        Indices by split.

    Raises:
        ValueError: If nothing is left to train on.
    """
    n_rest = n - official_test
    n_test = 0 if official_test else n_test
    n_left = n_rest - n_validation - n_test
    if min(n_validation, n_test + official_test, n_left) < 2:  # a standard error takes two
        raise ValueError(
            f"the split leaves {n_left} of {n} points to train on, {n_validation} to validate, "
            f"{n_test + official_test} to test: lower data.n_validation or data.n_test; each needs "
            "two or more"
        )
    if n_train is not None and not (isinstance(n_train, int) and 2 <= n_train <= n_left):
        raise ValueError(
            f"data.n_train is {n_train!r}: expected 2 to {n_left}, what validation and test leave, "
            "or null"
        )
    order = torch.randperm(n_rest, generator=seeded_generator(seed))
    held_out = order[n_left:]
    official = torch.arange(n_rest, n)
    return {
        "train": order[: n_left if n_train is None else n_train],
        "validation": held_out[:n_validation],
        "test": official if official_test else held_out[n_validation:],
    }
