"""Whatever comes in, a result that is right or one clear error comes out: no traceback, no hang.

The fast profile repeats the same cases in every run; the slow one draws new ones from a seed that it prints,
and that CPMM_FUZZ_SEED sets.
"""

import codecs
import csv
import faulthandler
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import signal
import struct
import sys
import tempfile
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import NEEDED, STAGES, TINY
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from cpmm.pipeline.artifacts.sources import read_source
from cpmm.pipeline.artifacts.store import load_prepared
from cpmm.pipeline.config.compose import (
    compose_preset,
    flatten,
    known_presets,
    option_rules,
    read_overrides,
)
from cpmm.pipeline.config.schema import leaves

SEED = int(os.environ.get("CPMM_FUZZ_SEED", random.randrange(2**32)))
COUNTS: Counter[tuple[str, str]] = Counter()
fuzzed = pytest.mark.parametrize("size", ["fast", pytest.param("full", marks=pytest.mark.slow)])


class TooLong(BaseException):
    """No stage may take it for an error of its own."""


@contextmanager
def within(seconds):
    """Fail what takes longer; what does not even hear of it takes the whole run with it."""

    def end(*_):
        raise TooLong(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(4 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(check, strategy, size, fast, full, shrink=True):
    """Run ``check`` on many cases; it counts them itself. What takes long is not worth shrinking."""
    profile = settings(
        max_examples=full if size == "full" else fast,
        derandomize=size == "fast",
        database=None,
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
        report_multiple_bugs=False,
        # Cases are drawn from many small alternatives: slow on a busy machine, and no sign of a bad strategy.
        suppress_health_check=[HealthCheck.too_slow],
    )
    run = profile(given(strategy)(check))
    before = sum(COUNTS.values())
    (seed(SEED)(run) if size == "full" else run)()
    assert sum(COUNTS.values()) - before >= (full if size == "full" else fast)


def expect_clear(kind, error, *names):
    """One message that names what it is about, and nothing from the depths."""
    message = str(error)
    assert type(error) in (ValueError, FileNotFoundError, FloatingPointError, MemoryError), error
    assert any(name and name in message for name in names), f"{message!r} names none of {names!r}"
    assert len(message) < 1500, message
    COUNTS[kind, "clear error"] += 1


@pytest.fixture(scope="module", autouse=True)
def report(request):
    yield
    lines = [f"  {kind}: {n} x {outcome}" for (kind, outcome), n in sorted(COUNTS.items())]
    text = "\n".join([f"fuzz: {sum(COUNTS.values())} cases, CPMM_FUZZ_SEED={SEED}", *lines])
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{text}")


# Overrides


@cache
def known_options():
    """Every option of every preset and of the sweep, by preset."""
    return {
        preset: sorted(dict(leaves(compose_preset(preset, NEEDED.get(preset, []), "sweep"))))
        for preset in known_presets()
    }


OPTIONS = option_rules()
WORDS = sorted({word for rule in OPTIONS.values() for word in re.findall(r"[\w-]+", rule.expected)})
values = st.one_of(
    st.integers(-3, 12).map(str),
    st.integers().map(str),
    st.sampled_from(["0", "-0.0", "1e400", "-1", "nan", "inf", "-inf", "1e-320", "9" * 5000, "0x10", "1_000", "01"]),
    st.floats().map(str),
    st.sampled_from(["null", "true", "false", "yes", "~", "''", '""', "[]", "{}", "", "???", "' '"]),
    st.sampled_from(["${seed}", "${nothing}", "${oc.env:NOTHING}", "${", "${.}", "${cpmm}", "${oc.env:HOME}"]),
    st.sampled_from(WORDS),
    st.lists(st.sampled_from(["1", "2.5", "-1", "a", "null", "[1]", "{a:1}"]), max_size=4).map(lambda v: f"[{','.join(v)}]"),
    st.sampled_from(["[" * 200 + "]" * 200, "[" * 900 + "]" * 900, "x" * 10_000, "{a:{b:{c:1}}}", "1,2", "range(1,3)", "int(3.7)", "glob(*)"]),
    st.text(max_size=12),
    st.text(max_size=12).map(lambda text: f"'{text}'"),
)  # fmt: skip
names = st.deferred(
    lambda: st.one_of(
        st.sampled_from(sorted({name for known in known_options().values() for name in known})),
        st.sampled_from(["cpmm", "data", "data.options", "cpmm.field", "teacher", "spaces", "sweep", "ray", "preset", "trainer.nothing", "cpmm.n_cluster", "", ".", "a.b.c", "hydra.run.dir", "hydra", "cpmm@data", "_target_", "defaults", "größe", "data.options.1"]),
        st.text(max_size=8),
    )
)  # fmt: skip
overrides = st.one_of(
    st.tuples(st.sampled_from(["", "", "", "", "+", "++", "~"]), names, values).map(lambda t: f"{t[0]}{t[1]}={t[2]}"),
    names.map(lambda name: f"~{name}"),
    st.text(max_size=20),
)  # fmt: skip


@fuzzed
def test_any_overrides_compose_or_are_named(size):
    def check(preset, primary, items):
        try:
            with within(30):
                config = compose_preset(preset, [*NEEDED.get(preset, []), *items], primary)
        except ValueError as error:
            keys = [re.split(r"[=\s]", item.lstrip("+~"))[0].split(".")[-1] for item in items]
            expect_clear(
                "overrides", error, *OPTIONS, *items, *map(repr, items), *keys, "overrides ["
            )
            return
        assert all(OPTIONS[name].accepts(value) for name, value in leaves(config))
        assert yaml.safe_load(yaml.safe_dump(config)) == config
        COUNTS["overrides", "result"] += 1

    drawn = st.tuples(
        st.sampled_from(known_presets()),
        st.sampled_from(["config", "config", "sweep"]),
        st.lists(overrides, min_size=1, max_size=3),
    )
    fuzz(lambda case: check(*case), drawn, size, 20, 300)


@fuzzed
def test_any_value_that_is_no_text_is_refused_or_kept(size):
    """One option at a time: most of the values are of the right kind, many out of range."""

    def check(case):
        name, value = case
        preset = next((p for p, known in known_options().items() if name in known), None)
        if preset is None:  # of a table that is to be told apart, which no preset names
            return
        try:
            with within(30):
                items = [*NEEDED.get(preset, []), *flatten({name: value})]
                config = dict(leaves(compose_preset(preset, items, "sweep")))
        except ValueError as error:
            expect_clear("values", error, name.split(".")[-1])
            return
        kept = config.get(name, value)
        assert type(kept) is type(value) or (type(value), type(kept)) == (int, float)
        assert kept == value or isinstance(value, dict)
        COUNTS["values", "result"] += 1

    plain = st.one_of(
        st.integers(-2, 4),
        st.integers(),
        st.floats(),
        st.floats(-2, 2),
        st.booleans(),
        st.none(),
        st.sampled_from(WORDS),
        # OmegaConf takes ${ for a reference, in text as well
        st.text().filter(lambda text: "${" not in text and text != "???"),
        st.lists(st.one_of(st.integers(-1, 5), st.floats(), st.text(max_size=3).filter(lambda t: "${" not in t)), max_size=4),
        st.just({}),
    )  # fmt: skip
    drawn = st.tuples(st.sampled_from(sorted(OPTIONS)), plain)
    fuzz(check, drawn, size, 20, 250)


@fuzzed
def test_any_params_are_read_or_named(size, tmp_path):
    path = tmp_path / "params.yaml"

    def check(data):
        path.write_bytes(data)
        try:
            with within(30):
                items = read_overrides("digits", path)
                compose_preset("digits", items)
        except ValueError as error:
            expect_clear(
                "params.yaml",
                error,
                "params.yaml",
                "expected",
                "overrides [",
                "not the name",
                "no option",
                "section",
                "cannot be",
            )
            return
        COUNTS["params.yaml", "result"] += 1

    key = st.one_of(
        st.sampled_from(
            ["seed", "cpmm", "noise", "digits", "csv", "a=b", "", "trainer", "data.n_test"]
        ),
        st.integers(),
        st.none(),
        st.text(max_size=5),
    )
    leaf = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 9),
        st.floats(),
        st.text(max_size=8),
        st.dates(),
        st.binary(max_size=4),
        st.sampled_from([3, 0.5]),
    )
    nested = st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(key, inner, max_size=3)
        ),
        max_leaves=6,
    )
    written = st.one_of(
        nested.map(lambda value: yaml.safe_dump({"overrides": value})),
        st.dictionaries(st.sampled_from(["seed", "cpmm.noise", "spaces", "digits", "cpmm"]), leaf, max_size=2).map(lambda value: yaml.safe_dump({"overrides": value})),
        nested.map(yaml.safe_dump),
        st.text(max_size=40).map(lambda text: f"overrides: {text}"),
        st.sampled_from(["overrides: &a {x: *a}", "overrides: {seed: &a [*a]}", "overrides: " + "[" * 5000, "overrides: {seed: " + "9" * 5000 + "}", "overrides: !!python/object/apply:os.getcwd []"]),
    ).map(lambda text: text.encode("utf-8", "surrogatepass"))  # fmt: skip
    fuzz(check, st.one_of(written, written, st.binary(max_size=30)), size, 10, 150)


