"""Tables written as text: how a file is packed, encoded and laid out is found out, and said.

A file may be plain or packed (gzip, zip, bzip2, xz), UTF-8 or UTF-16, its fields between commas,
semicolons, tabs, bars or white space, its decimals after a point or a comma. What is ambiguous is
refused, with the option that decides.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import lzma
import re
import shlex
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from cpmm.reading.kinds import recognize
from cpmm.reading.overrides import write_options

# Cells that are no value; in a column of numbers, in any case, the second row is none either.
GAPS = ("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "-nan", "-NaN", "NULL", "null", "?")
GAPS_AMONG_NUMBERS = ("", ".", "-", "--", "none", "na", "nan", "nat", "n.a.", "missing")
SPACE = "white space"
NAMED = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars", SPACE: SPACE}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
COMMA_NUMBER = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?", re.ASCII)
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+", re.ASCII)
SAMPLE = 1 << 20  # characters, from which the layout is found out
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, gzip.BadGzipFile)


class TableError(ValueError):
    """What is wrong with a table, and options by which it is read.

    Args:
        said: What is wrong.
        section: What the options are of: ``--`` for a command line, or the prefix of overrides.
        options: By name, whole words such as ``data.text``, without ``section``.
        more: What is to be known of them.
    """

    def __init__(self, said: str, section: str, options: dict[str, Any], more: str = "") -> None:
        self.said, self.options, self.more = said, options, more
        super().__init__(f"{said}; set {write_options(section, **options)}{more}")


@dataclass(frozen=True)
class TextFormat:
    r"""How a table is written; what is None is found out.

    Attributes:
        delimiter: One character, \t for a tab.
        decimal: A point or a comma.
        encoding: A name that Python knows, such as latin-1.
        header: "names": the first line names the columns; "none": it is data; "skip": it is
            neither. In the last two cases the columns are called x0, x1, ...
    """

    delimiter: str | None = None
    decimal: str | None = None
    encoding: str | None = None
    header: str | None = None


class TextTable:
    """A table written as text, its layout known and its header checked.

    Args:
        path: The file.
        form: What is known of how it is written.
        prefix: Of its options in messages: ``--`` for a command line, or a section with its dot.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no table written as text, or its layout or its header are not clear;
            says what to write.
    """

    def __init__(self, path: Path, form: TextFormat, prefix: str) -> None:
        self.path, self.prefix, self.form = path, prefix, form
        self.found: list[str] = []  # of the layout, if it is out of the ordinary
        self.size = path.stat().st_size
        with self._reworded():
            self.encoding = self._find_encoding()
            lines, whole = self._sample()
            self._lay_out(lines, whole)

    def options(self, **values: str | list[str]) -> str:
        """Write options as they are to be set."""
        return write_options(self.prefix, **values)

    def frames(
        self, n_rows: int | None = None, texts: Sequence[str] = (), raw: str | None = None
    ) -> Iterator[tuple[pd.DataFrame, int]]:
        """Yield rows, ``n_rows`` at a time (None: all at once), and how much of the file was read.

        Args:
            n_rows: Rows of each part.
            texts: Columns that are text whatever they hold.
            raw: A column that is text, gaps too.
        """
        kinds = dict.fromkeys([*texts, *([] if raw is None else [raw])], str)
        gaps = list(GAPS)
        if raw is not None:
            gaps = {name: [] if name == raw else list(GAPS) for name in self.names}
        n_before = 0
        with self._reworded(lambda: n_before), _open(self.path) as (file, unpacked):
            text = io.TextIOWrapper(unpacked, self.encoding, newline="")
            for _ in range(self.n_above):
                text.readline()
            with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
                options: dict[str, Any] = {
                    "sep": r"\s+" if self.delimiter == SPACE else self.delimiter,
                    "header": None, "names": self.names, "index_col": False, "dtype": kinds,
                    "keep_default_na": False, "na_values": gaps,
                    "skipinitialspace": self.delimiter != "\t",  # an empty first cell is no space
                    "decimal": self.decimal, "low_memory": False, "engine": "c",
                }  # fmt: skip
                if n_rows is None:
                    parts = iter([pd.read_csv(text, **options)])
                else:
                    parts = pd.read_csv(text, **options, chunksize=n_rows)
                for frame in parts:
                    if frame.empty:
                        break
                    yield frame.reset_index(drop=True), file.tell()
                    n_before += len(frame)
        if not n_before:
            raise ValueError(
                f"{self.path} has a header and no rows: expected at least one row of numbers"
            )

    def _find_encoding(self) -> str:
        with _open(self.path) as (_, unpacked):
            head = unpacked.read(4096)
        if not head:
            raise ValueError(f"{self.path} is empty: expected a header and a row of numbers")
        given = self.form.encoding
        if given is not None:
            try:
                name = codecs.lookup(given).name
                "".encode(name)
            except LookupError as error:
                raise ValueError(
                    f"{self.path}: there is no text encoding {given!r}: choose another, such as "
                    f"{self.options(encoding='latin-1')}"
                ) from error
            return "utf-8-sig" if name == "utf-8" else name
        marks = (
            (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"),
            (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
            (codecs.BOM_UTF16_BE, "utf-16"),
        )  # fmt: skip
        name = next((name for mark, name in marks if head.startswith(mark)), None)
        if name is None and b"\0" in head:
            pairs = len(head) // 2
            of = {"utf-16-le": head[1::2].count(0), "utf-16-be": head[::2].count(0)}
            name = max(of, key=lambda name: of[name])
            if of[name] < 0.7 * pairs or min(of.values()) > 0.1 * pairs:
                known = recognize(self.path, head) or "holds zero bytes: it is no text"
                raise ValueError(f"{self.path} {known}")
        if name is None:
            self._require_table(head)
        if name not in (None, "utf-8-sig"):
            self.found.append(name.upper()[:6])
        return name or "utf-8"

    def _require_table(self, head: bytes) -> None:
        start, known = head.lstrip(), recognize(self.path, head)
        if start[:1] in (b"{", b"[") and (b'":' in head or start[:1] == b"["):
            known = (
                f"is JSON: write it as CSV, pandas.read_json({str(self.path)!r}).to_csv('x.csv', "
                "index=False)"
            )
        elif start[:1] == b"@":
            known = (
                "is an ARFF or KEEL file: replace its lines that begin with @ by one line with the "
                f"names of the columns, or delete them and set {self.options(header='none')}"
            )
        if known is not None and not known.startswith("is text"):
            raise ValueError(f"{self.path} {known}")

    def _sample(self) -> tuple[list[str], bool]:
        """The first lines, and whether they are all."""
        with _open(self.path) as (_, unpacked):
            text = io.TextIOWrapper(unpacked, self.encoding, newline="")
            sample, wanted = "", SAMPLE
            while True:
                more = text.read(wanted)
                sample += more
                lines = io.StringIO(sample, newline="").readlines()
                if len(more) < wanted:
                    return lines, True
                if len(lines) > 3:
                    return lines[:-1][:1000], False
                wanted *= 2

    def _lay_out(self, lines: list[str], whole: bool) -> None:
        """Find delimiter, decimals and header, and how many lines are above the data."""
        if "\0" in "".join(lines[:100]):
            raise ValueError(f"{self.path} holds zero bytes: it is no text")
        top = next((i for i, line in enumerate(lines) if line.strip()), None)
        if top is None:
            raise ValueError(f"{self.path} is empty: expected a header and a row of numbers")
        below = next(
            (i for i in range(top, len(lines)) if lines[i].strip() and lines[i][0] != "#"), top
        )
        rows = self._find_delimiter(lines[below:], whole)
        first, n_first = rows[0]
        body = [cells for cells, _ in rows[1:]]
        # A line that begins with # is a comment, or the header of numbers below.
        above = [i for i in range(top, below) if lines[i].strip()]
        is_header = _is_header(first, body) and not all(map(_is_number, first))
        if above and (not is_header or self.form.header is not None):
            last, ((head, _), *_) = above[-1], _split([lines[above[-1]]], self.delimiter)
            if len(head) == len(first):
                rest = head[0].lstrip("# ")
                head, body = [rest or head[0], *head[1:]], [cells for cells, _ in rows]
                first, below, n_first = head, last, 1
        if self.form.header == "none" and below not in above:
            body, n_first = [cells for cells, _ in rows], 0
        self.n_above = below + n_first
        width = Counter(map(len, body)).most_common(1)[0][0] if body else len(first)
        self.begin = _begin(rows, below)
        if self.form.header is not None:
            width = max(map(len, body), default=width)
        self._find_decimal(body)
        if self.form.header in ("none", "skip"):
            self.names = [f"x{m}" for m in range(width)]
            self.found.append("columns called x0, x1, ...")
            self.nameless: set[str] = set()
        else:
            self._name_columns(first, body, width)

    def _find_delimiter(self, lines: list[str], whole: bool) -> list[tuple[list[str], int]]:
        """Choose a delimiter, and split the lines by it; the last may be cut within quotes."""
        given = self.form.delimiter
        self.delimiter = _likeliest(lines, self.path.name) if given is None else given
        if self.delimiter == r"\t":
            self.delimiter = "\t"
        if self.delimiter != SPACE and len(self.delimiter) != 1:
            raise ValueError(
                f"{self.path}: {self.prefix}delimiter must be one character: got {given!r}"
            )
        rows = _split(lines, self.delimiter)
        if given is not None and max(len(cells) for cells, _ in rows[:2]) == 1:
            other = _likeliest(lines, self.path.name)
            if other != self.delimiter and len(_split(lines[:1], other)[0][0]) > 1:
                options = "" if other == SPACE else f": {self.options(delimiter=other)}"
                raise ValueError(
                    f"{self.path} has no {given!r}, the delimiter that is set, between its fields, "
                    f"but {NAMED[other]}: leave the option {self.prefix}delimiter out{options}"
                )
        if given is None and self.delimiter != ",":
            self.found.append(f"fields between {NAMED[self.delimiter]}")
        return rows if whole or len(rows) < 3 else rows[:-1]

    def _find_decimal(self, body: list[list[str]]) -> None:
        given = self.form.decimal
        self.decimal = given or "."
        if given is not None or self.delimiter == ",":
            if self.decimal == self.delimiter:
                raise ValueError(
                    f"{self.path}: the comma cannot be both between fields and in numbers: set "
                    f"{self.options(delimiter=';')} or {self.options(decimal='.')}"
                )
            return
        commas = []
        for column in zip(*(cells for cells in body if len(cells) == len(body[0])), strict=True):
            cells = [cell for cell in map(str.strip, column) if cell not in GAPS]
            if all(map(_is_number, cells)) and any("." in cell for cell in cells):
                return
            if all(COMMA_NUMBER.fullmatch(cell) or cell.lstrip("+-").isdecimal() for cell in cells):
                commas += [cell for cell in cells if "," in cell]
        if commas and all(THOUSANDS.fullmatch(cell) for cell in commas):
            raise ValueError(
                f"{self.path}: is {commas[0]!r} {commas[0].replace(',', '.')} or "
                f"{commas[0].replace(',', '')}? Set {self.options(decimal=',')} for the first; for "
                "the second, write the file without commas within numbers"
            )
        if commas:
            self.decimal = ","
            self.found.append("decimal commas")

    def _name_columns(self, first: list[str], body: list[list[str]], width: int) -> None:
        """Check the header, (M,), against the rows below, and complete it where it is clear."""
        names = [re.sub(r"\s+", " ", name).strip() for name in first]
        self._require_header(names, body, width)
        empty_end = bool(body) and not any(cells[-1].strip() for cells in body if cells)
        if len(names) == width - 1 and empty_end:
            names.append("")
        elif len(names) == width - 1 and _names_rows(body, self.delimiter):
            names.insert(0, "")  # as R writes them
        elif len(names) == width + 1 and not names[-1]:
            names.pop()
        elif len(names) < width or (
            len(names) > width and not any(len(cells) == len(names) for cells in body)
        ):
            self._refuse_width(names, width)
        repeated = [name for name, n in Counter(names).items() if n > 1 and name]
        if repeated:
            raise TableError(
                f"{self.path} has more than one column named {self._shown(repeated)}: give each a "
                "name of its own, or call them x0, x1, ...",
                self.prefix,
                {"header": "skip"},
            )
        taken = set(names)
        for m, name in enumerate(names):
            if not name:  # as pandas calls them
                names[m] = f"Unnamed: {m}{'.1' * (f'Unnamed: {m}' in taken)}"
        self.nameless, self.names = set(names) - taken, names

    def _refuse_width(self, names: list[str], width: int) -> None:
        said = (
            f"{self.path} is not text with as many fields in every row as in its header: the "
            f"header has {len(names)}, {self._shown(names)}, and the rows below have {width}"
        )
        if self.begin is None:
            raise ValueError(
                f"{said}, not all of them: mend the file, or set {self.prefix}delimiter (now "
                f"{self.delimiter!r})"
            )
        line, is_header = self.begin
        if line > 2 or is_header:
            raise ValueError(
                f"{said}; the table seems to begin in line {line}: remove the lines above, "
                f"tail -n +{line} {shlex.quote(str(self.path))} > table.csv"
            )
        raise TableError(
            f"{said}; complete the header, or, if it is none, leave it out", self.prefix,
            {"header": "skip"},
        )  # fmt: skip

    def _require_header(self, names: list[str], body: list[list[str]], width: int) -> None:
        if self.form.header == "names":
            return
        text = [m for m, cells in enumerate(zip(*body[:50], strict=False)) if not _numbers(cells)]
        label = {"label_column": f"x{text[0]}"} if len(text) == 1 and self.prefix != "--" else {}
        if (
            len(names) > 3
            and names[0].isdecimal()
            and names[1] == str(width - 1)
            and not any(map(_is_number, names[2:]))
        ):
            label = {} if self.prefix == "--" else {"label_column": f"x{width - 1}"}
            raise TableError(
                f"{self.path} has a first line of scikit-learn's, {self._shown(names)}: numbers of "
                "rows and columns, and classes, no names of columns",
                self.prefix,
                {"header": "skip", **label},
            )
        if _is_header(names, body) is None:
            raise TableError(
                f"the first row of {self.path} must name the columns: got {self._shown(names)}, "
                "which look like data; add a header, or call the columns x0 to "
                f"x{width - 1}",
                self.prefix,
                {"header": "none", **label},
                f" (if they are names: {self.options(header='names')})",
            )

    def _shown(self, names: Sequence[str]) -> str:
        return some([repr(name[:40]) for name in names])

    @contextmanager
    def _reworded(self, n_before: object = None) -> Iterator[None]:
        """Say what errors of decoding, unpacking and splitting mean for the file."""
        try:
            yield
        except (UnicodeError, *DAMAGED, OSError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, UnicodeError):
                options = self.options(encoding="latin-1")
                said = f"is not UTF-8 text ({error}): set {options}, or the encoding that it has"
                if self.form.encoding is not None:
                    said = f"is not text in the encoding {self.form.encoding} ({error})"
            elif isinstance(error, DAMAGED) or (type(error) is OSError and error.errno is None):
                said = f"is packed, and damaged or not whole ({error or type(error).__name__})"
            elif isinstance(error, RuntimeError | NotImplementedError):
                said = f"is packed in a way that is not read here ({error}): unpack it"
            else:
                raise
            raise ValueError(f"{self.path} {' '.join(said.split())}") from error
        except (pd.errors.ParserError, pd.errors.ParserWarning, csv.Error) as error:
            said = " ".join(str(error).split()).removeprefix("Error tokenizing data. C error: ")
            if fields := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", said):
                line = int(fields[2]) + self.n_above
                said = f"line {line} has {fields[3]} fields, not {fields[1]}"
            elif "Length of header" in said:
                said = "its first row has more fields than the header"
            after = f", after row {n_before()}" if callable(n_before) and n_before() else ""
            raise ValueError(
                f"{self.path} is not text with as many fields in every row as in its header"
                f"{after}: {said}; mend that line, or set {self.prefix}delimiter (now "
                f"{getattr(self, 'delimiter', ',')!r})"
            ) from error


def some(words: Sequence[str], most: int = 5) -> str:
    """List the first words, and say how many more there are."""
    more = len(words) - most
    return ", ".join(words[:most]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, Any]]:
    """Yield a file, and what it holds once it is unpacked."""
    with path.open("rb") as file:
        head = file.read(6)
        file.seek(0)
        if head.startswith(b"\x1f\x8b"):
            yield file, gzip.GzipFile(fileobj=file)
        elif head.startswith(b"BZh"):
            yield file, bz2.BZ2File(file)
        elif head.startswith(b"\xfd7zXZ"):
            yield file, lzma.LZMAFile(file)  # noqa: SIM115 (the file beneath is closed)
        elif head.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(file) as archive, archive.open(_member(path, archive)) as inside:
                yield file, inside
        else:
            yield file, file


def _member(path: Path, archive: zipfile.ZipFile) -> str:
    every = archive.namelist()
    if "[Content_Types].xml" in every:
        raise ValueError(
            f"{path} is a workbook, not text: save its sheet as CSV, or write it by "
            f"pandas.read_excel({str(path)!r}).to_csv('x.csv', index=False)"
        )
    names = [n for n in every if not n.endswith("/") and not re.search(r"(^|/)(\.|__MACOSX)", n)]
    if len(names) != 1:
        raise ValueError(
            f"{path} must hold one file, the table: it holds {len(names)}"
            f"{' (' * bool(names)}{some(names)}{')' * bool(names)}; unpack it, and give the table"
        )
    return names[0]


def _begin(rows: list[tuple[list[str], int]], above: int) -> tuple[int, bool] | None:
    """Where a table begins within a file.

    Returns:
        The line, from 1, from which all rows have as many cells, two or more, and whether it names
        the columns; None if there is none.
    """
    cells = [row for row, _ in rows]
    width, start = len(cells[-1]), len(rows)
    while start > 0 and len(cells[start - 1]) == width:
        start -= 1
    if width < 2 or len(rows) - start < max(2, len(rows) / 2):
        return None
    rest = cells[start + 2 :]
    if (
        rest
        and not any(map(_is_number, cells[start + 1]))
        and any(map(_numbers, zip(*rest[:50], strict=True)))
    ):
        start += 1  # the names of the columns come second
    line = above + (rows[start - 1][1] if start else 0) + 1
    return line, bool(_is_header(cells[start], cells[start + 1 :]))


def _split(lines: Sequence[str], delimiter: str) -> list[tuple[list[str], int]]:
    """Cells of each row that is not blank, and at which line it ends, counted from 1."""
    if delimiter == SPACE:
        pattern = re.compile(r'"(?:[^"]|"")*"(?=\s|$)|\S+')
        rows = [
            ([cell.strip('"') for cell in pattern.findall(line)], i + 1)
            for i, line in enumerate(lines)
        ]
    else:
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
        rows = [(cells, reader.line_num) for cells in reader]
    return [(cells, end) for cells, end in rows if any(map(str.strip, cells)) or len(cells) > 1]


def _likeliest(lines: Sequence[str], name: str) -> str:
    """The delimiter by which the first lines have the same number of fields, and most numbers."""
    lines, scores = lines[:200], {}
    order = [",", ";", "\t", "|", SPACE]
    if ".tsv" in name.lower():
        order = ["\t", ",", ";", "|", SPACE]
    for delimiter in order:
        if delimiter == SPACE and any(score[0] for score in scores.values()):
            continue  # tabs are white space, too, and spaces follow commas
        try:
            rows = [cells for cells, _ in _split(lines, delimiter)]
        except csv.Error:
            continue
        body = rows[1:] or rows
        width, n = Counter(map(len, body)).most_common(1)[0] if rows else (0, 0)
        if width < 2:
            continue
        cells = [cell.strip() for row in body[:50] for cell in row[:1000] if cell.strip()]
        share = sum(_is_number(c) or bool(COMMA_NUMBER.fullmatch(c)) for c in cells)
        share /= max(1, len(cells))
        exact, regular = len(rows[0]) == width, n / len(body)
        r_wrote = delimiter in ("\t", SPACE) or all(line[0] == '"' for line in lines[:2])
        near = r_wrote and len(rows[0]) == width - 1
        scores[delimiter] = ((2 * exact + near) * (regular > 0.8), round(regular, 2), share)
    return max(scores, key=lambda delimiter: scores[delimiter], default=",")


def _is_number(cell: str) -> bool:
    return NUMBER.fullmatch(cell.strip()) is not None


def _numbers(cells: Sequence[str]) -> bool:
    """Whether all cells that are no gaps are numbers, and there are some."""
    values = [
        c for c in map(str.strip, cells) if c not in GAPS and c.casefold() not in GAPS_AMONG_NUMBERS
    ]
    return bool(values) and all(_is_number(c) or COMMA_NUMBER.fullmatch(c) for c in values)


def _is_header(first: Sequence[str], body: Sequence[Sequence[str]]) -> bool | None:
    """Whether a row names columns; None if it may as well be data."""
    first = [cell.strip() for cell in first]
    below = list(zip(*(cells for cells in body[:50] if len(cells) >= len(first)), strict=False))
    below = below if len(below) >= len(first) else [("0",)] * len(first)
    number = [m for m, cell in enumerate(first) if _is_number(cell)]
    named = [m for m, cell in enumerate(first) if cell not in GAPS and not _is_number(cell)]
    if not number or any(_numbers(below[m]) for m in named):
        return True
    if not named:  # 0, 1, 2 are names, but in a table that goes on with 3, 4, 5
        counted = [str(m) for m in range(len(first))]
        goes_on = [str(m + len(first)) for m in range(len(first))]
        return True if first == counted and (not body or list(body[0]) != goes_on) else None
    years = [int(first[m]) for m in number if first[m].isdecimal()]
    in_order = years == sorted(set(years)) and len(years) == len(number) > 1
    return True if in_order and years[0] >= 1500 and years[-1] <= 2200 else None


def _names_rows(body: Sequence[Sequence[str]], delimiter: str) -> bool:
    """Whether the first cells look like names of the rows: all different, 1, 2, ... or text."""
    firsts = [cells[0].strip() for cells in body if cells]
    if len(set(firsts)) < len(firsts) or not firsts or "" in firsts:
        return False
    counted = firsts in (
        [str(n) for n in range(len(firsts))],
        [str(n + 1) for n in range(len(firsts))],
    )
    wide = delimiter in ("\t", SPACE) or min(map(len, body)) > 2
    return wide and (counted or not any(map(_is_number, firsts)))
