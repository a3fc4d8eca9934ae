from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from cpmm.clusters import clusters_of, standardized, telling
from cpmm.fitted import FittedMixture
from cpmm.mixture import Mixture
from cpmm.notebook import mixture_html
from cpmm.preprocessing import Preprocessing
from tests.test_fitted import make_mixture


class Cells(HTMLParser):
    """Texts of the cells of a table, and every tag."""

    def __init__(self, html):
        super().__init__()
        self.cells, self.tags = [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


@pytest.fixture
def fitted(generator):
    pre = Preprocessing(None, None, (10.0, -2.0, 0.0), (0.5, 3.0, 1.0))
    return FittedMixture(make_mixture(generator, 3), pre, None, ("a", "b", "c"), {})


def test_clusters_have_the_moments_of_their_draws(fitted):
    clusters, mean, deviation = standardized(fitted)
    assert sum(cluster.weight for cluster in clusters) == pytest.approx(1)
    assert [c.weight for c in clusters] == sorted((c.weight for c in clusters), reverse=True)
    x, cluster = fitted.sample(200_000, torch.Generator().manual_seed(0))
    for one, m, d in zip(clusters, mean, deviation, strict=True):
        own = x[cluster == one.index]
        assert len(own) / len(x) == pytest.approx(one.weight, abs=5 * 0.5 / len(x) ** 0.5)
        error = 5 * own.std(0) / len(own) ** 0.5
        assert ((one.mean() - own.mean(0)).abs() < error).all()
        z = (own - x.mean(0)) / x.std(0)
        np.testing.assert_allclose(m, z.mean(0), atol=0.03)
        np.testing.assert_allclose(d, z.std(0), rtol=0.03)


def test_mean_of_grey_levels_is_that_of_draws(generator):
    pre = Preprocessing(16, 1e-3, (0.0,) * 4, (1.0,) * 4)
    fitted = FittedMixture(make_mixture(generator, 4), pre, (1, 2, 2), tuple("abcd"), {})
    one = clusters_of(fitted)[0]
    x, _ = one.fitted.sample(50_000, generator)
    np.testing.assert_allclose(one.mean(), x.double().mean(0), atol=0.15)  # a cell's middle


def test_a_cluster_without_components_is_left_out(fitted):
    sizes = (*fitted.mixture.cluster_sizes, 0)
    empty = replace(fitted, mixture=Mixture(fitted.mixture.components, sizes))
    assert len(clusters_of(empty)) == len(clusters_of(fitted))


def test_telling_features_are_those_that_differ(fitted):
    clusters = clusters_of(fitted)
    mean = torch.zeros(len(clusters), 5)
    mean[0, 3], mean[0, 1] = 2.0, 1.0
    assert telling(clusters, mean, 2) == [1, 3]


def test_the_table_holds_weights_and_means(fitted):
    html = mixture_html(fitted, {"rows": 7})
    assert fitted._repr_html_() == html.replace("rows <b>7</b> · ", "")
    cells = Cells(html).cells
    first = clusters_of(fitted)[0]
    begin = cells.index(str(first.index))
    assert cells[begin + 1] == f"{100 * first.weight:.1f} %"
    assert cells[begin + 2] == f"{float(first.mean()[0]):.4g}"
    assert "mean of a" in cells


def test_names_are_escaped_and_cut(fitted):
    html = mixture_html(replace(fitted, feature_names=("<script>x</script>", "b&b", "c" * 99)))
    parsed = Cells(html)
    assert "script" not in parsed.tags
    assert "mean of <script>x</script>" in parsed.cells
    assert "mean of b&b" in parsed.cells
    assert f"mean of {'c' * 39}…" in parsed.cells


def test_one_cluster_of_all_is_at_zero_with_deviation_one(fitted):
    fa = fitted.mixture.components
    one = replace(fitted, mixture=Mixture(fa, (fa.n_components,)))
    _, mean, deviation = standardized(one)
    np.testing.assert_allclose(mean, 0, atol=1e-12)
    np.testing.assert_allclose(deviation, 1)
