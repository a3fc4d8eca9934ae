from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from cpmm import CPMM, MixtureOfFactorAnalyzers
from cpmm.cli.main import main
from cpmm.fitted import FittedMixture

BOTH = [
    MixtureOfFactorAnalyzers(3, n_factors=1, shrinkage=5.0, random_state=0),
    CPMM(3, n_factors=1, shrinkage=5.0, max_steps=20, random_state=0),
]
pytestmark = pytest.mark.filterwarnings("ignore:the best of .* starts:UserWarning")


def named(estimator):
    return type(estimator).__name__


@pytest.fixture(scope="module")
def frame():
    return load_iris(as_frame=True).data


@pytest.fixture(scope="module", params=BOTH, ids=named)
def fitted(request, frame):
    return clone(request.param).fit(frame)


def dense_log_prob(model, x):
    """Log-density of a table by scipy, from the mixture in its own space."""
    pre, fa = model.mixture_.preprocessing, model.mixture_.mixture.components
    scale, shift = np.array(pre.scale), np.array(pre.shift)
    covariance = fa.covariance().numpy() * scale[:, None] * scale
    parts = [
        w + multivariate_normal.logpdf(x, m * scale + shift, c)
        for w, m, c in zip(fa.log_weight.numpy(), fa.mean.numpy(), covariance, strict=True)
    ]
    return np.logaddexp.reduce(parts, 0)


@pytest.mark.parametrize(
    "estimator",
    [
        MixtureOfFactorAnalyzers(n_factors=1, shrinkage=5.0, n_init=1, max_steps=5),
        CPMM(n_factors=1, shrinkage=5.0, n_init=1, max_steps=4),
    ],
    ids=named,
)
def test_the_estimators_are_scikit_learns(estimator):
    checks = check_estimator(estimator, on_fail=None, on_skip=None)
    bad = [c for c in checks if c["status"] not in ("passed", "skipped")]
    assert [(c["check_name"], c["exception"]) for c in bad] == []
    skipped = {c["check_name"] for c in checks if c["status"] == "skipped"}
    assert skipped <= {"check_array_api_input"}  # of an environment without SCIPY_ARRAY_API
    assert len(checks) > 50


def test_densities_are_those_of_the_dense_gaussians(fitted, frame):
    x = frame.to_numpy()
    np.testing.assert_allclose(fitted.score_samples(frame), dense_log_prob(fitted, x), rtol=1e-9)
    assert fitted.score(frame) == pytest.approx(fitted.score_samples(frame).mean())
    n, p = len(x), fitted.n_parameters_
    assert fitted.bic(frame) - fitted.aic(frame) == pytest.approx(p * (np.log(n) - 2))
    share = fitted.predict_proba(frame)
    np.testing.assert_allclose(share.sum(1), 1)
    assert (share.argmax(1) == fitted.predict(frame)).all()
    assert (fitted.labels_ == fitted.predict(frame)).all()
    assert list(fitted.feature_names_in_) == list(frame.columns)
    assert fitted.mixture_.feature_names == tuple(frame.columns)


def test_units_of_the_table_move_the_density_by_their_determinant(frame):
    x = frame.to_numpy()
    for estimator in BOTH:
        a, b = (clone(estimator).fit(z).score(z) for z in (x, 1000 * x + 7))
        assert b == pytest.approx(a - 4 * np.log(1000), abs=1e-4)


def test_samples_are_of_the_fitted_density(fitted):
    x, cluster = fitted.sample(20000, random_state=1)
    again, _ = fitted.sample(20000, random_state=1)
    assert (x == again).all()
    fa, pre = fitted.mixture_.mixture.components, fitted.mixture_.preprocessing
    weight = fa.log_weight.exp()
    mean = pre.inverse((weight @ fa.mean)[None]).numpy()[0]
    assert (abs(x.mean(0) - mean) < 5 * x.std(0) / np.sqrt(len(x))).all()
    assert set(cluster) == {0, 1, 2}
    assert fitted.sample(3, random_state=np.random.RandomState(0))[0].shape == (3, 4)
    with pytest.raises(ValueError, match="n_samples is 0: expected a whole number"):
        fitted.sample(0)