# Inputs


def outcome(kind, read, *names):
    """Read; give the source, or None after one clear error that names ``names``."""
    with warnings.catch_warnings(), within(20):
        warnings.simplefilter("error")
        try:
            source = read()
        except (ValueError, FileNotFoundError) as error:
            expect_clear(kind, error, *names)
            return None
    COUNTS[kind, "result"] += 1
    return source


def same_classes(source, wanted):
    """Whether labels and class names say of each row what was written, as a number where it is one.

    "", -1, NaN and NA are no class.
    """

    def plain(text):
        text = text.strip()
        with suppress(ValueError):
            text = text if text.casefold() == "nan" else float(text)
        return "" if text == -1 or str(text).casefold() in ("nan", "na") else text

    got = [source.class_names[c] if c >= 0 else "" for c in source.label.tolist()]
    return [*map(plain, got)] == [*map(plain, wanted)]


CSV = {
    "source": "csv",
    **dict.fromkeys(["label_column", "delimiter", "decimal", "encoding", "header"]),
    "table": {
        "columns": None,
        "drop": [],
        "missing": "refuse",
        "constant": "drop",
        "text": "refuse",
    },
}


def numbers(cells):
    """Of a column, true and yes as 1, None for what is no usable number."""
    cells = [cell.strip("\ufeff").strip().lower() for cell in cells]
    pair = next((p for p in (("false", "true"), ("no", "yes")) if set(cells) <= {*p}), None)
    gaps = ("", "na", "none", "-", "?", ".")
    values = [None if c in gaps else pair.index(c) if pair else float(c) for c in cells]
    return [None if v is None or not abs(v) <= 1e30 else v for v in values]


