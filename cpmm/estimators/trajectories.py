"""CPMM: clusters that are trajectories of factor analyzers through pseudotime."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor, nn

from cpmm.baselines.merging import normalized_cuts, overlap_affinity
from cpmm.estimators.base import DTYPES, MixtureEstimator, Progress
from cpmm.estimators.descent import Descent, DescentOptions
from cpmm.estimators.em import EMOptions
from cpmm.estimators.sizes import Search, Sizes
from cpmm.estimators.starts import N_POINTS, Fit, fit_again, fit_from_starts, warn_of_disagreement
from cpmm.factor_analyzers import FactorAnalyzers
from cpmm.fields import MLPField
from cpmm.mixture import Mixture
from cpmm.odes import Solver
from cpmm.trajectory import StateLayout, Trajectories, pseudotime_grid

MANY = 3000  # rows, from which on there are more trajectories than clusters
N_TRAJECTORIES = 50
FEWEST = 30  # rows that gradient steps need: some are held out


class CPMM(MixtureEstimator):
    """Continuously parameterized mixture model of a table (Bender et al., ICML 2023).

    An ODE moves factor analyzers through pseudotime. Its trajectories start at a mixture of factor
    analyzers and are trained by maximum likelihood as long as held-out rows gain. What is kept is
    the mixture at ``n_pseudotimes`` times of each. Below 3,000 rows a cluster is a trajectory, and
    all rows are fitted in the end; from there on 50 trajectories share the ODE, and their
    components are merged into clusters by how often they answer for the same points.

    Args:
        n_clusters: C; "auto": by BIC of the mixture that the trajectories start at.
        n_factors: R, the rank of a covariance, 1 to M; "auto": by BIC or held-out likelihood.
        n_trajectories: "auto", or how many, no fewer than clusters.
        n_pseudotimes: G, components of a trajectory.
        shrinkage: Of the start, see :class:`MixtureOfFactorAnalyzers`.
        log_diagonal_floor: Lower bound of the log-variances, in units of the columns' variances.
        n_init: Starts, of which the likeliest is taken.
        max_steps: Gradient steps at most; 0 leaves the start.
        validation_fraction: Share of the rows that is held out to end the steps.
        patience: Looks at these rows without a gain that end the steps; one every 20 steps. "auto":
            5 where a cluster is a trajectory, else all steps are taken: with many trajectories much
            is gained late, as the learning rate falls.
        batch_size: Points of a step.
        learning_rate: Learning rate of Adam.
        warm_start: Whether ``fit`` goes on from the trajectories of the last fit.
        random_state: Seed of every draw.
        device: Of torch: "cpu", "cuda".
        dtype: Of training and of the mixture that is kept, "float64" or "float32".
        verbose: Whether a line on a terminal shows how far it is.

    Attributes:
        mixture_: What remains, a :class:`cpmm.fitted.FittedMixture`: no ODE; it takes and gives
            points in the units of the data. Its ``mixture`` is in the standardized space.
        trajectories_: The ODE and its initial states, :class:`cpmm.trajectory.Trajectories`.
        n_clusters_: C.
        n_factors_: R.
        n_trajectories_: How many there are.
        shrinkage_: The start's prior's weight.
        labels_: Cluster of each point of ``fit``, (N,).
        log_likelihood_: Their mean log-density in the units of the data, nats.
        n_iter_: Gradient steps of the weights that are kept.
        history_: A dict for each look: the step, and mean log-densities of standardized points
            in training and held out, nats a point.
        tried_: What "auto" has tried, a dict each.
        n_features_in_: M.
        feature_names_in_: Names of the columns, if ``X`` was a data frame.
    """

    _parameter_constraints: dict[str, list] = {  # noqa: RUF012  (scikit-learn's way)
        **MixtureEstimator._parameter_constraints,
        "n_clusters": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "n_trajectories": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "n_pseudotimes": [Interval(Integral, 1, None, closed="left")],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "patience": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
    }
    _counts = ("n_clusters", "n_trajectories")
    n_clusters_: int
    n_trajectories_: int
    n_factors_: int
    shrinkage_: float
    n_trajectories: Any
    n_clusters: Any
    patience: Any
    _found: Fit | None

    def __init__(
        self,
        n_clusters="auto",
        *,
        n_factors="auto",
        n_trajectories="auto",
        n_pseudotimes=5,
        shrinkage="auto",
        log_diagonal_floor=-13.8,
        n_init=5,
        max_steps=2000,
        validation_fraction=0.15,
        patience="auto",
        batch_size=256,
        learning_rate=1e-3,
        warm_start=False,
        random_state=None,
        device="cpu",
        dtype="float64",
        verbose=True,
    ):
        self.n_clusters = n_clusters
        self.n_factors = n_factors
        self.n_trajectories = n_trajectories
        self.n_pseudotimes = n_pseudotimes
        self.shrinkage = shrinkage
        self.log_diagonal_floor = log_diagonal_floor
        self.n_init = n_init
        self.max_steps = max_steps
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device
        self.dtype = dtype
        self.verbose = verbose

    def _fit_mixture(self, z: Tensor, weight: Tensor, progress: Progress) -> Mixture:
        goes_on = self._goes_on and hasattr(self, "trajectories_")
        if not goes_on:
            self._choose_sizes(z, weight, progress)
        self._n_pseudotimes = self.n_pseudotimes
        n_out = round(self.validation_fraction * len(z))
        order = torch.randperm(len(z), generator=self._generator).to(z.device)
        parts = (order, order[:0]) if len(z) < FEWEST else (order[n_out:], order[:n_out])
        (x, w), held_out = ((z[part], weight[part]) for part in parts)
        model = self.trajectories_ if goes_on else self._start(x, w, progress)
        self.history_, self.n_iter_ = [], 0
        if self.max_steps and len(parts[1]):
            model, self.history_, self.n_iter_ = self._descend(model, x, w, held_out, progress)
        if len(z) < MANY and not goes_on:  # all rows, for as many steps
            model = self._start(z, weight, progress)
            if self.n_iter_:
                model, _, _ = self._descend(model, z, weight, None, progress)
        self.trajectories_ = model
        self._group = None
        if self.n_trajectories_ > self.n_clusters_:
            self._group = self._merge(self._extract(model), z)
        return self._extract(model)

    def _choose_sizes(self, z: Tensor, weight: Tensor, progress: Progress) -> None:
        """Set how many clusters, trajectories and factors there are."""
        options = EMOptions(self.log_diagonal_floor, 0.0)
        some, w = z, weight
        if len(z) > N_POINTS:
            index = torch.randperm(len(z), generator=self._generator)[:N_POINTS].to(z.device)
            some, w = z[index], weight[index]

        def choose(by: str, n_components: int | str) -> Sizes:
            search = Search(some, w, options, self.n_init, by, self._generator, progress)
            sizes = search.choose(n_components, self.n_factors, self.shrinkage)
            self.tried_ += search.tried
            self._found = search.fits.get(sizes[0])
            return sizes

        self.tried_: list[dict] = []
        sizes = choose("bic", self.n_clusters) if len(z) < MANY or self.n_clusters == "auto" else ()
        self.n_clusters_ = sizes[0] if sizes else self.n_clusters
        usual = self.n_clusters_ if len(z) < MANY else max(self.n_clusters_, N_TRAJECTORIES)
        self.n_trajectories_ = usual if self.n_trajectories == "auto" else self.n_trajectories
        if self.n_trajectories_ < self.n_clusters_:
            raise ValueError(
                f"n_trajectories is {self.n_trajectories_}, fewer than the {self.n_clusters_} "
                "clusters: leave it at 'auto', or raise it"
            )
        if not sizes or self.n_trajectories_ > self.n_clusters_:
            sizes = choose("validation", self.n_trajectories_)
        _, self.n_factors_, self.shrinkage_ = sizes

    def _start(self, x: Tensor, weight: Tensor, progress: Progress) -> Trajectories:
        """Build trajectories that stay where a fitted mixture of factor analyzers is."""
        options = EMOptions(self.log_diagonal_floor, self.shrinkage_, tolerance=1e-4)

        def listener(step: int, _: float) -> None:
            progress(f"start | step {step}")

        if self._found is None:
            self._found = fit_from_starts(
                x, weight, self.n_trajectories_, self.n_factors_, options, self.n_init,
                self._generator, listener,
            )  # fmt: skip
        fit = fit_again(self._found, x, weight, self.n_factors_, options, listener=listener)
        if not fit.agreed and self.n_trajectories_ == self.n_clusters_:
            warn_of_disagreement("n_clusters", self.n_init)
        return resting_trajectories(
            fit.result.components, self.log_diagonal_floor, self._generator
        ).to(x.device, DTYPES[self.dtype])

    def _descend(
        self,
        model: Trajectories,
        x: Tensor,
        weight: Tensor,
        held_out: tuple[Tensor, Tensor] | None,
        progress: Progress,
    ) -> tuple[Trajectories, list[dict[str, float]], int]:
        n_steps = self.max_steps if held_out is not None else self.n_iter_
        usual = 5 if self.n_trajectories_ == self.n_clusters_ else self.max_steps
        options = DescentOptions(
            self.max_steps, self.batch_size, self.learning_rate, self.n_pseudotimes,
            patience=usual if self.patience == "auto" else self.patience,
        )  # fmt: skip
        dtype = DTYPES[self.dtype]
        if held_out is not None:
            held_out = held_out[0].to(dtype), held_out[1].to(dtype)

        def listener(step: int, value: float) -> None:
            progress(f"step {step}/{n_steps} | held out {value:.4f} nats a point, standardized")

        descent = Descent(model, options, self._generator)
        return model, *descent.run(x.to(dtype), weight, held_out, n_steps, listener)

    def _merge(self, mixture: Mixture, z: Tensor) -> Tensor:
        """Cluster of each component, (K,): those that answer for the same points go together."""
        some = mixture.impute(z[: 4 * N_POINTS].to(mixture.components.mean))
        for temperature in (1.0, 4.0, 16.0, 64.0):
            affinity = overlap_affinity(mixture, some, temperature).cpu()
            try:
                return normalized_cuts(affinity, self.n_clusters_, self._generator)
            except ValueError:  # more parts than clusters that nothing ties
                continue
        return normalized_cuts(affinity + 1e-6, self.n_clusters_, self._generator)

    def _make_model(self) -> nn.Module:
        if not hasattr(self, "trajectories_"):
            raise ValueError(
                "partial_fit needs the trajectories, which load does not bring back: call fit, or "
                "keep the estimator by joblib.dump"
            )
        return self.trajectories_

    @torch.no_grad()
    def _extract(self, model: Any) -> Mixture:
        like = next(model.parameters())
        n = self.n_pseudotimes if self.n_iter_ else 1
        mixture = model.mixture(pseudotime_grid(n, like))
        if self._group is None:
            return mixture
        order = self._group.argsort(stable=True).to(like.device)
        sizes = torch.bincount(self._group, minlength=self.n_clusters_)
        return Mixture(mixture.components.select(order), tuple(sizes.tolist()))


def resting_trajectories(
    fa: FactorAnalyzers, log_diagonal_floor: float, generator: torch.Generator
) -> Trajectories:
    """Build trajectories that start at factor analyzers, with a field that is zero as yet.

    Args:
        fa: C factor analyzers, none below the floor.
        log_diagonal_floor: Lower bound of log d.
        generator: Source of the augmentation and of the field's weights.
    """
    layout = StateLayout(
        fa.n_features, fa.n_factors, augmentation=1.0, learned_weight=True,
        log_diagonal_floor=log_diagonal_floor - 1,
    )  # fmt: skip
    fa = fa.to("cpu")
    c, n_free = fa.n_components, layout.n_maps - layout.n_factors - 2
    free = 0.1 * torch.randn(c, n_free, fa.n_features, generator=generator).to(fa.mean)
    free[:, 0] = 0  # log-weight
    initial = layout.write(fa.mean, fa.loading, fa.log_diagonal, free)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        field = MLPField(layout.size, 128, 2, last_layer_scale=0.0)
    model = Trajectories(layout, field.to(initial), initial, Solver(n_steps=4))
    with torch.no_grad():
        model.cluster_logit.copy_(fa.log_weight)
    return model.to(initial)