def test_what_is_saved_is_what_the_command_reads(fitted, frame, tmp_path, capsys, monkeypatch):
    fitted.save(tmp_path / "mixture")
    read = type(fitted).load(tmp_path / "mixture")
    assert read.get_params() == fitted.get_params()
    scores = fitted.score_samples(frame)
    np.testing.assert_allclose(read.score_samples(frame), scores, rtol=1e-12)
    raw = torch.tensor(frame.to_numpy())
    other = FittedMixture.load(tmp_path / "mixture").log_prob(raw, torch.Generator())
    np.testing.assert_allclose(other.numpy(), scores, rtol=1e-12)
    frame.to_csv(tmp_path / "x.csv", index=False)
    command = ["cpmm", "score", str(tmp_path / "mixture"), str(tmp_path / "x.csv")]
    monkeypatch.setattr(sys, "argv", command)
    main()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(frame) + 1
    pickled = pickle.loads(pickle.dumps(fitted))
    assert (pickled.score_samples(frame) == scores).all()


def test_a_mixture_of_the_pipeline_is_loaded():
    folder = Path(__file__).parents[2] / "data" / "digits" / "mixture"
    if not folder.is_dir():
        pytest.skip("data/digits/mixture is not there: dvc pull")
    model = CPMM.load(folder)
    x, _ = model.sample(3, random_state=0)
    assert x.shape == (3, 64)


def test_pipelines_grids_and_frames(frame):
    search = GridSearchCV(
        make_pipeline(StandardScaler(), clone(BOTH[0])),
        {"mixtureoffactoranalyzers__n_components": [1, 3]},
        cv=KFold(2, shuffle=True, random_state=0),
    ).fit(frame)
    assert search.best_params_ == {"mixtureoffactoranalyzers__n_components": 3}
    assert search.best_estimator_.predict(frame).shape == (150,)
    assert clone(BOTH[0]).fit(torch.tensor(frame.to_numpy())).n_features_in_ == 4


def test_weights_count_points(frame):
    x = frame.to_numpy()
    weight = np.where(np.arange(150) < 50, 0.0, np.where(np.arange(150) % 2, 1.0, 2.0))
    model = clone(BOTH[0]).set_params(n_components=1)
    weighted = model.fit(x, sample_weight=weight)
    repeated = clone(model).fit(x.repeat(weight.astype(int), 0))
    np.testing.assert_allclose(weighted.score_samples(x), repeated.score_samples(x), rtol=1e-6)
    assert weighted.mixture_.preprocessing.shift[0] == pytest.approx(
        np.average(x[:, 0], weights=weight)
    )


def test_gaps_are_fitted_scored_and_filled(frame):
    x, rng = frame.to_numpy(), np.random.default_rng(0)
    gaps = rng.random(x.shape) < 0.2
    holed = np.where(gaps, np.nan, x)
    for estimator in BOTH:
        model = clone(estimator).fit(holed)
        filled = model.impute(holed)
        assert (filled[~gaps] == x[~gaps]).all()
        error = ((filled - x) / x.std(0))[gaps]
        assert np.sqrt((error**2).mean()) < 0.6  # 1 by the mean
        assert model.score(x) > clone(estimator).fit(x).score(x) - 0.5
        assert model.predict(np.full((1, 4), np.nan)).shape == (1,)
        given = model.conditional({"x0": 5.0})
        assert given.n_features == 3


