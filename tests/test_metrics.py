from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from cpmm.metrics import (
    clustering_scores,
    confusion,
    detection_scores,
    match_clusters,
    nats_per_dimension,
)
from cpmm.preprocessing import Preprocessing
from tests.oracles import best_accuracy


@given(
    n_classes=st.integers(1, 5),
    n_clusters=st.integers(1, 5),
    n=st.integers(1, 30),
    unlabelled=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_accuracy_is_that_of_the_best_of_all_matchings(n_classes, n_clusters, n, unlabelled, seed):
    rng = np.random.default_rng(seed)
    label, cluster = rng.integers(n_classes, size=n), rng.integers(n_clusters, size=n)
    expected = best_accuracy(label, cluster, n_classes, n_clusters)
    if unlabelled:
        label = np.append(label, np.full(7, -1))
        cluster = np.append(cluster, rng.integers(n_clusters, size=7))
    scores = clustering_scores(label, cluster, n_clusters)
    assert scores["accuracy"] == pytest.approx(expected)
    member = label >= 0
    commonest = [
        np.bincount(label[member & (cluster == c)]).max()
        for c in range(n_clusters)
        if (member & (cluster == c)).any()
    ]
    assert scores["purity"] == pytest.approx(sum(commonest) / n)
    assert scores["purity"] >= scores["accuracy"] - 1e-12


def test_a_renamed_clustering_is_perfect_and_shuffled_labels_are_not():
    rng = np.random.default_rng(0)
    label = rng.integers(4, size=4000)
    renamed = np.array([2, 0, 3, 1])[label]
    perfect = {"accuracy": 1.0, "purity": 1.0, "nmi": 1.0, "ari": 1.0}
    assert clustering_scores(label, renamed, 4) == pytest.approx(perfect)
    chance = clustering_scores(label, rng.permutation(renamed), 4)
    assert abs(chance["ari"]) < 0.01
    assert chance["nmi"] < 0.01
    assert chance["accuracy"] < 0.3


def test_nmi_and_ari_by_hand():
    label, cluster = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 2, 2])
    counts = np.array([[2, 1, 0], [0, 1, 2]])
    joint = counts / 6
    a, b = joint.sum(1), joint.sum(0)
    mutual = sum(
        joint[i, j] * math.log(joint[i, j] / a[i] / b[j])
        for i in range(2)
        for j in range(3)
        if joint[i, j]
    )
    entropies = [-(p * np.log(p)).sum() for p in (a, b)]
    pairs = [sum(math.comb(int(k), 2) for k in t) for t in (counts.flat, 6 * a, np.round(6 * b))]
    chance = pairs[1] * pairs[2] / math.comb(6, 2)
    scores = clustering_scores(label, cluster, 3)
    assert scores["nmi"] == pytest.approx(mutual / np.mean(entropies))
    assert scores["ari"] == pytest.approx((pairs[0] - chance) / (np.mean(pairs[1:]) - chance))


def test_clusters_left_over_match_no_class():
    label, cluster = np.array([0, 0, 0, 1, 1]), np.array([3, 3, 0, 2, 2])
    assert match_clusters(label, cluster, 5).tolist().count(-1) == 3
    assert match_clusters(label, cluster, 5)[[2, 3]].tolist() == [1, 0]
    assert clustering_scores(label, cluster, 5)["accuracy"] == pytest.approx(4 / 5)


def test_confusion_counts_every_point():
    label, cluster = np.array([0, 2, 2, 2]), np.array([1, 0, 0, 1])
    expected = [[0, 1, 0], [0, 0, 0], [2, 1, 0]]
    np.testing.assert_array_equal(confusion(label, cluster, 3, 3), expected)


def test_no_labels_raise():
    with pytest.raises(ValueError, match="every point has label -1"):
        clustering_scores(np.array([-1, -1]), np.array([0, 1]), 2)


def test_bits_are_the_cost_of_a_dequantized_level():
    # z = 3 x of one dimension in [0, 1] with 8 levels, scored by N(1, 2^2) on z.
    x = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    log_prob = torch.from_numpy(norm(1, 2).logpdf(3 * x))
    log_det = torch.full((3,), math.log(3), dtype=torch.float64)
    density = norm(1 / 3, 2 / 3).pdf(x)  # of x
    np.testing.assert_allclose(nats_per_dimension(log_prob, log_det, 1), -np.log(density))
    _, factor, offset = Preprocessing(8, 0.01, (0.0,), (1.0,)).density_unit
    nats = nats_per_dimension(log_prob, log_det, 1)
    np.testing.assert_allclose(factor * nats + offset, -np.log2(density / 8))
    # Per dimension: two equal ones cost the same.
    np.testing.assert_allclose(nats_per_dimension(2 * log_prob, 2 * log_det, 2), nats)


def test_detection_is_the_share_of_pairs_in_order_and_the_mean_precision(generator):
    inside = torch.randn(80, generator=generator).numpy() + 0.7
    outside = torch.randn(50, generator=generator).numpy()
    got = detection_scores(inside, outside)
    pairs = inside[:, None] > outside
    assert got["auroc"] == pytest.approx(pairs.mean())

    def precision(own, others):  # at each of the own points, from the highest score down
        return np.mean([(own >= t).sum() / ((own >= t).sum() + (others >= t).sum()) for t in own])

    assert got["aupr"] == pytest.approx(precision(inside, outside))
    assert got["aupr_out"] == pytest.approx(precision(-outside, -inside))
    assert detection_scores(outside, inside)["auroc"] == pytest.approx(1 - got["auroc"])


def test_detection_of_equal_scores_is_chance():
    got = detection_scores(np.zeros(30), np.zeros(10))
    assert got == {"auroc": 0.5, "aupr": 0.75, "aupr_out": 0.25}
    with pytest.raises(ValueError, match="got 30 and 0"):
        detection_scores(np.zeros(30), np.zeros(0))
