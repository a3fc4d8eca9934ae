"""Tables of people: which columns are numbers, which are not, and how each becomes features.

The same code reads them to train on and to score: what trains scores, with the same answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pandas as pd

from cpmm.columns import Columns
from cpmm.reading.arrays import LARGEST
from cpmm.reading.labels import describe_labels, index_classes
from cpmm.reading.text import GAPS, GAPS_AMONG_NUMBERS, TableError, TextFormat, TextTable, some

MOST_CATEGORIES = 50  # of a column of text; more of them are an identifier
MANY = 20  # columns that are named in an option; of more, an option drops the whole kind
FEW = 0.05  # of the rows, that may rather be left out than filled
BOOLEANS = ({"true", "false"}, {"yes", "no"})  # true is 1, and yes
LABELS = {"class", "label", "target", "species", "diagnosis", "outcome", "category", "y"}
MONTH = r"(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
DATE = re.compile(
    r"\d{4}[-/.]\d{1,2}([-/.]\d{1,2})?([ T].*)?|\d{1,2}[/.-]\d{1,2}[/.-]\d{2,4}([ T].*)?"
    rf"|\d{{1,2}}:\d\d(:\d\d.*)?|\d{{1,2}}[- ]{MONTH}[- ,]*\d{{2,4}}.*|{MONTH} \d{{1,2}},? \d{{4}}"
    r"|\d{4}[mMqQ]\d{1,2}",
    re.IGNORECASE,
)
SIGNS = re.compile(r"[$€£¥]?\s*[+-]?[$€£¥]?\s*\d{1,3}(,?\d{3})*([.,]\d+)?\s*[%$€£¥]?")


@dataclass(frozen=True)
class Choice:
    """What becomes of the columns of a table.

    Attributes:
        columns: Those that are read, in any order; None takes all.
        drop: Of those, the ones that are left out.
        missing: Of rows with a gap: "refuse", "drop" the rows, or "impute".
        constant: Of columns with one value: "refuse" or "drop".
        text: Of columns of text: "refuse", "drop" or "one_hot".
    """

    columns: Sequence[str] | None = None
    drop: Sequence[str] = ()
    missing: str = "refuse"
    constant: str = "refuse"
    text: str = "refuse"


@dataclass(frozen=True)
class Table:
    """A table read for training.

    Attributes:
        x: (N, M), float64; NaN is a gap that is to be filled.
        feature_names: M names.
        columns: How they came about.
        label: Class of each row, (N,), -1 for none; None without labels.
        class_names: Names by class index.
        found: What was found out, and done, for people.
        doubts: What looks wrong.
    """

    x: np.ndarray
    feature_names: tuple[str, ...]
    columns: Columns
    label: np.ndarray | None
    class_names: tuple[str, ...]
    found: tuple[str, ...]
    doubts: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Column:
    """A column as it was read.

    Attributes:
        name: Its name.
        kind: "numbers", "booleans", or of text "text", "dates", "identifiers", "numbers with
            signs", "numbers beside text".
        value: (N,), float64: the numbers, or the index of the category; NaN for a gap.
        categories: Of text, sorted.
        example: A cell that is no number, and its row.
    """

    name: str
    kind: str
    value: np.ndarray
    categories: tuple[str, ...] = ()
    example: str = ""

    @property
    def is_text(self) -> bool:
        return self.kind not in ("numbers", "booleans")

    @property
    def can_be_encoded(self) -> bool:
        most = {"text": MOST_CATEGORIES, "numbers beside text": 10}  # such as 1, 2, 3+
        return len(self.categories) <= most.get(self.kind, 0)


def read_table(
    path: Path, form: TextFormat, label_column: str | None, choice: Choice,
    prefixes: tuple[str, str] = ("data.options.", "data."),
) -> Table:  # fmt: skip
    """Read a table to train on.

    Args:
        path: A table written as text.
        form: How it is written.
        label_column: Column of class labels; None without labels.
        choice: What becomes of its columns.
        prefixes: Of the options of the file and of the columns, in messages.

    Raises:
        ValueError: If a column or a cell is not as ``choice`` has it. One error names all that is
            wrong, and says what to write.
        FileNotFoundError: If there is no such file.
    """
    try:
        return _read_table(path, form, label_column, choice, prefixes)
    except TableError as error:
        raise ValueError(str(error)) from error


def _read_table(
    path: Path, form: TextFormat, label_column: str | None, choice: Choice,
    prefixes: tuple[str, str],
) -> Table:  # fmt: skip
    """As :func:`read_table`, with errors whose options can be followed."""
    try:
        text = TextTable(path, form, prefixes[0])
    except TableError as error:
        _say_the_rest(error, path, form, label_column, choice, prefixes)
        raise
    wanted = _wanted(text, label_column, choice, prefixes)
    ((frame, _),) = text.frames(raw=label_column)
    columns = [_inspect(name, frame[name], text.decimal) for name in wanted]
    n_before = len(columns)
    while columns and columns[-1].name in text.nameless and np.isnan(columns[-1].value).all():
        columns.pop()  # of a comma at the end of each line
    plan = _Plan(columns, text.nameless - set(choice.columns or ()), choice)
    if plan.faults or not plan.kept:
        raise _explain(path, plan, label_column, prefixes)
    found = [f"{path.name}: {len(frame)} rows and {len(text.names)} columns", *text.found]
    found += plan.describe()
    if len(columns) < n_before:
        found.append("empty ends of lines left out")
    doubts = [
        f"column {c.name!r} counts the rows: if it is an index, leave it out, "
        f"{text.options(**{'drop': [*choice.drop, c.name]}).replace(prefixes[0], prefixes[1])}"
        for c in plan.kept
        if _counts(c)
    ]
    if label_column is None:
        doubts += [
            f"column {c.name!r} looks like classes, and is trained on: if it is, set "
            f"{text.options(label_column=c.name)}"
            for c in plan.kept
            if _is_named_label(c)
        ]
    label, class_names = None, ()
    if label_column is not None:
        values = frame[label_column].fillna("").str.strip()[plan.rows]
        label, class_names = index_classes(f"column {label_column!r} of {path}", values)
        more, wrong = describe_labels(values, label, class_names)
        found, doubts = [*found, *more], [*doubts, *wrong]
    columns = plan.columns()
    parts = [_features(c, columns) for c in plan.kept]
    names = tuple(name for part in parts for name in part)
    if len(set(names)) < len(names):
        (twice,) = [name for name in names if names.count(name) > 1][:1]
        raise ValueError(f"{path}: a column and a category are both called {twice!r}: rename it")
    x = np.empty((int(plan.rows.sum()), len(names)))
    values = (value for part in parts for value in part.values())
    for m, value in enumerate(values):
        x[:, m] = value[plan.rows]
    return Table(x, names, columns, label, class_names, tuple(found), tuple(doubts))


class FeatureReader:
    """Points of a table, ``batch_size`` at a time, (n, M), as a mixture was trained on.

    Args:
        path: A table written as text, with the columns of the features, in any order and among
            others.
        feature_names: M of them.
        columns: How they came about.
        form: How the file is written.
        batch_size: Rows at a time.
        prefix: Of the options of ``form`` in messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such table, or a cell is none that the mixture knows.
    """

    def __init__(
        self, path: Path, feature_names: Sequence[str], columns: Columns, form: TextFormat,
        batch_size: int | None = None, prefix: str = "--",
    ) -> None:  # fmt: skip
        self.path, self.columns, self.batch_size = path, columns, batch_size
        try:
            self.text = TextTable(path, form, prefix)
        except TableError as error:
            raise ValueError(str(error)) from error
        origin = {
            feature: column
            for column in columns.categories or ()
            for feature in columns.features(column)
        }
        self.place = {name: m for m, name in enumerate(feature_names)}
        self.wanted = list(dict.fromkeys(origin.get(name, name) for name in feature_names))
        known = set(self.text.names)
        lacking = [name for name in self.wanted if name not in known]
        if lacking:
            raise ValueError(
                f"{path} lacks {len(lacking)} of the mixture's {len(self.wanted)} features: "
                f"{some(lacking)}; its header has {some(self.text.names)} "
                f"(delimiter {self.text.delimiter!r})"
            )
        self.total = self.text.size

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yield points, (n, M), and how far the file has been read, of :attr:`total`."""
        n_before = 0
        for frame, done in self.text.frames(self.batch_size, [*self._texts]):
            x = np.empty((len(frame), len(self.place)))
            for name in self.wanted:
                column = _inspect(name, frame[name], self.text.decimal, name in self._texts)
                for feature, value in self._values(column, n_before).items():
                    if feature in self.place:
                        x[:, self.place[feature]] = value
            if self.columns.fill is not None:
                x = np.where(np.isnan(x), self.columns.fill, x)
            yield x, done
            n_before += len(frame)

    def read(self) -> np.ndarray:
        """All points, (N, M)."""
        return np.concatenate([x for x, _ in self])

    @property
    def _texts(self) -> Mapping[str, tuple[str, ...]]:
        return self.columns.categories or {}

    def _values(self, column: _Column, n_before: int) -> dict[str, np.ndarray]:
        name, known = column.name, self._texts.get(column.name)
        if known is not None:
            strange = [c for c in column.categories if c not in known]
            gap = np.isnan(column.value)
            if strange or (gap.any() and self.columns.fill is None):
                is_it = column.value == column.categories.index(strange[0]) if strange else gap
                got = repr(strange[0]) if strange else "a gap"
                raise ValueError(
                    f"column {name!r} of {self.path} has {got} in row "
                    f"{n_before + int(is_it.argmax()) + 1}: the mixture knows {some(known, 10)} "
                    "alone; leave such rows out, or train on data that have it"
                )
            index = np.array([known.index(c) for c in column.categories] + [np.nan])
            value = np.where(np.isnan(column.value), len(index) - 1, column.value).astype(int)
            return _features(replace(column, value=index[value], categories=known), self.columns)
        is_boolean = name in self.columns.booleans
        is_number = column.kind == "numbers" and (
            not is_boolean or np.isin(column.value, (0, 1, np.nan)).all()
        )
        gap = np.isnan(column.value)
        strange = column.kind != ("booleans" if is_boolean else "numbers") and not is_number
        if strange or (self.columns.fill is None and gap.any()):
            cell, _, row = column.example.rpartition(" in row ")
            if not strange and not cell:
                cell, row = "a gap", str(gap.argmax() + 1)
            at = f"got {cell} in row {int(row) + n_before}" if row else "got other numbers"
            wanted = "true and false, or 1 and 0" if is_boolean else "finite numbers"
            remedy = "" if strange else "; leave such rows out, or train with data.missing=impute"
            raise ValueError(
                f"column {name!r} of {self.path} must hold {wanted}: {at} (row 1 follows the "
                f"header){remedy}"
            )
        return {name: column.value}


