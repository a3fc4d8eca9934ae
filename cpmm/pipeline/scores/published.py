"""The scores in the paper's tables, and what was measured beside them: all stand in published.csv.

``paper`` is the paper's score; ``anchor`` that of a small run of another implementation on the same
data, one seed, untuned: alpha 1e-6, log-determinant included, one noise sample, the 10k test
images. The file has percent, as the paper prints them; they are read as shares, like our own.
Table 3 of the paper does not say in which space its densities are.
"""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from cpmm.pipeline.scores.tables import SCORES

PATH = Path(__file__).with_suffix(".csv")
TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}  # of the data sets


class PublishedScore(NamedTuple):
    """One score of a table.

    Attributes:
        table: 1 or 3.
        data: Data set that is modelled.
        ood: Data set that is told from it, Table 3 only.
        row: Name of the row.
        model: What this project calls the model, in ``metrics.json`` or else in the sweep
            ``table1``; empty if it has none.
        space: Space of the densities, "data" or "mixture"; empty if it is not stated.
        metric: density, accuracy, auroc or aupr.
        paper: Bits per dimension, or a share; None if the paper has none.
        anchor: As measured elsewhere, None if it was not.
    """

    table: int
    data: str
    ood: str
    row: str
    model: str
    space: str
    metric: str
    paper: float | None
    anchor: float | None


@lru_cache
def published() -> tuple[PublishedScore, ...]:
    """Read every score, in the order of the paper."""

    def read(row: dict[str, str]) -> PublishedScore:
        factor = SCORES[row["metric"]].factor
        numbers = {
            source: round(float(row[source]) / factor, 6) if row[source] else None
            for source in ("paper", "anchor")
        }
        return PublishedScore(**row | numbers | {"table": int(row["table"])})

    with PATH.open(newline="", encoding="utf-8") as file:
        return tuple(map(read, csv.DictReader(file)))


def data_of(preset: str) -> str | None:
    """Which of the paper's data sets a preset models, by its name; None for another."""
    return next((name for name in TITLES if preset.startswith(name)), None)


def printed(data: str | None, row: str | None, metric: str, ood: str = "") -> float | None:
    """A score of the paper, by its row or our model; of Table 3 with ``ood``; None without one."""
    for score in published():
        key = (score.data, score.ood, score.metric)
        if key == (data, ood, metric) and row in (score.row, score.model):
            return score.paper
    return None
