"""What the tests of the training loops share: small models, rows, and a run of the trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from cpmm.fields import MLPField
from cpmm.odes import Solver
from cpmm.spaces import Curriculum
from cpmm.teacher import Flow
from cpmm.training.epochs import EpochData, Recorded, Rows
from cpmm.training.likelihood import MixtureOptions
from cpmm.training.mixture import MixtureTraining
from cpmm.training.teacher import TeacherTraining
from cpmm.trajectory import StateLayout, Trajectories

M = 2
CURRICULUM = Curriculum(n_spaces=2, epochs_per_space=1, fine_tune_epochs=3)


def make_trajectories(seed: int = 0, n_clusters: int = 2, **options) -> Trajectories:
    torch.manual_seed(seed)
    layout = StateLayout(M, 1, 1.0)
    return Trajectories(
        layout,
        MLPField(layout.size, 8, 1),
        torch.randn(n_clusters, layout.size),
        Solver(n_steps=4, **options),
    )


def mixture_training(
    model: nn.Module | None = None, curriculum: Curriculum = CURRICULUM, **changes
) -> MixtureTraining:
    options = {
        "n_pseudotimes": 3,
        "pseudotimes": "uniform",
        "n_extracted": 4,
        "noise": 0.01,
        "learning_rate": 0.01,
        "initial_rate_factor": 2.0,
        "n_warmup_epochs": 1,
        "seed": 0,
    }
    options = MixtureOptions(**(options | changes))
    return MixtureTraining(model or make_trajectories(), curriculum, options)


def teacher_training(flow: Flow | None = None, **changes) -> TeacherTraining:
    torch.manual_seed(0)
    options = {
        "flow_matching_epochs": 2,
        "likelihood_epochs": 2,
        "kinetic_weight": 0.1,
        "jacobian_weight": 0.1,
        "learning_rate": 0.01,
        "n_warmup_epochs": 1,
        "seed": 0,
    }
    flow = flow or Flow(MLPField(M, 8, 1), Solver("rk4", n_steps=4), "hutchinson")
    return TeacherTraining(flow, **(options | changes))


def random_points(generator: torch.Generator) -> Tensor:
    return torch.randn(50, M, generator=generator) * torch.tensor([1.0, 0.3])


def random_rows(epoch: int, generator: torch.Generator) -> Rows:
    return Rows(x=random_points(generator))


def validation_rows(epoch: int) -> Tensor:
    return random_points(torch.Generator().manual_seed(99))


def true_loss(x: Tensor) -> float:
    """Nats per dimension of the rows above under the density that they come from."""
    truth = torch.distributions.Normal(torch.zeros(M), torch.tensor([1.0, 0.3]))
    return -float(truth.log_prob(x).mean())


def fit(
    module: Recorded,
    rows: Callable = random_rows,
    validation: Callable = validation_rows,
    resume: Path | None = None,
    callbacks: tuple[Callback, ...] = (),
    seed: int = 0,
) -> Recorded:
    trainer = pl.Trainer(
        max_epochs=module.n_epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        callbacks=list(callbacks),
    )
    data = EpochData(rows, validation, batch_size=16, seed=seed, n_rows=lambda epoch: 50)
    trainer.fit(module, data, ckpt_path=resume and str(resume), weights_only=True)
    return module


def weights(module: Recorded) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.model.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def broken_at(epoch: int) -> Callable:
    def rows(now: int, generator: torch.Generator) -> Rows:
        x = random_points(generator)
        if now == epoch:
            x[:] = float("nan")
        return Rows(x=x)

    return rows


class Break(Callback):
    """Sets a weight to NaN before an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Recorded) -> None:
        if module.current_epoch == self.epoch:
            with torch.no_grad():
                next(module.model.parameters()).fill_(float("nan"))


class BreakValidation(Break):
    """Sets a weight to NaN before the validation of an epoch."""

    on_validation_epoch_start = Break.on_train_epoch_start
    on_train_epoch_start = Callback.on_train_epoch_start