def complete_splits(
    x: dict[str, np.ndarray], feature_names: Sequence[str], columns: Columns, missing: str,
    constant: str,
) -> tuple[dict[str, np.ndarray], tuple[str, ...], Columns, list[str]]:  # fmt: skip
    """Fill gaps, and see to columns of one value, by what the training split has.

    Args:
        x: (N, M) by split, "train" among them; NaN is a gap.
        feature_names: M of them.
        columns: How they came about.
        missing: "impute", or anything else, for tables without gaps.
        constant: Of columns with one value: "refuse" or "drop".

    Returns:
        The splits, the names and how they came about, changed; and what was done, for people.

    Raises:
        ValueError: If a column has one value, and is not to be dropped.
    """
    train, done = x["train"], []
    with np.errstate(invalid="ignore"):
        same = ~(np.fmin.reduce(train, axis=0) < np.fmax.reduce(train, axis=0))  # of NaN alone, too
    if same.any():
        names = [repr(feature_names[m]) for m in np.flatnonzero(same)]
        if constant == "refuse" or same.all():
            raise ValueError(
                f"{len(names)} of {len(same)} features have one value in the training split of "
                f"{len(train)} rows, where a density is not defined: {some(names)}; set "
                "data.constant=drop to leave them out"
            )
        done.append(f"{len(names)} of one value in the training split left out: {some(names)}")
        x = {split: part[:, ~same] for split, part in x.items()}
        feature_names = [n for n, s in zip(feature_names, same, strict=True) if not s]
    if missing == "impute":
        fill = _fill(x["train"], feature_names, columns)
        n = sum(int(np.isnan(part).sum()) for part in x.values())
        done.append(f"{n} gaps filled by medians (categories: the most frequent) of training rows")
        x = {split: np.where(np.isnan(part), fill, part) for split, part in x.items()}
        columns = replace(columns, fill=tuple(fill.tolist()))
    return x, tuple(feature_names), columns, done


