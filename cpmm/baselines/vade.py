r"""Variational deep embedding (Jiang et al., IJCAI 2017): a VAE with a Gaussian mixture as prior.

Equation numbers with "VaDE" are those of arXiv:1611.05148v3. The model (VaDE Eqs. 3-6) is

.. math::
    c \sim \mathrm{Cat}(\pi), \quad z | c \sim N(\mu_c, \mathrm{diag}\,\sigma_c^2), \quad
    x | z \sim \mathrm{Ber}(\mu_x(z)) \text{ or } N(\mu_x(z), \mathrm{diag}\,\sigma_x^2(z))

and it is fitted by the evidence lower bound with q(z, c | x) = q(z | x) q(c | x).

**What the ELBO is a bound of.** With the Gaussian likelihood, of the log-density of x in the space
that x is given in: with the log-determinant of the map to that space, -ELBO bounds nats or bits per
dimension from above. With the Bernoulli likelihood x is a probability of white, not a value: the
ELBO of grey levels bounds the expected log-probability of the black-and-white images b drawn with
b_i ~ Ber(x_i),

.. math:: \mathrm{ELBO}(x) \le E_b \log p(b), \quad
    \text{since } x_i \log \mu_i + (1 - x_i) \log(1 - \mu_i) = E_b \log \mathrm{Ber}(b_i; \mu_i)

It is no bound of a density of the grey levels, as the Bernoulli's "density" does not integrate to
one over [0, 1], and it must not stand beside bits per dimension of dequantized images. A VaDE of
this likelihood has clusters and samples to report, and no density.
"""

from __future__ import annotations

import copy
import math
import warnings

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.nn import functional

from cpmm.baselines.autoencoder import Autoencoder, in_batches
from cpmm.initialization import TooFewPointsError, require_clusters
from cpmm.trajectory import inverse_soft_floor, soft_floor

LOG_2PI = math.log(2 * math.pi)


