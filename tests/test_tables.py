from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.reading import follow, options_in
from cpmm.columns import Columns
from cpmm.reading.tables import Choice, FeatureReader, Table, complete_splits, read_table
from cpmm.reading.text import TextFormat

PLAIN = pd.DataFrame({"a": [1.5, -2.25, 3.0, 4.125], "b": [10, 20, 30, 40.5]})
PENGUINS = """\
,species,island,bill,mass,sex,day,code,flag,k
0,Adelie,Torgersen,39.1,3750,male,2007-11-11,N1A1,yes,7
1,Adelie,Biscoe,,3800,female,2007-11-12,N1A2,no,7
2,Gentoo,Biscoe,40.3,NA,female,2007-11-13,N2A1,no,7
3,Gentoo,Biscoe,46.7,3450,,2007-11-14,N2A2,yes,7
4,Gentoo,Dream,48.7,3475,male,2007-11-15,N3A1,yes,7
"""


def write(folder: Path, text: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(path: Path, label: str | None = None, choice: Choice | None = None, **form) -> Table:
    return read_table(path, TextFormat(**form), label, choice or Choice())


# how a file is written


def packed(kind: str, data: bytes) -> bytes:
    if kind == "zip":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("folder/", b"")
            archive.writestr(zipfile.ZipInfo("folder/t.csv"), data)  # else the time is in it
            archive.writestr("__MACOSX/._t.csv", b"x")
        return file.getvalue()
    pack = {"": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    return pack[kind](data)


@pytest.mark.parametrize("kind", ["", "gz", "zip", "bz2", "xz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_packed_and_encoded_files_are_the_same_table(kind, encoding, tmp_path):
    data = PLAIN.rename(columns={"b": "größe"}).to_csv(index=False).encode(encoding)
    path = write(tmp_path, packed(kind, data), "t.csv" + f".{kind}" * bool(kind))
    table = read(path)
    assert table.feature_names == ("a", "größe")
    assert table.x.tolist() == PLAIN.to_numpy().tolist()
    rest = packed(kind, data)[:-9]
    if kind:
        with pytest.raises(ValueError, match=r"damaged or not whole|t\.csv"):
            read(write(tmp_path, rest, path.name))


@pytest.mark.parametrize(
    ("delimiter", "found"),
    [(",", None), (";", "semicolons"), ("\t", "tabs"), ("|", "bars"), (" ", "white space")],
)
def test_the_delimiter_is_found_out(delimiter, found, tmp_path):
    path = write(tmp_path, PLAIN.to_csv(index=False, sep=delimiter))
    table = read(path)
    assert table.x.tolist() == PLAIN.to_numpy().tolist()
    assert [word for word in table.found if "between" in word] == (
        [f"fields between {found}"] if found else []
    )
    assert read(path, delimiter=delimiter).x.tolist() == table.x.tolist()
    if delimiter != " ":  # a first cell that is empty is not skipped
        gaps = PLAIN.assign(z="u").where(PLAIN["a"] > 0)
        path = write(tmp_path, gaps.to_csv(index=False, sep=delimiter))
        x = read(path, None, Choice(missing="impute", text="drop")).x
        np.testing.assert_array_equal(x, gaps[["a", "b"]])


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_decimal_commas_are_found_out(delimiter, tmp_path):
    path = write(tmp_path, PLAIN.to_csv(index=False, sep=delimiter, decimal=","))
    table = read(path)
    assert table.x.tolist() == PLAIN.to_numpy().tolist()
    assert "decimal commas" in table.found
    path = write(tmp_path, "a;b\n1,234;1\n2,500;2\n")
    with pytest.raises(ValueError, match=r"is '1,234' 1\.234 or 1234\?"):
        read(path)
    assert follow(path)[0].x.tolist() == [[1.234, 1], [2.5, 2]]


def test_other_encodings_are_named_with_what_to_write(tmp_path):
    path = write(tmp_path, "größe,b\n1,2\n3,4\n".encode("latin-1"))
    table, said = follow(path)
    assert "is not UTF-8 text" in said[0]
    assert table.feature_names == ("größe", "b")
    with pytest.raises(ValueError, match="there is no text encoding 'latin-eins'"):
        read(path, encoding="latin-eins")
    with pytest.raises(ValueError, match="not text in the encoding ascii"):
        read(path, encoding="ascii")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"\x93NUMPY\1\0", "is a .npy file: choose preset npy"),
        (b"PAR1\0\0", "is a Parquet file: write it as CSV"),
        (b"<!DOCTYPE html><p>", "is a web page, not the data"),
        (b'[{"a": 1}]', "is JSON: write it as CSV"),
        (b"@relation iris\n@data\n1,2\n", "is an ARFF or KEEL file"),
        (b"a,b\n1,\0\n", "holds zero bytes"),
        pytest.param(packed("zip", b"")[:20], "damaged or not whole", id="half a zip"),
    ],
)
def test_what_is_no_table_is_named(data, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        read(write(tmp_path, data))


def test_archives_of_several_files_and_workbooks_are_named(tmp_path):
    for names, said in (
        (("a.csv", "b.csv"), "must hold one file, the table: it holds 2"),
        (("[Content_Types].xml", "xl/sheet1.xml"), "is a workbook, not text: save its sheet"),
    ):
        with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
            for name in names:
                archive.writestr(name, b"a,b\n1,2\n")
        with pytest.raises(ValueError, match=re.escape(said)):
            read(tmp_path / "t.zip")


# headers


@pytest.mark.parametrize(
    ("text", "names", "said"),
    [
        ("5.1,3.5\n4.9,3.0\n6,2\n", ("x0", "x1"), "must name the columns"),
        ("1,2\n3,4\n5,1\n", ("x0", "x1"), "must name the columns"),
        ("0,1,2\n3,4,5\n6,7,9\n", ("x0", "x1", "x2"), "must name the columns"),
        ("1,0,2,0\n0,1,5,5\n", ("x0", "x1", "x2", "x3"), "must name the columns"),
        ("5.1,3,u\n4.9,3,u\n7,4,v\n7,4,v\n8,2,v\n", ("x0", "x1"), "must name the columns"),
        ("3,2,u,v,w\n5,1,0\n4,2,1\n3,3,2\n", ("x0", "x1"), "first line of scikit-learn's"),
        ("a,b,a\n1,2,3\n4,5,7\n", ("x0", "x1", "x2"), "more than one column named 'a'"),
        ("about this\na,b\n1,2\n3,4\n5,6\n", None, "tail -n +2"),
        ("/* of it, all, */\n<1947,Q1>\na,b\n1,2\n3,4\n5,6\n", None, "tail -n +3"),
        (",a\n0,5\n1,7\n", ("a",), "without a name: 'Unnamed: 0'"),
        ("a b\nr1 1 2\nr2 3 4\n", ("a", "b"), "without a name: 'Unnamed: 0'"),
    ],
)
def test_headers_that_are_none_are_read_by_what_the_error_says(text, names, said, tmp_path):
    path = write(tmp_path, text)
    if names is None:
        with pytest.raises(ValueError, match=re.escape(said)) as caught:
            read(path)
        lines = text.splitlines(keepends=True)[int(said[-1]) - 1 :]
        write(tmp_path, "".join(lines), "table.csv")  # what `tail` does
        assert f"{path} > table.csv" in str(caught.value)
        assert read(tmp_path / "table.csv").feature_names == ("a", "b")
        return
    table, errors = follow(path)
    assert said in errors[0]
    assert table.feature_names == names
    assert len(table.x) == len(text.splitlines()) - ("header=none" not in errors[0])
    assert "\n" not in errors[0]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0,1\n5,6\n7,8\n", ("0", "1")),
        ("group,2010,2012,2015\n1,1.5,2,3\n2,4,5,6\n", ("group", "2010", "2012", "2015")),
        ("a,b,\n1,2,\n3,4,\n", ("a", "b")),
        ("a,b\n1,2,\n3,4,\n", ("a", "b")),
        ("a,b,\n1,2\n3,4\n", ("a", "b")),
        ("# a,b\n1,2\n3,4\n", ("a", "b")),
        ("# by me, today\n#\na,b\n1,2\n3,4\n", ("a", "b")),
        ("#a\n0\n1\n", ("a",)),
        ("#,b\n1,2\n3,4\n", ("#", "b")),
        ("\n\n a , b\n 1 , 2\n3,4\n\n", ("a", "b")),
        ('"a\nb","c,d"\n1,2\n3,4\n', ("a b", "c,d")),
    ],
)
def test_headers_are_read_as_they_are_meant(text, names, tmp_path):
    table = read(write(tmp_path, text))
    assert table.feature_names == names
    assert table.x[0].tolist()[:2] in ([1, 2], [5, 6], [1, 1.5], [0])
    assert len(table.x) == 2


