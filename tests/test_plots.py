from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy.stats import norm

from cpmm import CPMM, MixtureOfFactorAnalyzers
from cpmm.factor_analyzers import FactorAnalyzers
from cpmm.fitted import FittedMixture
from cpmm.mixture import Mixture
from cpmm.plots import Picture, plot
from cpmm.preprocessing import Preprocessing
from tests.test_fitted import make_mixture


def of(generator, n_features, levels=None, image_shape=None):
    alpha = None if levels is None else 1e-3
    pre = Preprocessing(levels, alpha, (0.0,) * n_features, (1.0,) * n_features)
    names = tuple("abcdefgh"[:n_features])
    return FittedMixture(make_mixture(generator, n_features), pre, image_shape, names, {})


@pytest.fixture
def two_humps():
    """A quarter at -3 with deviation 1, three quarters at 4 with deviation 2."""
    fa = FactorAnalyzers(
        torch.tensor([0.25, 0.75]).double().log(), torch.tensor([[-3.0], [4.0]]).double(),
        torch.zeros(2, 1, 1).double(), torch.tensor([[1.0], [4.0]]).double().log(),
    )  # fmt: skip
    pre = Preprocessing(None, None, (0.0,), (1.0,))
    return FittedMixture(Mixture(fa, (1, 1)), pre, None, ("a",), {})


def drawn(picture):
    """Whether something was drawn: not of one colour."""
    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    return len(np.unique(pixels.reshape(-1, 4), axis=0)) > 10


def test_one_column_is_its_density(two_humps):
    axes = plot(two_humps).axes[0]
    *parts, whole = axes.lines
    x, y = whole.get_data()
    expected = 0.25 * norm(-3, 1).pdf(x), 0.75 * norm(4, 2).pdf(x)
    np.testing.assert_allclose(y, sum(expected), rtol=1e-6)
    for line, density in zip(parts, expected, strict=True):
        np.testing.assert_allclose(line.get_ydata(), density, rtol=1e-6, atol=1e-12)


def test_lines_of_two_columns_hold_their_share(generator):
    fitted = of(generator, 2)
    picture = plot(fitted)
    assert drawn(picture)
    contours = picture.axes[0].collections[-1]
    x, _ = fitted.sample(50_000, generator)
    log_prob = fitted.log_prob(x, generator)
    held = [float((log_prob > level).double().mean()) for level in contours.levels]
    np.testing.assert_allclose(held, [0.99, 0.9, 0.5], atol=0.03)  # levels are from 4,000 draws


def test_two_of_many_columns_are_their_marginal(generator):
    fitted = of(generator, 4)
    axes = plot(fitted, features=["d", "a"]).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("d", "a")
    x, y = axes.collections[0].get_offsets().T
    own, cluster = fitted.sample(4000, torch.Generator().manual_seed(0))
    first = int(cluster.min())
    assert set(np.round(x, 9)) <= set(np.round(own[cluster == first, 3].numpy(), 9))
    assert set(np.round(y, 9)) <= set(np.round(own[cluster == first, 0].numpy(), 9))


def test_one_name_is_one_column(generator):
    assert plot(of(generator, 4), features="c").axes[0].get_xlabel() == "c"


def test_profiles_are_means_in_deviations(generator):
    fitted = of(generator, 4)
    x, cluster = fitted.sample(100_000, generator)
    z = ((x - x.mean(0)) / x.std(0)).numpy()
    shown = [axes for axes in plot(fitted).axes if axes.get_visible()]
    assert len(shown) == len(np.unique(cluster))
    for axes in shown:
        c = int(axes.get_title().split()[1])
        (dots,) = [line for line in axes.lines if len(line.get_xdata()) == 4]
        np.testing.assert_allclose(dots.get_xdata(), z[cluster == c].mean(0), atol=0.05)


