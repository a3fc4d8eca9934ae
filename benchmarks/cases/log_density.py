"""The mixture's log-density beside its peers, and beside the machine's matrix products.

One of the peers does the same work, MixtureSameFamily over LowRankMultivariateNormal. The others,
for which there is no low rank, get the same K components as full covariances, factorized before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cases.timing import Row, require_agreement, square_product, time_in_turns, unavailable
from cpmm.factor_analyzers import FactorAnalyzers
from cpmm.mixture import Mixture

N_CHECKED = 20  # components of the model on which the results are compared: 784^2 float64 for each

LogProb = Callable[[Tensor], object]


def torch_log_prob(fa: FactorAnalyzers) -> LogProb:
    """Log-density of torch's own mixture of low-rank Gaussians."""
    from torch.distributions import Categorical, LowRankMultivariateNormal, MixtureSameFamily

    return MixtureSameFamily(
        Categorical(logits=fa.log_weight),
        LowRankMultivariateNormal(fa.mean, fa.loading, fa.log_diagonal.exp()),
    ).log_prob


def sklearn_log_prob(fa: FactorAnalyzers) -> LogProb:
    """Log-density of scikit-learn's mixture of Gaussians, its parameters set and not fitted."""
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(fa.n_components, covariance_type="full")
    model.weights_ = fa.log_weight.exp().numpy()
    model.means_ = fa.mean.numpy()
    # Upper triangular U with U U^T the precision: the inverse of L^T.
    cholesky = torch.linalg.cholesky(fa.covariance())
    identity = torch.eye(fa.n_features, dtype=fa.mean.dtype)
    model.precisions_cholesky_ = torch.linalg.solve_triangular(
        cholesky.mT, identity.expand_as(cholesky), upper=True
    ).numpy()
    return lambda x: model.score_samples(x.numpy())


def pomegranate_log_prob(fa: FactorAnalyzers) -> LogProb:
    """Log-density of pomegranate's mixture of Gaussians."""
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    components = [Normal(m, c) for m, c in zip(fa.mean, fa.covariance(), strict=True)]
    model = GeneralMixtureModel(components, priors=fa.log_weight.exp())
    return model.log_probability


PEERS = {  # with its module, and how far it may be from ours in float64, relative
    "torch MixtureSameFamily, low rank": (torch_log_prob, "torch.distributions", 1e-12),
    "scikit-learn GaussianMixture, full": (sklearn_log_prob, "sklearn.mixture", 1e-12),
    # 1.1.2 collects the components' densities in float32, whatever they come in.
    "pomegranate GeneralMixtureModel, full": (pomegranate_log_prob, "pomegranate.gmm", 1e-6),
}


def time_log_density(quick: bool, repeats: int) -> list[Row]:
    """Compare with the peers, first the numbers and then the times, and with matrix products."""
    k, m, r = (50, 196, 6) if quick else (250, 784, 6)
    generator = torch.Generator().manual_seed(0)
    fa = random_model(k, m, r, generator)
    x = torch.randn(512, m, generator=generator, dtype=torch.float64)
    rows = [Row(f"{m} features x {k} components x {r} factors, float32")]
    rows += _time_beside_products(fa.to(torch.float32), quick, repeats, generator)
    with torch.no_grad():
        for name, (build, module, tolerance) in PEERS.items():
            if missing := unavailable(name, module):
                rows += missing
                continue
            few = fa.select(torch.arange(min(N_CHECKED, k)))
            ours = Mixture(few, (few.n_components,)).log_prob(x[:64])
            found, sizes = torch.as_tensor(build(few)(x[:64])), f": {few.n_components} components"
            rows.append(require_agreement(name, sizes, found, ours, tolerance))
            narrow, points = fa.to(torch.float32), x.float()
            mixture, peer = Mixture(narrow, (k,)), build(narrow)
            calls = {
                "ours": partial(mixture.log_prob, points),
                "peer": partial(peer, points),
            }
            seconds = time_in_turns(calls, min(3, repeats))
            ratio = seconds["peer"] / seconds["ours"]
            rows.append(Row(f"{name}, {len(x)} points", seconds["peer"], ratio, "x our time"))
    return rows


def random_model(k: int, m: int, r: int, generator: torch.Generator) -> FactorAnalyzers:
    """Draw K factor analyzers in float64."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return FactorAnalyzers(
        normal(k).log_softmax(0), normal(k, m), 0.3 * normal(k, m, r), normal(k, m).clamp(-2, 2)
    )


def _time_beside_products(
    fa: FactorAnalyzers, quick: bool, repeats: int, generator: torch.Generator
) -> list[Row]:
    product, n_operations = square_product(1024 if quick else 2048, generator)
    calls: dict[str, Callable[[], object]] = {"product": product}
    # Operations of the matrix products that the formula needs. Gradients, which the points do
    # without, need as many again.
    useful = {}
    mixture = Mixture(fa, (fa.n_components,))
    for n in (512, 2048) if quick else (512, 2048, 8192):
        x = torch.randn(n, fa.n_features, generator=generator)
        operations = 2 * n * fa.n_components * fa.n_features * (fa.n_factors + 2)
        name = f"ours, {n} points"
        calls[name] = torch.no_grad()(lambda x=x: mixture.log_prob(x))
        useful[name] = operations
        if n <= 2048:
            name += ", forward and backward"
            calls[name] = lambda x=x: _forward_and_backward(fa, x)
            useful[name] = 2 * operations
    seconds = time_in_turns(calls, repeats)
    peak = n_operations / seconds["product"]
    rows = [Row("product of large square matrices", seconds["product"], peak / 1e9, "GFLOP/s")]
    for name, operations in useful.items():
        share = 100 * operations / seconds[name] / peak
        rows.append(Row(name, seconds[name], share, "% of that rate"))
    return rows


def _forward_and_backward(fa: FactorAnalyzers, x: Tensor) -> None:
    leaves = {name: value.detach().requires_grad_() for name, value in vars(fa).items()}
    Mixture(FactorAnalyzers(**leaves), (fa.n_components,)).log_prob(x).mean().backward()
