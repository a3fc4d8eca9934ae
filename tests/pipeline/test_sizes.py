"""What the options and the data tell before training; rows that cannot be fitted, or only smaller."""

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY

from cpmm.baselines.gaussian import fit_shrunk_gaussian
from cpmm.pipeline.artifacts.store import load_prepared
from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.config.fingerprints import fingerprint_prepared
from cpmm.pipeline.errors import reason_of
from cpmm.pipeline.models import baselines
from cpmm.pipeline.models.baselines import train_baseline
from cpmm.pipeline.models.fitted import load_baseline
from cpmm.pipeline.scores.rules import FAR, doubt_densities
from cpmm.pipeline.scores.sizes import check_sizes
from workflows import prepare_data
from workflows import train_baseline as stage

PLAIN = [
    *TINY, "cpmm.curriculum=false", "data.n_validation=10", "data.n_test=10", "cpmm.n_factors=1",
    "cpmm.n_clusters=10", "cpmm.initialization.kind=gaussian", "data.augmentation.noise=0.05",
    "cpmm.learned_weight=false", "cpmm.log_diagonal_floor=-6", "cpmm.noise=0.01",
]  # fmt: skip


def table(tmp_path, x, *overrides):
    """Prepare a table of an array's columns."""
    path, folder = tmp_path / "table.csv", tmp_path / "csv"
    names = ",".join(f"x{i}" for i in range(x.shape[1]))
    np.savetxt(path, x, delimiter=",", header=names, comments="")
    config = compose_preset("csv", [*PLAIN, f"data.options.path='{path}'", *overrides])
    prepare_data.main(folder, config)
    return folder, config, load_prepared(folder / "prepared", fingerprint_prepared(config))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Rows of three columns, eight of which are distinct to train on, and the last a sum."""
    x = np.random.default_rng(0).normal(size=(8, 2)).round(2)[np.arange(60) % 8]
    x = np.column_stack([x, x.sum(1)])
    return table(tmp_path_factory.mktemp("few"), x, "data.augmentation.noise=0")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Forty rows of one column."""
    return table(tmp_path_factory.mktemp("one"), np.random.default_rng(0).normal(size=(40, 1)))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cpmm.n_factors=2", r"cpmm\.n_factors \(R\) is 2: .* set it to 1 or less"),
        ("cpmm.n_clusters=21", r"cpmm\.n_clusters \(C\) is 21: .* set it to 20 or less"),
        ("cpmm.n_points=21", r"cpmm\.n_points is 21: expected at most 20"),
        ("cpmm.initialization.kind=neighbours", "set it to kmeans or analyzers"),
        ("cpmm.consistency_weight=1", r"cpmm\.consistency_weight is 1.0, .* set it to 0"),
        ("cpmm.fine_tune_epochs=0", "at least one epoch"),
        ("cpmm=conv", r"cpmm\.field\.kind is 'conv', but the data are no images"),
    ],
)
def test_what_a_configuration_and_its_data_tell_ends_at_once(one, override, said):
    _, config, data = one
    path = config["data"]["options"]["path"]
    wrong = compose_preset("csv", [*PLAIN, f"data.options.path='{path}'", override])
    with pytest.raises(ValueError, match=said):
        check_sizes(wrong, data)
    check_sizes(wrong | {"model": "gaussian"}, data)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("spaces.n_train=21", r"spaces\.n_train is 21: expected 2 to 20"),
        ("spaces.n_validation=11", r"spaces\.n_validation is 11: expected 2 to 10"),
        ("teacher=conv", r"teacher\.field\.kind is 'conv'"),
        ("teacher.flow_matching_epochs=0", r"set teacher\.flow_matching_epochs to 1 or more"),
    ],
)
def test_so_does_what_the_curriculum_needs(one, override, said):
    _, config, data = one
    path = config["data"]["options"]["path"]
    options = [*PLAIN, "cpmm.curriculum=true", "spaces=teacher", f"data.options.path='{path}'"]
    check_sizes(compose_preset("csv", options), data)
    with pytest.raises(ValueError, match=said):
        check_sizes(compose_preset("csv", [*options, override]), data)