def _fill(train: np.ndarray, names: Sequence[str], columns: Columns) -> np.ndarray:
    """What stands for a gap in each feature, (M,)."""
    fill = np.nanmedian(train, axis=0)
    place = {name: m for m, name in enumerate(names)}
    for column in columns.categories or ():
        every = columns.features(column)
        of = [place[feature] for feature in every if feature in place]
        if of:
            share = np.nanmean(train[:, of], axis=0)
            fill[of] = 0.0
            rest = 1 - share.sum()  # of the first of two categories, and of rare ones
            if len(of) == len(every) > 1 or share.max() >= rest:
                fill[of[int(share.argmax())]] = 1.0
    return fill


def _wanted(
    text: TextTable, label_column: str | None, choice: Choice, prefixes: tuple[str, str]
) -> list[str]:
    """Names of the columns that become features, in the order of the file."""
    known = set(text.names)
    named = {
        f"{prefixes[0]}label_column": [] if label_column is None else [label_column],
        f"{prefixes[1]}columns": choice.columns or [],
        f"{prefixes[1]}drop": choice.drop,
    }
    for option, names in named.items():
        strange = [name for name in names if name not in known]
        if strange:
            near = get_close_matches(strange[0], text.names[:1000], 1)
            close = f"; is it {near[0]!r}?" if near else ""
            null = "set it to null or to" if option.endswith("label_column") else "choose from"
            raise ValueError(
                f"{text.path} has no column {some([*map(repr, strange)])}, which {option} names"
                f"{close}: {null} one of {some([repr(n[:40]) for n in text.names], 10)} "
                f"(delimiter {text.delimiter!r})"
            )
    taken = known if choice.columns is None else set(choice.columns)
    taken = taken - set(choice.drop) - {label_column}
    wanted = [name for name in text.names if name in taken]
    if label_column in choice.drop:
        raise ValueError(
            f"{prefixes[1]}drop names {label_column!r}, which is {prefixes[0]}label_column, and no "
            "feature anyway: leave it out of one of them"
        )
    if not wanted:
        raise ValueError(
            f"{text.path} has no column but the labels, or none is left: expected at least one of "
            "numbers"
        )
    return wanted