def test_many_columns_are_quick_and_their_errors_short(tmp_path):
    n = 20_000
    rows = [",".join(map(str, range(k, k + n))) for k in (5, 3)]
    path = write(tmp_path, "\n".join([",".join(f"c{m}" for m in range(n)), *rows]))
    started = time.process_time()
    assert read(path).x.shape == (2, n)
    assert time.process_time() - started < 8  # 2 here; counting each name took 8 by itself
    row = rows[0][:20_000]
    for text in (row, re.sub(r"\d+", "a", row)):
        with pytest.raises(ValueError, match=r"t\.csv") as caught:
            read(write(tmp_path, f"{text}\n{row}\n{row}\n"))
        assert len(str(caught.value)) < 1000


# columns


def test_one_error_names_all_that_is_wrong_and_one_line_reads_it(tmp_path):
    path = write(tmp_path, PENGUINS)
    table, (said,) = follow(path)
    for part in (
        "without a name: 'Unnamed: 0'", "text: 'species' (2 different, 'Adelie' in row 1)",
        "'island'", "'sex'", "dates: 'day' ('2007-11-11' in row 1)",
        "gaps: 'bill' (1, first in row 2), 'mass'",
        "constant: 'k'", "data.missing=impute", "data.constant=drop", "data.text=one_hot",
    ):  # fmt: skip
        assert part in said
    assert "\n" not in said
    assert "data.options.label_column=species" in said
    assert table.feature_names == (
        "island=Biscoe", "island=Dream", "island=Torgersen", "bill", "mass", "sex=male",
        "code=N1A1", "code=N1A2", "code=N2A1", "code=N2A2", "code=N3A1", "flag",
    )  # fmt: skip
    assert "true or yes 1, false or no 0: flag" in table.found


