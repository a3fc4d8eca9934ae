"""Every score of a model: what it is called, how it is written, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

# Where densities are compared when another data set is told apart.
SPACES = {"data": "units of the data", "mixture": "the models' space"}


@dataclass(frozen=True)
class Score:
    """A score of a model, or what the model costs.

    Attributes:
        title: For people.
        of: What a model must give to have it: "density", "clusters", "ood" (densities of another
            data set, too), "size" or "cost".
        digits: After the point.
        unit: "%" of a share in [0, 1], "s" or "GB"; empty for numbers, and for densities, whose
            unit is the data's.
        lower_is_better: None if neither way is.
        space: Of the densities, where two are compared: a name of :data:`SPACES`.
    """

    title: str
    of: str
    digits: int = 3
    unit: str = ""
    lower_is_better: bool | None = False
    space: str = ""

    @property
    def heading(self) -> str:
        """Title of a column, with its space and unit; durations are written with their own."""
        parts = [self.title, SPACES.get(self.space), self.unit if self.unit != "s" else ""]
        return ", ".join(filter(None, parts))

    @property
    def factor(self) -> int:
        """What a value is multiplied by before it is written."""
        return 100 if self.unit == "%" else 1

    def gain(self, value: float, other: float) -> float:
        """By how much a value is better than another one, below 0 if it is worse."""
        return other - value if self.lower_is_better else value - other


def _ood(title: str, space: str) -> Score:
    return Score(title, "ood", digits=2, unit="%", space=space)


# By their names in tables of trials; those of "ood" are in metrics.json by space, see OOD.
SCORES = {
    "validation": Score("validation", "density", lower_is_better=True),
    "density": Score("density", "density", lower_is_better=True),
    "density_of_first": Score("density on the flows' points", "density", lower_is_better=True),
    "accuracy": Score("accuracy", "clusters", digits=1, unit="%"),
    "nmi": Score("NMI", "clusters"),
    "ari": Score("ARI", "clusters"),
    "purity": Score("purity", "clusters", digits=1, unit="%"),
    "auroc": _ood("AUROC", "mixture"),
    "aupr": _ood("AUPR", "mixture"),
    "aupr_out": _ood("AUPR out", "mixture"),
    "auroc_data": _ood("AUROC", "data"),
    "aupr_data": _ood("AUPR", "data"),
    "aupr_out_data": _ood("AUPR out", "data"),
    "n_components": Score("components", "size", digits=0, lower_is_better=None),
    "n_parameters": Score("parameters", "size", digits=0, lower_is_better=None),
    "seconds": Score("training", "cost", unit="s", lower_is_better=True),
    "seconds_10k": Score("10,000 densities", "cost", unit="s", lower_is_better=True),
    "memory_gb": Score("memory", "cost", unit="GB", lower_is_better=True),
}
CLUSTERING = tuple(name for name, score in SCORES.items() if score.of == "clusters")
TEST = ("density", *CLUSTERING)  # of a model on the test points, where seeds are compared
COSTS = ("n_parameters", "seconds", "seconds_10k", "memory_gb")
OOD = {  # space and key of metrics.json, by the name in tables of trials
    name: (score.space, name.removesuffix("_data"))
    for name, score in SCORES.items()
    if score.of == "ood"
}


def is_number(value: object) -> bool:
    """Whether there is a value, and a finite one."""
    return isinstance(value, Real) and math.isfinite(value)


def write_score(
    name: str,
    value: object,
    spread: object = None,
    nothing: str = "",
    digits: int | None = None,
) -> str:
    """Write a score for people, without its unit but for durations.

    Args:
        name: Of :data:`SCORES`.
        value: Shares are in [0, 1].
        spread: Its standard deviation or error; left out if it is no number.
        nothing: What stands for a value that is no finite number.
        digits: After the point, in place of the score's own.
    """
    score = SCORES[name]
    if not is_number(value):
        return nothing
    if score.unit == "s":
        return _write_duration(value)
    if score.of == "cost":
        return f"{value:.2g}"
    digits = score.digits if digits is None else digits
    text = f"{score.factor * value:,.{digits}f}".replace("-", "−")
    return f"{text} ± {score.factor * spread:.{digits}f}" if is_number(spread) else text


def write_digits(value: float) -> str:
    """Write a ratio with two digits that count, and all of those before the point."""
    if value >= 10 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{1 - math.floor(math.log10(value))}f}"


def write_line(cells: Sequence[str]) -> str:
    """Write a line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def write_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Write a Markdown table, its first column to the left and the others to the right."""
    return [write_line(line) for line in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]


def _write_duration(seconds: float) -> str:
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{write_digits(seconds / size)} {unit}"
    return f"{write_digits(seconds / 3600)} h"
