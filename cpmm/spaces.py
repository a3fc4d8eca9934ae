"""The curriculum: the spaces between the latent Gaussian and the input (section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpmm.seeds import seeded_generator


def space_positions(n_spaces: int) -> Tensor:
    """Positions v of the spaces, evenly from 1 (latent) to 0 (input), (V,), float64.

    Raises:
        ValueError: If there are fewer than two.
    """
    if n_spaces < 2:
        raise ValueError(
            f"spaces.n_spaces is {n_spaces}: expected at least 2, the latent and the input space"
        )
    return torch.linspace(1, 0, n_spaces, dtype=torch.float64)


def training_subset(n: int, n_train: int | None, seed: int) -> Tensor | None:
    """Choose the training points that go through the spaces, the same ones through all of them.

    Args:
        n: Training points, N.
        n_train: How many; None takes all.
        seed: Seed of the choice; with the same seed, fewer points are a subset of more.

    Returns:
        Their indices, ascending, (n_train,); None for all.

    Raises:
        ValueError: If ``n_train`` is not between 2 and N.
    """
    if n_train is None:
        return None
    if not 2 <= n_train <= n:
        raise ValueError(
            f"spaces.n_train is {n_train}: expected 2 to {n}, the training points, or null for all"
        )
    return torch.randperm(n, generator=seeded_generator(seed, 21))[:n_train].sort().values


def require_validation(n: int, n_validation: int | None) -> None:
    """Check the number of validation points that go through the spaces, of ``n``; None: all.

    Raises:
        ValueError: If it is not from 2 to ``n``.
    """
    if n_validation is not None and not 2 <= n_validation <= n:
        raise ValueError(
            f"spaces.n_validation is {n_validation}: expected 2 to {n}, the validation points, or "
            "null for all"
        )


@dataclass(frozen=True)
class Curriculum:
    """Which space each epoch trains on; earlier spaces are not revisited, they are only a guide.

    Attributes:
        n_spaces: V; 0 trains on the input space alone.
        epochs_per_space: The paper allocates one.
        fine_tune_epochs: Epochs on the input space at the end.
    """

    n_spaces: int
    epochs_per_space: int
    fine_tune_epochs: int

    def __post_init__(self) -> None:
        """Raise ValueError if nothing would be trained."""
        if (
            min(self.n_spaces, self.epochs_per_space, self.fine_tune_epochs) < 0
            or not self.n_epochs
        ):
            raise ValueError(
                "a curriculum needs counts of 0 or more and at least one epoch: got n_spaces "
                f"{self.n_spaces}, epochs_per_space {self.epochs_per_space}, fine_tune_epochs "
                f"{self.fine_tune_epochs}"
            )

    @property
    def n_guided_epochs(self) -> int:
        """Epochs on the spaces, before fine-tuning."""
        return self.n_spaces * self.epochs_per_space

    @property
    def n_epochs(self) -> int:
        """Epochs in all."""
        return self.n_guided_epochs + self.fine_tune_epochs

    def space(self, epoch: int) -> int | None:
        """Index of the epoch's space, 0 for the latent one; None while fine-tuning."""
        return epoch // self.epochs_per_space if epoch < self.n_guided_epochs else None
