"""Class labels as people write them: which cells are a class, and which are none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

# In any case. "None" is not among them: it is a class of many tables, beside "mild" and "severe".
NO_LABEL = frozenset(
    {"", "?", "na", "n/a", "#n/a", "<na>", "nan", "-nan", "nat", "null", "noise", "1.#qnan"}
)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
MEANT = "empty cells, NaN, NA, N/A, null, ?, noise and -1"


def index_classes(where: str, values: Iterable[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Number the classes of a column of labels.

    -1, an empty cell, NaN, NA and noise are no label. Where all labels are numbers, 1 and 1.0 are
    one class, called 1.

    Args:
        where: What the labels are of, for messages, such as a path.
        values: The label of each row as text, N of them; spaces around it do not count.

    Returns:
        Class of each row, (N,), int64, -1 for no label; the names of the classes, numbers in
        their order, text in that of the alphabet.

    Raises:
        ValueError: If no row has a label.
    """
    texts = [str(value).strip() for value in values]
    number = {text: _number(text) for text in set(texts)}
    found = sorted(text for text in number if not _is_none(text, number[text]))
    if not found:
        raise ValueError(
            f"{where} has no label ({MEANT} mean none): set its label option to null to go without"
        )
    if all(number[text] is not None for text in found):
        found.sort(key=lambda text: (number[text], len(text)))  # 1 before 1.0
        names: dict[object, str] = {}
        for text in found:
            names.setdefault(number[text], re.sub(r"\.0*$", "", text))
        place = {value: c for c, value in enumerate(names)}
        index = {text: place[number[text]] for text in found}
    else:
        names = {text: text for text in found}
        index = {text: c for c, text in enumerate(found)}
    label = np.array([index.get(text, -1) for text in texts], dtype=np.int64)
    return label, tuple(names.values())


def describe_labels(
    values: Iterable[str], label: np.ndarray, class_names: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Say what was made of labels.

    Args:
        values: As :func:`index_classes` took them.
        label: As it gave them, (N,).
        class_names: Likewise.

    Returns:
        What was found, such as ``12 of 200 rows without a label ('-1')``; and what looks wrong.
    """
    texts = [str(value).strip() for value in values]
    none = Counter(text for text, c in zip(texts, label, strict=True) if c < 0)
    found, doubts = [], []
    if none:
        cells = ", ".join(repr(text) if text else "empty" for text in sorted(none)[:5])
        found.append(f"{none.total()} of {len(texts)} rows without a label ({cells})")
    n_labelled = len(texts) - none.total()
    if len(class_names) == 1 and any(_number(text) == -1 for text in none):
        doubts.append(
            f"all labels are {class_names[0]!r} or -1, which means no label: if -1 is a class, "
            "write it as another number"
        )
    elif len(class_names) == n_labelled > 10 and any("." in name for name in class_names):
        doubts.append(
            f"the {n_labelled} labels are numbers that all differ, such as {class_names[0]}: they "
            "look like a measurement, not classes"
        )
    elif len(class_names) == n_labelled > 10:
        doubts.append(
            f"the {n_labelled} labels all differ, such as {class_names[0]!r}: they look like "
            "names of rows, not classes"
        )
    return found, doubts


def _number(text: str) -> int | float | None:
    """The value of a text that is a finite number, exact where it is whole; else None."""
    if not NUMBER.fullmatch(text):
        return None
    if len(text) < 4000 and re.fullmatch(r"[+-]?\d+", text, re.ASCII):
        return int(text)
    value = float(text)
    return value if np.isfinite(value) else None


def _is_none(text: str, number: int | float | None) -> bool:
    return number == -1 or text.casefold() in NO_LABEL
