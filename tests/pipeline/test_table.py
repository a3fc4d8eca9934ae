"""Tables, claims and figures of a sweep's results, against numpy; no Ray."""

import io
import json
import shlex
from functools import cache

import numpy as np
import pandas as pd
import pytest

from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.sweeps.plan import Trial, make_trial, shorten, show
from cpmm.pipeline.sweeps.table import (
    best_line,
    best_trial,
    check_claims,
    draw,
    markdown,
    metrics,
    rows_table,
    terminal_table,
    trials_table,
)

UNIT = "bits per dimension"


@cache
def compose(*overrides):
    return compose_preset("digits", overrides)


def trial(seed, **row):
    words = [f"cpmm.{name}={value}" for name, value in row.items()]
    overrides = (*words, "data.options.path='a b.csv'", f"cpmm.seed={seed}")
    row = tuple((name, str(value)) for name, value in row.items())
    return Trial("digits", row, seed, overrides, compose(), f"{row}{seed}")


def finished(validation, density, accuracy=None):
    test = {"density": density, "density_standard_error": 0.01, "n_components": 30}
    if accuracy is not None:
        test |= {"accuracy": accuracy, "nmi": accuracy / 2, "ari": accuracy / 3, "purity": accuracy}
    return {
        "status": "finished", "validation": validation, "test": test, "best_epoch": 3, "steps": 90,
        "seconds": 10.0,
    }  # fmt: skip


def failed(status="diverged", reason="7 of 16 log-densities are not finite", step=12):
    return {"status": status, "step": step, "reason": reason}


@pytest.fixture
def results():
    good = [(2.20, 2.10, 0.80), (2.30, 2.50, 0.70), (2.24, 2.15, 0.90)]
    return [
        *((trial(s, ode="shared", n_factors=2), finished(*good[s])) for s in range(3)),
        (trial(0, ode="shared", n_factors=5), finished(2.19, 2.40, 0.50)),
        (trial(1, ode="shared", n_factors=5), failed()),
        (trial(2, ode="shared", n_factors=5), failed("lost", "out of | memory", None)),
        *((trial(s, ode="separate", n_factors=2), failed("failed", "KeyError: 'x'", None))
          for s in range(3)),
        (trial(0, ode="separate", n_factors=5), finished(2.50, 2.05, 0.99)),
        (trial(1, ode="separate", n_factors=5), {"status": "stopped", "step": 40, "reason": "stopped early by asha after epoch 9", "validation": 0.1}),
        (trial(2, ode="separate", n_factors=5), finished(2.60, 2.07, 0.97)),
    ]  # fmt: skip


@pytest.fixture
def rows(results):
    return rows_table(results)


def test_rows_are_means_and_deviations_of_what_finished(results, rows):
    assert rows["row"].tolist() == list(dict.fromkeys(t.label for t, _ in results))
    assert rows["ode"].tolist() == ["shared", "shared", "separate", "separate"]
    assert rows["n"].tolist() == [3, 3, 3, 3]
    assert rows["n_failed"].tolist() == [0, 2, 3, 0]
    assert rows["n_stopped"].tolist() == [0, 0, 0, 1]
    for score in ("validation", "density", "accuracy", "nmi", "ari", "purity"):
        for index in range(4):
            values = np.array(
                [
                    record["validation"] if score == "validation" else record["test"][score]
                    for _, record in results[3 * index : 3 * index + 3]
                    if record["status"] == "finished"
                ]
            )
            expected = [np.nan, np.nan]
            if len(values):
                mean = values.sum() / len(values)
                spread = ((values - mean) ** 2).sum()
                expected = [
                    mean,
                    np.sqrt(spread / (len(values) - 1)) if len(values) > 1 else np.nan,
                ]
            got = rows.loc[index, [f"{score}_mean", f"{score}_sd"]].astype(float)
            np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert rows["seconds_mean"].astype(float).tolist()[:2] == [10, 10]


def test_failures_are_said(rows):
    assert rows["failures"].tolist()[0] == ""
    first, second = rows["failures"][1].split("; ")
    assert first == "diverged at step 12: 7 of 16 log-densities are not finite"
    assert second == "lost: out of | memory"
    assert "failed: KeyError: 'x'" in rows["failures"][2]
    assert rows["failures"][3] == ""  # stopped early is no failure


def test_a_single_seed_has_no_deviation():
    rows = rows_table([(trial(0, ode="shared"), finished(2.0, 2.1))])
    assert rows["density_mean"].tolist() == [2.1]
    assert rows["density_sd"].isna().all()
    assert "accuracy_mean" not in rows  # no labels
    assert "auroc_mean" not in rows  # no other data set
    assert "AUROC" not in markdown("s", "csv", UNIT, rows, [], "")
    assert "±" not in markdown("s", "csv", UNIT, rows, [], "").splitlines()[-3]


