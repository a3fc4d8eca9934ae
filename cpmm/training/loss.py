"""Training of a model by a loss that it states itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cpmm.seeds import seeded_generator
from cpmm.training.epochs import Recorded


class LossTraining(Recorded):
    """Minimize a model's own loss on training points: the baselines that gradients train.

    Args:
        model: Its ``loss(x, generator)`` is a scalar, of points (N, M): nats per dimension where
            it is a density.
        n_epochs: Epochs of the run; the learning rate decays over the second half.
        noise: Deviation of the Gaussian noise added to training points.
        learning_rate: Learning rate of Adam.
        n_warmup_epochs: Epochs of linear warm-up.
        seed: Seed of every random draw.
        density: Whether the loss is a density's, in nats per dimension of the points' space.
    """

    subject, remedy = "the loss", "lower the learning rate or the gradient clip"  # of errors

    def __init__(
        self,
        model: nn.Module,
        n_epochs: int,
        noise: float,
        learning_rate: float,
        n_warmup_epochs: int,
        seed: int,
        density: bool = True,
    ) -> None:
        super().__init__(model, learning_rate, n_epochs, n_epochs // 2, n_warmup_epochs, seed)
        self.noise, self.density = noise, density

    def measures_density(self, epoch: int) -> bool:
        """Only what has a density does."""
        return self.density

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Loss of points, (N, M), a scalar."""
        return self.model.loss(x, generator)

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """One step down the loss."""
        x = batch["x"]
        if self.noise:
            x = x + self.noise * torch.randn(x.shape, generator=self._generator, device=x.device)
        with self.located():
            loss = self.loss(x, self._generator)
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(f"{self.subject} is {loss.item()}: {self.remedy}")
        self._record("train", loss, len(x))
        return loss

    def on_validation_epoch_start(self) -> None:
        """The same draws for every validation, so that epochs can be compared."""
        self._validation_generator = seeded_generator(self.seed, 2, device=self.device)

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Loss of held-out rows, without noise."""
        with self.located():
            loss = self.loss(batch["x"], self._validation_generator)
        self._record("validation", loss, len(batch["x"]))
