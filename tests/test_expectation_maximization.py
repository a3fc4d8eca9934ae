from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.decomposition import FactorAnalysis

from cpmm.expectation_maximization import EMRun, fit_by_em
from cpmm.factor_analyzers import FactorAnalyzers
from cpmm.mixture import Mixture
from tests.oracles import (
    dense_component_log_prob,
    dense_covariance,
    dense_log_prob,
    dense_observed_log_prob,
    random_factor_analyzers,
)

FLOOR = -30.0  # far below what any of these points ask for


def draw(fa: FactorAnalyzers, n: int, generator: torch.Generator) -> torch.Tensor:
    return Mixture(fa, (fa.n_components,)).sample(n, generator)[0]


def fit(start, x, validation=None, floor=FLOOR, n_iterations=20, patience=10**6, batch_size=64):
    validation = x if validation is None else validation
    return fit_by_em(start, x, validation, floor, n_iterations, patience, batch_size)


def step(start, x, floor=FLOOR):
    heard = []
    fit_by_em(start, x, x, floor, 1, 1, 64, heard.append)
    return heard[0].current


def trained(run: EMRun) -> np.ndarray:
    return np.array([entry["train"] for entry in run.history])


def dense_step(x: np.ndarray, fa: FactorAnalyzers, floor: float = FLOOR) -> dict[str, np.ndarray]:
    """One step with dense covariances and loops over points, as Ghahramani & Hinton write it."""
    weight, log_variance = [], []
    means, loadings = [], []
    joint = dense_component_log_prob(torch.from_numpy(x), fa) + fa.log_weight.numpy()
    share = np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
    for k, covariance in enumerate(dense_covariance(fa)):
        a, mu = fa.loading[k].numpy(), fa.mean[k].numpy()
        r = a.shape[1]
        beta = a.T @ np.linalg.inv(covariance)
        cross, square = np.zeros((len(mu), r + 1)), np.zeros((r + 1, r + 1))
        for point, h in zip(x, share[:, k], strict=True):
            z = beta @ (point - mu)
            extended = np.append(z, 1)
            second = np.outer(extended, extended)
            second[:r, :r] += np.eye(r) - beta @ a
            cross += h * np.outer(point, extended)
            square += h * second
        extended_loading = cross @ np.linalg.inv(square)
        variance = np.zeros(len(mu))
        for point, h in zip(x, share[:, k], strict=True):
            extended = np.append(beta @ (point - mu), 1)
            variance += h * (point - extended_loading @ extended) * point
        variance /= share[:, k].sum()
        weight.append(share[:, k].mean())
        means.append(extended_loading[:, -1])
        loadings.append(extended_loading[:, :-1])
        log_variance.append(np.log(np.maximum(variance, np.exp(floor))))
    return {
        "log_weight": np.log(weight),
        "mean": np.stack(means),
        "loading": np.stack(loadings),
        "log_diagonal": np.stack(log_variance),
    }


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_a_step_is_that_of_the_dense_formulas(generator, offset):
    fa = random_factor_analyzers(generator, 3, 5, 2, offset)
    x = draw(fa, 150, generator)
    start = replace(fa, mean=fa.mean + 0.3, loading=0.5 * fa.loading)
    fitted = step(start, x)
    for name, value in dense_step(x.numpy(), start).items():
        np.testing.assert_allclose(getattr(fitted, name).numpy(), value, rtol=1e-6, atol=1e-8)


def test_a_step_onto_the_floor_is_that_of_the_dense_formulas(generator):
    fa = random_factor_analyzers(generator, 2, 4, 1)
    x = draw(fa, 100, generator)
    start = replace(fa, log_diagonal=fa.log_diagonal.clamp(min=-0.5))
    value = dense_step(x.numpy(), start, floor=-0.5)["log_diagonal"]
    assert (value == -0.5).any()
    assert (value > -0.5).any()
    np.testing.assert_allclose(step(start, x, -0.5).log_diagonal.numpy(), value, rtol=1e-6)