def test_what_is_told_apart_is_in_the_table():
    told = [(0.99, 0.98), (0.97, 0.96), (None, None)]  # the last trial lacked the other data set
    results = [
        (trial(seed, ode="shared"),
         finished(2.0, 2.1, 0.8) | ({"auroc": auroc, "aupr": aupr} if auroc else {}))
        for seed, (auroc, aupr) in enumerate(told)
    ]  # fmt: skip
    results.append((trial(0, ode="separate"), finished(2.2, 2.3, 0.7)))
    rows = rows_table(results)
    np.testing.assert_allclose(rows.loc[0, ["auroc_mean", "aupr_mean"]].astype(float), [0.98, 0.97])
    np.testing.assert_allclose(float(rows.loc[0, "auroc_sd"]), 0.02 / 2**0.5)
    text = markdown("s", "digits", UNIT, rows, [], "")
    assert (
        "| ode | seeds | validation | density | accuracy, % | NMI | AUROC, the models' space, % "
        "| AUPR, the models' space, % | failures |"
    ) in text
    assert "| 98.00 ± 1.41 | 97.00 ± 1.41 |" in text
    assert "| 0.350 |  |  |  |" in text  # the row that was not asked
    assert "tells another data set apart" in text


def test_trials_have_one_line_each(results):
    table = trials_table(results)
    assert len(table) == 12
    assert table["status"].value_counts().to_dict() == {
        "finished": 6, "failed": 3, "diverged": 1, "lost": 1, "stopped": 1,
    }  # fmt: skip
    assert table["seed"].tolist() == [0, 1, 2] * 4
    assert table["steps"].tolist()[:5] == [90, 90, 90, 90, 12]
    for (item, _), command in zip(results, table["command"], strict=True):
        words = shlex.split(command)
        assert words == ["python", "workflows/trial.py", "preset=digits", *item.overrides]


def test_a_trials_fingerprint_is_of_its_options_and_not_of_the_code():
    def marks(*overrides, code="a", seeds=(0,)):
        trials = [make_trial("digits", (), s, overrides, compose(*overrides), code) for s in seeds]
        return trials_table([(t, failed()) for t in trials])["fingerprint"].tolist()

    same = marks("model=gaussian")
    assert same == marks("model=gaussian", code="b") == marks("model=gaussian", "name=other")
    others = [
        *marks("model=gaussian", seeds=(1, 2)),
        *marks("model=gmm_full"),
        *marks("model=gaussian", "data.noise_seed=9"),
        *marks("seed=1"),
        *marks("cpmm.noise=0.123"),
        *marks("ood@evaluation.ood=mnist"),
        *marks(),
    ]
    assert len({*same, *others}) == 1 + len(others)


def test_the_best_is_chosen_by_validation_alone(results):
    # Another has the better test density and accuracy, and one that was stopped a better validation.
    best, record = best_trial(results)
    assert record["validation"] == 2.19
    assert best.row == (("ode", "shared"), ("n_factors", "5"))
    line = best_line((best, record), UNIT, "data/digits/sweep/s", ["cpmm", "mixture"])
    assert best.command in line
    assert best.name in line
    assert "validation 2.1900, test 2.4000 bits per dimension" in line
    assert "In data/digits/sweep/s: its cpmm and mixture" in line


def test_of_a_best_trial_without_a_mixture_nothing_is_said_to_be_kept(results):
    line = best_line(best_trial(results), UNIT, "data/digits/sweep/s", [])
    assert "not kept" in line
    assert "data/digits/sweep/s" not in line


def test_where_nothing_finished_there_is_no_best():
    results = [(trial(seed, ode="shared"), failed()) for seed in range(2)]
    assert best_trial(results) is None
    rows = rows_table(results)
    assert "No trial finished" in best_line(None, UNIT, "data", [])
    assert "2 of 2: diverged at step 12" in markdown("s", "digits", UNIT, rows, [], "")
    assert metrics("s", rows, None, UNIT)["best"] is None
    json.dumps(metrics("s", rows, None, UNIT), allow_nan=False)
    assert terminal_table("s", rows).row_count == 1


def test_where_nothing_finished_there_is_a_figure_all_the_same():
    results = [(trial(seed, ode="shared"), failed()) for seed in range(2)]
    file = io.BytesIO()
    draw(results, rows_table(results), UNIT).savefig(file, format="svg")
    assert b"2 of 2 failed" in file.getvalue()


