from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from cpmm import conditioning
from cpmm.columns import Columns
from cpmm.conditioning import prepare_observed_density
from cpmm.distribution import MixtureDistribution
from cpmm.elementwise import ElementwiseMap
from cpmm.factor_analyzers import FactorAnalyzers, component_log_prob
from cpmm.fitted import FittedMixture
from cpmm.mixture import Mixture
from cpmm.preprocessing import Preprocessing
from tests.oracles import (
    assert_moments,
    dense_conditional,
    dense_covariance,
    dense_observed_log_prob,
    random_factor_analyzers,
    torch_mixture,
)

NAN = float("nan")
SIZES = (2, 1, 3)


def with_gaps(x: torch.Tensor, generator: torch.Generator, share: float = 0.4) -> torch.Tensor:
    return x.masked_fill(torch.rand(x.shape, generator=generator) < share, NAN)


@pytest.fixture
def mixture(generator) -> Mixture:
    return Mixture(random_factor_analyzers(generator, 6, 4, 2), SIZES)


@pytest.fixture
def x(generator) -> torch.Tensor:
    """Points with gaps; the first is complete, the second nothing but gaps."""
    x = with_gaps(3 * torch.randn(40, 4, generator=generator).double(), generator)
    x[0], x[1] = 1.0, NAN
    return x


def expected_fill(x: torch.Tensor, fa: FactorAnalyzers) -> np.ndarray:
    filled = x.numpy().copy()
    for n, point in enumerate(x):
        if bool(point.isnan().any()):
            weight, mean, _ = dense_conditional(point, fa)
            filled[n][np.isnan(filled[n])] = weight @ mean
    return filled


@given(st.data())
def test_density_and_mean_are_those_of_the_dense_formulas_for_any_pattern(data):
    m, r = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    fa = random_factor_analyzers(generator, data.draw(st.integers(1, 3)), m, r)
    seen = st.lists(st.lists(st.booleans(), min_size=m, max_size=m), min_size=1, max_size=6)
    seen = torch.tensor(data.draw(seen))
    x = 3 * torch.randn(seen.shape, generator=generator).double().masked_fill(~seen, NAN)
    got = prepare_observed_density(fa).component_log_prob(x)
    np.testing.assert_allclose(got, dense_observed_log_prob(x, fa), rtol=1e-9, atol=1e-9)
    filled = conditioning.impute(x, fa)
    np.testing.assert_allclose(filled, expected_fill(x, fa), rtol=1e-9, atol=1e-9)
    assert torch.equal(filled[seen], x[seen])