def _inspect(name: str, series: pd.Series, decimal: str, as_text: bool = False) -> _Column:
    """Find out of what kind a column is."""
    if pd.api.types.is_bool_dtype(series):
        example = f"{str(series.iloc[0])!r} in row 1"
        return _Column(name, "booleans", series.to_numpy(float), example=example)
    if pd.api.types.is_numeric_dtype(series) and not as_text:
        return _numbers(name, series.to_numpy(float))
    texts = series.map(str, na_action="ignore").astype(object).str.strip()
    texts = texts.mask(texts.isin(GAPS))  # with spaces around them
    code, every = pd.factorize(texts)
    words = pd.Series([str(word) for word in every], dtype=object)
    as_numbers = words.str.replace(",", ".", regex=False) if decimal == "," else words
    number = pd.to_numeric(as_numbers, errors="coerce").to_numpy(float)
    is_number = ~np.isnan(number)
    folded = words.str.casefold()
    gap = folded.isin(GAPS_AMONG_NUMBERS).to_numpy()
    if (is_number | gap).all() and not as_text:
        return _numbers(name, np.append(number, np.nan)[code])
    truth = folded.isin(("true", "yes"))
    odd = np.append(~gap if as_text else ~(is_number | gap), False)[code]
    first = int(odd.argmax())
    example = f"{str(texts[first])[:40]!r} in row {first + 1}"
    if any(set(folded[~gap]) <= pair for pair in BOOLEANS) and not as_text and (~gap).any():
        value = np.where(gap, np.nan, truth.to_numpy(float))
        return _Column(name, "booleans", np.append(value, np.nan)[code], example=example)
    categories = sorted(words)
    place = {word: c for c, word in enumerate(categories)}
    value = np.array([*map(place.get, words), np.nan], float)[code]
    kind = _kind_of(words, code, is_number)
    return _Column(name, kind, value, tuple(categories), example)