def test_an_axis_called_like_a_column_has_its_whole_name():
    # `seed` is that of data and teacher, `data.options.n` the number of points of rings.
    assert shorten(["seed", "data.options.n", "cpmm.ode"]) == {
        "seed": "config.seed", "data.options.n": "data.options.n", "cpmm.ode": "ode"
    }  # fmt: skip


def claim(metric, better, worse):
    return {
        "claim": f"{better} over {worse}", "metric": metric, "better": better, "worse": worse,
        "paper": {"better": 2.21, "worse": 4.49},
    }  # fmt: skip


def two_rows(metric, first, second):
    """Rows a and b with these values of their seeds; None for a seed that failed."""
    results = []
    for name, values in (("a", first), ("b", second)):
        for seed, value in enumerate(values):
            record = failed() if value is None else finished(2.0, 2.0, 0.5)
            if value is not None and metric == "validation":
                record["validation"] = value
            elif value is not None:
                record["test"][metric] = value
            results.append((trial(seed, ode=name), record))
    return rows_table(results)


# Standard deviation 1: by Welch's test, of 4 degrees of freedom, the difference to another such
# row must reach 2.776 sqrt(2 / 3) = 2.267.
NOISY = [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("metric", "a", "b", "holds"),
    [
        ("density", [1.0, 1.1, 1.2], [2.0, 2.1, 2.2], "yes"),
        ("density", [2.0, 2.1, 2.2], [1.0, 1.1, 1.2], "no"),
        ("accuracy", [0.8, 0.81], [0.7, 0.71], "yes"),
        ("accuracy", [0.7, 0.71], [0.8, 0.81], "no"),
        ("validation", [1.0, 1.1], [2.0, 2.1], "yes"),
        ("nmi", [0.8, 0.81], [0.7, 0.71], "yes"),
        ("density", NOISY, [v + 2.3 for v in NOISY], "yes"),
        ("density", NOISY, [v + 2.2 for v in NOISY], "yes, within noise"),
        ("density", NOISY, [v - 2.2 for v in NOISY], "no, within noise"),
        ("density", NOISY, [v - 2.3 for v in NOISY], "no"),
        ("density", NOISY, NOISY, "no, within noise"),
        # More than two standard errors, and yet no difference that three seeds can tell.
        ("density", [1.0, 1.1, 1.2], [1.21, 1.3, 1.4], "yes, within noise"),
        ("density", [1.0], [2.0], "yes, one seed"),
        ("density", [2.0], [1.0], "no, one seed"),
        ("density", [*NOISY, None], [v + 2.3 for v in NOISY], "yes"),  # n of what finished
        ("density", [None, None], [1.0, 1.1], "cannot be said: a row failed"),
        ("density", [1.0, 1.1], [None, None], "cannot be said: a row failed"),
    ],
)
def test_a_claim_is_checked_against_the_noise_of_the_seeds(metric, a, b, holds):
    rows = two_rows(metric, a, b)
    (checked,) = check_claims(rows, [claim(metric, {"ode": "a"}, {"ode": "b"})])
    assert checked["holds"] == holds
    assert checked["paper"] == {"better": 2.21, "worse": 4.49}


def test_a_claim_shows_means_and_deviations(rows):
    (density, accuracy) = check_claims(
        rows,
        [
            claim(metric, {"ode": "separate", "n_factors": 5}, {"ode": "shared", "n_factors": 2})
            for metric in ("density", "accuracy")
        ],
    )
    assert density["ours"] == {"better": "2.060 ± 0.014", "worse": "2.250 ± 0.218"}
    assert accuracy["ours"] == {"better": "98.0 ± 1.4", "worse": "80.0 ± 10.0"}


@pytest.mark.parametrize(
    ("a", "b", "holds"),
    [([1.0, 1.0], [None, 1.0], "yes"), ([None, 1.0], [None, 1.0], "no"), ([1.0], [1.0], "no")],
)
def test_a_claim_of_failure_counts_failures(a, b, holds):
    rows = two_rows("density", a, b)
    (checked,) = check_claims(rows, [claim("failed", {"ode": "a"}, {"ode": "b"})])
    assert checked["holds"] == holds
    assert checked["ours"]["worse"] == f"{b.count(None)} of {len(b)} failed"


def test_a_claim_about_a_row_that_is_not_there_is_left_out(rows):
    a = {"ode": "shared", "n_factors": 2}
    for other in ({"ode": "none", "n_factors": 2}, {"diagonal": "constant"}, {"ode": "shared"}):
        assert check_claims(rows, [claim("density", a, other)]) == []
        assert check_claims(rows, [claim("density", other, a)]) == []