def test_text_is_dropped_or_encoded_and_gaps_leave_or_stay(tmp_path):
    path = write(tmp_path, PENGUINS)
    choice = Choice(columns=["species", "island", "bill", "mass"], missing="drop", text="one_hot")
    table = read(path, "species", choice)
    assert table.feature_names == (
        "island=Biscoe",
        "island=Dream",
        "island=Torgersen",
        "bill",
        "mass",
    )
    assert table.x.tolist() == [[0, 0, 1, 39.1, 3750], [1, 0, 0, 46.7, 3450], [0, 1, 0, 48.7, 3475]]
    assert (table.label.tolist(), table.class_names) == ([0, 1, 1], ("Adelie", "Gentoo"))
    assert "2 rows with gaps left out" in table.found
    table = read(path, None, Choice(drop=["Unnamed: 0", "k"], missing="impute", text="drop"))
    assert table.feature_names == ("bill", "mass", "flag")
    assert np.isnan(table.x).sum() == 2
    with pytest.raises(ValueError, match=r"'bil'.*data\.columns names; is it 'bill'"):
        read(path, None, Choice(columns=["bil"]))
    with pytest.raises(ValueError, match=r"no column 'x', which data\.drop names"):
        read(path, None, Choice(drop=["x"]))
    with pytest.raises(ValueError, match=r"'nope', which data\.options\.label_column names.*null"):
        read(path, "nope")


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["01/02/2003", "4/5/2006"] * 6, "dates"),
        (["12:30", "12:31"] * 6, "dates"),
        (["$1,200", "$900"] * 6, "numbers with signs"),
        (["10%", "12.5%"] * 6, "numbers with signs"),
        ([*map(str, range(20)), "x"], "numbers beside text"),
        ([f"id{n}" for n in range(12)], "identifiers"),
        (["inf", "1", "2"], "gaps"),
        (["1e31", "1", "2"], "gaps"),
        (["9" * 400, "1", "2"], "gaps"),
        (["5", "5", "5"], "constant"),
        (["", "", ""], "empty"),
        (["1e-13", "1e-13", "2e-13"], None),
        (["1", ".", "None", "2"], "gaps"),
    ],
)
def test_kinds_of_columns_are_told_apart(cells, kind, tmp_path):
    text = "a,v\n" + "".join(f'{n * n},"{cell}"\n' for n, cell in enumerate(cells))
    path = write(tmp_path, text)
    if kind is None:
        assert read(path).x[:, 1].tolist() == [float(cell) for cell in cells]
        return
    table, (said,) = follow(path)
    assert f"{kind}: 'v'" in said
    assert table.feature_names[0] == "a"
    assert ("v" in table.feature_names) == (kind == "gaps")