def _numbers(name: str, value: np.ndarray) -> _Column:
    """A column of numbers, (N,); what is too large for float32 is a gap."""
    usable = np.abs(value) <= LARGEST
    if usable.all():
        return _Column(name, "numbers", value)
    far = ~usable & ~np.isnan(value)
    row = int(far.argmax())
    example = f"{value[row]:g} in row {row + 1}" if far.any() else ""
    return _Column(name, "numbers", np.where(usable, value, np.nan), example=example)


def _kind_of(words: pd.Series, code: np.ndarray, is_number: np.ndarray) -> str:
    """Which kind of text the cells are, by the different ones, and which of them each row has."""
    head = words[~is_number][:1000]
    if all(DATE.fullmatch(word) for word in head) and not is_number.any():
        return "dates"
    if all(SIGNS.fullmatch(word) for word in head):
        return "numbers with signs"
    n = int((code >= 0).sum())
    if is_number[code[code >= 0]].mean() > 0.5:
        return "numbers beside text"
    if len(words) > MOST_CATEGORIES or (len(words) == n > 10):
        return "identifiers"
    return "text"


class _Plan:
    """What becomes of columns by a choice: which are kept, which rows, and what is at fault."""

    def __init__(self, columns: list[_Column], nameless: set[str], choice: Choice) -> None:
        self.every, self.nameless, self.choice = columns, nameless, choice
        self.faults: dict[str, list[_Column]] = {}
        self.left_out: dict[str, list[_Column]] = {}
        self.kept: list[_Column] = []
        for column in columns:
            if column.name in choice.drop:
                continue
            if column.name in nameless:
                self._fault("without a name", column)
            elif not column.is_text or (choice.text == "one_hot" and column.can_be_encoded):
                self.kept.append(column)
            elif choice.text == "drop":
                self.left_out.setdefault(column.kind, []).append(column)
            else:
                self._fault(column.kind, column)
        n = len(columns[0].value) if columns else 0
        self.rows = np.ones(n, bool)
        self._see_to_constants("empty", lambda value: bool(np.isnan(value).all()))
        self.gaps = {c.name: g for c in self.kept if (g := int(np.isnan(c.value).sum())) > 0}
        with_gaps = [column for column in self.kept if column.name in self.gaps]
        self.lost = np.zeros(n, bool)
        for column in with_gaps:
            self.lost |= np.isnan(column.value)
        if with_gaps and choice.missing == "refuse":
            self.faults["gaps"] = with_gaps
        elif with_gaps and choice.missing == "drop":
            self.rows = ~self.lost
            if self.lost.all():
                self.faults["a gap in every row"] = with_gaps
        if self.rows.any():
            self._see_to_constants("constant", self._is_constant)

    def _is_constant(self, value: np.ndarray) -> bool:
        value = value[self.rows]
        return len(value) > 1 and not np.nanmin(value) < np.nanmax(value)

    def _see_to_constants(self, kind: str, is_so: object) -> None:
        assert callable(is_so)
        found = [column for column in self.kept if is_so(column.value)]
        if not found:
            return
        names = {column.name for column in found}
        self.kept = [column for column in self.kept if column.name not in names]
        if self.choice.constant == "drop":
            self.left_out.setdefault(kind, []).extend(found)
        else:
            self.faults.setdefault(kind, []).extend(found)

    def _fault(self, kind: str, column: _Column) -> None:
        self.faults.setdefault(kind, []).append(column)

    def columns(self) -> Columns:
        """How the features come about."""
        categories = {c.name: c.categories for c in self.kept if c.is_text}
        return Columns(tuple(c.name for c in self.kept if c.kind == "booleans"), categories or None)

    def describe(self) -> list[str]:
        """Say what was done."""
        said = []
        if booleans := [c.name for c in self.kept if c.kind == "booleans"]:
            said.append(f"true or yes 1, false or no 0: {some(booleans)}")
        if texts := [f"{c.name} ({len(c.categories)})" for c in self.kept if c.is_text]:
            said.append(f"one-hot: {some(texts)}")
        for kind, columns in self.left_out.items():
            said.append(f"{kind} left out: {some([c.name for c in columns])}")
        if dropped := [c.name for c in self.every if c.name in self.choice.drop]:
            said.append(f"left out: {some(dropped)}")
        if not self.rows.all():
            said.append(f"{int((~self.rows).sum())} rows with gaps left out")
        return said

    def amended(self) -> Choice:
        """A choice by which less is at fault."""
        choice, drop = self.choice, list(self.choice.drop)
        texts = [c for columns in self.faults.values() for c in columns if c.is_text]
        texts = [column for column in texts if column.name not in self.nameless]
        hard = [column.name for column in texts if not column.can_be_encoded]
        if texts:
            n_new = sum(len(column.categories) for column in texts if column.can_be_encoded)
            if len(hard) > MANY or (self.kept and n_new > 4 * MOST_CATEGORIES):
                choice = replace(choice, text="drop")
            else:
                drop += hard
                if len(hard) < len(texts):
                    choice = replace(choice, text="one_hot")
        drop += [c.name for c in self.faults.get("without a name", ())]
        if "gaps" in self.faults or "a gap in every row" in self.faults:
            few = self.lost.mean() <= FEW
            choice = replace(choice, missing="drop" if few else "impute")
        if {"constant", "empty"} & self.faults.keys():
            choice = replace(choice, constant="drop")
        return replace(choice, drop=tuple(dict.fromkeys(drop)))


