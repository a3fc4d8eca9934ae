"""The paper's tables and figures from sealed evaluations."""

import base64
import csv
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from conftest import ROOT
from PIL import Image

from benchmarks import paper
from cpmm.artifact import file_digest, seal_folder
from cpmm.figures import plot_trajectory_means
from cpmm.pipeline.artifacts.store import seal_sweep
from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.config.fingerprints import fingerprint_evaluation, fingerprint_trial
from cpmm.pipeline.scores.published import data_of, published

DETECTED = {"auroc": 0.9512, "aupr": 0.9411, "aupr_out": 0.9613}


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def add_preset(root, preset, name=None, ood=None, **options):
    """Write a sealed evaluation of made-up figures."""
    folder = root / (name or preset)
    (folder / "evaluation" / "figures").mkdir(parents=True)
    config = compose_preset(preset, [f"{key}={value}" for key, value in options.items()])
    metrics = {
        "preset": config["name"],
        "seed": config["seed"],
        "unit": "bits per dimension",
        "n_test": 10000,
        "models": {
            "cpmm": {
                "name": "CPMM: 10 x 25 components, R = 6",
                "density": 2.1234,
                "density_standard_error": 0.0051,
                "accuracy": 0.7654,
            },
            "gaussian": {"name": "one Gaussian", "density": 2.0126},
            "kmeans": {"name": "k-means", "accuracy": 0.5432},
        },
        "discretization": {},
    }
    if ood:
        row = {"name": "CPMM", "data": DETECTED, "mixture": DETECTED | {"auroc": 0.25}}
        metrics["ood"] = {"name": ood, "n_ood": 10000, "models": {"cpmm": row}}
    mean = np.linspace(0, 1, 2 * 3 * 784).reshape(2, 3, 784)
    figure = plot_trajectory_means(mean, (1, 28, 28))
    figure.savefig(folder / "evaluation" / "figures" / "trajectories.svg")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    header = {
        "fingerprint": fingerprint_evaluation(config),
        "metrics": file_digest(folder / "metrics.json"),
    }
    seal_folder(folder / "evaluation", "evaluation", header, {})
    return folder


