"""Another data set told apart, the teacher on a part of the points, and the direct mixture's cheaper start."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TINY, run_stages
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, roc_auc_score

from cpmm.data import DataSplits
from cpmm.fitted import FittedMixture
from cpmm.pipeline.artifacts.store import load_prepared
from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.scores.ood import OodPoints, read_ood
from cpmm.pipeline.scores.scorer import Scorer
from cpmm.pipeline.stage import load_config
from cpmm.preprocessing import Augmentation, Preprocessing
from cpmm.seeds import seeded_generator
from workflows.report import tabulate_ood

MODELS = (
    "cpmm", "direct", "matched", "refined", "gaussian", "teacher",
)  # fmt: skip


@pytest.fixture(scope="module")
def upside_down(tmp_path_factory):
    """Digits' negatives: of the same kind, and another data set."""
    path = tmp_path_factory.mktemp("ood") / "negative.npy"
    np.save(path, 16 - load_digits().images[:60].astype(np.uint8))
    return path


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, upside_down):
    """A tiny pipeline on digits with another data set, and what evaluate printed."""
    folder = tmp_path_factory.mktemp("evaluated") / "digits"
    folder.mkdir()
    options = [
        *TINY, "ood@evaluation.ood=npy", f"evaluation.ood.options.path={upside_down}",
        "evaluation.ood.options.levels=17", "evaluation.ood.name=negative",
        "evaluation.teacher_points=50", "evaluation.batch_size=20",
        "baselines.direct.kmeans_points=300", "baselines.direct.kmeans_restarts=1",
        "baselines.kmeans.n_starts=2", "data.n_train=400",
    ]  # fmt: skip
    config = compose_preset("digits", options)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder, run_stages(folder)["evaluate"]


def test_every_density_tells_points_apart_in_both_spaces(evaluated, upside_down):
    folder, _ = evaluated
    metrics = json.loads((folder / "metrics.json").read_text())
    ood = metrics["ood"]
    assert (ood["name"], ood["n_ood"]) == ("negative", 60)
    assert set(ood["models"]) == set(MODELS)
    fitted = FittedMixture.load(folder / "mixture")
    data = load_prepared(folder / "prepared")
    inside = fitted.log_prob(data.raw["test"], seeded_generator(data.noise_seed, 2))
    raw = torch.from_numpy(np.load(upside_down).reshape(60, 64))
    apart = fitted.log_prob(raw, seeded_generator(data.noise_seed, 4))
    member = np.repeat([1, 0], [len(inside), 60])
    score = torch.cat([inside, apart]).numpy()
    got = ood["models"]["cpmm"]
    assert got["data"]["auroc"] == pytest.approx(roc_auc_score(member, score))
    assert got["data"]["aupr"] == pytest.approx(average_precision_score(member, score))
    assert got["data"]["aupr_out"] == pytest.approx(average_precision_score(1 - member, -score))
    z = [fitted.transform(x, seeded_generator(data.noise_seed, s))[0]
         for x, s in ((data.raw["test"], 2), (raw, 4))]  # fmt: skip
    score = torch.cat([fitted.mixture.log_prob(part) for part in z]).numpy()
    assert got["mixture"]["auroc"] == pytest.approx(roc_auc_score(member, score))
    table = pd.read_csv(folder / "evaluation" / "ood.csv")
    assert len(table) == 2 * len(MODELS)
    for _, row in table.iterrows():
        for key in ("auroc", "aupr", "aupr_out"):
            assert row[key] == ood["models"][row["model"]][row["space"]][key]