def test_a_claim_of_accuracy_is_left_out_without_labels():
    results = [(trial(0, ode=name), finished(2.0, 2.0)) for name in "ab"]
    wanted = [claim(metric, {"ode": "a"}, {"ode": "b"}) for metric in ("accuracy", "density")]
    assert [c["metric"] for c in check_claims(rows_table(results), wanted)] == ["density"]


@pytest.mark.parametrize("metric", ["speed", "seconds"])
def test_a_claim_about_what_is_no_score_raises(metric):
    rows = two_rows("density", [1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=f"unknown metric '{metric}'"):
        check_claims(rows, [claim(metric, {"ode": "a"}, {"ode": "b"})])


@pytest.mark.parametrize(("value", "other"), [(0.0, 0.1), (1.0, 0.5), (True, False), (6, 4)])
def test_a_claim_names_a_row_by_the_value_in_the_sweeps_file(value, other):
    results = [
        (trial(seed, weight=show(v)), finished(2.0, v + 0.1 * seed))
        for v in (value, other)
        for seed in range(2)
    ]
    checked = check_claims(
        rows_table(results), [claim("density", {"weight": other}, {"weight": value})]
    )
    assert len(checked) == 1


def test_markdown_has_every_row_failure_and_claim(results, rows):
    claims = check_claims(rows, [claim("density", {"ode": "separate", "n_factors": 5}, {"ode": "shared", "n_factors": 2})])  # fmt: skip
    text = markdown("mine", "digits", UNIT, rows, claims, "Best by validation: this one")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    table, of_claims = lines[:6], lines[6:]
    assert text.startswith("# Sweep mine of digits\n")
    assert UNIT in text
    assert (
        table[0]
        == "| ode | n_factors | seeds | validation | density | accuracy, % | NMI | failures |"
    )
    assert table[2].startswith("| shared | 2 | 3 | 2.247 ± 0.050 | 2.250 ± 0.218 | 80.0 ± 10.0 | ")
    assert "| 2.400 | 50.0 | " in table[3]
    assert "2 of 3: diverged at step 12: 7 of 16 log-densities are not finite; lost: " in table[3]
    assert "3 of 3: failed: KeyError: 'x'" in table[4]
    assert "1 stopped early" in table[5]
    assert len({line.count("|") for line in table}) == 1  # a bar within a reason is no cell
    assert of_claims[2].endswith("| 4.49 → 2.21 | 2.250 ± 0.218 → 2.060 ± 0.014 | yes, within noise |")  # fmt: skip
    assert text.rstrip().endswith("Best by validation: this one")


def test_metrics_are_json_without_nan(results, rows):
    text = json.dumps(metrics("mine", rows, best_trial(results), UNIT), allow_nan=False)
    got = json.loads(text)
    assert (got["sweep"], got["unit"]) == ("mine", UNIT)
    assert list(got["rows"]) == rows["row"].tolist()
    first, second, third, _ = got["rows"].values()
    assert first["density_mean"] == pytest.approx((2.10 + 2.50 + 2.15) / 3)
    assert "density_sd" not in second
    assert third == {"n": 3, "n_failed": 3}
    assert not any(name.startswith("seconds") for name in first)
    assert got["best"]["validation"] == 2.19
    assert got["best"]["command"][:3] == ["python", "workflows/trial.py", "preset=digits"]
    assert got["best"]["command"][-2:] == ["data.options.path='a b.csv'", "cpmm.seed=0"]


def test_the_terminals_table_has_every_row(rows):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    console.print(terminal_table("title", rows))
    text = console.file.getvalue()
    assert text.startswith("title")
    assert text.count("shared") == 2
    assert "KeyError" in text
    assert "out of" in text


def test_the_figure_has_a_row_each(results, rows):
    figure = draw(results, rows, UNIT)
    (left, right) = figure.axes
    shown = [tick.get_text().split("\n") for tick in left.get_yticklabels()]
    assert [text[0] for text in shown] == rows["row"].tolist()
    failed = [text[1] for text in shown if len(text) > 1]
    assert sorted(failed) == ["(2 of 3 failed)", "(3 of 3 failed)"]
    assert left.get_xlabel().replace("\n", " ") == f"test density, {UNIT}"
    means = [c.lines[0].get_xdata()[0] for c in right.containers]
    np.testing.assert_allclose(means, [80, 50, 98])


def test_tables_are_written_and_read_again(results, rows, tmp_path):
    trials_table(results).to_csv(tmp_path / "trials.csv", index=False)
    again = pd.read_csv(tmp_path / "trials.csv")
    assert again["density"].notna().sum() == 6
    assert again["command"].tolist() == [item.command for item, _ in results]
    assert json.loads(rows.to_json(orient="records"))[2]["density_mean"] is None
