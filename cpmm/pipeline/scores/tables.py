"""How scores are written for people in the tables of sweeps and comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Of another data set told apart by density: column of a trial, and its space and score in metrics.json.
DETECTION = {
    "auroc": ("mixture", "auroc"),
    "aupr": ("mixture", "aupr"),
    "auroc_data": ("data", "auroc"),
    "aupr_data": ("data", "aupr"),
}
# Shares that are written in percent, with so many digits after the point.
PERCENT = {"accuracy": 1, "purity": 1, **dict.fromkeys(DETECTION, 2)}


def write_score(score: str, mean: float | None, sd: float | None = None, nothing: str = "") -> str:
    """Write a score, with its deviation where there is one.

    Args:
        score: Its name, which says whether it is in percent.
        mean: None or NaN if there is none.
        sd: None or NaN if there is none.
        nothing: What stands for no score.
    """
    if mean is None or math.isnan(mean):
        return nothing
    factor, digits = (100, PERCENT[score]) if score in PERCENT else (1, 3)
    text = f"{factor * mean:.{digits}f}".replace("-", "−")
    return text if sd is None or math.isnan(sd) else f"{text} ± {factor * sd:.{digits}f}"


DENSITY_SPACES = (("data", "units of the data"), ("mixture", "the models' space"))


def write_line(cells: Sequence[str]) -> str:
    """Write a line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
