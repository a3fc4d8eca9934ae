"""What the configuration and the prepared data already tell, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cpmm.data import DataSplits
from cpmm.initialization import PARTITIONS, count_distinct, dense_points, require_clusters
from cpmm.neighbours import require_graph
from cpmm.pipeline.config import Config, pick
from cpmm.pipeline.config.fingerprints import needs_spaces, needs_teacher
from cpmm.pipeline.models.flows import make_teacher
from cpmm.pipeline.models.mixtures import make_curriculum, require_drawn
from cpmm.pipeline.models.trajectories import make_trajectories
from cpmm.pipeline.scores.ood import read_ood
from cpmm.spaces import require_validation, training_subset
from cpmm.training.teacher import TeacherTraining


def check_sizes(
    config: Config, data: DataSplits, model: str | None = None, ood: bool = False
) -> None:
    """Check that a model can be trained on the data, by the checks that training makes itself.

    Args:
        config: The whole composed configuration.
        data: The splits.
        model: "cpmm", or a row of conf/baselines/; None: what the configuration says.
        ood: Whether the data set that is to be told apart is read as well.

    Raises:
        ValueError: If it cannot, or the other data set is of another kind.
        FileNotFoundError: If a file of the other data set is missing.
        ConnectionError: If its download fails.
    """
    model = config["model"] if model is None else model
    guided = needs_spaces(config, model)
    if guided and needs_teacher(config):
        with _named("teacher"):
            _check_teacher(config, data)
    if guided:
        require_validation(len(data.raw["validation"]), config["spaces"]["n_validation"])
    if model == "cpmm" or config["baselines"][model]["kind"] == "curriculum":
        with _named("cpmm"):
            _check_cpmm(config, data, guided)
    if ood and config["evaluation"]["ood"] is not None:
        read_ood(config["evaluation"]["ood"], data)


def _check_teacher(config: Config, data: DataSplits) -> None:
    options = config["teacher"]
    epochs = pick(options, "flow_matching_epochs", "likelihood_epochs")
    rates = pick(options, "kinetic_weight", "jacobian_weight", "learning_rate", "n_warmup_epochs")
    seed = config["seed"]
    TeacherTraining(make_teacher(options, data, seed), **epochs, **rates, seed=seed)


def _check_cpmm(config: Config, data: DataSplits, guided: bool) -> None:
    cpmm, spaces = config["cpmm"], config["spaces"]
    start, n_clusters = cpmm["initialization"], cpmm["n_clusters"]
    n = len(data.raw["train"])
    make_curriculum(cpmm, spaces["n_spaces"] if guided else 0)
    make_trajectories(cpmm, data)
    require_drawn(n, cpmm["n_points"])
    _check_views(cpmm, data)
    index = training_subset(n, spaces["n_train"], config["seed"]) if guided else None
    told = bool(cpmm["pseudo_label_weight"])  # then all points are grouped
    n_grouped = n if index is None or told else len(index)
    require_clusters(n_clusters, n_grouped)
    if start["kind"] == "neighbours":
        require_graph(n_grouped, n_clusters, **pick(start, "n_points", "n_neighbours"))
    elif start["kind"] in PARTITIONS:
        x = data.preprocessing.unwhiten(data.points("train")[0]).float()
        x = x if index is None or told else x[index]
        n_distinct = count_distinct(x, n_clusters)
        if n_distinct < n_clusters:
            raise ValueError(
                f"cpmm.initialization.kind {start['kind']!r} makes cpmm.n_clusters (C) = "
                f"{n_clusters} groups, but only {n_distinct} of the {len(x)} training points are "
                f"distinct: set cpmm.n_clusters to {n_distinct} or less"
            )
        if start["kind"] == "linkage":
            dense_points(x.double().numpy(), n_clusters, start["outlier_share"])


def _check_views(cpmm: Config, data: DataSplits) -> None:
    if data.image_shape is not None and not data.raw["train"].is_floating_point():
        return
    if cpmm["initialization"]["kind"] == "neighbours":
        raise ValueError(
            "cpmm.initialization.kind is 'neighbours', which needs images of whole grey levels, "
            "and the data are a table: set it to kmeans or analyzers"
        )
    if cpmm["consistency_weight"]:
        raise ValueError(
            f"cpmm.consistency_weight is {cpmm['consistency_weight']}, which needs images of whole "
            "grey levels, and the data are a table: set it to 0"
        )


@contextmanager
def _named(section: str) -> Iterator[None]:
    """Say which section an option is of, where the error is of any field or solver."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(("field.", "solver.")):
            raise ValueError(f"{section}.{error}") from error
        raise