def test_a_mixture_takes_gaps_where_they_are_allowed(mixture, x):
    fa, open_ = mixture.components, mixture.allow_missing()
    joint = dense_observed_log_prob(x, fa) + fa.log_weight.numpy()
    close = {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(open_.joint_log_prob(x), joint, **close)
    np.testing.assert_allclose(open_.log_prob(x), np.logaddexp.reduce(joint, 1), **close)
    posterior = softmax(joint, axis=1)
    np.testing.assert_allclose(open_.component_responsibilities(x), posterior, **close)
    by_cluster = np.add.reduceat(posterior, [0, 2, 3], axis=1)
    np.testing.assert_allclose(open_.cluster_responsibilities(x), by_cluster, **close)
    np.testing.assert_allclose(open_.cluster_joint_log_prob(x).softmax(1), by_cluster, **close)
    np.testing.assert_array_equal(open_.predict(x), by_cluster.argmax(1))
    # Nothing observed: the weights, and the density of no feature.
    assert abs(open_.log_prob(x)[1]) < 1e-14
    np.testing.assert_allclose(open_.component_responsibilities(x)[1], fa.log_weight.exp())
    # Elsewhere NaN is a broken number.
    assert bool(mixture.log_prob(x)[x.isnan().any(1)].isnan().all())


def test_complete_points_go_the_usual_way_to_the_last_byte(mixture, x, generator):
    whole = torch.randn(30, 4, generator=generator).double()
    expected = mixture.joint_log_prob(whole)
    assert torch.equal(mixture.allow_missing().joint_log_prob(whole), expected)
    mixed = torch.cat([whole[:10], x[2:], whole[10:]])
    complete = ~mixed.isnan().any(1)
    got = prepare_observed_density(mixture.components).component_log_prob(mixed)
    assert torch.equal(got[complete], component_log_prob(mixed[complete], mixture.components))


@pytest.mark.parametrize("most", [1, 40, 10**9])
def test_batches_and_order_change_nothing(mixture, x, most, monkeypatch, generator):
    monkeypatch.setattr(conditioning, "MOST_NUMBERS", most)
    open_ = replace(mixture.allow_missing(), batch_size=7)
    with torch.no_grad():
        joint = torch.from_numpy(dense_observed_log_prob(x, mixture.components))
        expected = (joint + mixture.components.log_weight).logsumexp(1)
        torch.testing.assert_close(open_.log_prob(x), expected, rtol=1e-9, atol=1e-12)
        order = torch.randperm(len(x), generator=generator)
        torch.testing.assert_close(open_.impute(x[order]), open_.impute(x)[order])


def test_patterns_of_more_features_than_an_integer_has_bits(generator):
    fa = random_factor_analyzers(generator, 3, 70, 2)
    x = with_gaps(torch.randn(12, 70, generator=generator).double(), generator)
    x[5:8, :] = x[4]
    x[6, 69], x[7, 0] = NAN, NAN
    got = Mixture(fa, (3,)).allow_missing().joint_log_prob(x)
    expected = dense_observed_log_prob(x, fa) + fa.log_weight.numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_gradients_are_those_of_finite_differences(mixture, x):
    inputs = [value.clone().requires_grad_() for value in vars(mixture.components).values()]
    points = x[:5].clone().requires_grad_()

    def function(points: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return Mixture(FactorAnalyzers(*tensors), SIZES).allow_missing().log_prob(points)

    assert torch.autograd.gradcheck(function, (points, *inputs))


def test_float32_is_near(mixture, x):
    narrow = mixture.to(torch.float32).allow_missing()
    torch.testing.assert_close(
        narrow.log_prob(x.float()).double(), mixture.allow_missing().log_prob(x), rtol=0, atol=1e-3
    )


def test_the_mean_of_an_image_is_that_of_the_components_gaussians(mixture, x):
    filled = mixture.impute(x, torch.exp)
    for n in (0, 2, 3, 4, 5):
        gaps = x[n].isnan()
        weight, mean, covariance = dense_conditional(x[n], mixture.components)
        log_normal = np.exp(mean + 0.5 * covariance.diagonal(axis1=1, axis2=2))
        np.testing.assert_allclose(filled[n][gaps], weight @ log_normal, rtol=1e-6)
        assert torch.equal(filled[n][~gaps], x[n][~gaps].exp())
    torch.testing.assert_close(mixture.impute(x, lambda z: 2 * z + 1), 2 * mixture.impute(x) + 1)


def test_draws_have_the_moments_of_the_dense_conditional(mixture, generator):
    point = torch.tensor([0.5, NAN, -1.0, NAN], dtype=torch.float64)
    weight, means, covariances = dense_conditional(point, mixture.components)
    mean = weight @ means
    covariance = np.einsum("k,kij->ij", weight, covariances)
    covariance += np.einsum("k,ki,kj->ij", weight, means - mean, means - mean)
    drawn = mixture.sample_missing(point.repeat(40_000, 1), generator)
    assert bool((drawn[:, [0, 2]] == point[[0, 2]]).all())
    assert_moments(drawn[:, [1, 3]], mean, covariance)
    seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
    first, second = (mixture.sample_missing(point[None], seed) for seed in seeds)
    assert torch.equal(first, second)


def test_a_marginal_is_the_mixture_of_sub_matrices(mixture):
    kept = mixture.marginal([3, 1])
    assert kept.cluster_sizes == SIZES
    assert torch.equal(kept.components.mean, mixture.components.mean[:, [3, 1]])
    dense = dense_covariance(mixture.components)[:, [3, 1]][:, :, [3, 1]]
    np.testing.assert_allclose(dense_covariance(kept.components), dense)


def test_conditionals_are_those_of_the_dense_formulas(mixture):
    values = {2: torch.tensor([-1.0, 0.0, 4.0]), 0: 0.5}
    found = mixture.conditionals(values)
    assert len(found) == 3
    for given_, value in zip(found, (-1.0, 0.0, 4.0), strict=True):
        point = torch.tensor([0.5, NAN, value, NAN], dtype=torch.float64)
        weight, mean, covariance = dense_conditional(point, mixture.components)
        assert given_.cluster_sizes == SIZES
        close = {"rtol": 1e-9, "atol": 1e-12}
        np.testing.assert_allclose(given_.components.log_weight.exp(), weight, **close)
        np.testing.assert_allclose(given_.components.mean, mean, **close)
        np.testing.assert_allclose(dense_covariance(given_.components), covariance, **close)
        alone = mixture.conditional({2: value, 0: 0.5})
        torch.testing.assert_close(alone.components.mean, given_.components.mean)
    assert found[0].components.loading is found[1].components.loading


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.marginal([]), r"different features of 0 to 3: got \[\]"),
        (lambda m: m.marginal([1, 1]), r"different features of 0 to 3: got \[1, 1\]"),
        (lambda m: m.marginal([4]), r"features of 0 to 3: got \[4\]"),
        (lambda m: m.conditional({}), r"features of 0 to 3: got \[\]"),
        (lambda m: m.conditional({-1: 0.0}), r"features of 0 to 3: got \[-1\]"),
        (lambda m: m.conditional(dict.fromkeys(range(4), 0.0)), "all 4 features are given"),
        (lambda m: m.conditional({0: NAN}), "condition on 0 is nan: expected finite numbers"),
        (lambda m: m.conditional({0: "a"}), "condition on 0 is 'a': expected finite numbers"),
        (lambda m: m.conditional({0: []}), r"condition on 0 is \[\]: expected finite numbers"),
        (lambda m: m.conditional({0: [1.0, 2.0]}), "2 values for a feature.*conditionals takes"),
        (lambda m: m.conditionals({0: [1.0, 2.0], 1: [1.0] * 3}), r"differ: \{0: 2, 1: 3\}"),
        (lambda m: m.conditionals({0: [0.0, 1e300]}), "condition 2 of 2 is too far"),
        (lambda m: m.impute(torch.zeros(3, 5)), r"x must be \(N, 4\)"),
        (lambda m: m.allow_missing().log_prob(torch.zeros(3)), r"x must be \(N, 4\)"),
    ],
)
def test_what_does_not_fit_is_named(mixture, call, message):
    with pytest.raises(ValueError, match=message):
        call(mixture)


