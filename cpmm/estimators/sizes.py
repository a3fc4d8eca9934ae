"""How many components and factors, and how strong a prior: tried one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpmm.estimators.em import EMOptions
from cpmm.estimators.starts import Fit, fit_again, fit_from_starts
from cpmm.initialization import count_distinct
from cpmm.mixture import Mixture

Sizes = tuple[int, int, float]  # components K, factors R, shrinkage
SHRINKAGES = (5.0, 20.0, 0.0)
N_FOLDS = 3
MOST = 512  # components
IN_VAIN = 2  # values tried after the best one


class Search:
    """Fits of several sizes to the same points, each remembered.

    Args:
        x: Points, (N, M), float64.
        weight: Of each point, more than 0, (N,).
        options: How a fit goes.
        n_init: Starts of each.
        criterion: "bic" of all points, or "validation": what a fifth of them, held out, get.
        generator: Source of every draw, on the CPU.
        progress: Called with a line of text.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        options: EMOptions,
        n_init: int,
        criterion: str,
        generator: torch.Generator,
        progress: Callable[[str], None],
    ) -> None:
        self.x, self.weight, self.n_init, self.criterion = x, weight, n_init, criterion
        self.options = replace(options, tolerance=max(options.tolerance, 1e-3))
        self.generator, self.progress = generator, progress
        self.tried: list[dict] = []
        self._losses: dict[tuple[str, Sizes], float] = {}
        self._fold = torch.randperm(len(x), generator=generator).to(x.device)
        self.fits: dict[int, Fit] = {}

    def choose(self, n_components: Any, n_factors: Any, shrinkage: Any) -> Sizes:
        """Find what is "auto"; the rest is as given.

        Lines of growing K and of growing R are gone along in turn, until neither moves. By BIC the
        prior, which no likelihood of the fitted points can tell, is chosen by three folds.
        """
        m = self.x.shape[1]
        at: dict[str, Any] = {
            "k": 1 if n_components == "auto" else n_components,
            "r": min(m, 4 if m <= 15 else 8) if n_factors == "auto" else n_factors,
            "s": SHRINKAGES[0] if shrinkage == "auto" else shrinkage,
        }
        by = "folds" if self.criterion == "bic" else self.criterion
        if n_components == n_factors == "auto" and self.criterion == "bic":
            # Many components of few factors, or few of many.
            ends = []
            for r in sorted({1, at["r"]}):
                k = self._line(at | {"r": r}, "k", self._counts(), self.criterion)
                ends.append(at | {"k": k, "r": r})
            at = min(
                ends, key=lambda end: self.loss((end["k"], end["r"], end["s"]), self.criterion)
            )
        for _ in range(3):
            before = dict(at)
            if n_components == "auto":
                at["k"] = self._line(at, "k", self._counts(), self.criterion)
            if n_factors == "auto":
                at["r"] = self._line(at, "r", factors(m), self.criterion)
            if shrinkage == "auto":
                at["s"] = self._line(at, "s", SHRINKAGES, by)
            if before == at:
                break
        return at["k"], at["r"], at["s"]

    def loss(self, sizes: Sizes, criterion: str) -> float:
        """What a fit of such sizes is worth: lower is better."""
        if (criterion, sizes) not in self._losses:
            self.progress(f"{sizes[0]} components, {sizes[1]} factors, shrinkage {sizes[2]:g}")
            measure = {"bic": self._bic, "validation": self._held_out, "folds": self._held_out}
            try:
                value = measure[criterion](sizes, N_FOLDS if criterion == "folds" else 1)
            except (FloatingPointError, ValueError):  # too few distinct points, or no density
                value = np.inf
            self._losses[criterion, sizes] = value
            row = dict(zip(("n_components", "n_factors", "shrinkage"), sizes, strict=True))
            self.tried.append(row | {"criterion": criterion, "value": value})
        return self._losses[criterion, sizes]

    def fit(self, sizes: Sizes, index: Tensor | None = None) -> Fit:
        """Fit such sizes to all points, or those at ``index``.

        Starts are looked for once for each number of components.
        """
        k, r, shrinkage = sizes
        x, weight, options = self.x, self.weight, replace(self.options, shrinkage=shrinkage)
        if index is not None:
            x, weight = x[index], weight[index]
        if k not in self.fits:
            some = (x, weight) if self.criterion == "validation" else (self.x, self.weight)
            self.fits[k] = fit_from_starts(*some, k, r, options, self.n_init, self.generator)
        return fit_again(self.fits[k], x, weight, r, options)

    def _bic(self, sizes: Sizes, _n_folds: int) -> float:
        log_likelihood, total = self.fit(sizes).result.log_likelihood, float(self.weight.sum())
        n_parameters = count_parameters(sizes[0], self.x.shape[1], sizes[1])
        return -2 * total * log_likelihood + np.log(total) * n_parameters

    def _held_out(self, sizes: Sizes, n_folds: int) -> float:
        """Negative log-density of points that were held out, nats."""
        values = []
        for fold in range(n_folds):
            parts = list(self._fold.tensor_split(5 if n_folds == 1 else n_folds))
            out = parts.pop(fold)
            fa = self.fit(sizes, torch.cat(parts)).result.components
            log_prob = Mixture(fa, (len(fa.mean),)).allow_missing().log_prob(self.x[out])
            values.append(float(log_prob @ self.weight[out] / self.weight[out].sum()))
        return -float(np.mean(values))

    def _counts(self) -> Iterator[int]:
        """Growing numbers of components, each with some points of its own."""
        most = count_distinct(self.x.cpu(), 8 * MOST) // 8
        yield 1
        for exponent in count():
            for value in (2 << exponent, 3 << exponent):
                if value > most:
                    return
                yield value

    def _line(self, at: dict[str, Any], name: str, values: Iterable, criterion: str) -> Any:
        """Go along values until some in a row are worse than the best."""
        best, found, worse = np.inf, at[name], 0
        for value in values:
            k, r, s = (at | {name: value}).values()
            loss = self.loss((k, r, s), criterion)
            if loss < best:
                best, found, worse = loss, value, 0
            elif (worse := worse + 1) == IN_VAIN:
                break
        return found


def factors(n_features: int) -> list[int]:
    """Growing numbers of factors, up to those of a full covariance."""
    most = max(1, n_features - 1)
    return sorted({min(most, value) for value in (1, 2, 4, 8, 16, 24, 32, 48, 64, most)})


def count_parameters(n_components: int, n_features: int, n_factors: int) -> int:
    """Free parameters of K factor analyzers: loadings are free up to a rotation."""
    each = n_features * (2 + n_factors) - n_factors * (n_factors - 1) // 2
    return n_components * each + n_components - 1