class VaDE(nn.Module):
    """A variational autoencoder with a mixture of C Gaussians as the prior of its codes.

    Built directly, it is a shell for ``load_state_dict``: all clusters are the standard Gaussian,
    and nothing would ever tell them apart. :meth:`from_autoencoder` makes one to train.

    Args:
        autoencoder: Its encoder gives the mean of q(z | x), its decoder that of x; held, not
            copied. Its ``likelihood`` is that of the model.
        n_clusters: C.
        log_variance_floor: Soft lower bound of log sigma_x^2 of the Gaussian likelihood, without
            which a constant feature has an infinite density.
    """

    def __init__(
        self, autoencoder: Autoencoder, n_clusters: int, log_variance_floor: float = -10.0
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.log_variance_floor = log_variance_floor
        like, d = autoencoder.code.weight, autoencoder.code_size
        self.code_log_variance = _constant_layer(autoencoder.code)
        self.logit = nn.Parameter(like.new_zeros(n_clusters))
        self.mean = nn.Parameter(like.new_zeros(n_clusters, d))
        self.log_variance = nn.Parameter(like.new_zeros(n_clusters, d))
        if autoencoder.likelihood == "gaussian":
            self.output_log_variance = _constant_layer(autoencoder.output)

    @classmethod
    def from_autoencoder(
        cls,
        autoencoder: Autoencoder,
        x: Tensor,
        n_clusters: int,
        generator: torch.Generator,
        n_init: int = 10,
        code_variance: float = 0.1,
        log_variance_floor: float = -10.0,
    ) -> VaDE:
        """Start from a trained autoencoder and the likeliest Gaussian mixture of its codes.

        As the authors' program does, but that several starts of EM are compared, by their
        likelihood; that pi is the mixture's instead of uniform; and that the variances which the
        autoencoder has not, those of q(z | x) and of x given z, start as constants instead of at
        random.

        Args:
            autoencoder: Trained; its weights are copied.
            x: Training points, (N, M).
            n_clusters: C.
            generator: Source of every draw, on the CPU.
            n_init: Starts of EM, each from k-means.
            code_variance: Variance of q(z | x) at the start, as a share of that within clusters.
            log_variance_floor: See the class; a Gaussian likelihood starts at the variances that
                the autoencoder leaves over, or at the floor.

        Raises:
            TooFewPointsError: If there are fewer points, or distinct codes, than clusters.
        """
        require_clusters(n_clusters, len(x))
        codes = autoencoder.codes(x).double()
        n_distinct = len(codes.unique(dim=0))
        if n_distinct < n_clusters:
            raise TooFewPointsError(
                f"a mixture of {n_clusters} clusters needs as many distinct codes, found "
                f"{n_distinct} among {len(x)} points: train the autoencoder longer, or lower the "
                "number of clusters",
                n_distinct,
            )
        seed = int(torch.randint(2**31, (1,), generator=generator))
        mixture = GaussianMixture(
            n_clusters,
            covariance_type="diag",
            n_init=n_init,
            max_iter=500,
            reg_covar=1e-6 * float(codes.var(0, correction=0).mean()) + 1e-12,
            random_state=seed,
        )
        with warnings.catch_warnings():  # training goes on from wherever EM has come
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(codes.numpy())
        fitted = mixture.weights_, mixture.means_, mixture.covariances_
        weight, mean, variance = map(torch.from_numpy, fitted)
        model = cls(copy.deepcopy(autoencoder), n_clusters, log_variance_floor)
        with torch.no_grad():
            model.logit.copy_(weight.log())
            model.mean.copy_(mean)
            model.log_variance.copy_(variance.log())
            model.code_log_variance.bias.copy_((code_variance * (weight @ variance)).log())
            if autoencoder.likelihood == "gaussian":
                error = in_batches(lambda part: _squares(autoencoder, part), x).sum(0) / len(x)
                start = error.log().clamp(min=log_variance_floor + 0.1)
                model.output_log_variance.bias.copy_(inverse_soft_floor(start, log_variance_floor))
        return model

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Negative ELBO, with one draw of z for each point, nats per dimension, a scalar.

        Args:
            x: Points, (N, M).
            generator: On the device of ``x``.
        """
        return -self._elbo(x, generator, 1).mean() / x.shape[1]

    @torch.no_grad()
    def elbo(self, x: Tensor, generator: torch.Generator, n_draws: int = 1) -> Tensor:
        r"""Estimate the evidence lower bound of each point (VaDE Eq. 12).

        .. math::
            \frac{1}{L} \sum_l \log p(x | z^{(l)})
            - \frac{1}{2} \sum_c \gamma_c \sum_j \left(\log \sigma_{cj}^2
              + \frac{\tilde\sigma_j^2}{\sigma_{cj}^2}
              + \frac{(\tilde\mu_j - \mu_{cj})^2}{\sigma_{cj}^2}\right)
            + \sum_c \gamma_c \log \frac{\pi_c}{\gamma_c}
            + \frac{1}{2} \sum_j (1 + \log \tilde\sigma_j^2)

        with q(z | x) = N(mean and variance of the encoder, written with a tilde; VaDE Eq. 11) and
        gamma = q(c | x) of Eq. 16 from the same L draws. Everything but the first term is exact
        given gamma. Any gamma gives a bound, so the expectation is one for every L; what it bounds
        is said at the top of this module. No stage reports it: it is here for users.

        Args:
            x: Points, (N, M).
            generator: On the device of ``x``.
            n_draws: L.

        Returns:
            Nats, (N,); without gradients.
        """
        return in_batches(lambda part: self._elbo(part, generator, n_draws), x)

    @torch.no_grad()
    def posterior(
        self, x: Tensor, generator: torch.Generator | None = None, n_draws: int = 1
    ) -> Tensor:
        r"""Posterior of the clusters given the points, (N, C), rows sum to one (VaDE Eq. 16).

        .. math:: q(c | x) = E_{q(z | x)} [p(c | z)], \quad
            p(c | z) = \frac{\pi_c N(z; \mu_c, \sigma_c^2)}
            {\sum_{c'} \pi_{c'} N(z; \mu_{c'}, \sigma_{c'}^2)}

        Args:
            x: Points, (N, M).
            generator: Of draws of z, on the device of ``x``. None takes p(c | z) at the
                mean of q(z | x), which is the same at every call.
            n_draws: Draws that the expectation is estimated from.
        """

        def of_batch(part: Tensor) -> Tensor:
            mean, log_variance = self._encode(part)
            z = mean[None]
            if generator is not None:
                z = self._draw(mean, log_variance, generator, n_draws)
            return self._log_posterior(z).exp()

        return in_batches(of_batch, x)

    def predict(self, x: Tensor) -> Tensor:
        """Likeliest cluster of each point by :meth:`posterior` at the mean, (N,), in [0, C)."""
        return self.posterior(x).argmax(1)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw points and the clusters that they come from.

        Args:
            n: Number of points.
            generator: On the device of the model.

        Returns:
            Points, (n, M), and clusters, (n,). With the Bernoulli likelihood a point is its mean
            given z, grey levels in (0, 1) as in VaDE's figures; a draw itself would be black and
            white.
        """
        weight = self.logit.softmax(0)
        cluster = torch.multinomial(weight, n, replacement=True, generator=generator)
        z = self._draw(self.mean[cluster], self.log_variance[cluster], generator, 1)[0]
        output, log_variance = self._decode(z)
        if log_variance is None:
            return output.sigmoid(), cluster
        return self._draw(output, log_variance, generator, 1)[0], cluster

    def _elbo(self, x: Tensor, generator: torch.Generator, n_draws: int) -> Tensor:
        mean, log_variance = self._encode(x)
        z = self._draw(mean, log_variance, generator, n_draws)  # (L, N, d)
        log_likelihood = self._log_likelihood(x, z).mean(0)
        log_gamma = self._log_posterior(z)
        # The spread of q(z | x) adds its variance to the squares in log N(z; mu_c, sigma_c^2).
        spread = 0.5 * log_variance.exp() @ (-self.log_variance).exp().T
        by_cluster = self._joint_log_prob(mean) - spread - log_gamma  # (N, C)
        entropy = 0.5 * (1 + LOG_2PI + log_variance).sum(1)
        return log_likelihood + (log_gamma.exp() * by_cluster).sum(1) + entropy

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x), each (N, d)."""
        hidden = self.autoencoder.encoder(self.autoencoder.checked(x))
        return self.autoencoder.code(hidden), self.code_log_variance(hidden)

    def _decode(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of x given z, (..., M); log-odds and None if it is a Bernoulli."""
        hidden = self.autoencoder.decoder(z)
        output = self.autoencoder.output(hidden)
        if self.autoencoder.likelihood == "bernoulli":
            return output, None
        return output, soft_floor(self.output_log_variance(hidden), self.log_variance_floor)

    def _log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(x | z), nats, (N, M) and (L, N, d) to (L, N)."""
        output, log_variance = self._decode(z)
        if log_variance is not None:
            return _log_normal(x, output, log_variance)
        cross_entropy = functional.binary_cross_entropy_with_logits
        return -cross_entropy(output, x.expand_as(output), reduction="none").sum(-1)

    def _joint_log_prob(self, z: Tensor) -> Tensor:
        """Log of pi_c N(z; mu_c, sigma_c^2), nats, (..., d) to (..., C)."""
        log_prob = _log_normal(z.unsqueeze(-2), self.mean, self.log_variance)
        return self.logit.log_softmax(0) + log_prob

    def _log_posterior(self, z: Tensor) -> Tensor:
        """Log of p(c | z) averaged over the draws, (L, N, d) to (N, C)."""
        return self._joint_log_prob(z).log_softmax(-1).logsumexp(0) - math.log(len(z))

    @staticmethod
    def _draw(mean: Tensor, log_variance: Tensor, generator: torch.Generator, n: int) -> Tensor:
        """Draws of a diagonal Gaussian by the reparametrization trick (VaDE Eq. 13), (n, ...)."""
        shape = (n, *mean.shape)
        noise = torch.randn(shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + (0.5 * log_variance).exp() * noise


def _log_normal(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian, nats; the last axis is summed."""
    square = (x - mean).square() * (-log_variance).exp()
    return -0.5 * (square + log_variance + LOG_2PI).sum(-1)


def _squares(autoencoder: Autoencoder, x: Tensor) -> Tensor:
    """Squared errors of reconstruction by feature, summed over the points, (1, M)."""
    error = autoencoder.decode(autoencoder.encode(x)) - x
    return error.cpu().double().square().sum(0, keepdim=True)


def _constant_layer(like: nn.Linear) -> nn.Linear:
    """Make a layer of the size, type and place of another that gives its bias, zero, at first."""
    layer = copy.deepcopy(like)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