def with_gaps(x: torch.Tensor, generator: torch.Generator, share: float = 0.2) -> torch.Tensor:
    return x.masked_fill(torch.rand(x.shape, generator=generator) < share, torch.nan)


def dense_observed_step(x: np.ndarray, fa: FactorAnalyzers, times: np.ndarray) -> dict:
    """One step where points have gaps and count ``times``, feature by feature, point by point."""
    (k, m), r = fa.mean.shape, fa.n_factors
    joint = dense_observed_log_prob(torch.from_numpy(x), fa) + fa.log_weight.numpy()
    share = times[:, None] * np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
    mean, loading, variance = np.zeros((k, m)), np.zeros((k, m, r)), np.zeros((k, m))
    for c, covariance in enumerate(dense_covariance(fa)):
        a, mu = fa.loading[c].numpy(), fa.mean[c].numpy()
        cross, square = np.zeros((m, r + 1)), np.zeros((m, r + 1, r + 1))
        total, power = np.zeros(m), np.zeros(m)
        for point, h in zip(x, share[:, c], strict=True):
            seen = np.flatnonzero(~np.isnan(point))
            beta = a[seen].T @ np.linalg.inv(covariance[seen][:, seen])
            extended = np.append(beta @ (point - mu)[seen], 1)
            second = np.outer(extended, extended)
            second[:r, :r] += np.eye(r) - beta @ a[seen]
            for i in seen:
                cross[i] += h * point[i] * extended
                square[i] += h * second
                total[i] += h
                power[i] += h * point[i] ** 2
        for i in range(m):
            row = np.linalg.solve(square[i], cross[i])
            mean[c, i], loading[c, i] = row[-1], row[:-1]
            variance[c, i] = (power[i] - row @ cross[i]) / total[i]
    log_weight = np.log(share.sum(0) / times.sum())
    return {
        "log_weight": log_weight,
        "mean": mean,
        "loading": loading,
        "log_diagonal": np.log(variance),
    }


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_a_step_with_gaps_and_weights_is_that_of_the_dense_formulas(generator, offset):
    fa = random_factor_analyzers(generator, 3, 5, 2, offset)
    x = with_gaps(draw(fa, 150, generator), generator, 0.3)
    x[3] = torch.nan
    times = 2 * torch.rand(150, generator=generator).double()
    start = replace(fa, mean=fa.mean + 0.3, loading=0.5 * fa.loading)
    heard = []
    fit_by_em(start, x, x, FLOOR, 1, 1, 64, heard.append, times, times)
    joint = dense_observed_log_prob(x, start) + start.log_weight.numpy()
    expected = np.average(logsumexp(joint, axis=1), weights=times)
    np.testing.assert_allclose(heard[0].history[0]["train"], expected)
    np.testing.assert_allclose(heard[0].history[0]["validation"], expected)
    for name, value in dense_observed_step(x.numpy(), start, times.numpy()).items():
        got = getattr(heard[0].current, name).numpy()
        np.testing.assert_allclose(got, value, rtol=1e-6, atol=1e-8)


def test_whole_weights_are_points_that_come_several_times(generator):
    fa = random_factor_analyzers(generator, 2, 4, 1)
    start = random_factor_analyzers(generator, 2, 4, 1)
    for x in (draw(fa, 80, generator), with_gaps(draw(fa, 80, generator), generator)):
        times = torch.randint(0, 4, (80,), generator=generator)
        repeated = x.repeat_interleave(times, 0)
        weighted = fit_by_em(start, x, x, FLOOR, 5, 9, 64, None, times, times)
        whole = fit_by_em(start, repeated, repeated, FLOOR, 5, 9, 64)
        np.testing.assert_allclose(trained(weighted), trained(whole))
        for name, value in vars(whole.best).items():
            torch.testing.assert_close(getattr(weighted.best, name), value)