def _say_the_rest(
    error: TableError, path: Path, form: TextFormat, label_column: str | None, choice: Choice,
    prefixes: tuple[str, str],
) -> None:  # fmt: skip
    """Follow an error of the header: raise one that names what is wrong with the columns, too."""
    options = dict(error.options)
    label = options.pop("label_column", label_column)
    try:
        _read_table(path, replace(form, **options), label, choice, prefixes)
    except TableError as rest:
        options = {f"{prefixes[0]}{name}": value for name, value in error.options.items()}
        said = f"{error.said}. Then, {rest.said.removeprefix(f'{path} ')}"
        raise TableError(said, "", options | rest.options, f"{error.more}{rest.more}") from error
    except ValueError:
        pass


def _explain(
    path: Path, plan: _Plan, label_column: str | None, prefixes: tuple[str, str]
) -> ValueError:
    """Name everything that is at fault, and one line of options by which the table is read."""
    faults, said = plan.faults, []
    for kind, columns in faults.items():
        tell = (
            _tell_gaps
            if "gap" in kind or kind == "empty"
            else lambda c: c.example if c.is_text else ""
        )
        if kind in ("text", "identifiers"):
            tell = lambda c: f"{len(c.categories)} different, {c.example}"  # noqa: E731
        named = [f"{c.name[:40]!r} ({tell(c)})" if tell(c) else repr(c.name[:40]) for c in columns]
        said.append(f"{kind}: {some(named)}")
    label = _likely_label(plan) if label_column is None else None
    columns = [column for column in plan.every if column is not label]
    nameless, amended = plan.nameless, plan
    if label is not None:
        amended = _Plan(columns, nameless, plan.choice)
    for _ in range(4):
        if not amended.faults:
            break
        choice = amended.amended()
        if plan.choice.missing == "refuse" and choice.missing == "drop":
            # With columns of text that are encoded, more rows may have gaps.
            few = _Plan(columns, nameless, choice).lost.mean() <= FEW
            choice = replace(choice, missing="drop" if few else "impute")
        amended = _Plan(columns, nameless, choice)
    what = "; ".join(said) or "every column is left out"
    if not amended.kept or amended.faults:
        return ValueError(
            f"{path} has no column to train on: {what}; expected columns of numbers that vary (is "
            f"{prefixes[0]}delimiter right?)"
        )
    old, new, notes = plan.choice, amended.choice, []
    drop = {} if list(new.drop) == list(old.drop) else {f"{prefixes[1]}drop": list(new.drop)}
    options = drop | {
        f"{prefixes[1]}{name}": value
        for name in ("missing", "constant", "text")
        if (value := getattr(new, name)) != getattr(old, name)
    }
    if label is not None:
        options = {f"{prefixes[0]}label_column": label.name, **options}
        notes.append(f"if {label.name!r} is the class, which is told and not trained on")
    if new.missing != old.missing:
        lost, n_rows = int(amended.lost.sum()), len(amended.rows)
        notes.append(f"missing=drop leaves out {lost} of {n_rows} rows, impute takes medians")
    if new.text != old.text == "refuse":
        notes.append("text=drop leaves text out")
    more = f" ({'; '.join(notes)})" if notes else ""
    return TableError(f"{path} must hold finite numbers that vary: {what}", "", options, more)


