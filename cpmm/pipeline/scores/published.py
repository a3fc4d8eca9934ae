"""The paper's tables, and what was measured beside them: published.csv, the one place of these figures.

``paper`` holds the paper's figure, in bits per dimension or percent; ``anchor`` that of a small run of another
implementation on the same data, one seed, untuned: alpha 1e-6, log-determinant included, one noise sample, the
10k test images. Table 3 of the paper does not say in which space its densities are.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}  # of the data sets


@dataclass(frozen=True)
class Figure:
    """One figure of a table.

    Attributes:
        table: 1 or 3.
        data: Data set that is modelled.
        ood: Data set that is told from it, Table 3 only.
        row: Name of the row.
        model: What this project calls the model, in ``metrics.json`` or else in the sweep ``table1``; empty if it has none.
        space: Space of the densities, "data" or "mixture"; empty if it is not stated.
        metric: density, accuracy, auroc or aupr.
        paper: As printed, None if the paper has none.
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
def published() -> tuple[Figure, ...]:
    """Read every figure, in the order of the paper."""
    with Path(__file__).with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        return tuple(
            Figure(
                **row
                | {
                    "table": int(row["table"]),
                    "paper": float(row["paper"]) if row["paper"] else None,
                    "anchor": float(row["anchor"]) if row["anchor"] else None,
                }
            )
            for row in csv.DictReader(file)
        )


def data_of(preset: str) -> str | None:
    """Which of the paper's data sets a preset models, by its name; None for another."""
    return next((name for name in TITLES if preset.startswith(name)), None)


def printed(data: str | None, row: str, metric: str) -> float | None:
    """A figure of the paper's Table 1, bits per dimension or percent; None if it has none."""
    for figure in published():
        if figure.table == 1 and (figure.data, figure.row, figure.metric) == (data, row, metric):
            return figure.paper
    return None


def printed_ood(data: str | None, ood: str, model: str, metric: str) -> float | None:
    """A figure of the paper's Table 3 in percent, None if it has none."""
    for figure in published():
        key = (figure.data, figure.ood, figure.model, figure.metric)
        if figure.table == 3 and key == (data, ood, model, metric):
            return figure.paper
    return None