def test_steps_and_streams_go_on(frame):
    x = frame.to_numpy()
    for estimator in BOTH:
        model = clone(estimator).set_params(batch_size=32).partial_fit(x[:100])
        before, steps = model.score(x), model.n_iter_
        for _ in range(15):
            model.partial_fit(x)
        assert model.n_iter_ == steps + 15
        assert model.score(x) > before
    model = clone(BOTH[0]).set_params(warm_start=True, max_steps=2, shrinkage=0).fit(x)
    scores = [model.fit(x).score(x) for _ in range(3)]
    assert scores == sorted(scores)


def test_numbers_may_be_float32(frame):
    for estimator in BOTH:
        model = clone(estimator).set_params(dtype="float32").fit(frame)
        assert model.score_samples(frame).dtype == np.float32
        assert model.score(frame) == pytest.approx(
            clone(estimator).fit(frame).score(frame), abs=0.1
        )


def test_auto_finds_three_blobs_and_says_what_it_tried():
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=300)
    x = rng.standard_normal((300, 5)) + 6 * np.eye(5)[y]
    for estimator in (MixtureOfFactorAnalyzers(random_state=0), CPMM(max_steps=0, random_state=0)):
        model = estimator.fit(x)
        assert adjusted_rand_score(model.labels_, y) > 0.98
        tried = pd.DataFrame(model.tried_)
        assert {"n_components", "n_factors", "shrinkage", "criterion", "value"} == set(tried)
        assert 3 in set(tried["n_components"])
    by = MixtureOfFactorAnalyzers(criterion="validation", random_state=0).fit(x)
    assert by.n_components_ == 3


def cigars(seed, m, n=300):
    """Three parallel Gaussians, a hundred times as long as thick, that k-means cuts across."""
    rng = np.random.default_rng(seed)
    y = rng.integers(3, size=n)
    x = rng.standard_normal((n, m))
    x[:, 0] *= 100
    x[:, 1] += 8 * y
    return x @ np.linalg.qr(rng.standard_normal((m, m)))[0].T, y


def finds_cigars(model, seed, m):
    x, y = cigars(seed, m)
    return adjusted_rand_score(y, clone(model).set_params(random_state=seed).fit_predict(x)) > 0.95


CIGARS = [MixtureOfFactorAnalyzers(3), CPMM(3, max_steps=0)]


