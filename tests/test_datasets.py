from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from cpmm.datasets import rings, spiral


def rng(seed: int = 20230723) -> np.random.Generator:
    return np.random.default_rng(seed)


def polar(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.hypot(*x.T), np.rad2deg(np.arctan2(x[:, 1], x[:, 0])) % 360


@pytest.mark.parametrize("draw", [rings, spiral])
def test_draws_are_typed_and_seeded(draw):
    x, label = draw(1001, rng())
    again, _ = draw(1001, rng())
    other, _ = draw(1001, rng(1))
    assert x.shape == (1001, 2)
    assert label.shape == (1001,)
    assert (x.dtype, label.dtype) == (np.float64, np.int64)
    assert np.array_equal(x, again)
    assert not np.array_equal(x, other)


@pytest.mark.parametrize("draw", [rings, spiral])
def test_rows_are_exchangeable(draw):
    _, label = draw(2000, rng())
    halves = [np.bincount(half + 1, minlength=6) for half in np.split(label, 2)]
    # a class has at most 1000 members, of which half +- 5 standard errors lie in the first half
    assert np.abs(halves[0] - halves[1]).max() < 5 * np.sqrt(1000)


def test_rings_are_broken_circles_ten_percent_apart():
    x, label = rings(20_000, rng(), radius=2.0, thickness=0.01, gaps=(60, 240), gap_width=50)
    distance, angle = polar(x)
    assert np.bincount(label).tolist() == [10_000, 10_000]
    for ring, (radius, gap) in enumerate([(2.0, 60), (2.2, 240)]):
        r, from_gap = (
            distance[label == ring],
            np.abs((angle[label == ring] - gap + 180) % 360 - 180),
        )
        assert abs(r.mean() - radius) < 5 * 0.02 / 100
        assert abs(r.std() / 0.02 - 1) < 5 / np.sqrt(2 * 10_000)
        assert from_gap.min() >= 25
        # uniform over the rest: the quarter circle opposite the gap holds 90 of 310 degrees
        share = 90 / 310
        assert abs((from_gap > 135).mean() - share) < 5 * np.sqrt(share * (1 - share) / 10_000)


def test_default_rings_do_not_overlap():
    x, label = rings(20_000, rng())
    wrong = (polar(x)[0] > 1.05) != label
    assert wrong.sum() <= 5  # 20,000 * P(a normal is beyond 0.05 / 0.012 = 4.17) = 0.3


def test_spiral_arms_start_near_the_origin_and_curve_outward():
    x, label = spiral(5000, rng(), start=0.15, twist=120, noise=0, outlier_fraction=0)
    distance, angle = polar(x)
    assert np.bincount(label).tolist() == [1000] * 5
    assert 0.15 <= distance.min() < 0.16
    assert 0.99 < distance.max() <= 1
    expected = 72 * label + 120 * (distance - 0.15) / 0.85
    assert np.abs((angle - expected + 180) % 360 - 180).max() < 1e-9


def test_spiral_arms_are_separable_despite_the_noise():
    x, label = spiral(5000, rng())
    member = label >= 0
    train = np.flatnonzero(member)[::2]
    test = np.flatnonzero(member)[1::2]
    model = KNeighborsClassifier(5).fit(x[train], label[train])
    assert model.score(x[test], label[test]) > 0.99


def test_spiral_outliers_lie_between_the_arms():
    x, label = spiral(5000, rng(), outlier_fraction=0.02)
    assert np.bincount(label + 1).tolist() == [100, *[980] * 5]
    clean, _ = spiral(5000, rng(1), noise=0, outlier_fraction=0)
    to_arm = NearestNeighbors(n_neighbors=1).fit(clean).kneighbors(x)[0][:, 0]
    # midway is 0.18 or more from both arms, and 3 standard deviations of the noise are 0.075
    assert to_arm[label == -1].min() > 0.1
    assert np.median(to_arm[label >= 0]) < 0.025


@pytest.mark.parametrize(
    ("draw", "options", "message"),
    [
        (rings, {"n": 0}, "n is 0"),
        (rings, {"n": 1e3}, "n is 1000.0: expected a whole number"),
        (rings, {"radius": 0.0}, "radius 0.0"),
        (rings, {"ratio": 1.0}, "ratio 1.0"),
        (rings, {"thickness": -0.1}, "thickness -0.1"),
        (rings, {"gaps": (0.0,)}, r"2 gaps .* got gaps \(0.0,\)"),
        (rings, {"gap_width": 360.0}, "gap_width 360.0"),
        (spiral, {"n": -3}, "n is -3"),
        (spiral, {"arms": 0}, "arms is 0"),
        (spiral, {"start": 1.0}, "start 1.0"),
        (spiral, {"noise": -0.1}, "noise -0.1"),
        (spiral, {"outlier_fraction": 1.0}, "outlier_fraction 1.0"),
    ],
)
def test_arguments_are_checked(draw, options, message):
    with pytest.raises(ValueError, match=message):
        draw(**{"n": 10, "generator": rng(), **options})
