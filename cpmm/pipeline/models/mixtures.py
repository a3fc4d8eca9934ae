"""From configuration to the training of a mixture: trajectories, or free components."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from cpmm.data import DataSplits
from cpmm.direct import DirectMixture
from cpmm.initialization import count_distinct, kmeans, local_factor_analyzers
from cpmm.pipeline.artifacts.spaces import Spaces
from cpmm.pipeline.config import pick
from cpmm.pipeline.config.schema import check_cpmm
from cpmm.pipeline.models.trajectories import (
    make_groups,
    make_trajectories,
    make_views,
    n_factors,
)  # fmt: skip
from cpmm.seeds import seeded_generator
from cpmm.spaces import Curriculum
from cpmm.training.epochs import EpochData, Rows
from cpmm.training.likelihood import MixtureOptions
from cpmm.training.mixture import MixtureTraining

SPACES = ("teacher", "noise")
STEPS = 25  # of an epoch, where the number of draws is left to the number of points


def make_disconnected(
    config: Mapping[str, Any],
    data: DataSplits,
    start: Tensor,
    group: Tensor | None,
    n_each: int,
    shrinkage: float,
) -> DirectMixture:
    """Build a mixture like that of trajectories, of components that nothing connects.

    Args:
        config: The section ``cpmm``.
        data: The splits.
        start: Training points in the space where training starts, (N, M).
        group: Their groups, (N,), each of which becomes a cluster; None takes k-means'.
        n_each: Components of a cluster, those of k-means within the group, as far as the group has
            so many distinct points.
        shrinkage: See :func:`cpmm.initialization.local_factor_analyzers`.
    """
    n_clusters, floor = config["n_clusters"], config["log_diagonal_floor"]
    generator = seeded_generator(config["seed"], 14)
    if group is None:
        group = kmeans(start, n_clusters, generator)
    label, sizes = torch.empty_like(group), []
    for c in range(n_clusters):
        member = group == c
        n_own = count_distinct(start[member], n_each)
        label[member] = sum(sizes) + kmeans(start[member], n_own, generator, n_init=1)
        sizes.append(n_own)
    analyzers = local_factor_analyzers(
        start, label, sum(sizes), n_factors(config, data), floor, shrinkage
    )
    return DirectMixture(analyzers, floor, tuple(sizes))


def make_curriculum(config: Mapping[str, Any], n_spaces: int) -> Curriculum:
    """Build the schedule of the section ``cpmm``; without a curriculum only fine-tuning is left."""
    if not config["curriculum"]:
        return Curriculum(0, 0, config["fine_tune_epochs"])
    return Curriculum(n_spaces, **pick(config, "epochs_per_space", "fine_tune_epochs"))


def make_mixture_training(
    config: Mapping[str, Any],
    mixture: Mapping[str, Any],
    data: DataSplits,
    spaces: Spaces | None,
    make_model: Callable[..., nn.Module] | None = None,
) -> tuple[MixtureTraining, EpochData]:
    """Build the training of the trajectories and its rows: the stage's, and every sweep trial's.

    Args:
        config: The section ``cpmm``.
        mixture: The section ``mixture``, for the pseudotimes that validation uses.
        data: The splits.
        spaces: The curriculum; None trains on the input space alone.
        make_model: Takes the arguments of :func:`make_trajectories`, and its place.
    """
    check_cpmm(config)
    curriculum = make_curriculum(config, len(spaces) if spaces else 0)
    fine_tuning = data.points("validation")[0].float()
    start = spaces.train(0) if spaces else data.points("train")[0].float()
    of_points, group = _groups(config, data, spaces.train_index if spaces else None, len(start))
    model = (make_model or make_trajectories)(config, data, start, group)
    options = MixtureOptions(
        n_extracted=mixture["n_pseudotimes"],
        **pick(
            config, "pseudo_label_spaces", "pseudo_label_weight", "n_pseudotimes", "pseudotimes",
            "noise", "entropy_weight", "learning_rate", "path_weight", "consistency_weight",
            "temperature", "initial_rate_factor", "n_warmup_epochs", "patience", "seed",
        ),
    )  # fmt: skip
    module = MixtureTraining(model, curriculum, options)

    @lru_cache(maxsize=1)
    def guided(index: int) -> Tensor:
        return spaces.train(index)

    def rows(epoch: int, generator: torch.Generator) -> Rows:
        space = curriculum.space(epoch)
        if space is None:
            return _fine_tuning_rows(config, data, of_points, generator)
        if of_points is not None or epoch < module.pseudo_label_epochs:
            return Rows(x=guided(space), group=group)
        return Rows(x=guided(space))

    def validation_rows(epoch: int) -> Tensor:
        index = curriculum.space(epoch)
        return fine_tuning if index is None else spaces.validation(index)

    def n_rows(epoch: int) -> int:
        if curriculum.space(epoch) is not None:
            return len(start)
        n = config["n_points"] or len(data.raw["train"])
        return n * _draws(config, n)

    return module, EpochData(rows, validation_rows, config["batch_size"], config["seed"], n_rows)


def _groups(
    config: Mapping[str, Any], data: DataSplits, index: Tensor | None, n_rows: int
) -> tuple[Tensor | None, Tensor | None]:
    """Groups of all training points, (N,), and of the ``n_rows`` of a space, each None without any.

    ``index`` are the training points that go through the spaces, draw by draw; None: all. All are
    only grouped if they are told on the input space too (``pseudo_label_weight``), and then the
    rows have theirs; else the rows are grouped by themselves.
    """
    of_points = make_groups(config, data) if config["pseudo_label_weight"] else None
    group = make_groups(config, data, index) if of_points is None else of_points[_all_or(index)]
    if group is None:
        return None, None
    if index is not None and len(found := group.unique()) < config["n_clusters"]:
        raise ValueError(
            f"{len(found)} of {config['n_clusters']} groups of the training points have points "
            f"among the {len(group)} in the spaces: raise spaces.n_train, or lower cpmm.n_clusters"
        )
    return of_points, group.repeat(n_rows // len(group))


def _all_or(index: Tensor | None) -> Tensor | slice:
    return slice(None) if index is None else index


def _draws(config: Mapping[str, Any], n_points: int) -> int:
    """Draws of each point in an epoch of fine-tuning; null: so many that it has some 25 steps."""
    return config["n_draws"] or max(1, round(STEPS * config["batch_size"] / n_points))


def require_drawn(n: int, n_points: int | None) -> None:
    """Check ``cpmm.n_points``, the training points of an epoch.

    Raises:
        ValueError: If there are only ``n``, fewer.
    """
    if n_points is not None and n_points > n:
        raise ValueError(
            f"cpmm.n_points is {n_points}: expected at most {n}, the training points, or null for "
            "all"
        )


def _fine_tuning_rows(
    config: Mapping[str, Any], data: DataSplits, group: Tensor | None, generator: torch.Generator
) -> Rows:
    n, n_points = len(data.raw["train"]), config["n_points"]
    require_drawn(n, n_points)
    n_draws = _draws(config, n_points or n)
    index = None if n_points is None else torch.randperm(n, generator=generator)[:n_points]
    rows = {"x": data.draw(n_draws, generator, index)}
    if group is not None:
        rows["group"] = group[_all_or(index)].repeat(n_draws)
    if config["consistency_weight"]:
        views = make_views(config, data)
        rows["view"] = torch.cat([data.draw_views(views, generator, index) for _ in range(n_draws)])
    return Rows(**rows)
