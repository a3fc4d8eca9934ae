from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from cpmm.baselines.merging import (
    _root_quadrature,
    frechet_distances,
    gaussian_affinity,
    merge_components,
    overlap_affinity,
)
from cpmm.factor_analyzers import FactorAnalyzers
from cpmm.mixture import Mixture
from tests.oracles import (
    best_accuracy,
    dense_component_log_prob,
    dense_covariance,
    dense_log_prob,
    random_factor_analyzers,
)


def dense_frechet(fa: FactorAnalyzers) -> np.ndarray:
    """Dowson & Landau's formula with matrix roots, (K, K)."""
    covariance, mean, k = dense_covariance(fa), fa.mean.numpy(), fa.n_components
    squares = np.zeros((k, k))
    for i, j in np.ndindex(k, k):
        root = sqrtm(covariance[i]).real
        cross = sqrtm(root @ covariance[j] @ root).real
        squares[i, j] = np.sum((mean[i] - mean[j]) ** 2) + np.trace(
            covariance[i] + covariance[j] - 2 * cross
        )
    return np.sqrt(squares.clip(0))


def blobs(generator: torch.Generator) -> tuple[Mixture, list[int]]:
    """Four blobs of 2, 3, 4 and 3 components that overlap within a blob, shuffled; their blob."""
    blob = torch.tensor([0] * 2 + [1] * 3 + [2] * 4 + [3] * 3)
    blob = blob[torch.randperm(12, generator=generator)]
    centre = 12 * torch.eye(4, 5, dtype=torch.float64)
    fa = random_factor_analyzers(generator, 12, 5, 2)
    return Mixture(replace(fa, mean=centre[blob] + 0.25 * fa.mean), (1,) * 12), blob.tolist()


def by_frechet(mixture: Mixture, generator: torch.Generator) -> Tensor:
    return gaussian_affinity(frechet_distances(mixture.components))


def by_local_frechet(mixture: Mixture, generator: torch.Generator) -> Tensor:
    return gaussian_affinity(frechet_distances(mixture.components), 2)


def by_overlap(mixture: Mixture, generator: torch.Generator) -> Tensor:
    return overlap_affinity(mixture, mixture.sample(2000, generator)[0], 5.0)


AFFINITIES = [by_frechet, by_local_frechet, by_overlap]


@pytest.mark.parametrize(("m", "r"), [(1, 1), (3, 3), (5, 2), (40, 4)])
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_frechet_distances_are_those_of_dense_roots(generator, m, r, spread):
    fa = random_factor_analyzers(generator, 5, m, r)
    fa = replace(fa, log_diagonal=spread * fa.log_diagonal, loading=spread * fa.loading)
    distance = frechet_distances(fa)
    expected = dense_frechet(fa)
    np.fill_diagonal(expected, 0)  # the roots leave the root of a rounding error there
    np.testing.assert_allclose(distance, expected, rtol=1e-7)
    assert torch.equal(distance, distance.T)


def test_frechet_distances_at_image_size(generator):
    fa = random_factor_analyzers(generator, 2, 784, 6)
    # The eigenvalues of S1 S2, by those of a symmetric matrix similar to it.
    first, second = dense_covariance(fa)
    cholesky = np.linalg.cholesky(first)
    root = np.sqrt(np.linalg.eigvalsh(cholesky.T @ second @ cholesky))
    means = (fa.mean[0] - fa.mean[1]).square().sum()
    expected = float(means) + np.trace(first + second) - 2 * root.sum()
    assert float(frechet_distances(fa)[0, 1] ** 2) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_diagonal_gaussians_is_that_of_their_deviations(generator):
    fa = random_factor_analyzers(generator, 4, 6, 1)
    fa.loading.zero_()
    parameters = torch.cat([fa.mean, (0.5 * fa.log_diagonal).exp()], 1)
    torch.testing.assert_close(frechet_distances(fa), torch.cdist(parameters, parameters))