def test_points_without_gaps_step_alike_on_both_ways(generator):
    fa = random_factor_analyzers(generator, 3, 5, 2)
    x = draw(fa, 150, generator)
    start = random_factor_analyzers(generator, 3, 5, 2)
    gap = torch.full((1, 5), torch.nan, dtype=torch.float64)  # which teaches the weights alone
    usual, other = step(start, x), step(start, torch.cat([gap, x]))
    for name in ("mean", "loading", "log_diagonal"):
        torch.testing.assert_close(getattr(other, name), getattr(usual, name))


@pytest.mark.parametrize("floor", [FLOOR, -1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_training_likelihood_never_falls_with_gaps(floor, weighted, generator):
    x = draw(random_factor_analyzers(generator, 4, 6, 2), 300, generator)
    x = with_gaps(x, generator)
    start = random_factor_analyzers(generator, 4, 6, 3)
    start = replace(start, log_diagonal=start.log_diagonal.clamp(min=floor))
    times = 3 * torch.rand(300, generator=generator).double() if weighted else None
    run = fit_by_em(start, x, x, floor, 40, 99, 64, None, times, times)
    assert (np.diff(trained(run)) > -1e-10).all()
    assert trained(run)[-1] > trained(run)[0] + 0.1
    if floor == -1.0:
        assert run.current.log_diagonal.min().item() == floor


def test_a_sampled_mixture_is_found_again_with_a_fifth_missing(generator):
    truth = random_factor_analyzers(generator, 3, 6, 2)
    truth = replace(truth, mean=3 * truth.mean)
    x, validation = draw(truth, 3000, generator), draw(truth, 3000, generator)
    start = FactorAnalyzers(
        log_weight=torch.full((3,), 1 / 3, dtype=torch.float64).log(),
        mean=truth.mean + torch.randn(3, 6, generator=generator, dtype=torch.float64),
        loading=torch.randn(3, 6, 2, generator=generator, dtype=torch.float64),
        log_diagonal=torch.ones(3, 6, dtype=torch.float64),
    )
    run = fit(start, with_gaps(x, generator), validation, n_iterations=100, batch_size=3000)
    # As without gaps; four fifths of the numbers leave as much of the information, and no less.
    loss = dense_log_prob(validation, truth).mean() - max(e["validation"] for e in run.history)
    assert loss < 3 * 77 / 2 / 3000 / 0.64
    weight = truth.log_weight.exp()
    assert ((run.best.log_weight.exp() - weight).abs() < 5 * (weight / 3000).sqrt()).all()
    for k, covariance in enumerate(dense_covariance(run.best)):
        n = 0.64 * 3000 * weight[k].item()  # both features of a pair were observed
        true = dense_covariance(truth)[k]
        variances = np.diag(true)
        error = np.sqrt((np.outer(variances, variances) + true**2) / n)
        assert (np.abs(covariance - true) < 5 * error).all()
        difference = (run.best.mean[k] - truth.mean[k]).numpy()
        assert (np.abs(difference) < 5 * np.sqrt(variances / n)).all()


def test_a_feature_that_a_component_hardly_sees_keeps_its_row(generator):
    start = random_factor_analyzers(generator, 1, 4, 2)
    x = draw(start, 60, generator)
    x[2:, 1] = torch.nan  # two points, where its regression has three unknowns
    run = fit(start, x, n_iterations=5)
    assert [entry["starved"] for entry in run.history] == [1] * 6
    for name in ("mean", "loading", "log_diagonal"):
        assert torch.equal(getattr(run.current, name)[0, 1], getattr(start, name)[0, 1])
        assert not torch.equal(getattr(run.current, name)[0, 0], getattr(start, name)[0, 0])
    assert (np.diff(trained(run)) > -1e-10).all()


def test_gaps_go_in_batches_go_on_and_stay_in_float32(generator):
    fa = random_factor_analyzers(generator, 3, 5, 2)
    x = with_gaps(draw(fa, 101, generator), generator)
    start = random_factor_analyzers(generator, 3, 5, 2)
    heard = []
    whole = fit_by_em(start, x, x, FLOOR, 9, 100, 1000, heard.append)
    resumed = fit_by_em(heard[4], x, x, FLOOR, 9, 100, 1000)
    assert resumed.history == whole.history
    batched = fit(start, x, n_iterations=9, batch_size=7)
    np.testing.assert_allclose(trained(batched), trained(whole), rtol=1e-9)
    narrow = fit(start.to(torch.float32), x.float(), n_iterations=9)
    assert {value.dtype for value in vars(narrow.best).values()} == {torch.float32}
    np.testing.assert_allclose(trained(narrow), trained(whole), atol=1e-4)


@pytest.mark.parametrize("floor", [FLOOR, -1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_training_likelihood_never_falls(floor, seed):
    generator = torch.Generator().manual_seed(seed)
    x = draw(random_factor_analyzers(generator, 4, 6, 2), 300, generator)
    start = random_factor_analyzers(generator, 4, 6, 3)
    start = replace(start, log_diagonal=start.log_diagonal.clamp(min=floor))
    run = fit(start, x, floor=floor, n_iterations=30)
    assert len(run.history) == 31
    assert (np.diff(trained(run)) > -1e-10).all()
    assert trained(run)[-1] > trained(run)[0] + 0.1
    lowest = run.current.log_diagonal.min().item()
    assert lowest >= floor
    if floor == -1.0:
        assert lowest == floor  # it was active


def test_the_history_holds_mean_log_likelihoods_of_the_iterates(generator):
    fa = random_factor_analyzers(generator, 3, 4, 2)
    x, validation = draw(fa, 90, generator), draw(fa, 50, generator)
    start = random_factor_analyzers(generator, 3, 4, 2)
    for n_iterations in (1, 4):
        run = fit(start, x, validation, n_iterations=n_iterations)
        values = [entry["validation"] for entry in run.history]
        assert len(values) == n_iterations + 1
        entry = run.history[run.best_iteration]
        np.testing.assert_allclose(entry["train"], dense_log_prob(x, run.best).mean())
        np.testing.assert_allclose(max(values), dense_log_prob(validation, run.best).mean())
    np.testing.assert_allclose(run.history[0]["train"], dense_log_prob(x, start).mean())


def test_one_component_is_factor_analysis(generator):
    truth = random_factor_analyzers(generator, 1, 6, 2)
    x = draw(truth, 400, generator)
    start = random_factor_analyzers(generator, 1, 6, 2)
    run = fit(start, x, n_iterations=600, batch_size=400)
    peer = FactorAnalysis(2, tol=1e-12, max_iter=20000, svd_method="lapack").fit(x.numpy())
    np.testing.assert_allclose(run.history[-1]["train"], peer.score(x.numpy()), atol=1e-6)
    np.testing.assert_allclose(
        dense_covariance(run.best)[0], peer.get_covariance(), rtol=1e-2, atol=1e-2
    )  # the likelihood is flat at its top: its first six digits leave the covariance two


@pytest.mark.parametrize("n_factors", [3, 4])
def test_one_component_with_enough_factors_is_the_full_gaussian(generator, n_factors):
    m = 4
    mixing = 0.3 * torch.randn(m, m, generator=generator, dtype=torch.float64)
    mixing = mixing + torch.eye(m, dtype=torch.float64)  # EM crawls where a variance is near zero
    x = torch.randn(300, m, generator=generator, dtype=torch.float64) @ mixing + 3
    run = fit(
        random_factor_analyzers(generator, 1, m, n_factors), x, n_iterations=300, batch_size=300
    )
    points = x.numpy()
    covariance = np.cov(points.T, ddof=0)
    expected = multivariate_normal(points.mean(0), covariance).logpdf(points).mean()
    np.testing.assert_allclose(run.history[-1]["train"], expected, atol=1e-9)
    np.testing.assert_allclose(run.current.mean[0].numpy(), points.mean(0), atol=1e-6)
    np.testing.assert_allclose(dense_covariance(run.current)[0], covariance, atol=1e-6)


def test_a_sampled_mixture_is_found_again(generator):
    truth = random_factor_analyzers(generator, 3, 6, 2)
    truth = replace(truth, mean=3 * truth.mean)
    x, validation = draw(truth, 3000, generator), draw(truth, 3000, generator)
    start = FactorAnalyzers(
        log_weight=torch.full((3,), 1 / 3, dtype=torch.float64).log(),
        mean=truth.mean + torch.randn(3, 6, generator=generator, dtype=torch.float64),
        loading=torch.randn(3, 6, 2, generator=generator, dtype=torch.float64),
        log_diagonal=torch.ones(3, 6, dtype=torch.float64),
    )
    run = fit(start, x, validation, n_iterations=150, batch_size=3000)
    assert run.history[-1]["train"] >= dense_log_prob(x, truth).mean()
    # Twice the difference on new points is about chi-squared with as many degrees of freedom as the
    # mixture has parameters, 77, over N: three times their number is far in its tail.
    loss = dense_log_prob(validation, truth).mean() - max(e["validation"] for e in run.history)
    assert loss < 3 * 77 / 2 / 3000
    weight = truth.log_weight.exp()
    error = (weight * (1 - weight) / 3000).sqrt()
    assert ((run.best.log_weight.exp() - weight).abs() < 5 * error).all()
    for k, covariance in enumerate(dense_covariance(run.best)):
        n = 3000 * weight[k].item()
        true = dense_covariance(truth)[k]
        variances = np.diag(true)
        error = np.sqrt((np.outer(variances, variances) + true**2) / n)
        assert (np.abs(covariance - true) < 5 * error).all()
        difference = (run.best.mean[k] - truth.mean[k]).numpy()
        assert (np.abs(difference) < 5 * np.sqrt(variances / n)).all()


def test_a_component_without_points_keeps_its_shape_and_loses_its_weight(generator):
    fa = random_factor_analyzers(generator, 3, 4, 2)
    x = draw(fa, 200, generator)
    start = replace(fa, mean=fa.mean + torch.tensor([[0.0], [0.0], [1e4]], dtype=torch.float64))
    run = fit(start, x, n_iterations=10)
    assert [entry["starved"] for entry in run.history] == [1] * 11
    for fitted in (run.current, run.best):
        assert all(bool(torch.isfinite(value).all()) for value in vars(fitted).values())
        for name in ("mean", "loading", "log_diagonal"):
            assert torch.equal(getattr(fitted, name)[2], getattr(start, name)[2])
    assert run.current.log_weight[2] < -500
    assert abs(run.current.log_weight.logsumexp(0)) < 1e-12
    assert (np.diff(trained(run)) > -1e-10).all()
    # The others are what they would be without it.
    rest = fit(start.select(torch.tensor([0, 1])), x, n_iterations=10)
    torch.testing.assert_close(run.current.select(torch.tensor([0, 1])).mean, rest.current.mean)


def test_fewer_points_than_any_component_needs_move_the_weights_only(generator):
    start = random_factor_analyzers(generator, 3, 5, 4)
    x = draw(start, 4, generator)
    run = fit(start, x, n_iterations=5)
    assert run.history[-1]["starved"] == 3
    assert torch.equal(run.current.mean, start.mean)
    assert (np.diff(trained(run)) > -1e-12).all()


def test_equal_points_stop_at_the_floor(generator):
    start = random_factor_analyzers(generator, 2, 3, 1)
    x = torch.ones(50, 3, dtype=torch.float64)
    run = fit(start, x, floor=-6.0, n_iterations=200)
    k = int(run.current.log_weight.argmax())
    torch.testing.assert_close(run.current.mean[k], x[0], rtol=0, atol=1e-3)
    assert (run.current.log_diagonal[k] == -6.0).all()
    assert (np.diff(trained(run)) > -1e-9).all()


def test_the_batch_size_does_not_matter(generator):
    fa = random_factor_analyzers(generator, 3, 5, 2)
    x = draw(fa, 101, generator)
    start = random_factor_analyzers(generator, 3, 5, 2)
    whole = fit(start, x, n_iterations=10, batch_size=1000)
    for batch_size in (1, 7, 100):
        other = fit(start, x, n_iterations=10, batch_size=batch_size)
        np.testing.assert_allclose(trained(other), trained(whole), rtol=1e-9)
        for name, value in vars(whole.current).items():
            torch.testing.assert_close(getattr(other.current, name), value, rtol=1e-6, atol=1e-8)


def test_the_best_validation_iterate_is_returned_and_patience_ends_the_run(generator):
    truth = random_factor_analyzers(generator, 2, 6, 1)
    x, validation = draw(truth, 40, generator), draw(truth, 500, generator)
    start = random_factor_analyzers(generator, 2, 6, 3)  # too many factors for 40 points
    start = replace(start, mean=x[[0, 20]])
    run = fit(start, x, validation, floor=-8.0, n_iterations=200, patience=5)
    values = [entry["validation"] for entry in run.history]
    assert len(values) == run.best_iteration + 6
    assert len(values) < 201
    assert max(values) > values[-1] + 0.01
    np.testing.assert_allclose(max(values), dense_log_prob(validation, run.best).mean())


def test_a_start_that_nothing_beats_is_returned(generator):
    truth = random_factor_analyzers(generator, 2, 6, 1)
    x, validation = draw(truth, 12, generator), draw(truth, 500, generator)
    run = fit(truth, x, validation, floor=-8.0, patience=3)
    assert run.best is truth
    assert run.best_iteration == 0
    assert len(run.history) == 4


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_a_run_goes_on_as_if_uninterrupted(generator, stop):
    fa = random_factor_analyzers(generator, 3, 5, 2)
    x, validation = draw(fa, 90, generator), draw(fa, 60, generator)
    start = random_factor_analyzers(generator, 3, 5, 2)
    heard = []
    whole = fit_by_em(start, x, validation, FLOOR, 9, 100, 64, heard.append)
    assert [len(run.history) for run in heard] == list(range(1, 11))
    assert heard[-1] is whole
    resumed = fit_by_em(heard[stop - 1], x, validation, FLOOR, 9, 100, 64)
    longer = fit_by_em(
        fit_by_em(start, x, validation, FLOOR, stop, 100, 64), *(x, validation), FLOOR, 9, 100, 64
    )
    for other in (resumed, longer):
        assert other.history == whole.history
        for name in ("current", "best"):
            for field, value in vars(getattr(whole, name)).items():
                assert torch.equal(getattr(getattr(other, name), field), value)


def test_an_ended_run_takes_no_step(generator):
    fa = random_factor_analyzers(generator, 2, 3, 1)
    x = draw(fa, 40, generator)
    run = fit(fa, x, n_iterations=3)
    assert fit(run, x, n_iterations=3) is run


def test_the_start_is_left_alone_and_nothing_is_drawn(generator):
    start = random_factor_analyzers(generator, 2, 3, 1)
    before = {name: value.clone() for name, value in vars(start).items()}
    x = draw(start, 40, generator)
    state = torch.get_rng_state()
    first, second = fit(start, x), fit(start, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.history == second.history
    assert all(torch.equal(value, before[name]) for name, value in vars(start).items())


def test_float32_stays_float32_and_agrees(generator):
    fa = random_factor_analyzers(generator, 3, 5, 2)
    x = draw(fa, 300, generator)
    start = random_factor_analyzers(generator, 3, 5, 2)
    run = fit(start.to(torch.float32), x.float(), n_iterations=20)
    assert {value.dtype for value in vars(run.best).values()} == {torch.float32}
    expected = fit(start, x, n_iterations=20)
    np.testing.assert_allclose(trained(run), trained(expected), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 4)}, r"x must be \(N, 3\).*got shape \(9, 4\)"),
        ({"x": torch.zeros(9)}, r"x must be \(N, 3\).*got shape \(9,\)"),
        ({"x": torch.zeros(0, 3)}, r"x must be \(N, 3\) with N > 0.*got shape \(0, 3\)"),
        ({"validation": torch.zeros(9, 2)}, r"validation must be \(N, 3\).*got shape \(9, 2\)"),
        ({"x": torch.tensor([[0, 1, torch.nan]])}, "feature 2 of x is missing in every point"),
        (
            {"validation": torch.full((2, 3), torch.inf)},
            "validation has 6 of 6 values that are infinite, in 2 of 2 points",
        ),
        ({"weight": torch.ones(8)}, "the weights of x must be 9 numbers.*8"),
        ({"weight": -torch.ones(9)}, "the weights of x must be 9 numbers of 0 or more.*from -1"),
        ({"weight": torch.zeros(9)}, "the weights of x .* not all 0"),
        ({"validation_weight": torch.full((9,), torch.nan)}, "the weights of validation must be"),
        ({"x": torch.zeros(9, 3).float()}, "x is torch.float32 on cpu, the mixture torch.float64"),
        (
            {"log_diagonal_floor": 1.0},
            "start.log_diagonal must not lie below log_diagonal_floor = 1",
        ),
        ({"log_diagonal_floor": float("nan")}, "log_diagonal_floor is nan: expected a number"),
        ({"n_iterations": 0}, "n_iterations is 0: expected 1 or more"),
        ({"patience": 0}, "patience is 0: expected 1 or more"),
        ({"batch_size": 0}, "batch_size is 0: expected 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(generator, change, message):
    start = random_factor_analyzers(generator, 2, 3, 1)
    x = torch.zeros(9, 3, dtype=torch.float64)
    arguments = {
        "x": x,
        "validation": x,
        "log_diagonal_floor": FLOOR,
        "n_iterations": 2,
        "patience": 2,
        "batch_size": 4,
    }
    single = isinstance(change.get("x"), torch.Tensor) and "float32" in message
    change = {
        name: value.double() if isinstance(value, torch.Tensor) and not single else value
        for name, value in change.items()
    }
    with pytest.raises(ValueError, match=message):
        fit_by_em(start, **(arguments | change))


@pytest.mark.parametrize("name", ["log_weight", "mean", "loading", "log_diagonal"])
def test_a_start_that_is_not_finite_or_of_two_types_is_refused_by_name(generator, name):
    start = random_factor_analyzers(generator, 2, 3, 1)
    x = torch.zeros(9, 3, dtype=torch.float64)
    broken = getattr(start, name).clone()
    broken.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=rf"start.{name} has 1 of \d+ values that are not finite"):
        fit(replace(start, **{name: broken}), x)
    if name != "mean":
        with pytest.raises(ValueError, match=rf"start.{name} is torch.float16"):
            fit(replace(start, **{name: getattr(start, name).half()}), x)


def test_points_out_of_range_raise(generator):
    start = random_factor_analyzers(generator, 2, 3, 1).to(torch.float32)
    x = torch.full((9, 3), 1e30)
    with pytest.raises(FloatingPointError, match="9 of 9 log-densities of x are not finite"):
        fit(start, x)


def test_components_without_a_density_raise(generator):
    start = random_factor_analyzers(generator, 2, 3, 2)
    start = replace(start, loading=torch.full_like(start.loading, 1e200))
    with pytest.raises(
        FloatingPointError, match=r"iteration 0 .*raise log_diagonal_floor \(now -30"
    ):
        fit(start, torch.zeros(9, 3, dtype=torch.float64))