def test_the_teacher_scores_the_first_points_and_says_so(evaluated):
    folder, printed = evaluated
    models = json.loads((folder / "metrics.json").read_text())["models"]
    teacher = models["teacher"]
    assert teacher["n_points"] == 50
    assert teacher["density_of_first"] == teacher["density"]
    data, mixture = (
        load_prepared(folder / "prepared"),
        FittedMixture.load(folder / "mixture").mixture,
    )
    first = Scorer(data, "test", 50)
    same = first.density(mixture.to(torch.float64).log_prob(first.z))["density"]
    assert models["cpmm"]["density_of_first"] == pytest.approx(same, rel=1e-12)
    assert models["cpmm"]["density_of_first"] != models["cpmm"]["density"]
    assert {name for name, row in models.items() if "density_of_first" in row} == set(MODELS)
    assert teacher["name"].endswith("first 50 test points")
    rules = json.loads((folder / "evaluation" / "rules.json").read_text())
    assert "the first 50 test points alone" in rules["teacher"]
    assert "the first 50 test points" in rules["density_of_first"]
    assert "60 points of negative" in rules["ood"]
    lines = [line for line in printed.splitlines() if line.startswith("evaluate teacher | ")]
    assert "50/50 points of test" in lines[0]
    assert "50/50 points of negative" in lines[-1]
    assert "calls of the field a batch" in lines[0]


def test_the_first_points_have_the_noise_that_they_have_among_all(evaluated):
    data = load_prepared(evaluated[0] / "prepared")
    every, some = Scorer(data, "test"), Scorer(data, "test", 7)
    assert torch.equal(every.z[:7], some.z)
    assert torch.equal(every.log_det[:7], some.log_det)
    assert some.label.tolist() == every.label[:7].tolist()
    density = some.density(some.z.sum(1))
    values = some.factor * -(some.z.sum(1) + some.log_det) / 64 + some.offset
    assert density["density"] == pytest.approx(float(values.mean()))
    assert density["density_standard_error"] == pytest.approx(float(values.std() / 7**0.5))


def test_the_report_has_the_table(evaluated):
    page = (evaluated[0] / "report.html").read_text(encoding="utf-8")
    assert 'id="ood"' in page
    assert "Density on the flows&#39; points" in page
    assert "Told from negative" in page
    assert "AUPR out, units of the data" in page


@pytest.mark.parametrize(
    ("preset", "ood", "expected"),
    [
        ("fashion_mnist", "mnist", ["93.38", "93.28"]),
        ("mnist_small", "fashion_mnist", ["99.95", "99.95"]),
        ("digits", "mnist", None),
        ("fashion_mnist", "mine", None),
    ],
)
def test_the_papers_figures_stand_beside_the_papers_pairs(preset, ood, expected):
    row = {"name": "m", "data": {"auroc": 0.25, "aupr": 0.5, "aupr_out": 1.0}, "mixture": {}}
    models = {"cpmm": row, "direct": row}
    table = tabulate_ood({"preset": preset, "ood": {"name": ood, "models": models}})
    assert table["paper"] is (expected is not None)
    cells = table["rows"][0]["cells"]
    assert cells[:6] == ["25.00", "50.00", "100.00", "–", "–", "–"]
    assert cells[6:] == (expected or [])
    assert table["rows"][1]["cells"][6:] == (["–", "–"] if expected else [])
    assert all(len(r["cells"]) == len(table["headings"]) for r in table["rows"])
    assert tabulate_ood({"preset": preset}) is None


def splits(raw, levels=17, image_shape=(1, 8, 8)):
    m = raw.shape[1]
    return DataSplits(
        raw={"train": raw[:20], "validation": raw[20:30], "test": raw[30:]},
        label=None,
        preprocessing=Preprocessing(levels, 0.01, (0.0,) * m, (1.0,) * m),
        augmentation=Augmentation(image_shape=image_shape),
        noise_seed=0,
        image_shape=image_shape,
        feature_names=tuple(f"pixel_{h}_{w}" for h, w in np.ndindex(8, 8)),
        class_names=(),
    )


def section(path, levels=17):
    options = {"path": str(path), "label_path": None, "levels": levels, "axes": "NHW"}
    return {"name": "other", "source": "npy", "options": options}


