from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm
from sklearn.mixture import GaussianMixture
from torch import Tensor

from cpmm.baselines.autoencoder import BATCH, Autoencoder
from cpmm.baselines.vade import VaDE
from cpmm.metrics import clustering_scores
from tests.baselines.deep import blobs, random_vade, train

LIKELIHOODS = ("gaussian", "bernoulli")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(likelihood: str, generator: torch.Generator, n: int = 4, m: int = 5) -> Tensor:
    if likelihood == "gaussian":
        return torch.randn(n, m, generator=generator, dtype=torch.float64)
    return torch.rand(n, m, generator=generator, dtype=torch.float64)


class Oracle:
    """The model's formulas for one point and one cluster at a time, from its bare parameters."""

    def __init__(self, model: VaDE) -> None:
        self.p = {name: value.numpy() for name, value in model.state_dict().items()}
        weight = np.exp(self.p["logit"])
        self.pi = weight / weight.sum()
        self.mu, self.sigma = self.p["mean"], np.exp(0.5 * self.p["log_variance"])
        self.floor = model.log_variance_floor

    def linear(self, name: str, h: np.ndarray) -> np.ndarray:
        return h @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]

    def hidden(self, name: str, h: np.ndarray) -> np.ndarray:
        layers = {
            int(key.split(".")[2]) for key in self.p if key.startswith(f"autoencoder.{name}.")
        }
        for layer in sorted(layers):
            h = np.maximum(self.linear(f"autoencoder.{name}.{layer}", h), 0)
        return h

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        h = self.hidden("encoder", x)
        log_variance = self.linear("code_log_variance", h)
        return self.linear("autoencoder.code", h), np.exp(0.5 * log_variance)

    def log_likelihood(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Log p(x | z) for draws of z, (L, d) to (L,)."""
        h = self.hidden("decoder", z)
        output = self.linear("autoencoder.output", h)
        if "output_log_variance.weight" not in self.p:
            mu = 1 / (1 + np.exp(-output))
            return np.sum(x * np.log(mu) + (1 - x) * np.log(1 - mu), 1)
        raw = self.linear("output_log_variance", h)
        variance = np.exp(self.floor + np.log1p(np.exp(raw - self.floor)))
        return norm(output, np.sqrt(variance)).logpdf(x).sum(1)

    def log_joint(self, z: np.ndarray) -> np.ndarray:
        """Log of pi_c N(z; mu_c, sigma_c^2), (L, d) to (L, C)."""
        columns = [
            np.log(pi) + norm(mu, sigma).logpdf(z).sum(1)
            for pi, mu, sigma in zip(self.pi, self.mu, self.sigma, strict=True)
        ]
        return np.stack(columns, 1)

    def gamma(self, z: np.ndarray) -> np.ndarray:
        """VaDE Eq. 16 from draws, (L, d) to (C,)."""
        joint = np.exp(self.log_joint(z))
        return np.mean([row / row.sum() for row in joint], 0)

    def elbo(self, x: np.ndarray, noise: np.ndarray) -> float:
        """VaDE Eq. 12, term by term."""
        mean, deviation = self.encode(x)
        z = mean + deviation * noise
        gamma = self.gamma(z)
        total = np.mean(self.log_likelihood(x, z))
        for c, share in enumerate(gamma):
            for j, variance in enumerate(self.sigma[c] ** 2):
                total -= 0.5 * share * np.log(variance)
                total -= 0.5 * share * deviation[j] ** 2 / variance
                total -= 0.5 * share * (mean[j] - self.mu[c, j]) ** 2 / variance
            total += share * np.log(self.pi[c] / share)
        return total + 0.5 * np.sum(1 + 2 * np.log(deviation))

    def log_prob(self, x: np.ndarray, random: np.random.Generator) -> tuple[float, float]:
        """Log p(x) by importance sampling from a wide mixture of q(z | x) and p(z); its error."""
        mean, deviation = self.encode(x)
        n, d, near = 20_000, len(mean), norm(mean, 1.5 * deviation)
        c = random.choice(len(self.pi), n, p=self.pi)
        prior = self.mu[c] + self.sigma[c] * random.standard_normal((n, d))
        z = np.where(random.random((n, 1)) < 0.5, prior, near.rvs((n, d), random_state=random))
        log_prior = logsumexp(self.log_joint(z), axis=1)
        proposal = np.logaddexp(log_prior, near.logpdf(z).sum(1)) - np.log(2)
        weight = self.log_likelihood(x, z) + log_prior - proposal
        ratio = np.exp(weight - weight.max())
        error = ratio.std() / ratio.mean() / np.sqrt(n)
        return float(logsumexp(weight) - np.log(n)), float(error)


@pytest.mark.parametrize("n_draws", [1, 3])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_elbo_is_that_of_loops_over_the_formula(likelihood, n_draws, generator):
    model = random_vade(likelihood, generator)
    x = points(likelihood, generator)
    elbo = model.elbo(x, seeded(1), n_draws)
    noise = torch.randn(n_draws, 4, 2, generator=seeded(1), dtype=torch.float64).numpy()
    oracle = Oracle(model)
    expected = [oracle.elbo(row, noise[:, n]) for n, row in enumerate(x.numpy())]
    np.testing.assert_allclose(elbo, expected, rtol=1e-10)
    if n_draws == 1:
        loss = model.loss(x, seeded(1))
        np.testing.assert_allclose(loss.item(), -np.mean(expected) / 5, rtol=1e-10)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_closed_forms_are_the_expectations_that_they_stand_for(likelihood, generator):
    """VaDE Eq. 12 against draws of z and c in Eq. 7; gamma, from many draws, is nearly constant."""
    model = random_vade(likelihood, generator)
    x = points(likelihood, generator, 1)
    elbo = float(model.elbo(x, generator, 50_000))
    oracle, random, n = Oracle(model), np.random.default_rng(3), 50_000
    row = x[0].numpy()
    mean, deviation = oracle.encode(row)
    q = norm(mean, deviation)
    z = q.rvs((n, 2), random_state=random)
    gamma = oracle.gamma(z)
    c = random.choice(3, n, p=gamma)
    log_joint = oracle.log_likelihood(row, z) + oracle.log_joint(z)[np.arange(n), c]
    ratio = log_joint - q.logpdf(z).sum(1) - np.log(gamma[c])
    # Both are random, of as many draws or more.
    assert abs(np.mean(ratio) - elbo) < 5 * np.std(ratio) * math.sqrt(2 / n)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_elbo_is_below_the_log_density(likelihood, generator):
    model = random_vade(likelihood, generator)
    x = points(likelihood, generator, 3)
    if likelihood == "bernoulli":  # of black and white alone it is a density
        x = x.round()
    oracle, random = Oracle(model), np.random.default_rng(5)
    for n_draws in (1, 4):  # a bound for any number of draws in gamma
        elbo = model.elbo(x.repeat(5000, 1), generator, n_draws).reshape(5000, 3)
        error = elbo.std(0) / math.sqrt(5000)
        for n, row in enumerate(x.numpy()):
            log_prob, log_prob_error = oracle.log_prob(row, random)
            assert log_prob_error < 0.05
            assert float(elbo[:, n].mean()) < log_prob + 5 * (log_prob_error + float(error[n]))


def linear_vade(generator: torch.Generator) -> tuple[VaDE, np.ndarray, np.ndarray]:
    """Linear both ways, orthogonal loadings, one cluster: q(z | x) can be the exact posterior."""
    model = VaDE(Autoencoder(4, (), 2, "gaussian", generator), 1).double()
    loading = torch.linalg.qr(torch.randn(4, 2, generator=generator, dtype=torch.float64)).Q
    bias, mean = torch.randn(4, generator=generator).double(), torch.tensor([[0.3, -1.0]]).double()
    prior, noise = torch.tensor([[1.5, 0.4]]).double(), 0.2
    posterior = 1 / (1 / prior[0] + 1 / noise)
    with torch.no_grad():
        model.mean.copy_(mean)
        model.log_variance.copy_(prior.log())
        model.autoencoder.output.weight.copy_(loading)
        model.autoencoder.output.bias.copy_(bias)
        model.output_log_variance.bias.fill_(math.log(noise))
        model.autoencoder.code.weight.copy_(posterior[:, None] * loading.T / noise)
        model.autoencoder.code.bias.copy_(
            posterior * (mean[0] / prior[0] - loading.T @ bias / noise)
        )
        model.code_log_variance.bias.copy_(posterior.log())
        variance = model.output_log_variance.bias.exp()  # the soft floor lies far below
    covariance = loading @ torch.diag(prior[0]) @ loading.T + torch.diag(variance)
    return model, (loading @ mean[0] + bias).numpy(), covariance.detach().numpy()


def test_the_elbo_is_the_log_density_where_the_posterior_is_exact(generator):
    model, mean, covariance = linear_vade(generator)
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    n = 20_000
    elbo = model.elbo(x.repeat(n, 1), generator).reshape(n, 3)
    expected = multivariate_normal(mean, covariance).logpdf(x.numpy())
    error = elbo.std(0).numpy() / math.sqrt(n)
    # The soft floor at -10 adds 2e-4 of itself to the variance.
    assert (np.abs(elbo.mean(0).numpy() - expected) < 5 * error + 1e-3).all()


def test_black_and_white_images_have_less_than_one_probability_in_all(generator):
    model = random_vade("bernoulli", generator, m=4)
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64)
    assert float(model.elbo(images, generator, 2000).exp().sum()) < 1


def test_grey_levels_bound_the_images_that_they_are_probabilities_of(generator):
    """The ELBO of grey levels is at most the mean of log p over black-and-white draws."""
    model = random_vade("bernoulli", generator, m=3)
    oracle, random = Oracle(model), np.random.default_rng(2)
    images = np.array(list(itertools.product([0.0, 1.0], repeat=3)))
    log_prob = [oracle.log_prob(image, random)[0] for image in images]
    assert abs(logsumexp(log_prob)) < 0.05  # over all images the probability is one
    for grey in torch.rand(3, 3, generator=generator, dtype=torch.float64):
        share = np.prod(np.where(images == 1, grey.numpy(), 1 - grey.numpy()), 1)
        elbo = model.elbo(grey.repeat(2000, 1), generator)
        assert float(elbo.mean()) < share @ log_prob + 0.05


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_posterior_is_that_of_the_formula(likelihood, generator):
    model = random_vade(likelihood, generator)
    x = points(likelihood, generator)
    oracle = Oracle(model)
    at_mean, drawn = model.posterior(x), model.posterior(x, seeded(1), 3)
    noise = torch.randn(3, 4, 2, generator=seeded(1), dtype=torch.float64).numpy()
    for n, row in enumerate(x.numpy()):
        mean, deviation = oracle.encode(row)
        np.testing.assert_allclose(at_mean[n], oracle.gamma(mean[None]))
        np.testing.assert_allclose(drawn[n], oracle.gamma(mean + deviation * noise[:, n]))
    for posterior in (at_mean, drawn):
        np.testing.assert_allclose(posterior.sum(1), 1)
    assert torch.equal(model.predict(x), at_mean.argmax(1))


def test_clusters_far_apart_leave_finite_gradients(generator):
    model = random_vade("gaussian", generator)
    with torch.no_grad():
        model.mean *= 1e4
    model = model.float()
    model.loss(points("gaussian", generator).float(), generator).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_gradients_are_those_of_finite_differences(likelihood, generator):
    model = random_vade(likelihood, generator)
    x = points(likelihood, generator)
    loss = model.loss(x, seeded(1))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        step = 1e-6 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        start, values = p.detach().clone(), []
        with torch.no_grad():
            for end in (start + step, start - step):
                p.copy_(end)
                values.append(model.loss(x, seeded(1)))
            p.copy_(start)
        change = (values[0] - values[1]) / 2
        torch.testing.assert_close(
            1e6 * (gradient * step).sum(), 1e6 * change, rtol=1e-5, atol=1e-8
        )


def test_samples_have_the_moments_of_the_model(generator):
    model, mean, covariance = linear_vade(generator)
    x, cluster = model.sample(20_000, generator)
    assert not cluster.any()
    error = np.sqrt(np.diag(covariance) / len(x))
    assert (np.abs(x.numpy().mean(0) - mean) < 5 * error).all()
    # Of a Gaussian's covariance: (s_ij^2 + s_ii s_jj) / N, the error squared.
    diagonal = np.diag(covariance)
    error = np.sqrt((covariance**2 + np.outer(diagonal, diagonal)) / len(x))
    assert (np.abs(np.cov(x.numpy().T) - covariance) < 5 * error + 1e-3).all()


def test_samples_of_clusters_are_as_frequent_as_their_weights_and_grey(generator):
    model = random_vade("bernoulli", generator)
    x, cluster = model.sample(5000, generator)
    weight = model.logit.softmax(0).detach()
    error = (weight * (1 - weight) / 5000).sqrt()
    assert bool(((cluster.bincount(minlength=3) / 5000 - weight).abs() < 5 * error).all())
    assert x.shape == (5000, 5)
    assert bool(((x > 0) & (x < 1)).all())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_it_clusters_blobs_without_labels(likelihood, tmp_path):
    generator = seeded(11)
    x, label = blobs(likelihood, generator)
    autoencoder = Autoencoder(6, (16,), 2, likelihood, generator)
    train(autoencoder, x, tmp_path / "autoencoder", 15)
    weights = [p.clone() for p in autoencoder.parameters()]
    model = VaDE.from_autoencoder(autoencoder, x[:240], 3, generator)
    before = float(model.elbo(x, seeded(1)).mean())
    train(model, x, tmp_path / "vade", 15)
    assert float(model.elbo(x, seeded(1)).mean()) > before
    scores = clustering_scores(label.numpy(), model.predict(x).numpy(), 3)
    assert scores["accuracy"] > 0.95
    assert all(torch.equal(a, b) for a, b in zip(autoencoder.parameters(), weights, strict=True))
    drawn, cluster = model.sample(300, generator)
    assert bool((model.predict(drawn) == cluster).float().mean() > 0.9)
    other = VaDE(Autoencoder(6, (16,), 2, likelihood, generator), 3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.posterior(x), model.posterior(x))


def test_it_starts_at_the_likeliest_mixture_of_the_codes(generator):
    x, _ = blobs("gaussian", generator)
    autoencoder = Autoencoder(6, (), 2, "gaussian", generator)
    model = VaDE.from_autoencoder(autoencoder, x, 3, generator)
    codes, group = autoencoder.codes(x), model.predict(x)
    for c in range(3):
        rows = codes[group == c]
        torch.testing.assert_close(model.mean[c].detach(), rows.mean(0), rtol=0.05, atol=0.2)
        variance = model.log_variance[c].detach().exp()
        torch.testing.assert_close(variance, rows.var(0), rtol=0.3, atol=0)
        share = model.logit.softmax(0)[c].item()
        assert abs(share - len(rows) / len(x)) < 0.05
    with torch.no_grad():
        error = (autoencoder.decode(codes) - x).square().mean(0)
        _, log_variance = model._decode(codes[:1])
    torch.testing.assert_close(log_variance[0].exp(), error)


def test_the_variance_of_a_code_starts_as_a_tenth_of_that_within_clusters(generator):
    x, _ = blobs("gaussian", generator)
    autoencoder = Autoencoder(6, (), 2, "gaussian", generator)
    model = VaDE.from_autoencoder(autoencoder, x, 3, generator)
    codes = autoencoder.codes(x).double().numpy()
    fitted = GaussianMixture(3, covariance_type="diag", n_init=10, random_state=7).fit(codes)
    expected = np.log(0.1 * fitted.weights_ @ fitted.covariances_)
    assert np.abs(expected).min() > 0.1  # to be told from zero, where the layer starts
    with torch.no_grad():
        _, log_variance = model._encode(x)  # the same of every point: no weights yet
    np.testing.assert_allclose(log_variance, np.tile(expected, (len(x), 1)), atol=0.02)


def test_the_same_seed_gives_the_same_and_no_draw_comes_from_elsewhere(tmp_path):
    states = []
    for run in range(2):
        generator = seeded(4)
        x, _ = blobs("bernoulli", generator, 120)
        state = torch.get_rng_state()
        autoencoder = Autoencoder(6, (4,), 2, "bernoulli", generator)
        model = VaDE.from_autoencoder(autoencoder, x, 3, generator)
        model.loss(x, generator)
        assert torch.equal(torch.get_rng_state(), state)
        train(model, x, tmp_path / str(run), 2)
        states.append(model.state_dict() | {"sample": model.sample(3, generator)[0]})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_batches_do_not_change_the_posterior(generator):
    model = random_vade("gaussian", generator)
    x = points("gaussian", generator, BATCH + 3)
    torch.testing.assert_close(model.posterior(x)[-5:], model.posterior(x[-5:]))
    assert model.elbo(x, generator).shape == (BATCH + 3,)


def test_wrong_points_raise(generator):
    model = random_vade("bernoulli", generator)
    x = points("bernoulli", generator)
    for call in (
        model.posterior,
        model.predict,
        lambda x: model.elbo(x, generator),
        lambda x: model.loss(x, generator),
    ):
        with pytest.raises(ValueError, match=r"shape \(4, 3\): expected \(N, 5\)"):
            call(x[:, :3])
        with pytest.raises(ValueError, match=r"20 of 20 values of x are outside \[0, 1\]"):
            call(x + 2)


def test_starts_without_enough_points_raise(generator):
    x, _ = blobs("gaussian", generator)
    autoencoder = Autoencoder(6, (4,), 2, "gaussian", generator)
    with pytest.raises(ValueError, match="expected 1 <= C <= N = 2 points"):
        VaDE.from_autoencoder(autoencoder, x[:2], 3, generator)
    with torch.no_grad():
        autoencoder.code.weight.zero_()  # it has collapsed
    with pytest.raises(ValueError, match="found 1 among 300 points: train the autoencoder longer"):
        VaDE.from_autoencoder(autoencoder, x, 3, generator)