def _tell_gaps(column: _Column) -> str:
    """How many cells are no numbers, and where the first is, or one that is too large."""
    gap = np.isnan(column.value)
    where = column.example if not column.is_text else ""
    return f"{gap.sum()}, {f'such as {where}' if where else f'first in row {gap.argmax() + 1}'}"


def _likely_label(plan: _Plan) -> _Column | None:
    """A column that looks like the classes of the rows."""
    numbers = [column for column in plan.faults.get("gaps", ()) if _is_named_label(column)]
    texts = [
        column
        for column in plan.faults.get("text", ())
        if 2 <= len(column.categories) <= MANY and len(column.categories) < len(column.value) / 2
    ]
    named = [column for column in texts if column.name.casefold() in LABELS]
    ends = [c for c in texts if plan.every and c in (plan.every[0], plan.every[-1])]
    return next(iter([*numbers, *named, *ends[::-1]]), None)


def _is_named_label(column: _Column) -> bool:
    """Whether a column of a few whole numbers is called as labels are."""
    if column.name.casefold() not in LABELS or column.kind != "numbers":
        return False
    value = column.value[~np.isnan(column.value)]
    few = len(np.unique(value)) <= MANY < len(value)
    return few and bool((value == value.round()).all())


def _counts(column: _Column) -> bool:
    """Whether a column is 0, 1, 2, ... or 1, 2, 3, ..."""
    value = column.value
    return len(value) > 20 and value[0] in (0, 1) and bool((np.diff(value) == 1).all())


def _features(column: _Column, columns: Columns) -> dict[str, np.ndarray]:
    """Values of each feature that a column becomes, (N,), NaN for gaps."""
    made = {}
    for name, category in columns.features(column.name).items():
        if category is None:
            made[name] = column.value
        else:
            equal = (column.value == column.categories.index(category)).astype(float)
            made[name] = np.where(np.isnan(column.value), np.nan, equal)
    return made