def parse_csv(data, delimiter, label_column):
    """The slow reader: Python's csv and float, row by row; no constants, an empty end ignored."""
    utf_16 = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    text = data.decode("utf-16" if utf_16 else "utf-8-sig")
    rows = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    rows = [row for row in rows if row and row != [""]]
    header, rows = [" ".join(name.split()) for name in rows[0]], rows[1:]
    header[0] = header[0].lstrip("# ") or header[0]
    rows = [row + [""] * (len(header) - len(row)) for row in rows]  # what is not there is empty
    n = len(header) - (header[-1] == "")
    assert all(not any(map(str.strip, row[n:])) for row in rows)
    columns = {m: numbers([row[m] for row in rows]) for m in range(n) if header[m] != label_column}
    features = [m for m, x in columns.items() if len(set(x)) > 1 or (len(x) == 1 and x != [None])]
    assert not any(None in columns[m] for m in features)
    x = [list(row) for row in zip(*(columns[m] for m in features), strict=True)]
    label = [row[header.index(label_column)].strip() for row in rows] if label_column else None
    return [header[m] for m in features], x, label


cells = st.one_of(
    st.integers(-1000, 1000).map(str),
    st.integers(-1000, 1000).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.floats(allow_nan=False, allow_infinity=False, width=32).map(str),
)
odd_cells = st.one_of(
    cells,
    st.sampled_from(["", "nan", "NA", "inf", "-inf", "1e999", "1e308", "1e-320", "0x10", "1_000", "1,5", '"', "'1'", '"1"', '" 2"', "True", "1e", "1 2", " 3 ", "+4", "١", "\0", "1\0", "1\x002", "\ufeff1", "-", ".5", "5.", "1d3", "#1", "\t1", "1\r2", "9" * 400, "None", "infinity", "1e5 ", "\u00a01", "99999999999999999999", "18446744073709551615", "-9223372036854775808", "0.1e-5", "00012"]),
    st.text(max_size=4),
)  # fmt: skip
headers = st.one_of(
    st.sampled_from(["a", "b", "c", "label", "0", "1", "", " d", "e ", "größe", '"q,r"', "nan", "NA", "1.5", "\ufeffa", "a.1", "Unnamed: 0", "True", "#a"]),
    st.text(max_size=4),
)  # fmt: skip
labels = st.sampled_from(["1", "2", "10", "-1", "", "oak", "NA", "None", "nan", " x ", "01", "1.0", "true", "größe", "-0"])  # fmt: skip


@st.composite
def tables(draw):
    """A CSV file, how to read it, and whether something was done to it."""
    delimiter = draw(st.sampled_from([",", ",", ",", ";", "\t", "|", " "]))
    n_columns, n_rows = draw(st.integers(1, 4)), draw(st.sampled_from([0, 1, 2, 3, 5, 8]))
    odd = draw(st.booleans())
    header = (
        draw(st.lists(headers, min_size=n_columns, max_size=n_columns))
        if odd
        else list("abcd"[:n_columns])
    )
    cell = st.one_of(cells, cells, cells, odd_cells) if odd else cells
    rows = [draw(st.lists(cell, min_size=n_columns, max_size=n_columns)) for _ in range(n_rows)]
    label_column = None
    if draw(st.booleans()):
        label_column = draw(st.sampled_from([*header, "absent"]) if odd else st.just("label"))
        if not odd:
            header, rows = [*header, "label"], [[*row, draw(labels)] for row in rows]
    if odd and rows and draw(st.integers(0, 3)) == 0:  # ragged
        rows[draw(st.integers(0, n_rows - 1))] = draw(st.lists(cell, max_size=5))
    end = draw(st.sampled_from(["\n", "\r\n", "\n"]))
    text = end.join(delimiter.join(row) for row in [header, *rows]) + draw(
        st.sampled_from([end, "", end * 2])
    )
    encoding = draw(st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "latin-1"]))
    data = text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")
    return mutated(draw, data) if odd else data, delimiter, label_column


def mutated(draw, data):
    """Flip, cut, insert or repeat bytes, or leave them."""
    for kind in draw(st.lists(st.sampled_from(["flip", "cut", "insert", "repeat"]), max_size=2)):
        at = draw(st.integers(0, len(data)))
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at:]
        else:
            data = data[:at] + data[max(0, at - 20) :]
    return data


@fuzzed
def test_any_table_is_read_right_or_named(size, tmp_path):
    path = tmp_path / "table.csv"

    def check(case):
        data, delimiter, label_column = case
        path.write_bytes(data)
        form = {"delimiter": delimiter, "decimal": "."}
        options = CSV | {"path": str(path), "label_column": label_column, **form}
        outcome("csv", lambda: read_source(options | {"delimiter": None}), str(path))
        source = outcome("csv", lambda: read_source(options), str(path))
        if source is None:
            return
        names, x, label = parse_csv(data, delimiter, label_column)
        assert list(source.feature_names) == names
        assert source.x.tolist() == x
        assert (source.label is None) == (label is None)
        assert label is None or same_classes(source, label)

    fuzz(check, tables(), size, 120, 1000)