def test_columns_of_a_frame_are_found_by_name(generator):
    fitted = of(generator, 2)
    x = fitted.sample(50, generator)[0].numpy()
    frame = pd.DataFrame({"label": ["u"] * 50, "b": x[:, 1], "a": x[:, 0]})
    by_name, by_place = (plot(fitted, X).axes[0].collections[0] for X in (frame, x))
    np.testing.assert_array_equal(by_name.get_offsets(), by_place.get_offsets())
    with pytest.raises(ValueError, match="X has no column 'a'"):
        plot(fitted, frame.drop(columns="a"))


def test_rows_with_gaps_are_left_out_of_the_points(generator):
    fitted = of(generator, 2).allow_missing()
    x = fitted.sample(50, generator)[0].numpy()
    x[:20, 0] = np.nan
    axes = plot(fitted, x).axes[0]
    assert sum(len(points.get_offsets()) for points in axes.collections[:-1]) == 30
    x[:, 1] = np.nan
    with pytest.raises(ValueError, match="no row of X has a value of a and b"):
        plot(fitted, x)


def test_images_are_drawn_alone_and_with_their_points(generator):
    fitted = of(generator, 4, 16, (1, 2, 2))
    x, _ = fitted.sample(60, generator)
    assert drawn(plot(fitted))
    assert drawn(plot(fitted, x.reshape(60, 2, 2)))
    assert drawn(plot(replace(fitted, image_shape=None), image_shape=(2, 2)))


@pytest.mark.parametrize("model", [MixtureOfFactorAnalyzers(), CPMM(max_steps=0)], ids=str)
def test_what_auto_has_tried(model):
    X = np.random.default_rng(0).normal(size=(80, 3)) + np.repeat([[0.0], [6.0]], 40, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.set_params(random_state=0, n_init=1, verbose=False).fit(X)
    picture = model.plot(kind="tried")
    values = {round(v, 6) for axes in picture.axes for line in axes.lines for v in line.get_ydata()}
    assert values == {round(r["value"], 6) for r in model.tried_ if np.isfinite(r["value"])}
    stars = [line for axes in picture.axes for line in axes.lines if line.get_marker() == "*"]
    assert stars
    assert drawn(model.plot(X))


def test_a_notebook_shows_it(two_humps):
    picture = plot(two_humps)
    assert isinstance(picture, Picture)
    assert picture._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "pie"}, "kind is 'pie': expected one of auto, density"),
        ({"kind": "density"}, r"a density is drawn of one or two columns: got 4.*\['a', 'b'\]"),
        ({"features": ["z"]}, "there is no feature 'z'"),
        ({"features": [0, 0]}, "one or more different features"),
        ({"kind": "profiles", "features": [9]}, "one or more different features"),
        ({"kind": "images"}, "no shape of images: give image_shape"),
        ({"image_shape": (3, 3)}, "image_shape is .*4 features"),
        ({"image_shape": 4}, "image_shape is 4: expected"),
        ({"kind": "tried"}, "nothing was tried"),
        ({"X": np.zeros((3, 5))}, r"X has shape \(3, 5\): expected \(N, 4\)"),
        ({"X": [["u"] * 4]}, "X must hold numbers"),
        ({"X": np.full((3, 4), np.inf), "features": [0, 1]}, "expected a finite number"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(generator, options, said):
    with pytest.raises(ValueError, match=said) as error:
        plot(of(generator, 4), **options)
    assert "\n" not in str(error.value)


def test_a_model_must_be_fitted():
    with pytest.raises(ValueError, match="without a mixture"):
        plot(CPMM())
    with pytest.raises(ValueError, match="not fitted"):
        CPMM().plot()


def test_without_matplotlib_the_extra_is_named():
    code = "import sys; sys.modules['matplotlib'] = None\nimport cpmm.plots"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ModuleNotFoundError: matplotlib is not installed: pip install 'cpmm[cli]'"


def test_estimators_do_not_load_matplotlib():
    code = "import sys; from cpmm import CPMM; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