def test_blocks_and_tolerance_change_little(generator, monkeypatch):
    fa = random_factor_analyzers(generator, 6, 5, 2)
    whole = frechet_distances(fa)
    monkeypatch.setattr("cpmm.baselines.merging.BLOCK", 1)
    torch.testing.assert_close(frechet_distances(fa), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(frechet_distances(fa, 1e-6), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("low", "high"), [(1, 1), (1e-2, 1e2), (1e-7, 1e7), (1e-10, 1e7), (1e-17, 1e5)]
)
@pytest.mark.parametrize("tolerance", [1e-4, 1e-8, 1e-12])
def test_the_quadrature_of_roots_keeps_its_tolerance(low, high, tolerance):
    nodes, weights = _root_quadrature(low, high, tolerance)
    x = torch.from_numpy(np.geomspace(low, high, 101))
    got = torch.log1p((x[:, None] - low) / (low + nodes.square())) @ weights
    error = (got - (x.sqrt() - low**0.5)).abs() / x.sqrt()
    assert float(error.max()) < 10 * tolerance


def test_affinities_of_distances_are_gaussian(generator):
    distance = torch.tensor([[0.0, 1, 2], [1, 0, 4], [2, 4, 0]])
    expected = np.exp(-(distance.numpy() ** 2) / (2 * 2**2))
    np.testing.assert_allclose(gaussian_affinity(distance), expected, rtol=1e-6)
    scale = np.array([1, 1, 2])
    expected = np.exp(-(distance.numpy() ** 2) / (2 * np.outer(scale, scale)))
    np.testing.assert_allclose(gaussian_affinity(distance, 1), expected, rtol=1e-6)
    assert bool((gaussian_affinity(torch.zeros(3, 3)) == 1).all())


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_overlap_is_the_cosine_of_responsibilities(generator, temperature):
    mixture = Mixture(random_factor_analyzers(generator, 4, 3, 1), (4,), batch_size=7)
    x = mixture.sample(50, generator)[0]
    joint = dense_component_log_prob(x, mixture.components) + mixture.components.log_weight.numpy()
    r = np.exp(joint / temperature)
    r /= r.sum(1, keepdims=True)
    expected = r.T @ r / np.sqrt(np.outer((r**2).sum(0), (r**2).sum(0)))
    np.testing.assert_allclose(overlap_affinity(mixture, x, temperature), expected, rtol=1e-9)


def test_a_component_far_from_all_points_still_has_overlaps(generator):
    fa = random_factor_analyzers(generator, 3, 3, 1)
    x = Mixture(fa, (3,)).sample(50, generator)[0]
    fa.mean[2] = 1e3
    affinity = overlap_affinity(Mixture(fa, (3,)), x)
    assert bool(torch.isfinite(affinity).all())
    torch.testing.assert_close(affinity.diagonal(), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_blobs_of_several_components_merge_into_their_clusters(generator, affinity):
    mixture, blob = blobs(generator)
    x, index = mixture.sample(500, generator)
    merged = merge_components(mixture, affinity(mixture, generator), 4, generator)
    assert sorted(merged.cluster_sizes) == [2, 3, 3, 4]
    label = np.array(blob)[index]
    assert best_accuracy(label, merged.predict(x).numpy(), 4, 4) == 1
    # Only the order of the components is another.
    np.testing.assert_allclose(merged.log_prob(x), dense_log_prob(x, mixture.components), rtol=1e-9)
    rows = {tuple(row) for row in merged.components.mean.tolist()}
    assert rows == {tuple(row) for row in mixture.components.mean.tolist()}


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_identical_components_merge(generator, affinity):
    fa = random_factor_analyzers(generator, 4, 3, 1)
    fa = replace(fa, mean=3 * fa.mean).select(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    mixture = Mixture(fa, (1,) * 8)
    merged = merge_components(mixture, affinity(mixture, generator), 4, generator)
    assert merged.cluster_sizes == (2, 2, 2, 2)
    pairs = merged.components.mean.unflatten(0, (4, 2))
    assert torch.equal(pairs[:, 0], pairs[:, 1])


def test_merged_mixtures_save_and_load(generator, tmp_path):
    mixture, _ = blobs(generator)
    merged = merge_components(mixture, by_frechet(mixture, generator), 4, generator)
    merged.save(tmp_path)
    assert Mixture.load(tmp_path).cluster_sizes == merged.cluster_sizes


@pytest.mark.parametrize("n_clusters", [1, 12])
def test_one_cluster_and_as_many_as_components(generator, n_clusters):
    mixture, _ = blobs(generator)
    merged = merge_components(
        mixture, torch.ones(12, 12) if n_clusters == 1 else torch.eye(12), n_clusters, generator
    )
    assert merged.cluster_sizes == (12 // n_clusters,) * n_clusters
    assert torch.equal(merged.components.mean, mixture.components.mean)


def test_parts_that_nothing_ties_are_clusters(generator):
    mixture, blob = blobs(generator)
    same = torch.tensor(blob)[:, None] == torch.tensor(blob)
    merged = merge_components(mixture, same.double(), 4, generator)
    assert sorted(merged.cluster_sizes) == [2, 3, 3, 4]
    with pytest.raises(ValueError, match="falls into 4 parts that nothing ties, more than the 3"):
        merge_components(mixture, same.double(), 3, generator)


def test_same_seed_gives_the_same_clusters(generator):
    mixture = Mixture(random_factor_analyzers(generator, 30, 4, 1), (30,))
    affinity = by_frechet(mixture, generator)
    first, second = (
        merge_components(mixture, affinity, 5, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert first.cluster_sizes == second.cluster_sizes
    assert torch.equal(first.components.mean, second.components.mean)


@pytest.mark.parametrize(
    ("affinity", "n_clusters", "message"),
    [
        (torch.ones(3, 3), 2, r"affinity must be \(12, 12\), the mixture has 12 components"),
        (torch.full((12, 12), torch.nan), 2, "144 of 144 affinities are not finite or negative"),
        (-torch.eye(12), 2, "12 of 144 affinities"),
        (torch.ones(12, 12).triu(), 2, "must be symmetric"),
        (torch.ones(12, 12), 13, "12 components into 13 clusters: expected 1 <= C <= K = 12"),
        (torch.ones(12, 12), 0, "into 0 clusters"),
    ],
)
def test_what_cannot_be_merged_raises(generator, affinity, n_clusters, message):
    with pytest.raises(ValueError, match=message):
        merge_components(blobs(generator)[0], affinity, n_clusters, generator)


def test_arguments_out_of_range_raise(generator):
    mixture, _ = blobs(generator)
    with pytest.raises(ValueError, match="temperature of the overlap is 0"):
        overlap_affinity(mixture, torch.zeros(2, 5, dtype=torch.float64), 0)
    with pytest.raises(ValueError, match="tolerance of the distances is 1"):
        frechet_distances(mixture.components, 1)
    with pytest.raises(ValueError, match="no neighbour number 12: expected from 1 to 11"):
        gaussian_affinity(torch.ones(12, 12), 12)


@pytest.mark.parametrize("name", ["mean", "loading", "log_diagonal"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_broken_components_have_no_distances(generator, name, value):
    fa = random_factor_analyzers(generator, 3, 4, 2)
    getattr(fa, name)[0, 0] = value
    with pytest.raises(FloatingPointError, match="not finite and positive"):
        frechet_distances(fa)