@fuzzed
def test_a_table_as_documented_is_read(size, tmp_path):
    """The other side: a file with nothing wrong must not be refused."""
    path = tmp_path / "table.csv"

    def check(case):
        x, label = case
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            x = [[float(n), *row] for n, row in enumerate(x)]  # one column varies
            writer.writerow([*(f"x{m}" for m in range(len(x[0]))), "kind"])
            writer.writerows([*map(repr, row), name] for row, name in zip(x, label, strict=True))
        with within(20):
            source = read_source(CSV | {"path": str(path), "label_column": "kind"})
        vary = [m for m, column in enumerate(zip(*x, strict=True)) if len({*column}) > 1]
        if len(x) > 1:
            x = [[row[m] for m in vary] for row in x]
        assert source.x.tolist() == x
        assert same_classes(source, label)
        COUNTS["csv", "result"] += 1

    number = st.one_of(st.floats(-1e30, 1e30), st.integers(-(10**18), 10**18).map(float))
    width = st.shared(st.integers(1, 4), key="width")
    length = st.shared(st.integers(1, 5), key="length")
    name = st.one_of(
        st.sampled_from(["1", "2", "oak", "NA", "None", "-1", "a,b", 'a"b', "größe", "a\nb"])
    )
    drawn = st.tuples(
        st.tuples(width, length).flatmap(
            lambda s: st.lists(
                st.lists(number, min_size=s[0], max_size=s[0]), min_size=s[1], max_size=s[1]
            )
        ),
        length.flatmap(lambda n: st.lists(name, min_size=n, max_size=n)),
    ).filter(lambda case: not set(case[1]) <= {"-1", "NA"})
    fuzz(check, drawn, size, 30, 200)


class Danger:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@st.composite
def arrays(draw, good):
    """An array for np.save: what is asked for, or anything."""
    n, m = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    shapes = [(n, m), (n, m), (n, 2, m), (n, 1, 2, m), (n, 3, 2, 4)]
    dtypes = ["<f8", "<f4", ">f8", "<f2", "<g"]
    if not good:
        n, m = draw(st.sampled_from([(n, m), (0, m), (n, 0)]))
        shapes += [(n, m), (n,), (), (n, m, 2), (n, 2, 2, 3)]
        dtypes += [
            "u1",
            "<i8",
            ">u2",
            "?",
            "<c16",
            "<U3",
            "S2",
            "<M8[s]",
            "V4",
            [("a", "<f8"), ("b", "u1")],
        ]
    shape = draw(st.sampled_from(shapes))
    dtype = "u1" if good and len(shape) > 2 else draw(st.sampled_from(dtypes))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    x = (100 * generator.random(shape)).astype("f8")
    if x.size and not good and draw(st.booleans()):
        x.flat[draw(st.integers(0, x.size - 1))] = draw(
            st.sampled_from([np.nan, np.inf, -np.inf, 1e308, -1e200, 0.0, 5e-324])
        )
    with np.errstate(all="ignore"):
        try:
            x = x.astype(dtype)
        except (TypeError, ValueError):
            x = np.zeros(shape, dtype)
    return np.asarray(x, order=draw(st.sampled_from("CF")))


def saved(array, version=None):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version, allow_pickle=True)
    return file.getvalue()


HEADS = [
    "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (2L, 3L), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 3), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999999999, 3), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (-2, -3), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (2, True), }",
    "{'descr': '<f8', 'fortran_order': 3, 'shape': (2, 3), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }",
    "{'descr': '<f8', 'shape': (2, 3), }",
    "{'descr': '<q9', 'fortran_order': False, 'shape': (2, 3), }",
    "{'descr': [('a', '<f8'), ('a', '<f8')], 'fortran_order': False, 'shape': (2, 3), }",
    "{'descr': ('<f8', (2,)), 'fortran_order': False, 'shape': (2, 3), }",
    "{[]: 3}", "((((((((", "'" * 50, "\\", "{'descr': " + "(" * 500, "0x", "{", "1_", "\n  1\n 2", "__import__('os')",
]  # fmt: skip


@st.composite
def npy_files(draw):
    """Bytes of an .npy file that is made by hand, damaged, or holds what is not asked for."""
    kind = draw(st.sampled_from(["array", "damaged", "damaged", "head", "pickle", "bytes"]))
    if kind == "bytes":
        return draw(
            st.one_of(
                st.binary(max_size=80),
                st.binary(max_size=40).map(lambda b: b"\x93NUMPY\x01\x00" + b),
            )
        )
    if kind == "pickle":
        return draw(
            st.sampled_from(
                [
                    pickle.dumps(Danger(DANGER)),
                    saved(np.array([Danger(DANGER)] * 2, dtype=object).reshape(1, 2)),
                ]
            )
        )
    if kind == "head":
        head = draw(st.sampled_from(HEADS)).encode() + b"\n"
        version = draw(st.sampled_from([1, 1, 2, 3, 4]))
        length = struct.pack("<H" if version == 1 else "<I", len(head))
        return (
            b"\x93NUMPY"
            + bytes([version, 0])
            + length
            + head
            + draw(st.sampled_from([bytes(48), bytes(40), b""]))
        )
    data = saved(draw(arrays(good=False)), draw(st.sampled_from([None, (2, 0), (3, 0)])))
    return mutated(draw, data) if kind == "damaged" else data