def test_no_points_and_no_gaps_are_left_alone(mixture):
    x = torch.ones(0, 4, dtype=torch.float64)
    assert mixture.impute(x).shape == (0, 4)
    assert mixture.allow_missing().log_prob(x).shape == (0,)
    x = torch.ones(3, 4, dtype=torch.float64)
    assert torch.equal(mixture.impute(x), x)


def fitted(generator, kind: str) -> FittedMixture:
    fa = random_factor_analyzers(generator, 4, 3, 1)
    shift, scale = (1.0, -2.0, 0.3), (0.5, 3.0, 1.5)
    knots = ElementwiseMap((-3.0, 3.0), (-2.0, 4.0), (0.1, 0.2))
    pre = {
        "table": Preprocessing(None, None, shift, scale),
        "images": Preprocessing(8, 0.05, shift, scale, knots),
        "white": Preprocessing(None, None, shift, scale, whitening=torch.eye(3).double()),
    }[kind]
    columns = Columns(fill=(0.0, 1.0, 2.0)).to_dict()
    names = ("age", "size", "dose")
    return FittedMixture(
        Mixture(fa, (3, 1)), pre, None, names, {"preset": "toy", "columns": columns}
    )


@pytest.mark.parametrize("kind", ["table", "images"])
def test_in_the_datas_units_the_parts_make_the_whole(generator, kind):
    whole = fitted(generator, kind)
    raw = torch.tensor([[1.0, 5.0, 0.0], [3.0, 2.0, 7.0]], dtype=torch.float64)
    # Without a generator grey levels stand for the middle of their cell.
    joint = whole.log_prob(raw, None)
    partly = torch.cat([raw[:, :2], torch.full((2, 1), NAN)], 1)
    seen = whole.allow_missing().log_prob(partly, None)
    marginal = whole.marginal(["size", "age"])
    torch.testing.assert_close(marginal.log_prob(raw[:, [1, 0]], None), seen, rtol=1e-9, atol=0)
    given_ = whole.conditionals({"age": raw[:, 0], 1: raw[:, 1]})
    rest = torch.stack([m.log_prob(raw[i : i + 1, 2:], None)[0] for i, m in enumerate(given_)])
    torch.testing.assert_close(rest, joint - seen, rtol=1e-9, atol=1e-9)
    assert given_[0].feature_names == ("dose",)
    assert given_[0].header["columns"]["fill"] == [2.0]
    posterior = whole.allow_missing().cluster_responsibilities(partly, None)
    expected = torch.stack([m.mixture.components.log_weight.exp() for m in given_])
    torch.testing.assert_close(posterior[:, 1], expected[:, 3])
    drawn, cluster = given_[0].sample(50, generator)
    assert drawn.shape == (50, 1)
    assert set(cluster.tolist()) <= {0, 1}


