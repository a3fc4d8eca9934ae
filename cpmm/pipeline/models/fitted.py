"""Trained baselines: scored, written to data/<preset>/baselines/<row> and read again from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from cpmm.artifact import load_artifact, load_header, save_artifact, seal_folder, verify_files
from cpmm.data import DataSplits
from cpmm.mixture import Mixture
from cpmm.pipeline.config import Config
from cpmm.pipeline.config.fingerprints import fingerprint_baseline
from cpmm.pipeline.models.runtime import choose
from cpmm.pipeline.models.trajectories import mixture_header

LogProb = Callable[[Tensor], Tensor]
NOT_TRAINED: dict[str, int | None] = {"best_epoch": None, "steps": None}


@dataclass(frozen=True)
class Fitted:
    """A baseline, trained.

    Attributes:
        n_parameters: Numbers that are kept to score points; None: it is no model.
        ended: How its training ended: ``best_epoch`` and ``steps``.
        log_prob: Log-density of points in the models' space, (N, M) float64 to nats, (N,).
        predict: Cluster of each point of a split, by the split's name.
        mixture: If it is one.
        weights: What is kept of it otherwise.
        n_points: Points of a split that its density is measured on; None: all.
        n_components: Components of its density; None: it has none.
        split: The split that it is scored on.
        missing: Why there is nothing of it; None: there is.
        note: What is to be said of it, such as that it is smaller than was asked for.
    """

    n_parameters: int | None
    ended: Mapping[str, int | None]
    log_prob: LogProb | None = None
    predict: Callable[[str], Tensor] | None = None
    mixture: Mixture | None = None
    weights: Mapping[str, Tensor] | None = None
    n_points: int | None = None
    n_components: int | None = None
    split: str = "test"
    missing: str | None = None
    note: str | None = None


def of_mixture(
    mixture: Mixture, data: DataSplits, n_clusters: int, ended: Mapping[str, int | None]
) -> Fitted:
    """Score a mixture in float64; it clusters points if it has up to ``n_clusters`` clusters."""
    mixture = mixture.to(torch.float64)

    def predict(split: str) -> Tensor:
        return mixture.predict(data.points(split)[0])

    fa = mixture.components
    return Fitted(
        fa.n_parameters, ended, mixture.log_prob,
        predict if mixture.n_clusters <= n_clusters else None, mixture,
        n_components=fa.n_components,
    )  # fmt: skip


def of_gaussian(weights: Mapping[str, Tensor], data: DataSplits) -> Fitted:
    """Score one Gaussian by its ``mean``, (M,), and ``scale_tril``, (M, M), in float64."""
    gaussian = MultivariateNormal(weights["mean"], scale_tril=weights["scale_tril"])
    size = data.n_features * (data.n_features + 3) // 2
    return Fitted(size, NOT_TRAINED, gaussian.log_prob, weights=weights, n_components=1)


def of_kmeans(weights: Mapping[str, Tensor], data: DataSplits) -> Fitted:
    """Cluster points by the nearest ``centre``, (C, M) float64, before any whitening."""

    def predict(split: str) -> Tensor:
        points = data.preprocessing.unwhiten(data.points(split)[0])
        return torch.cdist(points, weights["centre"]).argmin(1)

    return Fitted(weights["centre"].numel(), NOT_TRAINED, predict=predict, weights=weights)


def of_groups(weights: Mapping[str, Tensor], _data: DataSplits) -> Fitted:
    """Score the ``group`` of each training point, (N,), which no other points have."""
    return Fitted(
        None, NOT_TRAINED, predict=lambda _split: weights["group"], weights=weights, split="train"
    )


# Kinds that are no mixtures, and how their weights are scored again.
KEPT: dict[str, Callable[[Mapping[str, Tensor], DataSplits], Fitted]] = {
    "gaussian": of_gaussian,
    "kmeans": of_kmeans,
    "groups": of_groups,
}


def save_baseline(
    row: str, fitted: Fitted, folder: Path, config: Config, data: DataSplits, fingerprint: str
) -> None:
    """Write what is kept of a baseline: a mixture as the pipeline's own, other models' weights.

    Files that already lie in the folder are sealed along.
    """
    kind = config["baselines"][row]["kind"]
    header = {"fingerprint": fingerprint, "row": row, "kind_of_model": kind}
    said = {"missing": fitted.missing, "note": fitted.note}
    header |= {name: text for name, text in said.items() if text is not None}
    if fitted.mixture is None:
        save_artifact(folder, "baseline", fitted.weights or {}, header)
        return
    described = mixture_header(config, data, fingerprint)
    mixture = fitted.mixture.to(torch.float32)
    mixture.save(folder / "mixture", described, data.preprocessing.tensors)
    seal_folder(folder, "baseline", header, {})


def load_baseline(row: str, folder: Path, config: Config, data: DataSplits) -> Fitted:
    """Read a row of conf/baselines/ that was trained for ``folder``, ``data/<preset>``.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or of another configuration, or the kind of the row is
            neither a mixture nor one of :data:`KEPT`.
    """
    fingerprint, place = fingerprint_baseline(config, row), folder / "baselines" / row
    try:
        header = load_header(place, "baseline", fingerprint)
        verify_files(place, header, header["files"])
        if (place / "mixture").is_dir():
            mixture = Mixture.load(place / "mixture", fingerprint=fingerprint)
            fitted = of_mixture(mixture, data, config["cpmm"]["n_clusters"], NOT_TRAINED)
            return replace(fitted, note=header.get("note"))
        weights, _ = load_artifact(place, "baseline", fingerprint=fingerprint)
    except (FileNotFoundError, ValueError) as error:
        command = f"python workflows/train_baseline.py {folder / 'config.yaml'} {row}"
        raise type(error)(f"{error}; `{command}` trains this baseline alone") from error
    if header.get("missing"):
        return Fitted(None, NOT_TRAINED, missing=header["missing"])
    kind = config["baselines"][row]["kind"]
    of = choose(f"baselines.{row}.kind, to be scored again,", kind, KEPT)
    return replace(of(weights, data), note=header.get("note"))
