"""Training of a mixture by gradient ascent through a curriculum of spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cpmm.spaces import Curriculum
from cpmm.training.epochs import Recorded
from cpmm.training.likelihood import MixtureOptions, mixture_at, mixture_loss
from cpmm.trajectory import pseudotime_grid


class MixtureTraining(Recorded):
    """Train a mixture by maximum likelihood through a curriculum of spaces (section 3.3).

    Args:
        model: The trajectories, or a direct mixture: ``mixture(times)`` is that at pseudotimes.
        curriculum: Which space each epoch trains on.
        options: Weights of the loss, and how to step.
    """

    def __init__(self, model: nn.Module, curriculum: Curriculum, options: MixtureOptions) -> None:
        super().__init__(
            model,
            options.learning_rate,
            curriculum.n_epochs,
            curriculum.n_guided_epochs,
            options.n_warmup_epochs,
            options.seed,
        )
        self.patience = options.patience
        self.curriculum = curriculum
        self.options = options
        n_spaces = min(options.pseudo_label_spaces, curriculum.n_spaces)
        self.pseudo_label_epochs = n_spaces * curriculum.epochs_per_space

    def describe_epoch(self) -> dict[str, float]:
        """Index of the epoch's space, V while fine-tuning."""
        space = self.curriculum.space(self.current_epoch)
        return {"space": float(self.curriculum.n_spaces if space is None else space)}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The initial states may learn faster than the field: they carry whole trajectories."""
        named = dict(self.named_parameters())
        fast = named.pop("model.initial", None)
        slow = {"params": [parameter for parameter in named.values() if parameter.requires_grad]}
        rate = self.options.learning_rate * self.options.initial_rate_factor
        return [slow] if fast is None else [slow, {"params": [fast], "lr": rate}]

    def describe_phase(self) -> str:
        """Say which space is being trained on."""
        space = self.curriculum.space(self.current_epoch)
        if space is None:
            return "fine-tuning"
        return f"space {space + 1}/{self.curriculum.n_spaces}"

    def is_candidate(self) -> bool:
        """Only weights trained on the input space may be chosen."""
        return self.measures_density(self.current_epoch)

    def measures_density(self, epoch: int) -> bool:
        """In the spaces of a curriculum a likelihood says nothing of the data's density."""
        return self.curriculum.space(epoch) is None

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """One step up the likelihood.

        A batch holds points ``x``; if they have pseudo-labels, their ``group``; and if consistency
        has a weight, a ``view`` of each.
        """
        x, labelled = batch["x"], self.current_epoch < self.pseudo_label_epochs
        group, view = batch.get("group"), batch.get("view")
        with self.located():
            loss, parts = mixture_loss(
                self.model, x, self.options, self._generator, group, labelled, view
            )
        for name, value in parts.items():
            self._record(name, value, len(x))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Solve the ODE once for all validation rows."""
        like = next(self.parameters())
        times = pseudotime_grid(self.options.n_extracted, like)
        with self.located():
            self._mixture = mixture_at(self.model, times, self.options)

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Nats per dimension of held-out rows, without noise."""
        x = batch["x"]
        with self.located():
            log_prob = self._mixture.log_prob(x)
        self._record("validation", -log_prob.mean() / x.shape[1], len(x))
