"""MixtureOfFactorAnalyzers: what scikit-learn's GaussianMixture is, with low-rank covariances."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor, nn

from cpmm.direct import DirectMixture
from cpmm.estimators.base import DTYPES, MixtureEstimator, Progress
from cpmm.estimators.em import EMOptions, fit_to_scatter, pooled_covariance
from cpmm.estimators.sizes import Search
from cpmm.estimators.starts import fit_again, warn_of_disagreement
from cpmm.mixture import Mixture

FEW = 1000  # rows, below which sizes are chosen by BIC


class MixtureOfFactorAnalyzers(MixtureEstimator):
    """Mixture of factor analyzers, by expectation maximization with a prior on the covariances.

    Every component is a Gaussian whose covariance is a low-rank matrix and a diagonal, and a
    cluster. Columns are standardized; densities are in the units of the data.

    Args:
        n_components: K, or "auto": by BIC, from 1,000 rows on by held-out likelihood.
        n_factors: R, the rank, 1 to M; "auto" as K.
        shrinkage: Points that a prior counts for in the covariance of each component: it has that
            many more, of the pooled covariance of all. "auto": 5, 20 or none, by held-out
            likelihood.
        criterion: What "auto" goes by: "bic", "validation" or "auto".
        log_diagonal_floor: Lower bound of the log-variances, in units of the columns' variances;
            the default is that of GaussianMixture, 1e-6.
        n_init: Starts, of which the likeliest is taken.
        max_steps: Steps of expectation maximization at most.
        tol: Gain of a step, in nats a point, below which it has converged.
        batch_size: Points of a gradient step, ``partial_fit`` only.
        learning_rate: Learning rate of Adam, ``partial_fit`` only.
        warm_start: Whether ``fit`` goes on from the last fit.
        random_state: Seed of every draw.
        device: Of torch: "cpu", "cuda".
        dtype: Of the mixture that is kept, "float64" or "float32".
        verbose: Whether a line on a terminal shows how far it is.

    Attributes:
        mixture_: What remains, a :class:`cpmm.fitted.FittedMixture`: it takes and gives points in
            the units of the data. Its ``mixture`` is in the standardized space.
        n_components_: K.
        n_factors_: R.
        shrinkage_: The prior's weight.
        weights_: Of the components, (K,).
        means_: In the units of the data, (K, M).
        covariances_: In the units of the data, (K, M, M).
        labels_: Cluster of each point of ``fit``, (N,).
        log_likelihood_: Their mean log-density in the units of the data, nats.
        n_iter_: Steps taken.
        converged_: Whether the last gain was below ``tol``.
        history_: Of each step, the mean log-density before it, of the standardized points, nats.
        tried_: What "auto" has tried, a dict each; ``pandas.DataFrame(model.tried_)`` shows it.
        n_features_in_: M.
        feature_names_in_: Names of the columns, if ``X`` was a data frame.
    """

    _parameter_constraints: dict[str, list] = {  # noqa: RUF012  (scikit-learn's way)
        **MixtureEstimator._parameter_constraints,
        "n_components": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "criterion": [StrOptions({"auto", "bic", "validation"})],
        "tol": [Interval(Real, 0, None, closed="left")],
    }
    _counts = ("n_components",)
    n_components_: int
    n_factors_: int
    shrinkage_: float
    _n_pseudotimes = 1

    def __init__(
        self,
        n_components="auto",
        *,
        n_factors="auto",
        shrinkage="auto",
        criterion="auto",
        log_diagonal_floor=-13.8,
        n_init=5,
        max_steps=500,
        tol=1e-4,
        batch_size=256,
        learning_rate=1e-3,
        warm_start=False,
        random_state=None,
        device="cpu",
        dtype="float64",
        verbose=True,
    ):
        self.n_components = n_components
        self.n_factors = n_factors
        self.shrinkage = shrinkage
        self.criterion = criterion
        self.log_diagonal_floor = log_diagonal_floor
        self.n_init = n_init
        self.max_steps = max_steps
        self.tol = tol
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device
        self.dtype = dtype
        self.verbose = verbose

    def _fit_mixture(self, z: Tensor, weight: Tensor, progress: Progress) -> Mixture:
        def listener(step: int, value: float) -> None:
            progress(f"step {step} | {value:.4f} nats a point, standardized")

        options = EMOptions(self.log_diagonal_floor, 0.0, self.max_steps, self.tol)
        if self._goes_on:
            fa = self.mixture_.mixture.components.to(z.device, torch.float64)
            options = EMOptions(self.log_diagonal_floor, self.shrinkage_, self.max_steps, self.tol)
            prior = pooled_covariance(fa, z, weight)
            result, agreed = fit_to_scatter(fa, z, weight, prior, options, listener), True
        else:
            by = "bic" if len(z) < FEW else "validation"
            by = by if self.criterion == "auto" else self.criterion
            search = Search(z, weight, options, self.n_init, by, self._generator, progress)
            sizes = search.choose(self.n_components, self.n_factors, self.shrinkage)
            self.n_components_, self.n_factors_, self.shrinkage_ = sizes
            self.tried_ = search.tried
            options = EMOptions(self.log_diagonal_floor, sizes[2], self.max_steps, self.tol)
            fit = search.fit(sizes)
            fit = fit_again(fit, z, weight, self.n_factors_, options, listener=listener)
            result, agreed = fit.result, fit.agreed
        if not agreed:
            warn_of_disagreement("n_components", self.n_init)
        self.converged_, self.n_iter_ = result.converged, len(result.history) - 1
        self.history_ = [{"step": i, "train": v} for i, v in enumerate(result.history)]
        fa = result.components
        mixture = Mixture(fa, (1,) * fa.n_components)
        if self.n_components == "auto":
            mixture = mixture.allow_missing().without_idle_components(z)
            mixture = Mixture(mixture.components, (1,) * mixture.components.n_components)
            self.n_components_ = mixture.n_clusters
        return mixture

    def _make_model(self) -> nn.Module:
        fa = self.mixture_.mixture.components.to(DTYPES[self.dtype])
        return DirectMixture(fa, self.log_diagonal_floor - 1)

    def _extract(self, model: Any) -> Mixture:
        with torch.no_grad():
            return model.mixture()

    @property
    def weights_(self) -> np.ndarray:
        """Weights of the components, (K,)."""
        return self.mixture_.mixture.components.log_weight.exp().cpu().numpy()

    @property
    def means_(self) -> np.ndarray:
        """Means of the components in the units of the data, (K, M)."""
        fitted = self.mixture_
        return fitted.preprocessing.inverse(fitted.mixture.components.mean).cpu().numpy()

    @property
    def covariances_(self) -> np.ndarray:
        """Covariances of the components in the units of the data, (K, M, M)."""
        fitted = self.mixture_
        scale = np.array(fitted.preprocessing.scale)
        covariance = fitted.mixture.components.covariance().cpu().numpy()
        return covariance * scale[:, None] * scale
