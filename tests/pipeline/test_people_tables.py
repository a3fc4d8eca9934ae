"""Tables as people have them, from the file to the scores: what trains scores, with the same answers."""

import io
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY

from cpmm.cli import main as tool
from cpmm.fitted import FittedMixture
from cpmm.pipeline.artifacts.store import load_prepared
from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.scores.ood import read_ood
from workflows import extract_mixture, prepare_data, train_cpmm

OPTIONS = [
    "cpmm.n_clusters=2", "cpmm.n_factors=1", "data.missing=impute", "data.text=one_hot", "data.constant=drop",
    "data.options.label_column=kind", "data.n_validation=20", "data.n_test=20", "cpmm.curriculum=false",
    "cpmm.fine_tune_epochs=1",
]  # fmt: skip


def make_table(n=120):
    generator = np.random.default_rng(0)
    table = pd.DataFrame(generator.normal(size=(n, 2)).round(3), columns=["x", "y"])
    table["tiny"] = generator.normal(size=n) * 1e-13
    table["smoker"] = generator.random(n) < 0.5
    table["island"] = generator.choice(["Biscoe", "Dream", "Torgersen"], n)
    table["sex"] = generator.choice(["male", "female"], n)
    table["k"] = 7
    table["kind"] = generator.choice(["-1.0", "1", "2.0", "noise"], n)
    table.loc[[3, 60], "x"] = np.nan
    table.loc[5, "island"] = None
    return table


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a mixture of a table of all kinds of columns, and the table."""
    folder = tmp_path_factory.mktemp("people")
    table = make_table()
    table.to_csv(folder / "table.csv.gz", index=False)
    files = [f"data.options.path={folder}/table.csv.gz"]
    config = compose_preset("csv", [*TINY, *OPTIONS, *files])
    for stage in (prepare_data, train_cpmm, extract_mixture):
        stage.main(folder, config)
    return folder, table


def score(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["cpmm", "score", *map(str, arguments)])
    capsys.readouterr()
    tool.main()
    return pd.read_csv(io.StringIO(capsys.readouterr().out))["log_prob"].to_numpy()


def test_every_way_to_write_a_table_has_the_scores_of_the_pipeline(
    trained, tmp_path, monkeypatch, capsys
):
    folder, table = trained
    data, fitted = load_prepared(folder / "prepared"), FittedMixture.load(folder / "mixture")
    assert data.feature_names == (
        "x", "y", "tiny", "smoker", "island=Biscoe", "island=Dream", "island=Torgersen", "sex=male",
    )  # fmt: skip
    assert data.columns.fill is not None
    assert fitted.header["columns"] == data.columns.to_dict()
    assert data.class_names == ("1", "2")
    raw = torch.cat([*data.raw.values()])
    assert len(raw) == len(table)
    expected = np.sort(fitted.log_prob(raw, torch.Generator()).numpy())
    for name, options in (
        ("a.csv", {}), ("a.tsv", {"sep": "\t"}), ("a.txt", {"sep": ";", "decimal": ","}),
        ("a.csv.xz", {}), ("b.csv", {"encoding": "utf-16"}), ("c.txt", {"sep": "|"}),
    ):  # fmt: skip
        table.iloc[:, ::-1].to_csv(tmp_path / name, index=False, **options)
        got = score(monkeypatch, capsys, folder / "mixture", tmp_path / name, "--batch-size", 50)
        np.testing.assert_allclose(np.sort(got), expected, rtol=1e-12)
    assert pd.Series(got).notna().all()


def test_what_was_read_is_said(trained, tmp_path, capsys):
    folder, _ = trained
    files = [f"data.options.path={folder}/table.csv.gz"]
    config = compose_preset("csv", [*TINY, *OPTIONS, *files])
    capsys.readouterr()
    last = prepare_data.main(tmp_path, config)
    lines = capsys.readouterr().out.splitlines()
    for part in (
        "prepare_data | table.csv.gz: 120 rows and 8 columns", "true or yes 1, false or no 0: smoker",
        "one-hot: island (3), sex (2)", "constant left out: k", "rows without a label ('-1.0', 'noise')",
    ):  # fmt: skip
        assert part in lines[0]
    assert any("gaps filled by medians" in line for line in lines)
    assert "a table of 8 features" in last


def test_another_table_is_read_as_the_data_were(trained, tmp_path):
    folder, table = trained
    data = load_prepared(folder / "prepared")
    other = table.assign(x=table["x"] + 9, y=table["y"] - 9)
    other.drop(columns=["kind", "k"]).to_csv(tmp_path / "other.tsv", sep="\t", index=False)
    form = dict.fromkeys(["label_column", "delimiter", "decimal", "encoding", "header"])
    options = {"name": "csv", "source": "csv", "options": form | {"path": f"{tmp_path}/other.tsv"}}
    points = read_ood(options, data)
    x = data.preprocessing.inverse(points.z)
    assert x.shape == (120, 8)
    np.testing.assert_allclose(x[:3, 0], other["x"][:3], rtol=1e-12)
    assert float(x[3, 0]) == pytest.approx(data.columns.fill[0])
    other.assign(island="Moon").to_csv(tmp_path / "other.tsv", sep="\t", index=False)
    with pytest.raises(ValueError, match=r"has 'Moon' in row 1.*evaluation\.ood=null"):
        read_ood(options, data)


def test_options_of_tables_are_refused_elsewhere():
    for preset, more in (("digits", []), ("npy", ["data.options.path=x.npy"])):
        with pytest.raises(ValueError, match=r"data\.missing is of tables .* leave it out"):
            compose_preset(preset, [*more, "cpmm.n_clusters=3", "+data.missing=drop"])
    with pytest.raises(ValueError, match=r"data\.missing is 'no': choose one of refuse, drop, imp"):
        compose_preset("csv", ["data.options.path=x.csv", "cpmm.n_clusters=3", "data.missing=no"])
    config = compose_preset(
        "csv",
        ["data.options.path=x.csv", "cpmm.n_clusters=3", "data.drop=[2010,'a b']", "data=npy"][:3],
    )
    assert config["data"]["drop"] == ["2010", "a b"]


def test_plain_tables_say_nothing_of_their_columns(tmp_path):
    make_table()[["x", "y"]].dropna().to_csv(tmp_path / "t.csv", index=False)
    config = compose_preset(
        "csv", [f"data.options.path={tmp_path}/t.csv", "cpmm.n_clusters=2", "data.n_test=20"]
    )
    prepare_data.main(tmp_path, config)
    assert "columns" not in (tmp_path / "prepared" / "prepared.json").read_text()
