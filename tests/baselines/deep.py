"""What tests of the deep baselines share: blobs, and the loop that trains a model's own loss."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cpmm.baselines.autoencoder import Autoencoder
from cpmm.baselines.vade import VaDE
from cpmm.pipeline.models.fit import fit
from cpmm.training.epochs import EpochData, Rows
from cpmm.training.loss import LossTraining

TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "deterministic": True,
    "precision": "32-true",
    "checkpoint_every_n_epochs": 100,
}


def blobs(likelihood: str, generator: torch.Generator, n: int = 300) -> tuple[Tensor, Tensor]:
    """Three well separated groups of points, (n, 6), in the likelihood's range; their labels."""
    label = torch.arange(n) % 3
    centre = torch.tensor([[1.0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]])
    noise = torch.randn(n, 6, generator=generator)
    if likelihood == "gaussian":
        return 5 * centre[label] + noise, label
    return (0.1 + 0.8 * centre[label] + 0.05 * noise).clamp(0, 1), label


def train(model: Autoencoder | VaDE, x: Tensor, folder: Path, n_epochs: int, seed: int = 0) -> None:
    """Train by :class:`LossTraining`; the last rows are its validation."""
    module = LossTraining(
        model, n_epochs, noise=0.0, learning_rate=0.01, n_warmup_epochs=1, seed=seed
    )
    rows = EpochData(
        lambda epoch, generator: Rows(x=x[:-60]),
        lambda epoch: x[-60:],
        60,
        seed,
        lambda epoch: len(x) - 60,
    )
    fit("blobs", module, rows, TRAINER, folder, gradient_clip=10.0, quiet=True)


def random_vade(
    likelihood: str,
    generator: torch.Generator,
    m: int = 5,
    hidden: tuple[int, ...] = (4, 3),
    d: int = 2,
    n_clusters: int = 3,
) -> VaDE:
    """A VaDE in float64 whose every parameter is random, so that none can hide."""
    model = VaDE(Autoencoder(m, hidden, d, likelihood, generator), n_clusters).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model