def test_a_part_can_be_saved_and_loaded(generator, tmp_path):
    part = fitted(generator, "images").conditional({"size": 3})
    part.mixture.save(tmp_path, part.header, part.preprocessing.tensors)
    loaded = FittedMixture.load(tmp_path)
    raw = torch.tensor([[1.0, 5.0]])
    assert torch.equal(loaded.log_prob(raw, None), part.log_prob(raw, None))


def test_a_column_of_categories_is_all_of_its_features(generator):
    table = fitted(generator, "table")
    categories = {"colour": ("blue", "green", "red"), "smoker": ("no", "yes")}
    names = ("colour=blue", "colour=red", "smoker=yes")  # green was the same in all rows
    columns = Columns(categories=categories).to_dict()
    table = replace(table, feature_names=names, header={"columns": columns})
    assert table.marginal(["colour"]).feature_names == names[:2]
    for named, plain in (
        ({"smoker": "yes"}, {2: 1}),
        ({"smoker": ["no"]}, {2: 0}),
        ({"colour": "green"}, {0: 0, 1: 0}),
        ({"colour": "red"}, {"colour=blue": 0, "colour=red": 1}),
    ):
        one, two = (table.conditional(observed).mixture.components for observed in (named, plain))
        assert torch.equal(one.mean, two.mean)
    found = table.conditionals({"smoker": ["no", "yes"], "colour=red": 1})
    assert [m.feature_names for m in found] == [("colour=blue",)] * 2
    with pytest.raises(ValueError, match=r"'smoker' has the categories .*: got 'maybe'"):
        table.conditional({"smoker": "maybe"})


def test_gaps_of_a_table_are_filled_in_its_units(generator):
    table = fitted(generator, "table")
    raw = torch.tensor([[1.0, NAN, 0.1], [NAN, NAN, NAN]], dtype=torch.float64)
    filled = table.impute(raw, generator)
    fa, pre = table.mixture.components, table.preprocessing
    scale, shift = torch.tensor([pre.scale, pre.shift], dtype=torch.float64)
    data_fa = replace(
        fa,
        mean=fa.mean * scale + shift,
        loading=fa.loading * scale[:, None],
        log_diagonal=fa.log_diagonal + 2 * scale.log(),
    )
    np.testing.assert_allclose(filled, expected_fill(raw, data_fa), rtol=1e-9)
    assert torch.equal(filled[0, [0, 2]], raw[0, [0, 2]])
    drawn = table.sample_missing(raw, generator)
    assert bool(torch.isfinite(drawn).all())
    assert torch.equal(drawn[0, [0, 2]], raw[0, [0, 2]])