@st.composite
def npy_pairs(draw):
    """Bytes of an array and of its labels, or None; in half of the cases nothing is wrong with them."""
    if not draw(st.booleans()):
        return (
            draw(npy_files()),
            draw(st.one_of(st.none(), npy_files())),
            draw(st.sampled_from([256, 100, 2, 1])),
        )
    x = draw(arrays(good=True))
    number = st.lists(st.integers(-2, 3), min_size=len(x), max_size=len(x)).map(np.array)
    name = st.lists(labels, min_size=len(x), max_size=len(x)).map(lambda v: np.array(v, dtype="U4"))
    label = draw(st.one_of(st.none(), number, name))
    return saved(x), None if label is None else saved(label), draw(st.sampled_from([256, 256, 100]))


DANGER = Path(tempfile.gettempdir()) / f"cpmm-fuzz-{os.getpid()}"


def parse_npy(data):
    """What numpy makes of a whole file with nothing behind its values."""
    file = io.BytesIO(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = np.load(file, allow_pickle=False)
    assert file.read() == b""
    return x


@fuzzed
def test_any_array_is_read_right_or_named(size, tmp_path):
    path, label_path = tmp_path / "x.npy", tmp_path / "label.npy"

    def check(case):
        data, label, levels = case
        path.write_bytes(data)
        if label is not None:
            label_path.write_bytes(label)
        axes = None
        with suppress(Exception):  # of what is no array
            axes = {3: "NHW", 4: "NCHW"}.get(parse_npy(data).ndim)
        options = {
            "path": str(path),
            "label_path": None if label is None else str(label_path),
            "levels": levels,
            "axes": axes,
        }
        source = outcome(
            "npy", lambda: read_source({"source": "npy", **options}), str(path), str(label_path)
        )
        assert not DANGER.exists(), "a pickle was executed"
        if source is None:
            return
        x = parse_npy(data)
        assert source.x.dtype == (np.float64 if x.ndim == 2 else np.uint8)
        assert source.x.tolist() == x.reshape(len(x), -1).astype(source.x.dtype).tolist()
        assert (source.image_shape is None) == (x.ndim == 2)
        if label is not None:
            y = parse_npy(label).ravel()
            texts = np.char.decode(y, "utf-8", "replace") if y.dtype.kind == "S" else y.astype(str)
            assert same_classes(source, texts.tolist())

    fuzz(check, npy_pairs(), size, 120, 1000)


ROLES = {"train_images": 3, "train_labels": 1, "test_images": 3, "test_labels": 1}


def parse_idx(data):
    """By the published description of the format."""
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    assert data[:2] == b"\0\0"
    code = {8: "B", 9: "b", 11: "h", 12: "i", 13: "f", 14: "d"}[data[2]]
    shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    return shape, list(struct.unpack(f">{math.prod(shape)}{code}", data[4 + 4 * data[3] :]))


@st.composite
def idx_files(draw):
    """Four files; in half of the cases something is wrong with one of them."""
    n = {"train": draw(st.integers(1, 3)), "test": draw(st.integers(1, 2))}
    size = draw(st.sampled_from([(2, 2), (1, 3)]))
    wrong = draw(st.sampled_from([None] * 4 + list(ROLES)))
    files = {}
    for role, n_dims in ROLES.items():
        magic, shape = bytes([0, 0, 8, n_dims]), (n[role[: role.index("_")]], *size)[:n_dims]
        what = (
            draw(st.sampled_from(["shape", "magic", "bytes", "bytes"])) if role == wrong else None
        )
        if what == "shape":
            shape = draw(
                st.sampled_from(
                    [
                        (2**32 - 1,) * n_dims,
                        (1,) * n_dims,
                        (3,) * n_dims,
                        (0,) * n_dims,
                        (0, 2, 2)[:n_dims],
                    ]
                )
            )
        n_bytes = math.prod(shape) if math.prod(shape) < 100 else 4
        top = 3 if n_dims == 1 else 255
        values = bytes(draw(st.lists(st.integers(0, top), min_size=n_bytes, max_size=n_bytes)))
        if what == "magic":
            magic = draw(st.sampled_from([bytes([0, 0, 9, n_dims]), bytes([0, 0, 8, 2]), b""]))
        data = magic + struct.pack(f">{n_dims}I", *shape) + values
        data = gzip.compress(data) if draw(st.booleans()) else data
        files[role] = mutated(draw, data) if what == "bytes" else data
    return files


@fuzzed
def test_any_idx_files_are_read_right_or_named(size, tmp_path):
    def check(case):
        files, with_md5, n_names = case
        for role, data in files.items():
            (tmp_path / role).write_bytes(data)
        source = outcome(
            "idx",
            lambda: read_source(
                {
                    "source": "idx", "folder": str(tmp_path), "mirror": None, "cache": None,
                    "files": {role: role for role in ROLES},
                    "md5": {role: hashlib.md5(data).hexdigest() for role, data in files.items()} if with_md5 else None,
                    "class_names": [f"c{c}" for c in range(n_names)],
                    "axes": None,
                }
            ),
            str(tmp_path), "data.options.class_names", *ROLES,
        )  # fmt: skip
        if source is None:
            return
        part = {role: parse_idx(data) for role, data in files.items()}
        assert source.x.ravel().tolist() == part["train_images"][1] + part["test_images"][1]
        assert source.label.tolist() == part["train_labels"][1] + part["test_labels"][1]
        assert source.image_shape == (1, *part["train_images"][0][1:])
        assert source.official_test == part["test_images"][0][0]
        assert not (with_md5 and any(data[:2] == b"\x1f\x8b" for data in files.values()))

    drawn = st.tuples(
        idx_files(), st.integers(0, 9).map(lambda i: i == 0), st.sampled_from([4, 4, 10, 1])
    )
    fuzz(check, drawn, size, 60, 500)


# Whole stages


def run_to_the_end(kind, run_stage, folder, stages, seconds=60):
    """Run stages until one ends with its one line; whether all came to their end."""
    for stage in stages:
        with within(seconds):
            status, _, errors = run_stage(stage, folder)
        if status == 0:
            continue
        assert status == 1
        (line,) = errors.splitlines()
        assert line.startswith(f"{stage}: error: ")
        clue = r"\b(data|teacher|spaces|cpmm|mixture|evaluation|trainer|solver)\.|expected|got|lower|drop|set "
        assert re.search(clue, line), line
        assert len(line) < 1500, line
        COUNTS[kind, "clear error"] += 1
        return False
    COUNTS[kind, "result"] += 1
    return True


@fuzzed
def test_any_input_is_prepared_right_or_named(size, tmp_path, run_stage):
    plain = {name: compose_preset(name, [*TINY, *NEEDED[name]]) for name in ("csv", "npy")}

    def check(case):
        (x, label), as_npy, n_validation, n_test, standardize, noise = case
        with tempfile.TemporaryDirectory(dir=tmp_path) as place:
            folder = Path(place)
            if as_npy:
                np.save(folder / "x.npy", np.array(x))
                np.save(folder / "label.npy", np.array(label))
                items = {"label_path": str(folder / "label.npy"), "path": str(folder / "x.npy")}
            else:
                with (folder / "x.csv").open("w", newline="") as file:
                    csv.writer(file).writerows(
                        [
                            ["a", "b", "c"],
                            *([*map(repr, r), y] for r, y in zip(x, label, strict=True)),
                        ]
                    )
                items = {"label_column": "c", "path": str(folder / "x.csv")}
            config = plain["npy" if as_npy else "csv"]
            data = {
                **config["data"],
                "n_validation": n_validation,
                "n_test": n_test,
                "standardize": standardize,
            }
            data |= {
                "options": config["data"]["options"] | items,
                "augmentation": config["data"]["augmentation"] | {"noise": noise},
            }
            config = {**config, "data": data}
            assert all(OPTIONS[name].accepts(value) for name, value in leaves(config))
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            if not run_to_the_end("prepare_data", run_stage, folder, ["prepare_data"]):
                return
            prepared = load_prepared(folder / "prepared")
        raw = np.concatenate(
            [prepared.raw[split].numpy() for split in ("train", "validation", "test")]
        )
        assert sorted(raw.tolist()) == sorted(x)
        assert [len(prepared.raw[split]) for split in ("validation", "test")] == [
            n_validation,
            n_test,
        ]
        train = prepared.raw["train"].numpy().astype(np.longdouble)
        z, log_det = prepared.points("train")
        scale = np.ones(2)
        if standardize != "none":
            scale = train.std(0, ddof=1)
            scale = scale if standardize == "feature" else np.full(2, np.sqrt((scale**2).mean()))
            train = (train - train.mean(0)) / scale
        np.testing.assert_allclose(z.numpy(), train.astype(float), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(log_det.numpy(), -np.log(scale).sum(), rtol=1e-6, atol=1e-6)
        generator = torch.Generator().manual_seed(0)
        assert bool(torch.isfinite(prepared.draw(2, generator)).all())

    number = st.one_of(
        st.floats(-100, 100),
        st.floats(-100, 100),
        st.floats(-1e300, 1e300),
        st.sampled_from([0.0, 1.0, 1e-300, 1e154, 1e200, -1e308]),
    )
    wild = st.lists(st.lists(number, min_size=2, max_size=2), min_size=1, max_size=8)
    tame = st.tuples(st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 1e12])).map(
        lambda t: (t[1] * np.random.default_rng(t[0]).standard_normal((9, 2))).tolist()
    )
    drawn = st.tuples(
        st.one_of(wild, tame, tame).flatmap(lambda x: st.tuples(st.just(x), st.lists(st.sampled_from(["1", "2", "-1"]), min_size=len(x), max_size=len(x)))),
        st.booleans(), st.sampled_from([2, 2, 3, 5]), st.sampled_from([2, 2, 3, 0]), st.sampled_from(["feature", "shared", "none"]), st.sampled_from([0, 0.05, 3.0]),
    )  # fmt: skip
    fuzz(check, drawn, size, 20, 300, shrink=False)


