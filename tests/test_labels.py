from __future__ import annotations

import numpy as np
import pytest

from cpmm.reading.labels import describe_labels, index_classes


@pytest.mark.parametrize(
    "none",
    ["", " ", "-1", "-1.0", "-1.", "-1e0", "NaN", "nan", "NA", "N/A", "<NA>", "null", "?", "noise"],
)
def test_no_label_is_written_in_many_ways(none):
    label, names = index_classes("t.csv", ["b", none, "a", none, "b"])
    assert (label.tolist(), names) == ([1, -1, 0, -1, 1], ("a", "b"))
    found, doubts = describe_labels(["b", none, "a", none, "b"], label, names)
    assert found == [f"2 of 5 rows without a label ({repr(none) if none.strip() else 'empty'})"]
    assert doubts == []
    with pytest.raises(ValueError, match=r"x has no label .* set its label option to null"):
        index_classes("x", [none])


def test_none_is_a_class():
    label, names = index_classes("t.csv", ["None", "mild", "None"])
    assert (label.tolist(), names) == ([0, 1, 0], ("None", "mild"))


@pytest.mark.parametrize(
    ("values", "label", "names"),
    [
        (["1", "1.0", "2.00", "10", "2"], [0, 0, 1, 2, 1], ("1", "2", "10")),
        (["1.0", "0.0", "-1.0"], [1, 0, -1], ("0", "1")),
        (["0.5", "1e1", "10", "2"], [0, 2, 2, 1], ("0.5", "2", "10")),
        (["007", "12"], [0, 1], ("007", "12")),
        (["1", "1.0", "a"], [0, 1, 2], ("1", "1.0", "a")),  # of text, as version numbers are
        ([f"{2**53 + 1}", f"{2**53}"], [1, 0], (f"{2**53}", f"{2**53 + 1}")),
        (["inf", "b"], [1, 0], ("b", "inf")),
        (["9" * 5000, "1"], [1, 0], ("1", "9" * 5000)),
    ],
)  # fmt: skip
def test_numbers_are_classes_by_their_value(values, label, names):
    got, got_names = index_classes("t.csv", values)
    assert (got.tolist(), got_names) == (label, names)
    assert got.dtype == np.int64


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([f"{n}.5" for n in range(20)], "look like a measurement"),
        ([f"row {n}" for n in range(20)], "look like names of rows"),
        (["-1", "1", "-1"], "if -1 is a class"),
        (["a", "b"] * 10, None),
    ],
)
def test_labels_that_are_none_are_doubted(values, said):
    _, doubts = describe_labels(values, *index_classes("t.csv", values))
    assert [said in doubt for doubt in doubts] == ([True] if said else [])