def test_gaps_of_images_are_filled_with_grey_levels(generator):
    images = fitted(generator, "images")
    raw = torch.tensor([[1.0, NAN, 6.0]]).repeat(500, 1)
    drawn = images.sample_missing(raw, generator)
    assert drawn.dtype == torch.uint8
    assert drawn[:, [0, 2]].unique(dim=0).tolist() == [[1, 6]]
    assert len(drawn[:, 1].unique()) > 2
    assert abs(drawn[:, 1].double().mean() - images.impute(raw, generator)[:, 1].mean()) < 0.3
    filled = images.impute(raw, generator)
    assert bool(((filled >= 0) & (filled <= 7)).all())
    assert filled[:, [0, 2]].unique(dim=0).tolist() == [[1, 6]]


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        ("white", lambda m: m.allow_missing(), "whitening.*data.standardize=feature"),
        ("white", lambda m: m.marginal(["age"]), "whitening.*data.standardize=feature"),
        ("white", lambda m: m.conditional({"age": 1}), "whitening.*data.standardize=feature"),
        ("white", lambda m: m.impute(torch.zeros(1, 3), None), "whitening"),
        ("table", lambda m: m.marginal(["agee"]), "no feature 'agee': the mixture has age, size"),
        ("table", lambda m: m.marginal(["age", 0]), r"different features of 0 to 2: got \[0, 0\]"),
        ("table", lambda m: m.conditional({"age": 1, 0: 2}), r"0 to 2: got \[0, 0\]"),
        ("table", lambda m: m.conditional({7: 1}), r"features of 0 to 2: got \[7\]"),
        ("table", lambda m: m.conditional({"age": NAN}), "condition on 'age' is nan"),
        (
            "table",
            lambda m: m.log_prob(torch.tensor([[0, 0, NAN]]), None),
            "'dose' of point 1 is nan",
        ),
        ("images", lambda m: m.conditional({"age": 8}), "grey levels must be 0 to 7"),
        ("images", lambda m: m.conditional({"age": 0.5}), "whole grey levels of 0 to 7: got 0.5"),
        (
            "table",
            lambda m: m.impute(torch.tensor([[1e200, NAN, 0]], dtype=torch.float64), None),
            "point 1 is too far",
        ),
        (
            "table",
            lambda m: m.sample_missing(
                torch.tensor([[0, 0, NAN], [1e200, NAN, 0]], dtype=torch.float64), torch.Generator()
            ),
            "point 2 is too far",
        ),
    ],
)
def test_what_does_not_fit_the_data_is_named(generator, kind, call, message):
    with pytest.raises(ValueError, match=message):
        call(fitted(generator, kind))


def test_a_view_as_one_of_torchs_distributions(mixture, generator):
    # zuko, of other tests, sets validation off for all of torch.
    view = MixtureDistribution(mixture, validate_args=True)
    peer = torch_mixture(mixture.components)
    x = 2 * torch.randn(5, 3, 4, generator=generator).double()
    torch.testing.assert_close(view.log_prob(x), peer.log_prob(x), rtol=1e-9, atol=0)
    torch.testing.assert_close(view.mean, peer.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(view.variance, peer.variance, rtol=1e-12, atol=0)
    torch.testing.assert_close(view.stddev, peer.stddev)
    assert (view.batch_shape, view.event_shape) == (peer.batch_shape, peer.event_shape)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        drawn = view.sample((20_000,))
        assert view.sample().shape == peer.sample().shape == (4,)
        assert view.sample((2, 3)).shape == (2, 3, 4)
    error = view.stddev / len(drawn) ** 0.5
    assert bool(((drawn.mean(0) - view.mean).abs() < 5 * error).all())
    with pytest.raises(ValueError, match="support"):
        view.log_prob(torch.full((2, 4), NAN))
    gaps = MixtureDistribution(mixture.allow_missing(), validate_args=False)
    assert float(gaps.log_prob(torch.full((4,), NAN, dtype=torch.float64)).abs()) < 1e-14