def test_a_table_that_holds_nothing_to_train_on_says_so(tmp_path):
    path = write(tmp_path, "a,b\n" + "".join(f"id{n},{n}x\n" for n in range(60)))
    with pytest.raises(ValueError, match="has no column to train on: identifiers: 'a'"):
        read(path)


def test_labels_are_read_as_text_and_told(tmp_path):
    path = write(tmp_path, "x,label\n1,1\n2,1.0\n3,-1.0\n4,NaN\n5,\n6,2\n7,noise\n8,NA\n")
    table = read(path, "label")
    assert table.label.tolist() == [0, 0, -1, -1, -1, 1, -1, -1]
    assert "5 of 8 rows without a label (empty, '-1.0', 'NA', 'NaN', 'noise')" in table.found
    path = write(tmp_path, "x,y\n" + "".join(f"{n * n},{n / 7}\n" for n in range(20)))
    assert "look like a measurement" in read(path, "y").doubts[0]
    path = write(tmp_path, "x,target\n" + "".join(f"{n * n},{n % 2}\n" for n in range(30)))
    assert "'target' looks like classes" in read(path).doubts[0]
    path = write(tmp_path, "i,x\n" + "".join(f"{n},{n * n}\n" for n in range(30)))
    assert "counts the rows" in read(path).doubts[0]
    assert "data.drop=[i]" in read(path).doubts[0]


# after the split


def test_gaps_and_constants_are_seen_to_by_the_training_split():
    columns = Columns((), {"c": ("u", "v", "w")})
    names = ("a", "c=u", "c=v", "c=w", "k")
    nan = np.nan
    train = np.array([[1, 0, 1, 0, 3], [2, 0, 1, 0, 3], [9, 1, 0, 0, 3], [nan, nan, nan, nan, 3]])
    test = np.array([[nan, 0, 0, 1, 4.0]])
    x = {"train": train, "test": test}
    with pytest.raises(ValueError, match="2 of 5 features have one value in the training split"):
        complete_splits(x, names, columns, "impute", "refuse")
    x, names, columns, done = complete_splits(x, names, columns, "impute", "drop")
    assert names == ("a", "c=u", "c=v")
    assert columns.fill == (2.0, 0.0, 1.0)
    assert x["train"].tolist()[3] == [2.0, 0.0, 1.0]
    assert x["test"].tolist() == [[2.0, 0.0, 0.0]]
    assert "'c=w', 'k'" in done[0]
    assert "5 gaps filled" in done[1] or "4 gaps filled" in done[1]
    assert Columns.from_dict(columns.to_dict()) == columns


# what trains scores