SMALL = [
    "teacher.flow_matching_epochs=1", "spaces.n_spaces=3", "cpmm.fine_tune_epochs=1", "cpmm.initialization.restarts=1",
    "cpmm.pseudo_label_spaces=2", "baselines.direct.epochs=1", "baselines.direct.shrinkages=[5]", "data.n_validation=20", "data.n_test=20",
]  # fmt: skip
TABLE = ["data.options.n=100", "cpmm.n_clusters=2"]
IMAGES = [
    "data.alpha=0.01", "teacher=conv", "cpmm=conv", "cpmm.n_clusters=3", "cpmm.n_factors=2", "cpmm.initialization.kind=kmeans",
    "teacher.field.width=4", "cpmm.field.width=4", "cpmm.epochs_per_space=1",
]  # fmt: skip
FIELD = {
    "kind": ["mlp", "conv"], "width": [1], "depth": [1, 4], "activation": ["tanh", "softplus", "silu", "sin"], "n_frequencies": [0, 1, 24],
    "last_layer_scale": [0, -1, 1e9, 1e-30], "kernel_size": [1, 5, 15], "coordinates": [True, False], "squeeze": [1, 2, 3],
}  # fmt: skip
SOLVER = {
    "method": ["euler", "midpoint", "heun2", "heun3", "rk4", "dopri5", "adaptive_heun"], "n_steps": [1, 3], "interpolation": ["linear", "cubic"],
    "rtol": [1e-3, 1, 1e9, 1e-12, 1e-300], "atol": [1e-3, 1e9, 1e-12, 1e-300], "gradient": ["backpropagation", "checkpoint", "adjoint"],
    "max_evaluations": [1, 100, 2000],
}  # fmt: skip
RATE = [1e-300, 1e-3, 1, 1e3, 1e9]
BATCH = [1, 7, 10**6]
# Values at the ends of what an option may be, as far as a tiny pipeline can afford them.
ENDS = {
    "seed": [0, 2**32 - 1],
    "data.n_train": [None, 2, 3, 10], "data.n_validation": [2, 3, 60, 2**40], "data.n_test": [0, 1, 2, 60], "data.split_seed": [2**32 - 1], "data.noise_seed": [2**32 - 1],
    "data.alpha": [None, 1e-300, 1e-9, 0.499999999], "data.standardize": ["none", "feature", "shared"], "data.augmentation.noise": [0, 1, 1e9], "data.augmentation.translate": [1, 10_000], "data.augmentation.flip": [True],
    "data.map.kind": ["none", "spline"], "data.map.n_bins": [2, 3, 1000], "data.map.n_points": [2, 3, 10**6], "data.map.n_components": [1, 2, 50, 10**6], "data.map.n_factors": [1, 2, 1000],
    "data.map.log_diagonal_floor": [-60, 0, 20], "data.map.n_steps": [1, 3, 21], "data.map.batch_size": [1, 7], "data.map.learning_rate": [1e-300, 1e-3, 1, 1e9], "data.map.map_rate_factor": [1e-300, 1, 1e9],
    "data.options.n": [1, 2, 42, 45, 60], "data.options.seed": [2**32 - 1], "data.options.radius": [1e-300, 1e-9, 1e9], "data.options.ratio": [1 + 1e-9, 1e9],
    "data.options.thickness": [0, 1e9], "data.options.gaps": [[0, 0], [-1e9, 1e9]], "data.options.gap_width": [0, 359.999999], "data.options.levels": [1, 2, 256], "data.options.label_path": [None], "data.options.axes": [None, "NHW", "WHCN"],
    **{f"teacher.field.{k}": v for k, v in FIELD.items()}, **{f"teacher.solver.{k}": v for k, v in SOLVER.items()},
    "teacher.exact_trace_up_to": [0, 1, 10**6], "teacher.flow_matching_epochs": [0, 1, 2], "teacher.likelihood_epochs": [0, 1], "teacher.kinetic_weight": [1, 1e9], "teacher.jacobian_weight": [1, 1e9],
    "teacher.n_draws": [1, 3], "teacher.batch_size": BATCH, "teacher.learning_rate": RATE, "teacher.n_warmup_epochs": [0, 10**6], "teacher.gradient_clip": [0, 1e-300, 1e9],
    "spaces.kind": ["teacher", "noise"], "spaces.n_spaces": [2, 3, 20], "spaces.n_draws": [1, 3], "spaces.n_train": [None, 2, 3, 2**40], "spaces.n_validation": [None, 2, 3, 2**40], "spaces.batch_size": BATCH, "spaces.dtype": ["float16", "float32"], "spaces.chunk_rows": [1, 10**6],
    "cpmm.n_clusters": [1, 2, 7, 60, 100, 10**6], "cpmm.n_factors": [None, 1, 2, 3, 10**6], "cpmm.augmentation": [0, 0.1, 2.5, 20], "cpmm.diagonal": ["variable", "constant"],
    "cpmm.learned_weight": [True, False], "cpmm.learned_cluster_weight": [True, False], "cpmm.log_diagonal_floor": [-60, 0, 20], "cpmm.ode": ["shared", "separate"],
    **{f"cpmm.field.{k}": v for k, v in FIELD.items()}, **{f"cpmm.solver.{k}": v for k, v in SOLVER.items()},
    "cpmm.initialization.kind": ["gaussian", "random", "kmeans", "analyzers", "linkage", "neighbours"], "cpmm.initialization.mean_scale": [0, 1e9], "cpmm.initialization.loading_scale": [0, 1e9],
    "cpmm.initialization.free_scale": [0, 1e9], "cpmm.initialization.restarts": [1, 3], "cpmm.initialization.outlier_share": [0, 0.5, 0.99, 0.999999],
    "cpmm.initialization.n_points": [1, 20, 10**6], "cpmm.initialization.n_views": [0, 2], "cpmm.initialization.n_neighbours": [1, 3, 10**6],
    "cpmm.views.rotate": [0, 180], "cpmm.views.shear": [0, 89], "cpmm.views.scale": [0, 0.99], "cpmm.views.translate": [0, 1e6],
    "cpmm.pseudo_label_weight": [0, 1, 1e9], "cpmm.weight_knots": [None, 2, 3, 1000], "cpmm.n_points": [1, 20, 10**6], "cpmm.consistency_weight": [0, 1, 1e9], "cpmm.temperature": [1e-300, 1, 1e9],
    "cpmm.pseudo_label_spaces": [0, 1, 10**6], "cpmm.curriculum": [True, False], "cpmm.epochs_per_space": [0, 1, 2], "cpmm.fine_tune_epochs": [0, 1, 2], "cpmm.n_draws": [None, 1, 3], "cpmm.patience": [None, 1, 10**6],
    "cpmm.n_pseudotimes": [1, 2, 30], "cpmm.pseudotimes": ["grid", "uniform", "stratified"], "cpmm.noise": [0, 1, 1e9], "cpmm.entropy_weight": [-1, 1, 1e9, -1e9], "cpmm.path_weight": [1, 1e9],
    "cpmm.seed": [0, 2**32 - 1], "cpmm.batch_size": BATCH, "cpmm.learning_rate": RATE, "cpmm.initial_rate_factor": [0, 1e9], "cpmm.n_warmup_epochs": [0, 10**6], "cpmm.gradient_clip": [0, 1e-300, 1e9],
    "mixture.n_pseudotimes": [1, 2, 30, 100], "mixture.drop_idle": [True, False],
    "evaluation.batch_size": BATCH, "evaluation.discretizations": [[1], [3, 3], [50, 1]], "baselines.gaussian.n_draws": [1, 2], **{f"evaluation.teacher_solver.{k}": SOLVER[k] for k in ("method", "rtol", "atol", "max_evaluations")},
    "evaluation.teacher_points": [None, 2, 10**6], "baselines.kmeans.n_starts": [1, 2], "baselines.direct.n_per_cluster": [1, 2], "baselines.direct.em_iterations": [0, 2], "baselines.direct.kmeans_points": [None, 1, 20, 10**6], "baselines.direct.kmeans_restarts": [1, 2],
    "baselines.direct.shrinkages": [[0], [1e9], [5, 5]], "baselines.direct.epochs": [1, 2], "baselines.direct.n_draws": [1, 2], "baselines.direct.batch_size": BATCH, "baselines.direct.learning_rate": RATE,
    "baselines.direct.n_warmup_epochs": [0, 10**6], "baselines.direct.gradient_clip": [0, 1e-300, 1e9], "baselines.direct.noise": [0, 1e9],
    "trainer.precision": ["32-true", "tf32", "bf16-mixed", "64-true"], "trainer.deterministic": [False, True], "trainer.threads": [1, 2], "trainer.checkpoint_every_n_epochs": [1, 10**6],
    "trainer.accelerator": ["auto", "cpu", "gpu"],
}  # fmt: skip
# Not drawn: where the data lie is the fixture's.
NOT_RUN = {"name", "model", "data.source", "data.options.path", "evaluation.ood", "trainer.devices"}


