"""Training of the teacher: flow matching, maximum likelihood, or one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from cpmm.teacher import Flow, flow_matching_loss
from cpmm.training.loss import LossTraining


class TeacherTraining(LossTraining):
    """Train a flow by flow matching, by maximum likelihood, or by one after the other.

    Args:
        flow: The teacher.
        flow_matching_epochs: Epochs of flow matching, first.
        likelihood_epochs: Epochs of maximum likelihood after them.
        kinetic_weight: Weight of the kinetic cost beside the likelihood (RNODE).
        jacobian_weight: Weight of the Jacobian cost beside the likelihood.
        learning_rate: Learning rate of Adam.
        n_warmup_epochs: Epochs of linear warm-up.
        seed: Seed of every random draw.
    """

    model: Flow
    subject = "the teacher's loss"
    remedy = "lower teacher.learning_rate or teacher.gradient_clip"

    def __init__(
        self,
        flow: Flow,
        flow_matching_epochs: int,
        likelihood_epochs: int,
        kinetic_weight: float,
        jacobian_weight: float,
        learning_rate: float,
        n_warmup_epochs: int,
        seed: int,
    ) -> None:
        n_epochs = flow_matching_epochs + likelihood_epochs
        if n_epochs < 1:
            raise ValueError(
                "the teacher needs at least one epoch of flow matching or likelihood: set "
                "teacher.flow_matching_epochs to 1 or more"
            )
        super().__init__(flow, n_epochs, 0.0, learning_rate, n_warmup_epochs, seed)
        self.flow_matching_epochs = flow_matching_epochs
        self.kinetic_weight, self.jacobian_weight = kinetic_weight, jacobian_weight

    def describe_epoch(self) -> dict[str, float]:
        """Which objective the epoch had: 0 flow matching, 1 likelihood."""
        return {"objective": float(self.current_epoch >= self.flow_matching_epochs)}

    def measures_density(self, epoch: int) -> bool:
        """The error of flow matching does not; a likelihood does, but for its regularization."""
        return epoch >= self.flow_matching_epochs

    def is_candidate(self) -> bool:
        """Losses of the two objectives cannot be compared: only those of the last one count."""
        last_is_likelihood = self.n_epochs > self.flow_matching_epochs
        return (self.current_epoch >= self.flow_matching_epochs) == last_is_likelihood

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Loss of the current objective: squared error, or nats per dimension."""
        if self.current_epoch < self.flow_matching_epochs:
            return flow_matching_loss(self.model.field, x, generator)
        log_prob, kinetic, jacobian = self.model.log_prob_and_costs(x, generator)
        costs = self.kinetic_weight * kinetic + self.jacobian_weight * jacobian
        return (-log_prob / x.shape[1] + costs).mean()