def test_points_are_read_as_they_were_trained_on(tmp_path):
    path = write(tmp_path, PENGUINS)
    choice = Choice(drop=["Unnamed: 0", "day", "code", "k"], missing="impute", text="one_hot")
    table = read(path, None, choice)
    fill = tuple(np.nanmedian(table.x, axis=0).tolist())
    columns = replace(table.columns, fill=fill)
    expected = np.where(np.isnan(table.x), fill, table.x)
    shuffled = pd.read_csv(path, dtype=str, keep_default_na=False).iloc[:, ::-1]
    for name, options in (
        ("p.csv", {}), ("p.tsv", {"sep": "\t"}), ("p.txt", {"sep": ";", "encoding": "utf-16"}),
        ("p.csv.gz", {}), ("p.csv.zip", {}),
    ):  # fmt: skip
        shuffled.to_csv(tmp_path / name, index=False, **options)
        for size in (1, 2, None):
            reader = FeatureReader(
                tmp_path / name, table.feature_names, columns, TextFormat(), size
            )
            np.testing.assert_array_equal(reader.read(), expected)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Torgersen", "Cormorant", "has 'Cormorant' in row 1: the mixture knows Biscoe, Dream"),
        ("39.1", "much", "column 'bill' of {path} must hold finite numbers: got 'much' in row 1"),
        ("39.1", "", "column 'bill' of {path} must hold finite numbers: got a gap in row 1"),
        (",no,", ",2,", "column 'flag' of {path} must hold true and false, or 1 and 0"),
        ("bill", "beak", "lacks 1 of the mixture's 3 features: bill; its header has"),
    ],
)  # fmt: skip
def test_points_that_are_otherwise_are_named(old, new, said, tmp_path):
    choice = Choice(columns=["island", "bill", "flag"], missing="impute", text="one_hot")
    table = read(write(tmp_path, PENGUINS), None, choice)
    path = write(tmp_path, PENGUINS.replace("Biscoe,,", "Biscoe,40,").replace(old, new), "p.csv")
    with pytest.raises(ValueError, match=re.escape(said.format(path=path))):
        FeatureReader(path, table.feature_names, table.columns, TextFormat(), 2).read()


def test_booleans_are_ones_and_zeros_in_both(tmp_path):
    path = write(tmp_path, "a,b\n1,True\n2,False\n3,TRUE\n")
    table = read(path)
    assert table.x[:, 1].tolist() == [1, 0, 1]
    other = write(tmp_path, "a,b\n1,1\n2,0\n3,yes\n", "o.csv")
    with pytest.raises(ValueError, match=r"column 'b' of .* true and false, or 1 and 0"):
        FeatureReader(other, ("a", "b"), table.columns, TextFormat()).read()
    other = write(tmp_path, "a,b\n1,1\n2,0\n3,1\n", "o.csv")
    got = FeatureReader(other, ("a", "b"), table.columns, TextFormat()).read()
    assert got.tolist() == table.x.tolist()
    with pytest.raises(ValueError, match=r"column 'b' of .* must hold finite numbers: got 'True'"):
        FeatureReader(path, ("a", "b"), Columns(), TextFormat()).read()


def test_a_column_of_classes_alone_is_all_that_is_named(tmp_path):
    rows = "".join(f"{n}.5,{'ab'[n % 2]}\n" for n in range(20))
    with pytest.raises(ValueError, match=r"set data\.options\.label_column=species \(if") as raised:
        read(write(tmp_path, f"mass,species\n{rows}"), choice=Choice(drop=[]))
    assert options_in(str(raised.value)) == {"data.options.label_column": "species"}


def test_a_table_of_text_alone_is_encoded(tmp_path):
    bases = np.random.default_rng(0).choice([*"ACGT"], (40, 60))
    text = "".join(",".join(row) + "\n" for row in [[f"b{m}" for m in range(60)], *bases])
    table, said = follow(write(tmp_path, text))
    assert len(said) == 1
    assert table.x.shape[0] == 40
    assert set(np.unique(table.x)) == {0, 1}
