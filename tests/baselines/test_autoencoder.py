from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cpmm.baselines.autoencoder import Autoencoder, CodeClusters
from cpmm.metrics import clustering_scores
from tests.baselines.deep import blobs, train

LIKELIHOODS = ("gaussian", "bernoulli")


def layer_sizes(model: Autoencoder) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")]


def by_hand(model: Autoencoder, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes and outputs by a loop over the layers."""
    layers = [p.detach().numpy() for p in model.parameters()]
    pairs = list(zip(layers[::2], layers[1::2], strict=True))
    h, middle = x.numpy(), len(pairs) // 2 - 1
    for index, (weight, bias) in enumerate(pairs):
        h = h @ weight.T + bias
        if index == middle:
            codes = h
        elif index < len(pairs) - 1:
            h = np.maximum(h, 0)
    return codes, h


def test_it_has_the_layers_of_the_paper(generator):
    model = Autoencoder(784, (500, 500, 2000), 10, "bernoulli", generator)
    sizes = [(784, 500), (500, 500), (500, 2000), (2000, 10)]
    assert layer_sizes(model) == [size[::-1] for size in sizes] + sizes[::-1]


@pytest.mark.parametrize("hidden", [(), (4,), (4, 3)])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_codes_points_and_loss_are_those_of_the_layers(likelihood, hidden, generator):
    model = Autoencoder(5, hidden, 2, likelihood, generator).double()
    x = torch.rand(7, 5, generator=generator, dtype=torch.float64)
    codes, output = by_hand(model, x)
    points, error = output, (output - x.numpy()) ** 2
    if likelihood == "bernoulli":
        points = 1 / (1 + np.exp(-output))
        error = -(x.numpy() * np.log(points) + (1 - x.numpy()) * np.log(1 - points))
    with torch.no_grad():
        np.testing.assert_allclose(model.encode(x), codes)
        np.testing.assert_allclose(model.codes(x), codes)
        np.testing.assert_allclose(model.decode(model.encode(x)), points)
        np.testing.assert_allclose(model.loss(x), error.mean())


def test_the_layers_keep_the_variance(generator):
    model = Autoencoder(100, (400, 400, 400), 100, "gaussian", generator)
    x = torch.randn(500, 100, generator=generator)
    with torch.no_grad():
        assert 0.5 < float(model.encode(x).std()) < 2


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_it_clusters_blobs_without_labels(likelihood, generator, tmp_path):
    x, label = blobs(likelihood, generator)
    model = Autoencoder(6, (16,), 2, likelihood, generator)
    before = model.loss(x).item()
    train(model, x, tmp_path, 15)
    assert model.loss(x).item() < before
    clusters = model.cluster(x[:240], 3, generator)
    scores = clustering_scores(label[240:].numpy(), clusters.predict(x[240:]).numpy(), 3)
    assert scores["accuracy"] > 0.95


def test_centres_are_the_means_of_their_codes(generator):
    model = Autoencoder(6, (4,), 2, "gaussian", generator)
    x, _ = blobs("gaussian", generator)
    clusters = model.cluster(x, 3, generator)
    codes, group = model.codes(x), clusters.predict(x)
    for c, centre in enumerate(clusters.centre):
        torch.testing.assert_close(centre, codes[group == c].mean(0))
    other = CodeClusters(Autoencoder(6, (4,), 2, "gaussian", generator), torch.zeros(3, 2))
    other.load_state_dict(clusters.state_dict())
    assert torch.equal(other.predict(x), group)


def test_the_same_seed_gives_the_same_and_no_draw_comes_from_elsewhere():
    results = []
    state = torch.get_rng_state()
    for _ in range(2):
        generator = torch.Generator().manual_seed(4)
        x, _ = blobs("gaussian", generator)
        model = Autoencoder(6, (4,), 2, "gaussian", generator)
        results.append((model.code.weight, model.cluster(x, 3, generator).centre))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    other = Autoencoder(6, (4,), 2, "gaussian", torch.Generator().manual_seed(5))
    assert not torch.equal(other.code.weight, model.code.weight)


def test_wrong_arguments_raise(generator):
    with pytest.raises(ValueError, match=r"layers are \(5, 0, 2\): expected positive"):
        Autoencoder(5, (0,), 2, "gaussian", generator)
    with pytest.raises(ValueError, match="'poisson': choose one of gaussian, bernoulli"):
        Autoencoder(5, (4,), 2, "poisson", generator)


def test_wrong_points_raise(generator):
    model = Autoencoder(5, (4,), 2, "bernoulli", generator)
    x = torch.rand(8, 5, generator=generator)
    with pytest.raises(ValueError, match=r"shape \(8, 3\): expected \(N, 5\)"):
        model.loss(x[:, :3])
    with pytest.raises(ValueError, match=r"shape \(5,\): expected \(N, 5\)"):
        model.encode(x[0])
    with pytest.raises(ValueError, match=r"codes have 3 numbers, the autoencoder's 2"):
        model.decode(x[:, :3])
    with pytest.raises(ValueError, match=r"torch.uint8, the autoencoder torch.float32: convert it"):
        model.loss((255 * x).byte())
    x[3, 1], x[4, 4] = -0.01, torch.nan
    with pytest.raises(ValueError, match=r"2 of 40 values of x are outside \[0, 1\]"):
        model.loss(x)


def test_clusters_without_enough_points_raise(generator):
    model = Autoencoder(6, (4,), 2, "gaussian", generator)
    x, _ = blobs("gaussian", generator)
    with pytest.raises(ValueError, match="expected 1 <= C <= N = 2 points"):
        model.cluster(x[:2], 3, generator)
    with torch.no_grad():
        model.code.weight.zero_()  # it has collapsed
    with pytest.raises(ValueError, match="needs 3 distinct points, found 1 among 300"):
        model.cluster(x, 3, generator)
    with torch.no_grad():
        model.code.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="codes of 300 of 300 points are not finite"):
        model.cluster(x, 3, generator)
