"""CPMM and its rivals in one table, from made-up trials."""

import csv
import io
import json
import math
import subprocess
from functools import cache, partial

import matplotlib
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import stage_command
from scipy.stats import ttest_ind

from cpmm.artifact import file_digest, load_header, seal_folder, verify_files
from cpmm.figures import plot_costs
from cpmm.pipeline.artifacts.store import seal_sweep
from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.config.fingerprints import (
    fingerprint_evaluation,
    fingerprint_options,
    fingerprint_trial,
)
from cpmm.pipeline.scores.comparison import LEVEL
from cpmm.pipeline.scores.published import printed, published
from cpmm.pipeline.scores.trials import NUMBERS, read_trials
from workflows import compare

RULES = {
    "density": "-(log p(z) + log|dz/dx|) / (M ln 2). Lower is better.",
    "accuracy": "Share of test points, matched one to one (Hungarian).",
    "nmi": "Normalized mutual information, arithmetic mean.",
}
MODELS = {
    "cpmm": {"name": "CPMM: 10 x 25 components, R = 6", "density": 9.9, "accuracy": 0.1},
    "refined": {
        "name": "CPMM's components trained on: 10 x 25 components, R = 6",
        "density": 1.85,
        "accuracy": 0.81,
        "nmi": 0.75,
        "n_parameters": 1000,
    },
    "teacher": {"name": "teacher (continuous normalizing flow)", "density": 1.5, "n_parameters": 70},
    "groups": {"name": "groups", "accuracy": 0.83, "nmi": 0.7},
    "kmeans": {"name": "k-means, 10 clusters", "accuracy": 0.2},
}  # fmt: skip


def trial(model, seed, density=None, accuracy=None, status="finished", **others):
    row = {
        "model": model, "seed": seed, "status": status, "density": density, "accuracy": accuracy,
        "nmi": accuracy, "steps": 40, "seconds": None, "n_parameters": None, "seconds_10k": None,
        "reason": None, "command": f"python workflows/trial.py preset=x model={model}",
    }  # fmt: skip
    return row | others


def several(model, densities, accuracies, **others):
    pairs = zip(densities, accuracies, strict=True)
    return [trial(model, seed, *pair, **others) for seed, pair in enumerate(pairs)]


TRIALS = [
    *several("kmeans", [None] * 3, [0.7, 0.72, 0.74], seconds=3.0, n_parameters=640),
    *several("cpmm", [2.0, 2.1, 2.2], [0.78, 0.8, 0.82], seconds=300.0, n_parameters=1000,
             seconds_10k=0.5),
    *several("matched", [2.05] * 3, [0.9, 0.9, 0.9], seconds=30.0, n_parameters=100, seconds_10k=0.1),
    *several("einet_large", [1.7, 1.71, 1.72], [None] * 3, seconds=900.0, n_parameters=9000,
             seconds_10k=1.5),
    *several("gaussian", [3.0] * 3, [None] * 3, seconds=0.02, n_parameters=65, seconds_10k=0.01),
    trial("cnf_mlp", 0, 1.6, seconds=9000.0, n_parameters=500, seconds_10k=400.0),
    trial("cnf_mlp", 1, status="diverged", reason="the loss is NaN: lower\nthe learning rate"),
    trial("cnf_mlp", 2, status="stopped"),
    *[trial("cnf_conv", seed, status="failed", reason="no memory | at all") for seed in range(3)],
    *several("my_model", [2.5, 2.5, 2.5], [0.5, 0.5, 0.5]),
]  # fmt: skip


@cache
def compose():
    config = compose_preset("digits", [])
    return config | {"baselines": config["baselines"] | {"my_model": {"kind": "kmeans"}}}


def marked(row, config):
    """A trial's row with the fingerprint that the sweep gives it."""
    cpmm = config["cpmm"] | {"seed": row["seed"]}
    options = config | {"model": row["model"], "cpmm": cpmm}
    return {"fingerprint": fingerprint_options(options)} | row


def add_preset(root, trials=TRIALS, name="digits", ood=None, columns=None):
    """Write a preset's sealed evaluation and the trials of its sweep."""
    folder = root / name
    (folder / "evaluation").mkdir(parents=True, exist_ok=True)
    config = compose() | {"name": name}
    metrics = {
        "preset": name, "seed": 7, "unit": "bits per dimension", "n_test": 400, "models": MODELS,
        "discretization": {},
    }  # fmt: skip
    if ood:
        metrics["ood"] = {"name": "mnist", "n_ood": 9, "models": ood}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "evaluation" / "rules.json").write_text(json.dumps(RULES))
    digest = file_digest(folder / "metrics.json")
    header = {"fingerprint": fingerprint_evaluation(config), "metrics": digest}
    seal_folder(folder / "evaluation", "evaluation", header, {})
    if trials is not None:
        add_sweep(folder, [marked(row, config) for row in trials], columns)
    return folder, config


