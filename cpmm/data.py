"""A data set split for training, with its way into the model's space."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpmm.columns import Columns
from cpmm.preprocessing import Augmentation, Preprocessing
from cpmm.seeds import seeded_generator

if TYPE_CHECKING:
    from cpmm.views import AffineViews

SPLITS = ("train", "validation", "test")
PART = 4096  # points preprocessed at a time
# What a share of the points may come to, and how many points there must be to take a share of.
LEAST, MOST, FEWEST = 30, 10_000, 100


@dataclass(frozen=True)
class DataSplits:
    """Raw data of the three splits and how to preprocess them.

    Attributes:
        raw: Grey levels or real values of each split, (N, M).
        label: Class of each point, -1 for none, (N,), by split; None without labels.
        preprocessing: Fitted on the training split.
        augmentation: Random changes of training data.
        noise_seed: Seed of the one dequantization draw that validation and test are scored with.
        image_shape: (channels, height, width), None for tables.
        feature_names: M of them.
        class_names: Names of the classes, by index.
        columns: How the features came about, of a table written as text.
    """

    raw: dict[str, Tensor]
    label: dict[str, Tensor] | None
    preprocessing: Preprocessing
    augmentation: Augmentation
    noise_seed: int
    image_shape: tuple[int, int, int] | None
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...]
    columns: Columns = field(default_factory=Columns)

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
            index: Indices of the N training points that are drawn; None draws all.

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
            index: Indices of the N training points; None draws all.

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


def split_sizes(
    n: int, n_train: int | None, n_validation: float, n_test: float, official_test: int
) -> dict[str, int]:
    """Number of points of each split; arguments as for :func:`split_indices`."""
    n_rest = n - official_test
    if n_rest < 6:
        raise ValueError(
            f"{n_rest} points are too few: expected 6 or more, two each to train, validate and test"
        )
    held_out = {"n_validation": n_validation, "n_test": official_test or n_test}
    shares = [name for name, size in held_out.items() if isinstance(size, float)]
    if shares and n_rest < FEWEST:
        some = max(2, n_rest // 5)
        remedy = " and ".join(f"data.{name} to {some}" for name in shares)
        raise ValueError(
            f"{n_rest} points are too few to hold a share of them out: set {remedy}, or to other "
            "whole numbers, and take scores on so few points for rough ones"
        )
    # A quarter at most of a small table, so that half is left to train on.
    least = min(LEAST, n_rest // 4)
    n_validation, n_test = (
        min(max(round(size * n_rest), least), MOST) if isinstance(size, float) else size
        for size in held_out.values()
    )
    n_left = n_rest - n_validation - (0 if official_test else n_test)
    if min(n_validation, n_test, n_left) < 2:  # a standard error takes two
        raise ValueError(
            f"the split leaves {n_left} of {n} points to train on, {n_validation} to validate, "
            f"{n_test} to test: lower data.n_validation or data.n_test; each needs two or more"
        )
    if n_train is not None and not (isinstance(n_train, int) and 2 <= n_train <= n_left):
        raise ValueError(
            f"data.n_train is {n_train!r}: expected 2 to {n_left}, what validation and test leave, "
            "or null"
        )
    n_train = n_left if n_train is None else n_train
    return {"train": n_train, "validation": n_validation, "test": n_test}


def describe_split(
    n: int, n_train: int | None, n_validation: float, n_test: float, official_test: int
) -> str:
    """Say how many points each split has, and why; arguments as for :func:`split_indices`."""

    def why(size: float) -> str:
        return f" ({100 * size:g} %, {LEAST} to {MOST:,})" if isinstance(size, float) else ""

    sizes = split_sizes(n, n_train, n_validation, n_test, official_test)
    whys = {
        "train": "" if n_train is None else " (data.n_train)",
        "validation": why(n_validation),
        "test": " (the data set's own)" if official_test else why(n_test),
    }
    return f"{n} points: " + ", ".join(f"{sizes[name]} {name}{whys[name]}" for name in SPLITS)


def split_indices(
    n: int, n_train: int | None, n_validation: float, n_test: float, official_test: int, seed: int
) -> dict[str, Tensor]:
    """Split points at random into training, validation and test.

    Args:
        n: Number of points.
        n_train: Size of the training split, for a cheaper run; None takes all that the others
            leave.
        n_validation: Size of the validation split: a whole number, or as a float a share of the
            points that are no official test points, in (0, 1). A share comes to :data:`LEAST`
            points or more (in a small table to a quarter) and to :data:`MOST` at most.
        n_test: The same of the test split; ignored if the source has its own.
        official_test: Number of points at the end that are the source's own test split.
        seed: Seed of the permutation; the same for every run on the data set.

    Returns:
        Indices by split.

    Raises:
        ValueError: If nothing is left to train on, or there are fewer than :data:`FEWEST` points
            to take a share of.
    """
    sizes = split_sizes(n, n_train, n_validation, n_test, official_test)
    n_rest = n - official_test
    order = torch.randperm(n_rest, generator=seeded_generator(seed))
    held_out = order[n_rest - sizes["validation"] - (0 if official_test else sizes["test"]) :]
    return {
        "train": order[: sizes["train"]],
        "validation": held_out[: sizes["validation"]],
        "test": (torch.arange(n_rest, n) if official_test else held_out[sizes["validation"] :]),
    }
