"""Mixtures without an ODE that evaluate trains beside the extracted one, on the same likelihood."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workflows.stage import Config

if TYPE_CHECKING:
    from cpmm.baselines.direct import DirectMixture
    from cpmm.data import DataSplits
    from cpmm.mixture import Mixture


def train_direct(
    config: Config, data: DataSplits, mixture: Mixture, scratch: Path, matched: bool = False
) -> Mixture:
    """Train a direct mixture with the K, R and floor of the extracted one, on the same likelihood.

    ``matched`` gives each cluster a single component. Of the shrinkages of the local covariances, the
    one with the best validation likelihood starts the run.
    """
    import torch

    from cpmm.baselines.direct import DirectMixture
    from cpmm.initialization import group_axes, kmeans, shrunk_factor_analyzers
    from cpmm.seeds import seeded_generator

    options, seed = config["evaluation"]["direct"], config["seed"]
    floor = config["cpmm"]["log_diagonal_floor"]
    n_components = mixture.n_clusters if matched else mixture.components.n_components
    generator = seeded_generator(seed, 30)
    z = data.points("train")[0]
    x, near = z.float(), data.preprocessing.unwhiten(z).float()
    validation = data.points("validation")[0].float()
    label = kmeans(
        near, n_components, generator, options["kmeans_restarts"], options["kmeans_points"]
    )
    groups = group_axes(x, label, n_components, config["cpmm"]["n_factors"])
    starts = [
        DirectMixture(shrunk_factor_analyzers(groups, floor, shrinkage), floor)
        for shrinkage in options["shrinkages"]
    ]
    with torch.no_grad():
        best = max(starts, key=lambda model: float(model.mixture().log_prob(validation).mean()))
    return _optimize(config, data, best, scratch, "matched" if matched else "direct")


def train_on(config: Config, data: DataSplits, mixture: Mixture, scratch: Path) -> Mixture:
    """Train the extracted components on, each free of its trajectory, as the direct mixture is."""
    from dataclasses import replace

    import torch

    from cpmm.baselines.direct import DirectMixture

    floor = config["cpmm"]["log_diagonal_floor"]
    start = mixture.components.to(torch.float32)
    start = replace(start, log_diagonal=start.log_diagonal.clamp(min=floor + 1e-3))
    model = DirectMixture(start, floor, mixture.cluster_sizes)
    return _optimize(config, data, model, scratch, "refined")


def _optimize(
    config: Config, data: DataSplits, model: DirectMixture, scratch: Path, name: str
) -> Mixture:
    """Train a direct mixture by the section ``evaluation.direct``; the best epoch by validation."""
    import torch

    from cpmm.spaces import Curriculum
    from cpmm.training import EpochData, MixtureTraining, Rows
    from workflows.fit import fit
    from workflows.stage import pick

    options, seed = config["evaluation"]["direct"], config["seed"]
    validation = data.points("validation")[0].float()
    module = MixtureTraining(
        model,
        Curriculum(0, 0, options["epochs"]),
        told_spaces=0,
        told_weight=0.0,
        n_pseudotimes=1,
        pseudotimes="grid",
        n_extracted=1,
        entropy_weight=0.0,
        path_weight=0.0,
        consistency_weight=0.0,
        temperature=1.0,
        initial_rate_factor=1.0,
        **pick(options, "noise", "learning_rate", "n_warmup_epochs"),
        seed=seed,
    )
    rows = EpochData(
        lambda epoch, draws: Rows(x=data.draw(options["n_draws"], draws)),
        lambda epoch: validation,
        options["batch_size"],
        seed,
    )
    (scratch / name).mkdir(exist_ok=True)
    fit(
        f"evaluate {name} mixture", module, rows, config["trainer"], scratch / name,
        options["gradient_clip"],
    )  # fmt: skip
    with torch.no_grad():
        return module.model.cpu().mixture().to(torch.float64)