@pytest.mark.parametrize("m", [2, 5])
@pytest.mark.parametrize("model", CIGARS, ids=named)
def test_long_thin_clusters_are_found(model, m):
    assert all(finds_cigars(model, seed, m) for seed in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("m", [2, 5])
@pytest.mark.parametrize("model", [MixtureOfFactorAnalyzers(3), CPMM(3)], ids=named)
def test_long_thin_clusters_are_found_in_20_of_20(model, m):
    assert [seed for seed in range(20) if not finds_cigars(model, seed, m)] == []


def test_more_trajectories_than_clusters_are_merged(frame):
    model = CPMM(
        2, n_trajectories=4, n_factors=1, shrinkage=5.0, n_init=1, max_steps=20, random_state=0
    ).fit(frame)
    assert model.predict_proba(frame).shape == (150, 2)
    assert model.n_trajectories_ == 4
    kind = load_iris().target > 0
    assert adjusted_rand_score(kind, model.labels_) > 0.95
    np.testing.assert_allclose(model.score_samples(frame), dense_log_prob(model, frame), rtol=1e-9)


def test_starts_that_disagree_are_told():
    x = np.random.default_rng(0).uniform(size=(200, 2))
    model = MixtureOfFactorAnalyzers(12, n_factors=1, shrinkage=0.0, n_init=3, random_state=0)
    with pytest.warns(UserWarning, match="no other start has: raise n_init, now 3, compare other"):
        model.fit(x)


TEXT = np.array([["a", 1.0], ["b", 2.0], ["c", 3.0]], dtype=object)
FEW = np.repeat([[0.0, 1.0], [1.0, 0.5], [3.0, 2.0]], 5, 0)
HOLE = np.column_stack([np.arange(9.0), np.full(9, np.nan)])
CONSTANT = pd.DataFrame({"age": np.arange(9.0), "unit": 1.0})


@pytest.mark.parametrize(
    ("changes", "x", "message"),
    [
        ({}, TEXT, "X holds text (could not convert string to float: 'a'): encode such columns"),
        ({}, np.arange(9.0), "Expected 2D array, got 1D array instead"),
        ({}, HOLE, "1 of 2 columns of X have no value, only NaN: x1; drop them"),
        ({}, CONSTANT, "1 of 2 columns of X (n_samples = 9) have one value only: unit; drop them"),
        ({"n_factors": 3}, FEW, "n_factors is 3, X has 2 features: set it to 2 or less, or 'auto'"),
        ({}, FEW, "is 4, X has 3 distinct rows (n_samples = 15): set it to 3 or less, or 'auto'"),
        ({}, FEW[:1], "Found array with 1 sample(s)"),
        ({}, FEW + np.inf, "infinity"),
        ({"device": "abacus"}, FEW, "device is 'abacus', which this machine or this torch has not"),
        ({"n_init": 0}, FEW, "The 'n_init' parameter of"),
        ({"dtype": "float16"}, FEW, "The 'dtype' parameter of"),
    ],
)
@pytest.mark.parametrize("estimator", BOTH, ids=named)
def test_bad_input_is_named_with_its_remedy(estimator, changes, x, message):
    first = {type(BOTH[0]): "n_components", type(BOTH[1]): "n_clusters"}[type(estimator)]
    model = clone(estimator).set_params(**{first: 4} | changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.fit(x)


def test_other_bad_input_is_named():
    x = np.random.default_rng(0).standard_normal((40, 2))
    with pytest.raises(ValueError, match="n_trajectories is 2, fewer than the 3 clusters"):
        CPMM(3, n_trajectories=2).fit(x)
    with pytest.raises(ValueError, match="must contain at least one non-zero"):
        CPMM(1).fit(x, sample_weight=np.zeros(40))
    model = clone(BOTH[0]).fit(x)
    with pytest.raises(ValueError, match=r"X has 3 features, but .* is expecting 2 features"):
        model.predict(np.zeros((1, 3)))


def test_importing_is_light():
    code = (
        "import sys, cpmm; assert not {'torch', 'numpy', 'sklearn'} & set(sys.modules)\n"
        "from cpmm import CPMM; CPMM(1, max_steps=1).fit([[0.0], [1.0], [2.5]] * 20)\n"
        "heavy = {'ray', 'hydra', 'dvc', 'matplotlib', 'pytorch_lightning', 'zarr'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "for name in [m for m in sys.modules if m.startswith('cpmm')]: del sys.modules[name]\n"
        "sys.modules['torchdiffeq'] = None\n"
        "try:\n"
        "    from cpmm import CPMM\n"
        "except ModuleNotFoundError as error:\n"
        "    assert str(error).endswith(\"is not installed: pip install 'cpmm[train]'\"), error\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("estimator", [MixtureOfFactorAnalyzers, CPMM])
def test_a_notebook_shows_the_diagram_and_then_what_was_learnt(estimator, tmp_path):
    X = np.random.default_rng(0).normal(size=(60, 2)) * [1.0, 5.0]
    model = estimator(1, n_factors=1, shrinkage=0.0, verbose=False)
    before = model._repr_html_()
    assert "log-likelihood" not in before
    model.fit(X)
    assert model.log_likelihood_ == pytest.approx(model.score(X))
    after = model._repr_mimebundle_()["text/html"]
    assert after.endswith("</table></div>")
    assert model._repr_html_().endswith(after[-100:])
    assert f"{model.log_likelihood_:.4g} nats a row" in after
    assert "rows <b>60</b>" in after
    model.save(tmp_path)
    assert "clusters <b>1</b>" in estimator.load(tmp_path)._repr_html_()
    with config_context(display="text"):
        assert set(model._repr_mimebundle_()) == {"text/plain"}