def test_every_option_of_a_tiny_pipeline_is_fuzzed():
    tiny = {name for preset in ("rings", "npy") for name in known_options()[preset]}
    # Of most baselines no stage of this pipeline reads any; tests/pipeline/test_baselines.py trains each row.
    read = ("baselines.direct.", "baselines.gaussian.", "baselines.kmeans.")
    tiny = {
        name
        for name in tiny
        if name.startswith(read) or not name.startswith(("sweep.", "ray.", "baselines."))
    }
    tiny = {
        name
        for name in tiny
        if not name.endswith(
            (".merge", "direct.kind", "gaussian.kind", "kmeans.kind", ".title", ".block", ".paper")
        )
    }
    assert set(ENDS) | NOT_RUN == tiny
    for name, ends in ENDS.items():
        assert all(map(OPTIONS[name].accepts, ends)), name


def finite_numbers(value):
    """Every number in nested JSON is one."""
    if isinstance(value, dict | list):
        return all(map(finite_numbers, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    kind = generator.integers(0, 3, 90)
    np.save(
        folder / "x.npy",
        (generator.integers(0, 60, (90, 4, 3)) + 60 * kind[:, None, None]).astype(np.uint8),
    )
    np.save(folder / "label.npy", kind)
    files = [f"data.options.path={folder}/x.npy", f"data.options.label_path={folder}/label.npy"]
    return [*files, "data.options.axes=NHW"]


@fuzzed
def test_any_pipeline_comes_to_its_end_or_says_why_not(size, tmp_path, run_stage, images):
    def check(case):
        preset, chosen = case
        base = [*TINY, *SMALL, *(TABLE if preset == "rings" else [*IMAGES, *images])]
        own = [f"{name}={value}" for name, value in [item.split("=", 1) for item in base]]
        try:
            config = compose_preset(preset, [*own, *flatten(dict(chosen))])
        except ValueError as error:  # an option of the other preset
            expect_clear("pipeline", error, "cannot be composed", "cpmm.")
            return
        with tempfile.TemporaryDirectory(dir=tmp_path) as place:
            folder = Path(place)
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            if run_to_the_end("pipeline", run_stage, folder, STAGES):
                metrics = json.loads((folder / "metrics.json").read_text())
                assert finite_numbers(metrics), metrics

    chosen = st.lists(
        st.sampled_from(sorted(ENDS)).flatmap(lambda name: st.tuples(st.just(name), st.sampled_from(ENDS[name]))),
        min_size=1, max_size=3, unique_by=lambda item: item[0],
    )  # fmt: skip
    fuzz(check, st.tuples(st.sampled_from(["rings", "npy"]), chosen), size, 1, 40, shrink=False)