def test_what_does_not_compare_is_named(tmp_path, upside_down):
    data = splits(torch.from_numpy(load_digits().data[:40].astype(np.uint8)))
    path = tmp_path / "x.npy"
    np.save(path, np.full((5, 7, 7), 9, np.uint8))
    with pytest.raises(ValueError, match=r"evaluation\.ood, other, .* features: 49, expected 64"):
        read_ood(section(path), data)
    np.save(path, np.full((5, 4, 16), 9, np.uint8))
    with pytest.raises(ValueError, match=r"shape of an image .*: \(1, 4, 16\), expected"):
        read_ood(section(path), data)
    with pytest.raises(ValueError, match="grey levels: 256, expected 17"):
        read_ood(section(upside_down, 256), data)
    np.save(path, load_digits().images[25:35].astype(np.uint8))
    with pytest.raises(ValueError, match="is the data set itself: 10 of its 10 test points"):
        read_ood(section(path), data)
    with pytest.raises(FileNotFoundError, match=r"set evaluation\.ood\.options\.path .*ood=null"):
        read_ood(section(tmp_path / "none.npy"), data)
    with pytest.raises(ValueError, match=r"evaluation\.ood\.source is None"):
        read_ood({"name": "other"}, data)
    with pytest.raises(ValueError, match=r"evaluation\.ood\.name is missing"):
        read_ood({}, data)
    found = read_ood(section(upside_down), data)
    assert found.z.shape == (60, 64)


def test_a_density_that_is_not_finite_is_no_score():
    data = splits(torch.from_numpy(load_digits().data[:40].astype(np.uint8)))
    score = Scorer(data, "test")
    ood = OodPoints("other", score.z[:3], score.log_det[:3])
    good = torch.zeros(10, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="1 of 13 log-densities are not finite: points of"):
        ood.scores(score, good, torch.tensor([0.0, float("-inf"), 0.0]))


def test_a_missing_data_set_is_said_before_anything_is_trained(evaluated, run_stage, tmp_path):
    import shutil

    folder = tmp_path / "digits"
    shutil.copytree(evaluated[0], folder)
    config = load_config(folder / "config.yaml")
    config["evaluation"]["ood"]["options"]["path"] = "nowhere.npy"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    status, printed, errors = run_stage("evaluate", folder)
    assert status == 1
    assert errors.startswith("evaluate: error: there is no file nowhere.npy: set evaluation.ood.")
    assert not printed
    assert (folder / "evaluation" / "ood.csv").is_file(), "an earlier result was lost"


def test_fashion_mnist_is_told_from_mnist_unless_it_is_not():
    options = compose_preset("fashion_mnist", [])["evaluation"]["ood"]
    assert (options["name"], options["source"]) == ("mnist", "idx")
    assert options["options"]["files"] == compose_preset("mnist", [])["data"]["options"]["files"]
    assert (
        options["options"]["md5"] != compose_preset("fashion_mnist", [])["data"]["options"]["md5"]
    )
    assert compose_preset("fashion_mnist", ["evaluation.ood=null"])["evaluation"]["ood"] is None
    assert compose_preset("mnist", [])["evaluation"]["ood"] is None


def test_an_edited_file_of_the_other_data_set_is_refused(evaluated, upside_down, tmp_path):
    folder, _ = evaluated
    path = tmp_path / "negative.npy"
    values = np.load(upside_down)
    np.save(path, values)
    options = ["ood@evaluation.ood=npy", f"evaluation.ood.options.path={path}",
               "evaluation.ood.options.levels=17", "evaluation.ood.name=negative"]  # fmt: skip
    ood = compose_preset("digits", options)["evaluation"]["ood"]
    data = load_prepared(folder / "prepared")
    assert len(read_ood(ood, data).z) == 60
    np.save(path, values[:40])
    with pytest.raises(
        ValueError, match=r"negative\.npy \(evaluation\.ood\.options\.path\) has changed"
    ):
        read_ood(ood, data)
