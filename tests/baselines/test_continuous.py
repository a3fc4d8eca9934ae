from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from scipy.stats import multivariate_normal, norm
from torch import Tensor, nn

from cpmm.baselines.continuous import (
    ContinuousMixture,
    ConvDecoder,
    MLPDecoder,
    initial_state,
    integration_points,
)
from cpmm.training.epochs import EpochData, Recorded, Rows
from cpmm.training.loss import LossTraining
from cpmm.trajectory import StateLayout
from tests.oracles import torch_mixture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")

M, R = 3, 1
LAYOUT = StateLayout(M, R, augmentation=0)


def make_mixture(
    n_latent: int = 1, n_points: int = 16, n_components: int = 32, layout: StateLayout = LAYOUT
) -> ContinuousMixture:
    torch.manual_seed(0)
    decoder = MLPDecoder(n_latent, layout.size, 16, 1, "tanh")
    initial = 0.3 * torch.randn(layout.size)
    return ContinuousMixture(decoder, layout, initial, n_latent, n_points, n_components).double()


def points_of(generator: torch.Generator, n: int = 5) -> Tensor:
    return torch.randn(n, M, generator=generator, dtype=torch.float64)


def dense_density(model: ContinuousMixture, z: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Density of points, (N, M), given one latent point, (d,), with the state read by hand."""
    with torch.no_grad():
        state = (model.initial + model.decoder(torch.as_tensor(z)[None]))[0].numpy()
    mean, loading, raw = state[:M], state[M : 2 * M, None], state[2 * M :]
    floor = model.layout.log_diagonal_floor
    log_diagonal = floor + np.logaddexp(0, raw - floor)
    covariance = loading @ loading.T + np.diag(np.exp(log_diagonal))
    return multivariate_normal(mean, covariance).pdf(x)


def test_log_prob_is_that_of_quadrature_in_one_dimension(generator):
    model, x = make_mixture(), points_of(generator)
    # The trapezoidal rule is all but exact for smooth functions that vanish on both sides.
    z = np.linspace(-8, 8, 321)
    density = np.stack([dense_density(model, np.array([u]), x.numpy()) for u in z])
    expected = (z[1] - z[0]) * norm.pdf(z) @ density
    with torch.no_grad():
        got = model.extract(4096).log_prob(x)
    np.testing.assert_allclose(got, np.log(expected), atol=2e-5)


def test_log_prob_is_that_of_quadrature_in_two_dimensions(generator):
    model, x = make_mixture(2), points_of(generator)
    z, weight = np.polynomial.hermite_e.hermegauss(24)
    expected = sum(
        a * b * dense_density(model, np.array([u, v]), x.numpy())
        for u, a in zip(z, weight, strict=True)
        for v, b in zip(z, weight, strict=True)
    ) / (2 * np.pi)
    with torch.no_grad():
        got = model.extract(4096).log_prob(x)
    np.testing.assert_allclose(got, np.log(expected), atol=2e-3)


@pytest.mark.parametrize("n_latent", [1, 2, 4])
def test_a_linear_decoder_is_a_gaussian(generator, n_latent):
    # mu(z) = b + W z with A and D constant has the covariance W W^T + A A^T + D.
    model = make_mixture(n_latent)
    decoder = nn.Linear(n_latent, LAYOUT.size, bias=False).double()
    with torch.no_grad():
        decoder.weight[M:] = 0
    model.decoder = decoder
    x = points_of(generator)
    with torch.no_grad():
        fa = model.decode(torch.zeros(1, n_latent, dtype=torch.float64))
        weight = decoder.weight[:M]
        gaussian = multivariate_normal(fa.mean[0], fa.covariance()[0] + weight @ weight.T)
        got = model.extract(1 << 13).log_prob(x)
    np.testing.assert_allclose(
        got, gaussian.logpdf(x.numpy()), atol=[0, 1e-5, 1e-3, 0, 5e-3][n_latent]
    )


@pytest.mark.parametrize("n_latent", [1, 2])
def test_the_log_density_converges_with_the_points(generator, n_latent):
    model, x = make_mixture(n_latent), points_of(generator, 50)
    with torch.no_grad():
        best = model.extract(1 << 14).log_prob(x)
        sizes = [16, 64, 256, 1024]
        errors = [float((model.extract(n).log_prob(x) - best).abs().mean()) for n in sizes]
    assert errors == sorted(errors, reverse=True)
    # Monte Carlo would halve the error with four times the points; at least 2.5 times is expected.
    assert errors[-1] < errors[0] / 2.5**3


def test_random_points_are_unbiased_and_vary_little(generator):
    model, x = make_mixture(2), points_of(generator)
    with torch.no_grad():
        expected = model.extract(1 << 13).log_prob(x).exp()
        draws = []
        for _ in range(200):
            mixture = model._integrate(64, torch.rand(2, generator=generator))
            draws.append(mixture.log_prob(x).exp())
        by_chance = model.decode(torch.randn(20_000, 2, generator=generator).double())
    draws = torch.stack(draws)
    error = draws.std(0) / 200**0.5
    assert bool(((draws.mean(0) - expected).abs() < 5 * error + 1e-3 * expected).all())
    one = torch_mixture(by_chance).component_distribution.log_prob(x[:, None]).exp()
    assert bool((draws.std(0) < 0.5 * one.std(1) / 64**0.5).all())


@pytest.mark.parametrize("n_latent", [1, 2, 4])
@pytest.mark.parametrize("n", [64, 250])
def test_integration_points_are_those_of_a_gaussian(generator, n_latent, n):
    z = integration_points(n, n_latent, torch.zeros(n_latent))
    assert z.shape == (n, n_latent)
    np.testing.assert_allclose(norm.cdf(z[:, 0]), (np.arange(n) + 0.5) / n)
    assert float(z.mean(0).abs().max()) < 0.05
    assert float((z.std(0) - 1).abs().max()) < 0.05
    # Rotated, every coordinate of every point is uniform.
    shifts = torch.rand(400, n_latent, generator=generator)
    cube = norm.cdf(torch.stack([integration_points(n, n_latent, s)[3] for s in shifts]))
    assert np.abs(cube.mean(0) - 0.5).max() < 5 * (1 / 12 / 400) ** 0.5
    assert np.abs(cube.std(0) - 12**-0.5).max() < 0.03


def test_training_rotates_the_points_uniformly(generator):
    model, x = make_mixture(2, n_points=8), points_of(generator)
    seen = []
    model.decode = lambda z: seen.append(z) or ContinuousMixture.decode(model, z)
    for _ in range(500):
        model.loss(x, generator)
    within = (norm.cdf(torch.stack(seen)[:, 3]) * [8, 1]) % 1  # in its cell, and anywhere
    assert np.abs(within.mean(0) - 0.5).max() < 5 * (1 / 12 / 500) ** 0.5
    assert np.abs(np.corrcoef(within.T)[0, 1]) < 5 / 500**0.5
    counts = np.stack([np.histogram(column, 4, (0, 1))[0] for column in within.T])
    assert np.abs(counts - 125).max() < 5 * (500 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("n_latent", [1, 2, 4])
@pytest.mark.parametrize("n", [4, 32, 250])
def test_the_extracted_mixture_is_of_points_that_no_draw_rotates(n_latent, n):
    model = make_mixture(n_latent, 8, 8)
    extracted = model.extract(n)
    fa = model.decode(integration_points(n, n_latent, torch.zeros(n_latent)))
    assert torch.equal(extracted.components.mean, fa.mean)
    assert extracted.cluster_sizes == (n,)
    assert model.extract(n, separate=True).cluster_sizes == (1,) * n
    torch.testing.assert_close(
        extracted.components.log_weight, torch.full((n,), 1 / n, dtype=torch.float64).log()
    )


def test_the_loss_is_fresh_in_training_and_fixed_in_evaluation(generator):
    model, x = make_mixture(), points_of(generator)
    first, second = model.loss(x, generator), model.loss(x, generator)
    assert not torch.equal(first, second)
    seeded = [model.loss(x, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*seeded)
    model.eval()
    expected = -torch_mixture(model.extract(32).components).log_prob(x).mean() / M
    torch.testing.assert_close(model.loss(x, generator), expected)


def test_it_starts_at_the_datas_mean_and_variances(generator):
    x = torch.tensor([0.5, 2.0, 1.0]) * torch.randn(500, M, generator=generator) + 3
    model = make_mixture()
    model.initial.data = initial_state(LAYOUT, x, generator, loading_scale=0.0).double()
    model.decoder = nn.Linear(1, LAYOUT.size, bias=False).double()
    nn.init.zeros_(model.decoder.weight)
    mixture = model.extract(4)
    assert torch.allclose(mixture.components.mean.float(), x.mean(0).expand(4, M))
    covariance = torch.diag(x.var(0, correction=0)).expand(4, M, M)
    assert torch.allclose(mixture.components.covariance().float(), covariance, atol=1e-4)


def test_a_constant_diagonal(generator):
    layout = StateLayout(M, R, augmentation=0, diagonal="constant")
    state = initial_state(layout, points_of(generator, 50), generator)
    fa = ContinuousMixture(MLPDecoder(1, layout.size, 8, 1), layout, state, 1, 8, 8).extract(8)
    log_diagonal = fa.components.log_diagonal
    assert bool((log_diagonal == log_diagonal[:, :1]).all())


class Trainer(pl.Trainer):
    def __init__(self, n_epochs: int) -> None:
        super().__init__(
            max_epochs=n_epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,
        )


def arc(generator: torch.Generator) -> Tensor:
    """Points near half a circle: far from Gaussian, of one latent dimension."""
    angle = torch.pi * torch.rand(200, generator=generator)
    x = torch.stack([angle.cos(), angle.sin(), 0 * angle], 1)
    return 1.5 * x + 0.1 * torch.randn(200, M, generator=generator)


def fit_arc(n_latent: int) -> Recorded:
    model = make_mixture(n_latent)
    start = torch.Generator().manual_seed(0)
    model.initial.data = initial_state(LAYOUT, arc(start), start)
    module = LossTraining(model.float(), 24, 0.01, 0.03, 0, 0)
    data = EpochData(
        lambda epoch, generator: Rows(x=arc(generator)),
        lambda epoch: arc(torch.Generator().manual_seed(9)),
        batch_size=20,
        seed=0,
        n_rows=lambda epoch: 200,
    )
    Trainer(module.n_epochs).fit(module, data)
    return module


@pytest.mark.parametrize("n_latent", [1, 2])
def test_training_beats_the_gaussian_and_repeats(n_latent):
    module = fit_arc(n_latent)
    x = arc(torch.Generator().manual_seed(9))
    gaussian = multivariate_normal(x.mean(0), np.cov(x.T.numpy())).logpdf(x.numpy())
    assert module.history[-1]["validation"] < -gaussian.mean() / M - 0.05
    # What was validated is what is extracted.
    with torch.no_grad():
        mixture = module.model.extract(32)
    value = -torch_mixture(mixture.components).log_prob(x).mean() / M
    assert module.history[-1]["validation"] == pytest.approx(float(value), rel=1e-4)
    if n_latent == 2:
        again = fit_arc(n_latent)
        assert again.history == module.history


def test_the_convolutional_decoder_fills_the_image(generator):
    layout = StateLayout(1 * 8 * 12, 2, augmentation=0)
    decoder = ConvDecoder(3, (layout.n_maps, 8, 12), 4, n_doublings=2, n_frequencies=1)
    x = torch.randn(20, layout.n_features, generator=generator)
    state = initial_state(layout, x, generator)
    model = ContinuousMixture(decoder, layout, state, 3, 8, 16)
    model.loss(x, generator).backward()
    assert all(bool(p.grad.any()) for p in model.parameters())
    mixture = model.extract(16)
    assert mixture.components.loading.shape == (16, 96, 2)
    assert mixture.components.n_parameters == 16 * (96 * 4 + 1)
    # A corner of the coarse image reaches seven more pixels: the other end stays as it is.
    coarse = torch.zeros(1, 4, 2, 3)
    states = []
    for value in (0.0, 1.0):
        coarse[0, :, 0, 0] = value
        states.append(decoder.layers[4:](coarse))
    changed = (states[0] != states[1]).unflatten(1, (4, 8, 12)).any(1)[0]
    assert bool(changed[0, 0])
    assert not bool(changed[:, 8:].any())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_mixture(layout=StateLayout(M, R)), "augmentation 0 and no learned_weight"),
        (
            lambda: ContinuousMixture(nn.Identity(), LAYOUT, torch.zeros(9), 0, 8, 8),
            "latent space of 0 dimensions",
        ),
        (lambda: make_mixture(4, 3), "4 dimensions with 3 integration points"),
        (
            lambda: ContinuousMixture(nn.Identity(), LAYOUT, torch.zeros(2), 1, 8, 8),
            r"initial must be \(9,\): got \(2,\)",
        ),
        (lambda: MLPDecoder(1, 9, 8, 0), "depth >= 1 and width >= 1: got 0 and 8"),
        (lambda: ConvDecoder(1, (3, 28, 28), 8, 3), "multiples of 8: got 28 and 28"),
        (lambda: ConvDecoder(1, (3, 28, 28), 0), "width >= 1: got 0"),
        (lambda: MLPDecoder(1, 9, 8, 1, "gelu"), "unknown activation 'gelu'"),
        (lambda: integration_points(0, 1, torch.zeros(1)), "at least 1: got 0"),
    ],
)
def test_what_does_not_fit_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()
