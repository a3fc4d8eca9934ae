"""What both estimators share: scikit-learn's interface around a fitted mixture."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClusterMixin, DensityMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from cpmm.card import model_card
from cpmm.estimators.descent import Descent, DescentOptions
from cpmm.estimators.sizes import count_parameters
from cpmm.files import write_text
from cpmm.fitted import FittedMixture
from cpmm.initialization import count_distinct
from cpmm.mixture import Mixture
from cpmm.notebook import mixture_html
from cpmm.preprocessing import Preprocessing

if TYPE_CHECKING:
    from cpmm.plots import Picture

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class MixtureEstimator(ClusterMixin, DensityMixin, BaseEstimator):
    """Density, clusters and samples of a table by a mixture of factor analyzers.

    A subclass says how the mixture is fitted (``_fit_mixture``) and what gradient steps move
    (``_make_model``).
    """

    _parameter_constraints: dict[str, list] = {  # noqa: RUF012  (scikit-learn's way)
        "n_factors": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "shrinkage": [Interval(Real, 0, None, closed="left"), StrOptions({"auto"})],
        "log_diagonal_floor": [Interval(Real, -30, 0, closed="both")],
        "n_init": [Interval(Integral, 1, None, closed="left")],
        "max_steps": [Interval(Integral, 0, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "warm_start": ["boolean"],
        "random_state": ["random_state"],
        "device": [str],
        "dtype": [StrOptions({"float32", "float64"})],
        "verbose": ["boolean"],
    }

    # What scikit-learn wants set in __init__, and what a fit sets.
    n_factors: Any
    batch_size: int
    learning_rate: float
    warm_start: bool
    random_state: Any
    device: str
    dtype: str
    verbose: bool
    mixture_: FittedMixture
    labels_: np.ndarray
    log_likelihood_: float
    n_iter_: int
    history_: list[dict[str, float]]
    n_features_in_: int
    feature_names_in_: np.ndarray
    _counts: tuple[str, ...]
    _n_pseudotimes: int
    _descent: Descent | None

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Fit the mixture.

        Args:
            X: Points, (N, M): numbers that vary in every column.
            y: Not used, for scikit-learn's conventions.
            sample_weight: Of each point, 0 or more, (N,); None: all count alike.

        Returns:
            The estimator.

        Raises:
            ValueError: If the points, their weights or an option cannot be used.
        """
        self._validate_params()
        points, weight = self._points(X, sample_weight)
        used = weight > 0
        with Progress(type(self).__name__, self.verbose) as progress:
            self._goes_on = self.warm_start and hasattr(self, "mixture_")
            if not self._goes_on:
                self._begin(points[used], weight[used])
            z = self._preprocessing.forward(points[used])[0].to(self._device)
            self._check_sizes(z)
            mixture = self._fit_mixture(z, weight[used].to(self._device), progress)
            self._keep(mixture)
        self._descent = None
        self._look_back(points)
        return self

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Take gradient steps on further points; the first ones are fitted.

        Args:
            X: Points, (N, M), some hundreds or more.
            y: Not used.
            sample_weight: Of each point, (N,).

        Returns:
            The estimator. Each point is seen about once a call; the standardization and the
            sizes stay those of the first call.
        """
        if not hasattr(self, "mixture_"):
            return self.fit(X, sample_weight=sample_weight)
        self._validate_params()
        points, weight = self._points(X, sample_weight, reset=False)
        z = self._preprocessing.forward(points)[0].to(self._device, DTYPES[self.dtype])
        if self._descent is None:
            options = DescentOptions(1, self.batch_size, self.learning_rate, self._n_pseudotimes)
            self._descent = Descent(self._make_model(), options, self._generator)
        for _ in range(-(-len(z) // self.batch_size)):
            self._descent.step(z, weight)
        self.n_iter_ += 1
        self._keep(self._extract(self._descent.model))
        self._look_back(points)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Likeliest cluster of each point, (N,), integers."""
        return self._predict(self._rows(X))

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of each cluster given each point, (N, C); rows sum to one."""
        points = self._rows(X)
        return self.mixture_.cluster_responsibilities(points, self._no_draws).cpu().numpy()

    def score_samples(self, X: Any) -> np.ndarray:
        """Log-density of each point in the units of the columns, nats, (N,)."""
        points = self._rows(X)
        return self.mixture_.log_prob(points, self._no_draws).cpu().numpy()

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log-density of the points in the units of the columns, nats; higher is better."""
        return float(self.score_samples(X).mean())

    def impute(self, X: Any) -> np.ndarray:
        """Fill what is NaN with its mean given the rest of the row, (N, M)."""
        return self.mixture_.impute(self._rows(X), self._no_draws).cpu().numpy()

    def conditional(self, observed: Mapping[str | int, float]) -> FittedMixture:
        """Mixture of the other columns given values of some, by name or position."""
        check_is_fitted(self)
        return self.mixture_.conditional(observed)

    def sample(
        self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw points.

        Args:
            n_samples: How many.
            random_state: Source of the draws; None takes that of the estimator.

        Returns:
            Points, (n_samples, M), and the cluster of each, (n_samples,).
        """
        check_is_fitted(self)
        if not isinstance(n_samples, Integral) or n_samples < 1:
            raise ValueError(f"n_samples is {n_samples!r}: expected a whole number of 1 or more")
        seed = draw_seed(self.random_state if random_state is None else random_state)
        device = self.mixture_.mixture.components.mean.device
        x, cluster = self.mixture_.sample(n_samples, torch.Generator(device).manual_seed(seed))
        return x.cpu().numpy(), cluster.cpu().numpy()

    def plot(
        self,
        X: Any = None,
        kind: str = "auto",
        *,
        features: Sequence[str | int] | str | None = None,
        image_shape: Sequence[int] | None = None,
    ) -> Picture:
        """Draw the mixture, over points if they are given; see :func:`cpmm.plots.plot`."""
        check_is_fitted(self)
        from cpmm.plots import plot

        return plot(self, X, kind, features=features, image_shape=image_shape)

    def bic(self, X: Any) -> float:
        """Bayesian information criterion of the points: lower is better.

        Its parameters are those of the mixture that remains, ``n_parameters_``.
        """
        log_prob = self.score_samples(X)
        return float(-2 * log_prob.sum() + self.n_parameters_ * np.log(len(log_prob)))

    def aic(self, X: Any) -> float:
        """Akaike's information criterion of the points: lower is better; see :meth:`bic`."""
        return float(-2 * self.score_samples(X).sum() + 2 * self.n_parameters_)

    @property
    def n_parameters_(self) -> int:
        """Free parameters of the mixture that remains."""
        check_is_fitted(self)
        fa = self.mixture_.mixture.components
        return count_parameters(fa.n_components, fa.n_features, fa.n_factors)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the mixture as the pipeline does: ``cpmm score``, ``cpmm sample`` read it, too.

        Args:
            folder: Made if missing; gets ``mixture.safetensors``, ``mixture.json`` and a model
                card, ``README.md``.
        """
        check_is_fitted(self)
        fitted = self.mixture_
        header = {
            "preprocessing": fitted.preprocessing.to_dict(),
            "image_shape": None,
            "feature_names": list(fitted.feature_names),
            "estimator": {"class": type(self).__name__, "parameters": _plain(self.get_params())},
        }
        fitted.mixture.save(folder, header, fitted.preprocessing.tensors)
        write_text(Path(folder) / "README.md", model_card(FittedMixture.load(folder)))

    @classmethod
    def load(cls, folder: str | os.PathLike, device: str = "cpu") -> Self:
        """Read what :meth:`save` or the pipeline's ``extract_mixture`` wrote.

        Args:
            folder: Such as ``data/<preset>/mixture``.
            device: Where it computes.

        Returns:
            An estimator that predicts, scores and samples. Trajectories are not kept: what it is
            fitted to next starts anew.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged or of another version.
        """
        fitted = FittedMixture.load(folder, device).allow_missing()
        said = fitted.header.get("estimator", {})
        known = cls._get_param_names()
        parameters = {k: v for k, v in said.get("parameters", {}).items() if k in known}
        model = cls(**parameters | {"device": device})
        model.mixture_, model.n_features_in_ = fitted, fitted.n_features
        if fitted.feature_names != _numbered(fitted.n_features):
            model.feature_names_in_ = np.array(fitted.feature_names, dtype=object)
        model._preprocessing, model._descent = fitted.preprocessing, None
        model._generator = torch.Generator().manual_seed(draw_seed(model.random_state))
        model._n_pseudotimes = 1
        model.n_iter_, model.history_ = 0, []
        return model

    def _fit_mixture(self, z: Tensor, weight: Tensor, progress: Progress) -> Mixture:
        """Fit standardized points, (N, M), and set what is said of the fit."""
        raise NotImplementedError

    def _make_model(self) -> nn.Module:
        """Return what gradient steps move."""
        raise NotImplementedError

    def _extract(self, model: Any) -> Mixture:
        """Return the mixture of what they have moved."""
        raise NotImplementedError

    def __sklearn_tags__(self) -> Tags:
        """Say that NaN is taken, as missing values."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _repr_html_inner(self) -> str:
        """scikit-learn's diagram, and once it is fitted the mixture."""
        diagram = super()._repr_html_inner()
        if not hasattr(self, "mixture_"):
            return diagram
        known: dict[str, object] = {}
        if hasattr(self, "labels_"):  # not after load
            known = {
                "rows": len(self.labels_),
                "log-likelihood": f"{self.log_likelihood_:.4g} nats a row",
            }
        return diagram + mixture_html(self.mixture_, known)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        """What Jupyter shows."""
        bundle = super()._repr_mimebundle_(**kwargs)
        return bundle | {"text/html": self._repr_html_inner()} if "text/html" in bundle else bundle

    @property
    def _device(self) -> torch.device:
        try:
            return torch.empty(0, device=self.device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"device is {self.device!r}, which this machine or this torch has not ({reason}): "
                "try 'cpu'"
            ) from None

    @property
    def _no_draws(self) -> torch.Generator:
        return torch.Generator(self.mixture_.mixture.components.mean.device)

    def _points(self, X: Any, sample_weight: Any, reset: bool = True) -> tuple[Tensor, Tensor]:
        """Points, (N, M), and their weights, (N,), float64, on the CPU."""
        X = validate(self, X, reset=reset, ensure_min_samples=2 if reset else 1)
        weight = _check_sample_weight(
            sample_weight, X, dtype=np.float64, ensure_non_negative=True, copy=True
        )
        return torch.from_numpy(X), torch.from_numpy(weight)

    def _rows(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return torch.from_numpy(validate(self, X, reset=False))

    def _begin(self, points: Tensor, weight: Tensor) -> None:
        """Choose the standardization and seed the draws."""
        names = getattr(self, "feature_names_in_", None)
        self._feature_names = (
            tuple(map(str, names)) if names is not None else _numbered(points.shape[1])
        )
        self._preprocessing = standardization(points, weight, self._feature_names)
        self._generator = torch.Generator().manual_seed(draw_seed(self.random_state))

    def _check_sizes(self, z: Tensor) -> None:
        """Raise ValueError if there are more clusters or factors asked for than can be."""
        n, m = z.shape
        if self.n_factors != "auto" and self.n_factors > m:
            raise ValueError(
                f"n_factors is {self.n_factors}, X has {m} features: set it to {m} or less, or "
                "'auto'"
            )
        for name in self._counts:
            wanted = getattr(self, name)
            if not isinstance(wanted, Integral):
                continue
            found = count_distinct(z.cpu(), wanted)
            if found < wanted:
                raise ValueError(
                    f"{name} is {wanted}, X has {found} distinct rows (n_samples = {n}): set it to "
                    f"{found} or less, or 'auto'"
                )

    def _keep(self, mixture: Mixture) -> None:
        fitted = mixture.to(DTYPES[self.dtype])
        header = {} if not hasattr(self, "mixture_") else self.mixture_.header
        names = self._feature_names if header == {} else self.mixture_.feature_names
        kept = FittedMixture(fitted, self._preprocessing, None, tuple(names), header)
        self.mixture_ = kept.allow_missing()

    def _look_back(self, points: Tensor) -> None:
        """Set what the mixture says of the points that it was fitted to."""
        self.labels_ = self._predict(points)
        self.log_likelihood_ = float(self.mixture_.log_prob(points, self._no_draws).mean())

    def _predict(self, points: Tensor) -> np.ndarray:
        share = self.mixture_.cluster_responsibilities(points, self._no_draws)
        return share.argmax(1).cpu().numpy()


def validate(estimator: MixtureEstimator, X: Any, **options: Any) -> np.ndarray:
    """Check points as scikit-learn does, (N, M) float64; text is named with what to do."""
    if isinstance(X, Tensor):
        X = X.detach().cpu().numpy()
    try:
        X = validate_data(
            estimator, X, dtype=np.float64, order="C", copy=True, ensure_all_finite="allow-nan",
            **options,
        )  # fmt: skip
    except ValueError as error:
        if "could not convert string to float" in str(error):
            raise ValueError(
                f"X holds text ({error}): encode such columns, as by OneHotEncoder, or leave them "
                "out"
            ) from None
        raise
    return X


def standardization(points: Tensor, weight: Tensor, names: tuple[str, ...]) -> Preprocessing:
    """Zero mean and unit deviation for each column, by the points' weights.

    Raises:
        ValueError: If a column has one value.
    """
    seen = ~points.isnan()
    if not bool(seen.any(0).all()):
        empty = [names[i] for i in (~seen.any(0)).nonzero().flatten().tolist()]
        raise ValueError(
            f"{len(empty)} of {len(names)} columns of X have no value, only NaN: "
            f"{', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}; drop them"
        )
    share = seen * weight[:, None] / (seen * weight[:, None]).sum(0)
    known = points.nan_to_num(nan=0.0)
    mean = (share * known).sum(0)
    deviation = (share * (known - mean).square()).sum(0).sqrt()
    known = torch.where(seen, points, mean)
    size = known.abs().amax(0)
    idle = ~((known.amax(0) > known.amin(0)) & (deviation > 1e-14 * size))
    if bool(idle.any()):
        which = [names[i] for i in idle.nonzero().flatten().tolist()]
        raise ValueError(
            f"{len(which)} of {len(names)} columns of X (n_samples = {len(points)}) have one value "
            f"only: {', '.join(which[:5])}{', ...' if len(which) > 5 else ''}; drop them, their "
            "density is not defined"
        )
    return Preprocessing(None, None, tuple(mean.tolist()), tuple(deviation.tolist()))


def draw_seed(random_state: int | np.random.RandomState | None) -> int:
    """Draw a seed for torch as scikit-learn draws."""
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def _numbered(n: int) -> tuple[str, ...]:
    return tuple(f"x{i}" for i in range(n))


def _plain(parameters: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold of an estimator's parameters."""
    plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in parameters.items()}
    return {k: v for k, v in plain.items() if v is None or isinstance(v, bool | int | float | str)}


class Progress:
    """One line on a terminal, rewritten as a fit goes on; elsewhere nothing is shown."""

    def __init__(self, name: str, verbose: bool) -> None:
        self.name, self.shown = name, 0.0
        self.active = verbose and sys.stderr is not None and sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __call__(self, text: str) -> None:
        """Show the text, at most five times a second."""
        if self.active and time.monotonic() - self.shown > 0.2:
            self.shown = time.monotonic()
            print(f"\r\x1b[2K{self.name} | {text}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.active:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
