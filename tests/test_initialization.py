from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cpmm.initialization import (
    INITIALIZATIONS,
    PARTITIONS,
    fill_gaps,
    group_axes,
    initial_states,
    kmeans,
    linkage_groups,
    local_factor_analyzers,
    partition,
    shrunk_factor_analyzers,
)
from cpmm.trajectory import DIAGONALS, StateLayout
from tests.oracles import random_factor_analyzers, torch_mixture

CENTRES = torch.tensor([[10.0, 0, 0, 0], [0, 10, 0, 0], [0, 0, 10, 10]])


@pytest.fixture
def blobs(generator) -> tuple[Tensor, Tensor]:
    """Three well separated groups of different sizes and spreads."""
    label = torch.tensor([0] * 200 + [1] * 100 + [2] * 50)
    spread = torch.tensor([0.5, 1.0, 0.1])[label, None] * torch.tensor([1.0, 0.3, 1.0, 0.7])
    noise = torch.randn(350, 4, generator=generator)
    return CENTRES[label] + spread * noise, label


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("learned_weight", [False, True])
@pytest.mark.parametrize("kind", INITIALIZATIONS)
def test_states_have_the_layouts_size_and_repeat(blobs, kind, learned_weight, diagonal):
    layout = StateLayout(4, 2, 1.5, diagonal, learned_weight)
    first, second, other = (
        initial_states(kind, layout, 3, *blobs, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first.shape == (3, layout.size)
    assert first.dtype == torch.float32
    assert bool(torch.isfinite(first).all())
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    if diagonal == "constant":
        log_diagonal = layout.read(first)[2]
        assert torch.equal(log_diagonal, log_diagonal[:, :1].expand_as(log_diagonal))


@pytest.mark.parametrize("diagonal", DIAGONALS)
@pytest.mark.parametrize("kind", PARTITIONS)
def test_grouped_states_are_centroids_and_spreads(blobs, generator, kind, diagonal):
    x, label = blobs
    layout = StateLayout(4, 1, 1.0, diagonal, log_diagonal_floor=-20)
    states = initial_states(kind, layout, 3, x, label, generator)
    mean, _, log_diagonal, _ = layout.read(states)
    groups = [x[label == c].double() for c in range(3)]
    centroids = torch.stack([group.mean(0) for group in groups])
    variances = torch.stack([group.var(0, correction=0) for group in groups])
    if diagonal == "constant":
        variances = variances.mean(1, keepdim=True).expand_as(variances)
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(mean, centroids, **close)
    torch.testing.assert_close(log_diagonal.exp(), variances, **close)


def test_gaussian_states_perturb_the_standard_gaussian(generator):
    layout = StateLayout(300, 2, 1.0, log_diagonal_floor=-6)
    x = 100 + torch.randn(20, 300, generator=generator)
    states = initial_states("gaussian", layout, 10, x, None, generator, 0.2, 0.05, 0.3)
    mean, loading, log_diagonal, log_weight = layout.read(states)
    free = states.reshape(10, layout.n_maps, 300)[:, layout.n_joint :]
    for values, deviation in ((mean, 0.2), (loading, 0.05), (free, 0.3)):
        error = deviation / math.sqrt(values.numel())
        assert float(values.mean().abs()) < 5 * error
        assert abs(float(values.std()) - deviation) < 5 * error / math.sqrt(2)
    torch.testing.assert_close(log_diagonal, torch.zeros(10, 300), rtol=0, atol=1e-5)
    assert not log_weight.any()


def test_random_states_are_spread_like_the_data(blobs, generator):
    x = blobs[0]
    layout = StateLayout(4, 1, 1.0)
    mean, _, log_diagonal, _ = layout.read(
        initial_states("random", layout, 300, x, None, generator)
    )
    deviation = x.std(0)
    assert bool(((mean.mean(0) - x.mean(0)).abs() < 5 * deviation / math.sqrt(300)).all())
    assert bool(((mean.std(0) / deviation - 1).abs() < 5 / math.sqrt(600)).all())
    torch.testing.assert_close(
        (0.5 * log_diagonal).exp(), deviation.expand(300, 4), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", INITIALIZATIONS)
@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_as_many_trajectories_as_points_stay_finite(generator, kind, diagonal):
    x = torch.randn(5, 4, generator=generator)
    x[:, 3] = 2  # no spread at all
    layout = StateLayout(4, 1, 1.0, diagonal)
    states = initial_states(kind, layout, 5, x, torch.arange(5), generator)
    assert bool(torch.isfinite(states).all())
    assert bool((layout.read(states)[2] > layout.log_diagonal_floor).all())


def test_unknown_initializations_and_partitions_raise(generator):
    x, layout = torch.zeros(5, 4), StateLayout(4, 1)
    with pytest.raises(ValueError, match=r"cpmm\.initialization\.kind is 'pca': choose one of"):
        initial_states("pca", layout, 3, x, None, generator)
    with pytest.raises(ValueError, match="partition 'pca' is unknown: choose one of kmeans"):
        partition("pca", x, 3, layout, generator)


@pytest.mark.parametrize("n_clusters", [0, 6])
def test_too_many_or_no_clusters_raise(generator, n_clusters):
    x, layout = torch.zeros(5, 4), StateLayout(4, 1)
    expected = rf"\(C\) is {n_clusters}: expected 1 <= C <= N = 5"
    with pytest.raises(ValueError, match=expected):
        initial_states("gaussian", layout, n_clusters, x, None, generator)
    for kind in PARTITIONS:
        with pytest.raises(ValueError, match=expected):
            partition(kind, x, n_clusters, layout, generator)


@pytest.mark.parametrize("kind", PARTITIONS)
def test_partitions_find_separated_groups_and_repeat(blobs, kind):
    x, label = blobs
    first, second = (
        partition(kind, x, 3, StateLayout(4, 1), torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert len({(int(a), int(b)) for a, b in zip(first, label, strict=True)}) == 3
    assert first.unique().tolist() == [0, 1, 2]


def test_linked_groups_follow_curves_past_outliers(generator):
    angle = torch.rand(400, generator=generator) * 2 * math.pi
    radius = torch.tensor([1.0, 3.0]).repeat(200)
    x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    outliers = torch.tensor([[2.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    points = torch.cat([x, outliers])
    group = partition(
        "linkage", points, 2, StateLayout(2, 1), generator, outlier_share=3 / len(points)
    )
    agree = float((group[:400] == (radius > 2)).float().mean())
    assert max(agree, 1 - agree) == 1
    assert set(group.tolist()) == {0, 1}
    with pytest.raises(ValueError, match="outlier_share is 1"):
        partition("linkage", points, 2, StateLayout(2, 1), generator, outlier_share=1)


@pytest.mark.parametrize(("n_groups", "share"), [(1, 0.999), (3, 0.99), (55, 0.5)])
def test_linkage_that_leaves_too_few_points_raises(generator, n_groups, share):
    x = torch.randn(60, 2, generator=generator)
    with pytest.raises(ValueError, match=r"lower cpmm\.initialization\.outlier_share"):
        linkage_groups(x, n_groups, share)


def test_linkage_to_almost_as_many_groups_as_points_is_quiet(generator):
    x = torch.randn(60, 2, generator=generator)
    assert len(linkage_groups(x, 50, 0.0).unique()) == 50


def test_fewer_distinct_points_than_clusters_raise(generator):
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(5, 1)
    with pytest.raises(ValueError, match="needs 3 distinct points, found 2 among 10"):
        kmeans(x, 3, generator)
    with pytest.raises(ValueError, match=r"needs 11 distinct points.*cpmm\.n_clusters"):
        kmeans(x, 11, generator)


def test_local_factor_analyzers_have_the_covariances_of_big_groups(generator):
    truth = random_factor_analyzers(generator, 2, 5, 2)
    torch.manual_seed(0)
    parts = [torch_mixture(truth.select(torch.tensor([k]))).sample((20_000,)) for k in range(2)]
    x = torch.cat([*parts, parts[0][:5000]])
    label = torch.tensor([0] * 20_000 + [1] * 20_000 + [0] * 5000)
    fa = local_factor_analyzers(x, label, 2, 2, -20.0)
    np.testing.assert_allclose(fa.log_weight.exp(), [25 / 45, 20 / 45])
    for k in range(2):
        group = x[label == k]
        torch.testing.assert_close(fa.mean[k], group.mean(0))
        empirical = torch.cov(group.T)
        # The variances are kept but for 20 pseudo-points in 20,000.
        torch.testing.assert_close(
            fa.covariance()[k].diag(), empirical.diag(), rtol=1e-2, atol=1e-2
        )
        # Off the diagonal the two largest of five principal components are what is kept.
        values, vectors = torch.linalg.eigh(empirical)
        low_rank = vectors[:, -2:] * values[-2:] @ vectors[:, -2:].T
        off = ~torch.eye(5, dtype=torch.bool)
        torch.testing.assert_close(fa.covariance()[k][off], low_rank[off], rtol=1e-2, atol=1e-2)


def test_local_factor_analyzers_score_better_than_spheres(blobs):
    x, label = blobs
    x = x.double()
    fa = local_factor_analyzers(x, label, 3, 1, -20.0)
    alone = torch.distributions.MultivariateNormal(x.mean(0), torch.cov(x.T)).log_prob(x).mean()
    assert float(torch_mixture(fa).log_prob(x).mean()) > float(alone) + 1


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 5), (3, 40, 1)])
def test_tiny_groups_stay_finite_and_above_the_floor(generator, sizes):
    label = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    x = torch.randn(len(label), 6, generator=generator)
    x[label == 0] = 1  # points that coincide
    fa = local_factor_analyzers(x, label, 3, 4, -6.0)
    assert all(bool(torch.isfinite(value).all()) for value in vars(fa).values())
    assert bool((fa.log_diagonal > -6).all())
    assert float(fa.log_weight.logsumexp(0)) == pytest.approx(0, abs=1e-6)


def test_tiny_groups_have_the_pooled_variances(generator):
    big = 0.5 * torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    x = torch.cat([big, torch.full((1, 3), 9.0, dtype=torch.float64)])
    label = torch.tensor([0] * 4000 + [1])
    fa = local_factor_analyzers(x, label, 2, 1, -20.0, shrinkage=7.0)
    assert not fa.loading[1].any()
    pooled = big.var(0, correction=0) * 4000 / 4001
    torch.testing.assert_close(fa.log_diagonal[1].exp(), pooled * 7 / 8)


def test_partition_is_likelier_than_kmeans_and_more_starts_help(generator):
    layout, label = StateLayout(2, 1), torch.arange(3).repeat_interleave(150)
    gains = []
    for _ in range(5):
        # Three long thin groups in directions of their own, close to each other.
        stretch = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
        stretch[:, :, 0] *= 0.1
        noise = torch.randn(450, 2, 1, generator=generator, dtype=torch.float64)
        x = (stretch[label] @ noise).squeeze(-1) + label[:, None]
        groups = [kmeans(x, 3, torch.Generator().manual_seed(1))]
        groups += [
            partition("analyzers", x, 3, layout, torch.Generator().manual_seed(1), restarts)
            for restarts in (1, 6, 6)
        ]
        start, one, many, _ = (
            float(torch_mixture(local_factor_analyzers(x, g, 3, 1, -6)).log_prob(x).mean())
            for g in groups
        )
        assert one <= many + 1e-9
        assert torch.equal(groups[2], groups[3])
        assert groups[2].unique().tolist() == [0, 1, 2]
        gains.append(many - start)
    # Hard assignments may lose a little in one data set, not in all.
    assert sum(gains) / 5 > 0.1


def test_an_empty_group_raises(generator):
    x = torch.randn(6, 3, generator=generator)
    with pytest.raises(ValueError, match="group 1 of 3 is empty"):
        local_factor_analyzers(x, torch.tensor([0, 0, 0, 2, 2, 2]), 3, 1, -6.0)


@pytest.mark.parametrize("sizes", [(30, 700), (5, 1), (450, 500), (490, 610)])
def test_axes_are_those_of_the_singular_value_decomposition(generator, sizes):
    m, r = 480, 3
    label = torch.arange(2).repeat_interleave(torch.tensor(sizes))
    stretch = torch.linspace(1, 3, m, dtype=torch.float64)
    x = 5 + stretch * torch.randn(sum(sizes), m, generator=generator, dtype=torch.float64)
    groups = group_axes(x, label, 2, r)
    assert groups.count.tolist() == list(sizes)
    for k in range(2):
        points = x[label == k].numpy()
        centred = points - points.mean(0)
        _, singular, axes = np.linalg.svd(centred, full_matrices=False)
        rank = min(r, len(points) - 1)
        expected = axes[:rank].T * singular[:rank]
        got = groups.axes[k].numpy()
        # Axes have no sign; the outer product has.
        np.testing.assert_allclose(got @ got.T, expected @ expected.T, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(np.linalg.norm(got[:, :rank], axis=0), singular[:rank])
        assert not got[:, rank:].any()
        np.testing.assert_allclose(groups.mean[k], points.mean(0))
        np.testing.assert_allclose(groups.square[k], centred.var(0) * len(points), atol=1e-10)


def test_one_pass_over_the_groups_serves_every_shrinkage(blobs):
    x, label = blobs
    groups = group_axes(x, label, 3, 2)
    for shrinkage in (0.0, 5.0, 80.0):
        expected = local_factor_analyzers(x, label, 3, 2, -9.0, shrinkage)
        got = shrunk_factor_analyzers(groups, -9.0, shrinkage)
        for name, value in vars(expected).items():
            assert torch.equal(value, getattr(got, name)), name


def test_large_groups_of_one_point_have_no_axes():
    x = torch.ones(1000, 500)
    x[500:] = 2
    groups = group_axes(x, (x[:, 0] > 1).long(), 2, 3)
    assert not groups.axes.any()
    assert not groups.square.any()


def test_kmeans_on_some_points_groups_all_of_them(blobs):
    x, label = blobs
    some, again = (
        kmeans(x, 3, torch.Generator().manual_seed(3), n_points=60).tolist() for _ in range(2)
    )
    assert some == again
    assert len(set(zip(some, label.tolist(), strict=True))) == 3
    every, enough = (
        kmeans(x, 3, torch.Generator().manual_seed(3), n_points=n) for n in (None, len(x))
    )
    assert torch.equal(every, enough)
    with pytest.raises(ValueError, match="needs 3 distinct points, found 2 among 2"):
        kmeans(x, 3, torch.Generator().manual_seed(3), n_points=2)


def test_groups_are_found_in_points_whose_gaps_were_filled(blobs, generator):
    x, label = blobs
    gaps = torch.rand(x.shape, generator=generator) < 0.2
    holed = x.masked_fill(gaps, torch.nan)
    filled = fill_gaps(holed, 2, -10.0)
    assert filled.dtype == x.dtype
    assert torch.equal(filled[~gaps], x[~gaps])
    assert torch.equal(filled, fill_gaps(holed, 2, -10.0))
    error, plain = (
        (f - x)[gaps].square().mean() for f in (filled, holed.nanmean(0).expand(x.shape))
    )
    assert error < 0.5 * plain
    found = kmeans(filled, 3, generator)
    share = torch.stack([torch.bincount(label[found == c], minlength=3) for c in range(3)])
    assert share.amax(1).sum() > 0.9 * len(x)
    assert fill_gaps(x, 2, -10.0) is x
    with pytest.raises(ValueError, match="feature 1 of x is missing in every point"):
        fill_gaps(torch.tensor([[0.0, torch.nan], [1.0, torch.nan]]), 1, -10.0)