def add_sweep(folder, trials, columns=None):
    """Write and seal trials as a sweep does."""
    sweep = compare.sweep_of(folder)
    sweep.mkdir(parents=True, exist_ok=True)
    with (sweep / "trials.csv").open("w", newline="") as file:
        names = dict.fromkeys([*(columns or trials[0]), "fingerprint"])
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(trials)
    beside = sweep.with_suffix(".json")
    beside.write_text(json.dumps({"sweep": "table1"}))
    seal_sweep(sweep, "0f", [beside])


@pytest.fixture
def make(tmp_path):
    return partial(add_preset, tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What is written of TRIALS."""
    return run(*add_preset(tmp_path_factory.mktemp("made")))


def make_frame(trials):
    """Finished trials as they are read."""
    frame = pd.DataFrame(trials, columns=list(dict.fromkeys([*trials[0], *NUMBERS])))
    return frame.astype(dict.fromkeys(NUMBERS, float))


def run(folder, config):
    line = compare.main(folder, config)
    out = folder / "comparison"
    rows = list(csv.DictReader(io.StringIO((out / "table1.csv").read_text())))
    text = (out / "table1.md").read_text()
    table = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len({len(cells) for cells in table}) == 1
    shown = {cells[0].strip(): dict(zip(table[0], cells, strict=True)) for cells in table[2:]}
    return line, {row["model"]: row for row in rows}, shown, text


def test_rows_are_means_and_deviations_over_seeds_in_blocks(made):
    line, rows, shown, _ = made
    own = rows["cpmm"]
    assert float(own["density_mean"]) == pytest.approx((2.0 + 2.1 + 2.2) / 3)
    assert float(own["density_sd"]) == pytest.approx(math.sqrt((0.1**2 + 0 + 0.1**2) / 2))
    assert float(own["accuracy_sd"]) == pytest.approx(math.sqrt((0.02**2 + 0 + 0.02**2) / 2))
    assert (own["n_seeds"], own["n_failed"], own["n_parameters"]) == ("3", "0", "1000")
    assert shown["CPMM"]["density"] == "2.100 ± 0.100"
    assert shown["CPMM"]["accuracy, %"] == "80.0 ± 2.0"
    assert shown["CPMM"]["training"] == "5.0 min (1.0×)"
    assert shown["EiNet (large)"]["training"] == "15 min (3.0×)"
    assert shown["EiNet (large)"]["10,000 densities"] == "1.5 s (3.0×)"
    assert shown["matched mixture"]["training"] == "30 s (0.10×)"
    assert shown["CNF (MLP)"]["10,000 densities"] == "6.7 min (800×)"
    assert shown["one Gaussian"]["accuracy, %"] == "–"
    # k-means is the sweep's; what the sweep has not is evaluate's.
    assert float(rows["kmeans"]["accuracy_mean"]) == pytest.approx((0.7 + 0.72 + 0.74) / 3)
    assert rows["teacher"]["source"] == "evaluation"
    assert rows["teacher"]["density_sd"] == ""
    assert shown["teacher"]["density"] == "1.500"
    assert shown["teacher"]["10,000 densities"] == "–"
    assert list(shown) == [
        "**CPMM**", "CPMM", "CPMM's components trained on", "**Mixtures**", "matched mixture",
        "**Circuits**", "EiNet (large)", "**Flows**", "CNF (MLP)", "CNF (conv)", "teacher",
        "**Clustering only**", "k-means", "groups (training points)", "**Sanity rows**",
        "one Gaussian", "**Others**", "my_model",
    ]  # fmt: skip
    # Of a table that is in no paper, and of a sweep that measured neither, there are no columns.
    assert not {"paper", "memory, GB", "AUROC, units of the data, %"} & set(shown["CPMM"])
    assert "CPMM 2.100 ± 0.100 bits per dimension, beaten by 1 of 4 rows" in line
    assert "4 failed" in line


def test_what_beats_cpmm_is_said(made):
    # Standard errors of differences with CPMM: einet 0.0580, matched and gaussian 0.0577; two degrees of
    # freedom ask for 4.3 times that.
    _, _, _, text = made
    assert (
        "In density (bits per dimension), EiNet (large) by 0.390 beats CPMM, judged by the seeds "
        "(Welch's t-test, "
        "p < 0.05). No such difference: matched mixture 0.050 better. Worse: my_model by 0.400, "
        "one Gaussian by "
        "0.900. Not judged, one seed: teacher 0.600 better, CNF (MLP) 0.500 better, CPMM's "
        "components trained on "
        "0.250 better.\n"
    ) in text
    assert "In clustering accuracy, matched mixture by 10.0 points beats CPMM, judged" in text
    assert "Worse: k-means by 8.0 points, my_model by 30.0 points. Not" in text
    assert "- Not there: autoencoder + k-means, continuous mixture, curriculum mixture" in text
    assert f"Density, bits per dimension: {RULES['density']}" in text


def test_a_single_seed_is_not_judged(make):
    trials = [row for row in TRIALS if row["seed"] == 0]
    _, _, shown, text = run(*make(trials))
    assert shown["CPMM"]["density"] == "2.000"
    assert (
        "In density (bits per dimension) no row is judged, one seed: teacher 0.500 better" in text
    )
    assert "beats" not in text


@pytest.mark.parametrize(
    ("own", "other", "kind"),
    [
        ([2.0, 2.1, 2.2], [1.9, 1.91, 1.92], "level"),  # 3.3 standard errors, 2 degrees of freedom
        ([2.0, 2.2], [1.8, 1.9], "level"),
        ([2.141, 2.148, 2.134, 2.15, 2.136], [2.026, 2.032], "better"),
        ([2.141, 2.148, 2.134, 2.15, 2.136], [2.24, 2.26, 2.25], "worse"),
        ([2.0, 2.0], [2.1, 2.1], "worse"),
        ([2.0, 2.0], [2.0, 2.0], "level"),
        ([2.0, 2.1, 2.2], [1.0], "single"),
        ([2.0], [1.0, 1.1], "single"),
    ],
)
def test_few_seeds_must_differ_by_more(own, other, kind):
    rows = [("cpmm", own), ("gaussian", other)]
    trials = [trial(model, s, x) for model, xs in rows for s, x in enumerate(xs)]
    table = compare.compare(make_frame(trials), {"models": {}}, compose())
    found = compare.judge(table, "density")
    (((name, judged),),) = [pairs for pairs in found.values() if pairs]
    assert (name, judged.verdict, found[kind]) == ("one Gaussian", kind, [(name, judged)])
    assert judged.gain == pytest.approx(np.mean(own) - np.mean(other))
    if kind == "single":
        assert judged.pvalue is None
    elif min(np.ptp(own), np.ptp(other)) > 0:
        p = ttest_ind(own, other, equal_var=False).pvalue
        assert judged.pvalue == pytest.approx(p)
        assert (p < LEVEL) == (kind in ("better", "worse"))


def test_costs_are_medians_and_one_slow_trial_changes_none(make):
    names = ("seconds", "seconds_10k", "memory_gb")
    slow = [
        row | {"memory_gb": 1.0}
        | {name: 1e6 for name in names if row["model"] == "cpmm" and row["seed"] == 1}
        for row in TRIALS
    ]  # fmt: skip
    _, rows, shown, text = run(*make(slow))
    assert [float(rows["cpmm"][f"{name}_median"]) for name in names] == [300, 0.5, 1]
    assert shown["EiNet (large)"]["training"] == "15 min (3.0×)"
    assert "Costs are medians over the seeds" in text
    own = make_frame([row for row in slow if row["model"] == "cpmm"])
    figure = compare.draw(compare.compare(own, {"models": {}}, compose()), "nats")
    assert [axes.collections[0].get_segments()[0][0][0] for axes in figure.axes] == [1000, 0.5]


def test_figures_of_some_seeds_only_say_of_how_many(make):
    trials = [
        row
        | {"auroc": 0.5 + 0.1 * row["seed"] if row["seed"] < 2 else None, "memory_gb": 1.0}
        | ({"seconds_10k": None, "memory_gb": None} if row["seed"] == 0 else {})
        for row in TRIALS
    ]
    _, rows, shown, text = run(*make(trials))
    own = shown["CPMM"]
    assert own["AUROC, the models' space, %"] == "55.00 ± 7.07 (2 of 3 seeds)"
    assert own["10,000 densities"] == "0.50 s (1.0×) (2 of 3 seeds)"
    assert own["memory, GB"] == "1 (2 of 3 seeds)"
    assert own["training"] == "5.0 min (1.0×)"
    assert (rows["cpmm"]["auroc_n"], rows["cpmm"]["seconds_n"]) == ("2", "3")
    assert shown["CNF (MLP)"]["AUROC, the models' space, %"] == "50.00"  # of the one that finished
    assert rows["teacher"]["auroc_n"] == ""
    assert "it says how many do" in text


def test_what_is_measured_otherwise_is_said(make):
    trials = [row | {"memory_gb": 1.0} for row in (*TRIALS, trial("vade", 0, accuracy=0.5))]
    folder, config = make(trials)
    text = run(folder, config)[3]
    assert "- VaDE: of raw grey levels k / (n - 1), without the others' dequantization" in text
    assert "are over seeds only; all rows have the same test points" in text
    assert "above what it held before" in text
    assert "grey levels" not in run(*make())[3]


def test_failures_stay_with_their_reason(made):
    _, rows, shown, text = made
    assert shown["CNF (MLP)"]["seeds"] == "1 of 3"
    assert shown["CNF (conv)"] | {"seeds": "0 of 3", "density": "–"} == shown["CNF (conv)"]
    assert (rows["cnf_mlp"]["n_failed"], rows["cnf_mlp"]["n_stopped"]) == ("1", "1")
    assert rows["cnf_mlp"]["density_mean"] == "1.6"
    assert (
        "- CNF (MLP), 2 of 3: seed 1: diverged at step 40: the loss is NaN: lower the learning "
        "rate; "
        "seed 2: stopped at step 40: by the scheduler"
    ) in text
    assert "- CNF (conv), 3 of 3: seeds 0, 1, 2: failed at step 40: no memory | at all" in text


def test_the_papers_figures_stand_beside_its_data_sets(make):
    found = {
        "data": {"auroc": 0.25, "aupr": 0.3, "aupr_out": 0.4},
        "mixture": {"auroc": 0.75, "aupr": 0.8, "aupr_out": 0.9},
    }
    trials = [row | {"auroc": 0.9, "auroc_data": 0.1 + 0.1 * row["seed"]} for row in TRIALS]
    folder = make(trials, "fashion_mnist_cpu", {"refined": found})
    _, rows, shown, text = run(*folder)
    assert (shown["CPMM"]["paper"], shown["CPMM"]["paper, %"]) == ("3.91", "65.01")
    assert rows["cpmm"]["paper_accuracy"] == "0.6501"
    assert shown["CNF (MLP)"]["paper"] == shown["CNF (conv)"]["paper"] == "2.75"
    assert shown["one Gaussian"]["paper"] == "–"
    assert (shown["SPC"]["paper, %"], shown["DLS"]["paper, %"]) == ("67.94", "69.30")
    assert shown["SPC"]["seeds"] == "–"
    assert (
        "SPC, of the paper alone: its published code picks its best epoch by ground-truth" in text
    )
    assert "DLS, of the paper alone: there is no code" in text
    assert "its Table 1, Fashion-MNIST" in text
    own = shown["CPMM"]
    assert own["AUROC, the models' space, %"] == "90.00 ± 0.00"
    assert own["AUROC, units of the data, %"] == "20.00 ± 10.00"  # of 10, 20 and 30
    refined = shown["CPMM's components trained on"]
    assert refined["AUROC, the models' space, %"] == "75.00"
    assert refined["AUROC, units of the data, %"] == "25.00"
    assert rows["refined"]["aupr_data_mean"] == "0.3"
    assert "how well log-density tells the test points from those of mnist" in text


def test_every_row_of_the_papers_table_has_one_here():
    printed_rows = {f.row for f in published() if f.table == 1 and f.paper is not None}
    models = (*compare.MODELS, *compose()["baselines"])
    ours = {compare.describe(model, compose()).get("paper") for model in models} - {None}
    assert ours | set(compare.NOT_RERUN) == printed_rows
    assert printed("mnist", "EiNet (Large)", "density") == 1.95
    assert printed("mnist", "EiNet (Large)", "accuracy") is None
    assert printed(None, "CPMM", "density") is None


def test_a_sweep_without_cpmm_still_gives_a_table(make):
    trials = [row for row in TRIALS if row["model"] != "cpmm"]
    line, _, shown, text = run(*make(trials))
    assert "CPMM" not in shown
    assert shown["EiNet (large)"]["training"] == "15 min"
    assert "The sweep has no CPMM: nothing is compared with it." in text
    assert "no CPMM to compare with" in line


def test_columns_that_a_sweep_lacks_are_no_error(make):
    columns = ["model", "seed", "status", "density"]
    trials = [trial("gaussian", 0, -1.5), trial("cpmm", 0, status="lost")]
    _, rows, shown, text = run(*make(trials, columns=columns))
    assert rows["gaussian"]["n_parameters"] == rows["gaussian"]["seconds_median"] == ""
    assert shown["one Gaussian"]["density"] == "−1.500"
    assert "In density (bits per dimension) CPMM has no score" in text
    assert "CPMM, 1 of 1: seed 0: lost: no reason recorded" in text


def test_it_is_sealed_and_the_same_for_the_same_inputs(make):
    folder, config = make()
    run(folder, config)
    out = folder / "comparison"
    fingerprint = compare.fingerprint_comparison(folder)
    header = load_header(out, "comparison", fingerprint)
    assert set(header["files"]) == {"table1.csv", "table1.md", "costs.svg"}
    verify_files(out, header, header["files"])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    run(folder, config)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    make([*TRIALS, trial("vade", 0, accuracy=0.5)])
    assert compare.fingerprint_comparison(folder) != fingerprint


def test_a_sweep_that_is_missing_is_named_with_its_command(make):
    folder, _ = make(trials=None)
    done = subprocess.run(
        stage_command("compare", folder), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"compare: error: {folder}/sweep/table1 is missing: "
        "`python workflows/sweep.py preset=digits sweep=table1` makes it\n"
    )
    assert not (folder / "comparison").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.noise_seed=9"], r"trial 1 \(kmeans, seed 0\) is of another configuration than"),
        (["cpmm.noise=0.123"], r"trial 4 \(cpmm, seed 0\) is of another configuration than"),
        (["baselines.einet_large.batch_size=77"],
         r"trial 10 \(einet_large, seed 0\) is of another configuration than"),
        (["ood@evaluation.ood=mnist"], r"trial 1 \(kmeans, seed 0\) is of another configuration"),
    ],
)  # fmt: skip
def test_trials_of_another_configuration_are_refused(make, overrides, said):
    folder, config = make()
    other = compose_preset("digits", overrides)
    other = other | {"baselines": compose()["baselines"] | other["baselines"]}
    with pytest.raises(ValueError, match=rf"{said}.*run the sweep table1 of this preset again"):
        read_trials(compare.sweep_of(folder), other)
    assert len(read_trials(compare.sweep_of(folder), config)) == len(TRIALS)


def test_what_tables_call_a_row_changes_no_fingerprint():
    named = [f"baselines.einet_large.{key}=other" for key in ("title", "block", "paper")]
    config = compose_preset("digits", named)
    assert compare.describe("einet_large", config)["title"] == "other"
    got, expected = (fingerprint_trial(c, "einet_large", 0) for c in (config, compose()))
    assert got == expected


def test_trials_without_fingerprint_or_of_an_unknown_model_are_refused(make):
    folder, config = make()
    again = "another configuration than .*run the sweep table1 of this preset again.*preset=digits "
    "sweep=table1"
    for row in (
        trial("cpmm", 0, 2.0) | {"fingerprint": ""},
        trial("unknown", 0, 2.0) | {"fingerprint": "0f"},
        trial("unknown", 0, 2.0) | {"fingerprint": ""},
    ):
        add_sweep(folder, [row])
        with pytest.raises(ValueError, match=rf"\({row['model']}, seed 0\) is of {again}"):
            compare.main(folder, config)


def test_a_configuration_that_was_written_and_read_has_the_sweeps_fingerprints(make):
    folder, config = make()
    read = yaml.safe_load((folder / "config.yaml").read_text())
    for row in TRIALS:
        assert marked(row, read) == marked(row, config)


@pytest.mark.parametrize("name", ["table1/trials.csv", "table1/sweep.json", "table1.json"])
def test_a_sweep_that_is_damaged_is_refused_by_name(make, name):
    folder, config = make()
    sweep = compare.sweep_of(folder)
    path = sweep.parent / name
    content = path.read_bytes()
    n = len(content)
    again = "preset=digits sweep=table1"
    for damaged in (
        content[: n // 2] + bytes([content[n // 2] ^ 1]) + content[n // 2 + 1 :],
        content[:-1],
        b"",
        b"\xff\xfe\x00",
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{path.name} is (damaged|not what).*{again}"):
            read_trials(sweep, config)
    path.unlink()
    with pytest.raises(
        (FileNotFoundError, ValueError), match=rf"{path.name} is .*missing.*{again}"
    ):
        compare.main(folder, config)
    path.write_bytes(content)
    assert len(read_trials(sweep, config)) == len(TRIALS)
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="is not what was evaluated"):
        compare.main(folder, config)


def test_numbers_are_read_to_the_last_digit(make):
    value = 2.1234567890123457
    folder, config = make([trial("cpmm", 0, value, 0.1 + 0.2)])
    (row,) = read_trials(compare.sweep_of(folder), config).to_dict("records")
    assert (row["density"], row["accuracy"], row["reason"]) == (value, 0.1 + 0.2, "")
    assert math.isnan(row["auroc"])


# Names as long as the table's, four of them at nearly the same place.
POINTS = {
    "CPMM": ("CPMM", 1.560, 0.004, 2.5e6, 1.7),
    "CPMM's components trained on": ("CPMM", 1.545, math.nan, 2.5e6, math.nan),
    "matched mixture": ("mixtures", 1.575, 0.002, 1e5, 0.09),
    "spectral (Fréchet)": ("mixtures", 1.524, 0.003, 2.5e6, 1.65),
    "spectral (overlap)": ("mixtures", 1.524, 0.003, 2.5e6, 1.66),
    "curriculum mixture": ("mixtures", 1.530, 0.01, 2.5e6, 1.8),
    "EiNet (matched)": ("circuits", 1.6, 0.003, 2.4e6, 3.0),
    "CNF (conv)": ("flows", 1.15, 0.05, 4e5, 3000.0),
    "one $Gaussian": ("sanity rows", 2.012, 0.0, 3e5, 0.0),
}


def costs_figure(points=POINTS):
    columns = [list(column) for column in zip(*points.values(), strict=True)]
    group, density, spread, parameters, seconds = columns
    costs = {"parameters": np.array(parameters), "seconds": np.array(seconds)}
    return plot_costs(list(points), group, density, spread, costs, "bits per dimension")


def render(figure):
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "cpmm"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def test_costs_are_labelled_and_no_label_covers_another():
    figure = costs_figure()
    figure.set_dpi(72)  # that of an SVG file
    figure.draw_without_rendering()
    first, second = figure.axes
    names = [text.get_text() for text in first.texts]
    assert names == list(POINTS)
    # What has no time, or none that a logarithm could show, is not in the other panel.
    assert [text.get_text() for text in second.texts] == [
        name for name in POINTS if name not in ("CPMM's components trained on", "one $Gaussian")
    ]
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        frame = axes.get_window_extent()
        boxes = [matplotlib.text.Text.get_window_extent(text) for text in axes.texts]
        for i, box in enumerate(boxes):
            assert frame.x0 <= box.x0 and box.x1 <= figure.bbox.x1  # noqa: PT018
            for other in boxes[:i]:
                assert not box.padded(-0.5).overlaps(other.padded(-0.5))
    assert first.get_ylabel() == "bits per dimension"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "CPMM", "mixtures", "circuits", "flows", "sanity rows",
    ]  # fmt: skip


def test_bars_of_costs_are_standard_deviations():
    figure = costs_figure({"a": ("x", 2.0, 0.25, 10.0, 1.0), "b": ("y", 3.0, math.nan, 20.0, 2.0)})
    bars = [bar.get_segments()[0] for bar in figure.axes[0].collections]
    np.testing.assert_allclose(bars[0], [[10, 1.75], [10, 2.25]])
    np.testing.assert_allclose(bars[1], [[20, 3], [20, 3]])


def test_costs_are_drawn_the_same_twice_and_without_points():
    assert render(costs_figure()) == render(costs_figure())
    nothing = {"a": ("x", math.nan, math.nan, 10.0, 1.0)}
    for points in (nothing, {"a": ("x", 2.0, 0.1, math.nan, 1.0)}):
        figure = costs_figure(points)
        assert render(figure)
        assert [text.get_text() for text in figure.axes[0].texts] == ["not measured"]
    empty = plot_costs([], [], [], [], {"parameters": []}, "nats per dimension")
    assert render(empty)
    with pytest.raises(ValueError, match="spread: expected 1 values, got 2"):
        plot_costs(["a"], ["x"], [1.0], [1.0, 2.0], {"parameters": [1]}, "nats")
    with pytest.raises(ValueError, match="costs has no panel"):
        plot_costs(["a"], ["x"], [1.0], [1.0], {}, "nats")