def add_sweep(folder, name, rows, models=False):
    """Write and seal a sweep of rows with this density, of five seeds of which one failed."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    table, trials = [], []
    for label, density in rows.items():
        model = label.split()[-1] if models else "cpmm"
        axes = {"part": "clusters", "model": model} if models else {"seed_of": "cpmm.seed"}
        table.append(axes | {"row": label, "n": 5, "density_mean": density})
        for seed in range(5):
            # Of four numbers at this distance from their mean, the standard deviation is 0.01 and 0.02.
            shift = 0.01 * 0.75**0.5 * (-1) ** seed
            trials.append(
                axes
                | {
                    "seed": seed,
                    "fingerprint": fingerprint_trial(config, model, seed),
                    "status": "failed" if seed == 4 else "finished",
                    "density": density + shift if density != "" and seed < 4 else "",
                    "accuracy": 0.8 + 2 * shift if seed < 4 else "",
                }
            )
    sweep = folder / "sweep" / name
    sweep.mkdir(parents=True)
    write_rows(sweep / "trials.csv", trials)
    write_rows(sweep.with_suffix(".csv"), table)
    sweep.with_suffix(".json").write_text(json.dumps({"rows": table}))
    seal_sweep(sweep, "0f", [sweep.with_suffix(".csv"), sweep.with_suffix(".json")])


def write_rows(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def rows_of(text, title):
    """Rows of the Markdown table under a heading, by their first cells."""
    part = text.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line[2:-2].split(" | ") for line in part.splitlines() if line.startswith("| ")]
    assert len({len(line) for line in lines}) == 1
    found = {}
    for line in lines[2:]:
        found.setdefault(line[0], []).append(dict(zip(lines[0], line, strict=True)))
    return found


def test_every_figure_of_the_paper_is_there_once():
    figures = published()
    keys = [(f.table, f.data, f.ood, f.row, f.space, f.metric) for f in figures]
    assert len(set(keys)) == len(keys)
    for data, n in (("mnist", 15), ("fashion_mnist", 15)):
        found = [f for f in figures if f.table == 1 and f.data == data and f.paper is not None]
        assert len(found) == n
    assert sum(f.table == 3 and f.paper is not None for f in figures) == 8
    evaluated = {
        "", "cpmm", "teacher", "direct", "matched", "gaussian", "groups", "kmeans",
        "refined",
    }  # fmt: skip
    trials = {path.stem for path in (ROOT / "conf" / "baselines").glob("*.yaml")}
    assert {f.model for f in figures} <= evaluated | trials
    # Every row of the sweep has one of Table 1.
    known = {f.model for f in figures if f.table == 1}
    assert {paper.SAME_ROW.get(row, row) for row in trials} <= known
    assert set(paper.SAME_ROW) <= trials
    assert set(paper.SAME_ROW.values()) <= evaluated
    assert data_of("fashion_mnist_map") == "fashion_mnist"
    assert data_of("mnist_small") == "mnist"
    assert data_of("digits") is None


def test_tables_hold_what_was_measured_and_a_dash_for_the_rest(root, tmp_path):
    folder = add_preset(root, "mnist", seed=3)
    add_preset(root, "fashion_mnist", ood="mnist")
    add_preset(root, "mnist", "mnist_other", **{"data.alpha": 0.01})
    (root / "digits").mkdir()
    (root / "digits" / "metrics.json").write_text("{")
    add_sweep(folder, "seeds", {"mnist": 2.5})
    add_sweep(folder, "table2", {"a": 1.5, "b": 1.4})
    models = {
        "clusters cpmm": 2.4, "clusters matched": 2.3, "clusters spectral_overlap": 2.2,
        "clusters vade": "", "densities einet_large": 1.9,
    }  # fmt: skip
    add_sweep(folder, "table1", models, models=True)
    out = tmp_path / "out"
    lines = paper.write_paper(paper.evaluated_presets(root), out)
    text = (out / "table1.md").read_text()
    mnist = {name: rows[0] for name, rows in rows_of(text, "MNIST").items()}
    own = mnist["CPMM"]
    assert (own["paper BPD"], own["paper Acc."], own["anchor BPD"]) == ("2.21", "80.07", "-")
    assert (own["mnist BPD"], own["mnist Acc."]) == ("2.123 ± 0.005", "76.54")
    assert own["mnist, sweep seeds BPD"] == "2.500 ± 0.010"
    assert own["mnist, sweep seeds Acc."] == "80.00 ± 2.00"
    assert "table2" not in text
    by_model = {name: row["mnist, sweep table1 BPD"] for name, row in mnist.items()}
    assert {name: value for name, value in by_model.items() if value != "-"} == {
        "CPMM": "2.400 ± 0.010",
        "Matched GMM": "2.300 ± 0.010",
        "GMM w/ S.Clust., by overlap (not in the paper)": "2.200 ± 0.010",
        "EiNet (Large)": "1.900 ± 0.010",
    }
    assert mnist["VADE"]["mnist, sweep table1 Acc."] == "80.00 ± 2.00"
    assert mnist["VADE"]["paper Acc."] == "94.50"
    assert mnist["one full Gaussian (not in the paper)"]["mnist BPD"] == "2.013"
    assert mnist["one full Gaussian (not in the paper)"]["anchor BPD"] == "2.012"
    assert mnist["Teacher"]["mnist BPD"] == "-"
    assert set(mnist["GMM w/ Curr."].values()) == {"GMM w/ Curr.", "2.61", "64.47", "-"}
    assert "- mnist: alpha 1e-06, noise seed 0, floor of log d " in text
    assert "seed 3, 10000 test points" in text
    assert "- mnist_other: alpha 0.01," in text
    assert "over 4 seeds" in text
    text = (out / "table3.md").read_text()
    found = rows_of(text, "Fashion-MNIST known, MNIST told apart")
    by_space = {row["space"]: row for row in found["CPMM"]}
    assert by_space["units of the data"]["paper AUROC"] == "93.38"
    assert by_space["units of the data"]["fashion_mnist AUROC"] == "95.12"
    assert by_space["the models' space"]["fashion_mnist AUROC"] == "25.00"
    assert by_space["the models' space"]["fashion_mnist AUPR out"] == "96.13"
    other = found["one full Gaussian (not in the paper)"]
    assert [row["anchor AUROC"] for row in other] == ["11.79", "97.54"]
    assert [row["fashion_mnist AUROC"] for row in other] == ["-", "-"]
    assert "Not measured yet." in text.split("## MNIST known")[1].split("## ")[0]
    records = list(csv.DictReader(io.StringIO((out / "table1.csv").read_text())))
    values = {(r["data"], r["row"], r["source"], r["metric"]): float(r["value"]) for r in records}
    assert values["mnist", "CPMM", "mnist", "density"] == 2.1234
    assert values["mnist", "CPMM", "paper", "accuracy"] == 0.8007
    assert values["fashion_mnist", "EiNet (Large)", "anchor", "density"] == 4.028
    assert not any("-" in r["value"] for r in records)
    assert any("no figure 2 of mnist: evaluate drew no spaces" in line for line in lines)
    figures = sorted(path.name for path in out.glob("*.svg"))
    assert figures == [
        "figure4_mnist.svg", "figure4_mnist_other.svg", "figure5_fashion_mnist.svg",
    ]  # fmt: skip
    assert all(path.stat().st_size < 300_000 for path in out.iterdir())
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    paper.write_paper(paper.evaluated_presets(root), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_columns_made_elsewhere_are_kept_if_asked(root, tmp_path):
    folder = add_preset(root, "mnist", seed=3)
    add_sweep(folder, "seeds", {"mnist": 2.5})
    add_preset(root, "fashion_mnist", ood="mnist")
    out = tmp_path / "out"
    paper.write_paper(paper.evaluated_presets(root), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (root / "mnist" / "metrics.json").unlink()  # evaluated elsewhere
    paper.write_paper([root / "fashion_mnist"], out, keep=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    elsewhere = add_preset(tmp_path / "elsewhere", "mnist", seed=4)
    paper.write_paper([elsewhere], out, keep=True)  # takes the place of mnist's, not of its sweep's
    text = (out / "table1.md").read_text()
    assert "seed 4, 10000 test points" in text
    assert "seed 3, 10000 test points" not in text
    assert "- mnist, sweep seeds: mean" in text
    assert "fashion_mnist BPD" in text
    paper.write_paper([elsewhere], out)
    assert "fashion_mnist BPD" not in (out / "table1.md").read_text()


def test_a_sweep_of_another_configuration_is_no_column_of_the_preset(root, tmp_path):
    folder = add_preset(root, "mnist")
    add_sweep(folder, "seeds", {"mnist": 2.5})
    add_sweep(folder, "table1", {"clusters matched": 2.3}, models=True)
    sweep = folder / "sweep" / "table1"
    path = sweep / "trials.csv"
    other = fingerprint_trial(compose_preset("mnist", ["cpmm.n_factors=12"]), "matched", 0)
    fingerprint = fingerprint_trial(compose_preset("mnist", []), "matched", 0)
    path.write_text(path.read_text().replace(fingerprint, other))
    seal_sweep(sweep, "0f", [sweep.with_suffix(".csv"), sweep.with_suffix(".json")])
    said = paper.write_paper([folder], tmp_path / "out")
    assert any(line.startswith(f"left out {folder / 'sweep' / 'table1.csv'}") for line in said)
    text = (tmp_path / "out" / "table1.md").read_text()
    assert "mnist, sweep seeds BPD" in text
    assert "sweep table1" not in text


def test_the_note_of_a_sweep_says_on_what_flows_were_scored_and_how_the_matched_mixture_was_fitted(
    root,
):
    folder = add_preset(root, "mnist", **{"evaluation.teacher_points": 70})
    add_sweep(folder, "table1", {"cpmm": 2.5, "cnf_conv": 1.5}, models=True)
    add_sweep(folder, "clusters", {"cpmm": 2.5, "matched": 2.6}, models=True)
    notes = {column.name: column.note for column in paper.read_sweeps(folder)[0]}
    assert notes["mnist, sweep table1"].endswith("test points, flows: the first 70 of them")
    assert "the first 70" not in notes["mnist, sweep clusters"]
    assert "Matched GMM: the likelier of Adam and EM" in notes["mnist, sweep clusters"]


def test_the_note_of_a_preset_says_how_the_weights_vary(root):
    folder = add_preset(root, "mnist", **{"cpmm.weight_knots": 5})
    assert "R = 6, the field's weights at 5 pseudotimes" in paper.read_preset(folder).note


def test_the_note_of_a_preset_says_what_it_was_trained_through_and_with(root):
    note = paper.read_preset(add_preset(root, "mnist")).note
    assert ("noise in place" in note, "trained with" in note) == (False, False)
    changes = {"spaces.kind": "noise", "trainer.precision": "bf16-mixed"}
    note = paper.read_preset(add_preset(root, "mnist", "mnist_other", **changes)).note
    assert "noise in place of the teacher, trained with bf16-mixed" in note


def test_only_whole_tables_are_kept(root, tmp_path):
    folder = add_preset(root, "mnist")
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"table1\.csv is missing: leave --keep out"):
        paper.write_paper([folder], out, keep=True)
    add_preset(root, "fashion_mnist")
    paper.write_paper(paper.evaluated_presets(root), out)
    text = (out / "table1.csv").read_text()
    for damaged in (text.replace("2.1234", "2.1x34"), text.replace(",value,", ",worth,")):
        assert damaged != text
        (out / "table1.csv").write_text(damaged)
        with pytest.raises(ValueError, match="tables are not as they were written"):
            paper.write_paper([folder], out, keep=True)


def pictures(text):
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(found))).convert("RGBA"))
        for found in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=\s]+)", text)
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_smaller_svg_shows_the_same(tmp_path, channels):
    mean = np.random.default_rng(0).random((2, 5, channels * 400))
    plot_trajectory_means(mean, (channels, 20, 20)).savefig(tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    smaller = paper.shrink_svg(text)
    before, after = pictures(text), pictures(smaller)
    assert len(before) == len(after) >= 2
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    if channels == 1:
        assert len(smaller) < 0.7 * len(text)
    else:
        assert smaller == text


def test_what_is_damaged_or_absent_is_named(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no evaluated preset of MNIST or Fashion"):
        paper.evaluated_presets(root)
    folder = add_preset(root, "mnist")
    with pytest.raises(ValueError, match="digits is no preset of the paper's images"):
        paper.read_preset(root / "digits")
    with pytest.raises(FileNotFoundError, match=r"mnist_2/metrics\.json is missing: `dvc repro`"):
        paper.read_preset(root / "mnist_2")
    add_sweep(folder, "seeds", {"mnist": 2.5})
    for name in ("seeds.csv", "seeds.json", "seeds/trials.csv", "seeds/sweep.json"):
        path = folder / "sweep" / name
        content = path.read_bytes()
        path.write_bytes(content.replace(b"5", b"6", 1))
        assert path.read_bytes() != content
        with pytest.raises(
            ValueError, match=rf"{path.name} is .*sweep\.py preset=mnist sweep=seeds"
        ):
            paper.read_sweeps(folder)
        path.write_bytes(content)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["models"]["cpmm"]["density"] = 0.5
    (folder / "metrics.json").write_text(json.dumps(metrics))
    command = [sys.executable, ROOT / "benchmarks" / "paper.py", "mnist", "--data", root,
               "--out", tmp_path / "out"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("paper: error: ")
    assert "is not what was evaluated" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_figure_that_is_too_large_is_not_written(root, tmp_path, monkeypatch):
    folder = add_preset(root, "mnist")
    monkeypatch.setattr(paper, "LARGEST_FIGURE", 1000)
    with pytest.raises(ValueError, match=r"trajectories\.svg has \d+ bytes in its smallest form"):
        paper.write_paper([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()