def test_groups_need_as_many_distinct_points(few):
    _, config, data = few
    options = config["cpmm"] | {
        "initialization": config["cpmm"]["initialization"] | {"kind": "kmeans"}
    }
    with pytest.raises(ValueError, match=r"only 8 of the 40 .* set cpmm\.n_clusters to 8 or less"):
        check_sizes(config | {"cpmm": options}, data)
    check_sizes(config | {"cpmm": options | {"n_clusters": 8}}, data)


@pytest.mark.parametrize("row", ["direct", "matched", "kmeans", "gmm_diagonal", "autoencoder"])
def test_a_row_is_fitted_smaller_where_there_are_few_points(few, row, tmp_path):
    _, config, data = few
    options = {"likelihood": "gaussian", "autoencoder_epochs": 1, "n_starts": 1}
    section = {**config["baselines"][row]}
    section |= {name: value for name, value in options.items() if name in section}
    config = config | {"baselines": config["baselines"] | {row: section}}
    fitted = train_baseline(row, config, data, None, tmp_path, quiet=True)
    asked = 30 if row == "direct" else 10
    assert fitted.note.split(":")[0].endswith(f"in place of {asked}")
    assert fitted.note.startswith("8 ")


def test_a_singular_gaussian_is_shrunk_and_says_so(few, tmp_path):
    folder, config, data = few
    said = stage.main(folder, config, "gaussian")
    assert "covariance shrunk by" in said
    loaded = load_baseline("gaussian", folder, config, data)
    assert loaded.note.startswith("covariance shrunk by")
    assert bool(torch.isfinite(loaded.log_prob(data.points("test")[0])).all())


def test_a_shrunk_covariance_is_that_of_scikit_learn(generator):
    from sklearn.covariance import LedoitWolf

    x = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    gaussian, share = fit_shrunk_gaussian(x)
    expected = LedoitWolf().fit(x.numpy())
    np.testing.assert_allclose(gaussian.covariance_matrix, expected.covariance_, atol=1e-12)
    assert share == expected.shrinkage_


@pytest.mark.parametrize("error", [ValueError("too few"), FloatingPointError("too few")])
def test_a_row_that_cannot_be_fitted_is_a_row_with_its_reason(few, error, monkeypatch):
    folder, config, data = few
    monkeypatch.setitem(baselines.KINDS, "kmeans", lambda run: (_ for _ in ()).throw(error))
    assert "a row without a model: too few" in stage.main(folder, config, "kmeans")
    assert load_baseline("kmeans", folder, config, data).missing == "too few"


def test_a_bug_or_a_damaged_file_ends_the_stage(few, tmp_path, monkeypatch):
    folder, config, _ = few
    monkeypatch.setitem(baselines.KINDS, "kmeans", lambda run: None + 1)
    with pytest.raises(TypeError):
        stage.main(folder, config, "kmeans")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_prepared(tmp_path)
    assert reason_of(caught.value) is None


def test_a_density_far_off_has_a_note():
    found = {"cpmm": 2.0, "gaussian": 2.5, "direct": 1428.0, "matched": -40.0, "teacher": 2 + FAR}
    doubts = doubt_densities(found)
    assert set(doubts) == {"direct", "matched"}
    assert "1,426 per dimension worse than that of CPMM" in doubts["direct"]
    assert "42 per dimension better than that of CPMM" in doubts["matched"]
    assert set(doubt_densities({"a": 1.0, "b": 50.0, "c": float("nan")})) == {"b"}
    assert doubt_densities({}) == {}


def test_the_config_of_a_share_is_read_back(one):
    _, config, _ = one
    again = yaml.safe_load(yaml.safe_dump(config | {"data": {**config["data"], "n_test": 0.15}}))
    assert fingerprint_prepared(again) == fingerprint_prepared(
        config | {"data": {**config["data"], "n_test": 0.15}}
    )
