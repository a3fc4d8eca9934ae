"""How columns of a table that are more than plain numbers became features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Columns:
    """What a table needs to be read once more as it was read for training.

    Attributes:
        booleans: Columns of true and false, or yes and no, which are 1 and 0.
        categories: Sorted categories of each column of text. Each is a feature ``column=category``
            that is 1 or 0; of two, the second alone.
        fill: What stands for a gap in each of the M features; None where gaps are refused.
    """

    booleans: tuple[str, ...] = ()
    categories: Mapping[str, tuple[str, ...]] | None = None
    fill: tuple[float, ...] | None = None

    def features(self, column: str) -> dict[str, str | None]:
        """Names of the features that a column becomes, and the category of each; None: numbers."""
        found = (self.categories or {}).get(column)
        if found is None:
            return {column: None}
        return {f"{column}={category}": category for category in found[len(found) == 2 :]}

    def encode(self, column: str, values: str | Sequence[str]) -> dict[str, list[float]]:
        """Values of the features of a column of categories, for one category or several in turn.

        Raises:
            ValueError: If a category is unknown.
        """
        values = [values] if isinstance(values, str) else list(values)
        known = (self.categories or {})[column]
        for value in values:
            if value not in known:
                raise ValueError(f"column {column!r} has the categories {known}: got {value!r}")
        return {
            feature: [float(value == category) for value in values]
            for feature, category in self.features(column).items()
        }

    def select(self, features: Sequence[int]) -> Columns:
        """Return what a table of some of the M features needs; columns may lose a category."""
        if self.fill is None:
            return self
        return replace(self, fill=tuple(self.fill[feature] for feature in features))

    def to_dict(self) -> dict[str, Any] | None:
        """Return what JSON can hold; None if there is nothing to say."""
        if not (self.booleans or self.categories or self.fill):
            return None
        return {
            "booleans": list(self.booleans),
            "categories": {name: list(found) for name, found in (self.categories or {}).items()},
            "fill": None if self.fill is None else list(self.fill),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Columns:
        """Build from what :meth:`to_dict` returned."""
        if values is None:
            return cls()
        categories = {name: tuple(found) for name, found in values["categories"].items()}
        fill = values["fill"]
        return cls(tuple(values["booleans"]), categories, None if fill is None else tuple(fill))
