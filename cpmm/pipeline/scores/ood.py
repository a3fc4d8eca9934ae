"""Points of another data set, and how well a density tells them from those of a split."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cpmm.data import SPLITS, DataSplits
from cpmm.metrics import detection_scores
from cpmm.pipeline.config.fingerprints import check_digests
from cpmm.seeds import seeded_generator

if TYPE_CHECKING:
    from cpmm.pipeline.artifacts.sources import Source
    from cpmm.pipeline.scores.scorer import Scorer


@dataclass(frozen=True)
class OodPoints:
    """Points of another data set, in the space of the data that the models know.

    Attributes:
        name: Of that data set.
        z: (N', M), float64, by the preprocessing of the data that the models know.
        log_det: Log-determinant of the map from data, nats, (N',).
    """

    name: str
    z: Tensor
    log_det: Tensor

    def tell(self, score: Scorer, inside: Tensor, ood: Callable[[], Tensor]) -> dict[str, Any]:
        """Tell the two apart as :meth:`scores` does, or say under ``missing`` why a model cannot.

        ``ood`` computes the log-densities of the other data set.
        """
        try:
            return self.scores(score, inside, ood())
        except FloatingPointError as error:
            return {"missing": str(error)}

    def scores(self, score: Scorer, inside: Tensor, ood: Tensor) -> dict[str, dict[str, float]]:
        """Tell the two apart by log-density, in units of the data and in the models' space.

        Args:
            score: Of the split whose points are known.
            inside: Log-density of its first n points in the models' space, nats, (n,).
            ood: The same of the first n' points of the other data set, (n',).

        Raises:
            FloatingPointError: If a log-density is not finite, or all are the same.
        """
        both = torch.cat([inside, ood])
        bad = int((~torch.isfinite(both)).sum())
        if bad:
            raise FloatingPointError(
                f"{bad} of {len(both)} log-densities are not finite: points of "
                f"{self.name} lie too far from the data to be told apart by a number"
            )
        if bool((both == both[0]).all()):
            raise FloatingPointError(
                f"all {len(both)} log-densities are {float(both[0]):.6g}: they tell nothing apart"
            )
        shifts = (score.log_det[: len(inside)], self.log_det[: len(ood)])
        return {
            "data": detection_scores((inside + shifts[0]).numpy(), (ood + shifts[1]).numpy()),
            "mixture": detection_scores(inside.numpy(), ood.numpy()),
        }


def read_ood(options: Mapping[str, Any], data: DataSplits) -> OodPoints:
    """Read the other data set's own test split, all of it if it has none.

    Args:
        options: The section ``evaluation.ood``.
        data: What the models know; its preprocessing and its noise seed are used.

    Raises:
        ValueError: If an option or a file is wrong, the file is another than when the configuration
            was composed, the points are of another kind, or the data set is the same.
        FileNotFoundError: If a file is missing.
        ConnectionError: If a download fails.
    """
    from cpmm.pipeline.artifacts.sources import read_source

    name = options.get("name")
    if name is None:
        raise ValueError(
            "evaluation.ood.name is missing: choose a file of conf/ood/, such as "
            "ood@evaluation.ood=mnist"
        )
    try:
        if options.get("source") == "csv":
            source = _read_table(options, data)
        else:
            source = read_source({"source": options.get("source"), **options.get("options", {})})
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        said = re.sub(r"\bdata\.(?=source|options)", "evaluation.ood.", str(error))
        raise type(error)(
            f"{said} (to go without another data set: evaluation.ood=null)"
        ) from error
    check_digests(options, "evaluation.ood")
    _require_same_kind(name, source, data)
    raw = torch.from_numpy(source.x[-source.official_test :])  # all, if it is 0
    _require_other_points(name, raw, data)
    pre = data.preprocessing
    generator = seeded_generator(data.noise_seed, len(SPLITS) + 1)
    return OodPoints(name, *pre.forward(pre.dequantize(raw, generator)))


def _read_table(options: Mapping[str, Any], data: DataSplits) -> Source:
    """Read a table written as text as the data were read: same columns, categories and fills."""
    from cpmm.pipeline.artifacts.sources import Source, read_like

    names = data.feature_names
    if data.preprocessing.levels is not None:
        raise ValueError("evaluation.ood is a table, and the data are images")
    x = read_like(options["options"], names, data.columns)
    return Source(x, None, 0, None, None, names, ())


def _require_same_kind(name: str, source: Source, data: DataSplits) -> None:
    for what, got, expected in (
        ("features", source.x.shape[1], data.n_features),
        ("shape of an image (channels, height, width)", source.image_shape, data.image_shape),
        ("grey levels", source.levels, data.preprocessing.levels),
        ("names of the features", source.feature_names, data.feature_names),
    ):
        if got != expected:
            found, known = (
                text if len(text) <= 60 else f"{text[:60]}..." for text in map(str, (got, expected))
            )
            raise ValueError(
                f"evaluation.ood, {name}, does not compare with the data: {what}: {found}, "
                f"expected {known}; choose another data set, or evaluation.ood=null"
            )


def _require_other_points(name: str, raw: Tensor, data: DataSplits) -> None:
    known = {row.tobytes() for split in SPLITS for row in data.raw[split].numpy()}
    same = sum(row.tobytes() in known for row in raw.numpy())
    if same > len(raw) / 2:
        raise ValueError(
            f"evaluation.ood, {name}, is the data set itself: {same} of its {len(raw)} test points "
            "are among the data; choose another one, or evaluation.ood=null"
        )
