"""The sweep's results: a table of rows over seeds, a figure, claims checked, the best trial's files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cpmm.pipeline.config import Config
from cpmm.pipeline.config.fingerprints import fingerprint_options
from cpmm.pipeline.scores.tables import DETECTION, write_line, write_score
from cpmm.pipeline.sweeps.plan import METRICS, Trial, show
from cpmm.pipeline.sweeps.trial import SCORES, explain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Sequence[tuple[Trial, Mapping[str, Any]]]
COSTS = ("n_parameters", "seconds_10k", "memory_gb")
HIGHER = ("accuracy", "nmi", "ari", "purity")
SHOWN = ("validation", "density", "accuracy", "nmi", "auroc", "aupr")  # as far as they are there
FAILED = ("diverged", "failed", "lost")


def trials_table(results: Results) -> pd.DataFrame:
    """One row a trial: its axes, seed, fingerprint, status, scores, and the command that repeats it."""
    rows = []
    for trial, record in results:
        test = record.get("test") or {}
        rows.append(
            {
                **dict(trial.row),
                "seed": trial.seed,
                "fingerprint": fingerprint_options(trial.config),
                "status": record["status"],
                "validation": record.get("validation"),
                **{score: test.get(score) for score in SCORES if score in test},
                "steps": record.get("steps", record.get("step")),
                "seconds": record.get("seconds"),
                **{cost: record.get(cost, test.get(cost)) for cost in COSTS},
                **{told: record[told] for told in DETECTION if told in record},
                "reason": record.get("reason"),
                "command": trial.command,
            }
        )
    return pd.DataFrame(rows)


def rows_table(results: Results) -> pd.DataFrame:
    """One row for each combination of the axes: mean and standard deviation over its seeds.

    The standard deviation is that of the seeds (n - 1), nothing for a single one. Trials that
    failed are counted, and do not enter the means.
    """
    trials = trials_table(results)
    axes = [name for name, _ in results[0][0].row]
    keys = pd.Series([trial.overrides[:-1] for trial, _ in results])
    rows = []
    for key, group in trials.groupby(keys, sort=False):
        label = results[group.index[0]][0].label
        done = group[group["status"] == "finished"]
        row = {**group.iloc[0][axes].to_dict(), "row": label, "n": len(group)}
        row["n_failed"] = int(group["status"].isin(FAILED).sum())
        row["n_stopped"] = int((group["status"] == "stopped").sum())
        for score in ("validation", *SCORES, *DETECTION):
            if score in trials:
                values = done[score].dropna().astype(float)
                row[f"{score}_mean"] = values.mean() if len(values) else None
                row[f"{score}_sd"] = values.std() if len(values) > 1 else None
        row["seconds_mean"] = done["seconds"].astype(float).mean() if len(done) else None
        reasons = group["reason"].dropna().unique()
        row["failures"] = (
            "; ".join(
                explain(record)
                for trial, record in results
                if trial.overrides[:-1] == key and record["status"] in FAILED
            )
            if len(reasons)
            else ""
        )
        rows.append(row)
    return pd.DataFrame(rows)


def best_trial(results: Results) -> tuple[Trial, Mapping[str, Any]] | None:
    """The finished trial with the best validation density; labels and test data have no say."""
    finished = [
        item
        for item in results
        if item[1]["status"] == "finished" and item[1]["validation"] is not None
    ]
    return min(finished, key=lambda item: item[1]["validation"], default=None)


def check_claims(rows: pd.DataFrame, claims: Sequence[Config]) -> list[dict[str, Any]]:
    """Compare pairs of rows with what a paper says of them.

    A difference is called clear if it exceeds the standard error of the two means' difference twice.

    Raises:
        ValueError: If a claim names a score that there is not.
    """
    checked = []
    for claim in claims:
        better, worse = _find(rows, claim["better"]), _find(rows, claim["worse"])
        if better is None or worse is None:
            continue  # the sweep was changed, and lacks a row
        metric = claim["metric"]
        if metric not in METRICS:
            raise ValueError(f"claim {claim['claim']!r}: unknown metric {metric!r}")
        result = {"claim": claim["claim"], "metric": metric, "paper": claim["paper"]}
        if metric == "failed":
            result["ours"] = {k: f"{r['n_failed']} of {r['n']} failed" for k, r in
                              (("better", better), ("worse", worse))}  # fmt: skip
            result["holds"] = "yes" if worse["n_failed"] > better["n_failed"] else "no"
        elif f"{metric}_mean" not in rows:
            continue  # data without labels
        else:
            result |= _compare(metric, better, worse)
        checked.append(result)
    return checked


def markdown(
    sweep: str, preset: str, unit: str, rows: pd.DataFrame, claims: Sequence[Config], best: str
) -> str:
    """Write the table, the claims and the best trial for people."""
    lines = [
        f"# Sweep {sweep} of {preset}",
        "",
        f"Test density in {unit} (lower is better), clustering accuracy in %; mean ± standard deviation over "
        "the seeds of a row. Trials are compared by validation density; test figures are only reported.",
    ]
    if "auroc_mean" in rows:
        lines.append(
            "AUROC and AUPR in %: another data set told apart by density in the mixture's space."
        )
    lines.append("")
    axes = _axes(rows)
    scores = _shown(rows)
    header = [*axes, "seeds", *scores, "failures"]
    lines += [write_line(header), write_line(["---"] * len(header))]
    lines += [write_line(cells) for cells in cells_of(rows, axes, scores)]
    if claims:
        lines += ["", "## The paper's claims", ""]
        lines += ["From the row that should be worse to the one that should be better.", ""]
        lines += [write_line(["claim", "paper", "here", "holds"]), write_line(["---"] * 4)]
        for claim in claims:
            paper = f"{claim['paper']['worse']} → {claim['paper']['better']}"
            ours = f"{claim['ours']['worse']} → {claim['ours']['better']}"
            lines.append(write_line([claim["claim"], paper, ours, claim["holds"]]))
    return "\n".join([*lines, "", best, ""])


def cells_of(rows: pd.DataFrame, axes: Sequence[str], scores: Sequence[str]) -> list[list[str]]:
    """Cells of the table for people, a list a row."""
    cells = []
    for _, row in rows.iterrows():
        numbers = [_mean_sd(row, score) for score in scores]
        failed = f"{row['n_failed']} of {row['n']}: {row['failures']}" if row["n_failed"] else ""
        stopped = f"{row['n_stopped']} stopped early" if row["n_stopped"] else ""
        note = "; ".join(filter(None, (failed, stopped)))
        cells.append([*(str(row[a]) for a in axes), str(row["n"]), *numbers, note])
    return cells


def terminal_table(title: str, rows: pd.DataFrame) -> Any:
    """The table as rich prints it."""
    from rich.table import Table

    axes = _axes(rows)
    scores = _shown(rows)
    table = Table(title=title, title_justify="left")
    for name in (*axes, "seeds", *scores, "failures"):
        table.add_column(name, justify="left" if name in (*axes, "failures") else "right")
    best = (
        rows["validation_mean"].astype(float).idxmin()
        if rows["validation_mean"].notna().any()
        else None
    )
    for index, cells in enumerate(cells_of(rows, axes, scores)):
        table.add_row(*cells, style="bold" if index == best else None)
    return table


def draw(results: Results, rows: pd.DataFrame, unit: str) -> Figure:
    """Draw every trial as a point and every row as an interval."""
    from cpmm.figures import plot_sweep

    trials = trials_table(results)
    labels = rows["row"].tolist()
    keys = list(dict.fromkeys(trial.overrides[:-1] for trial, _ in results))
    place = [keys.index(trial.overrides[:-1]) for trial, _ in results]
    scores = [
        ("density", f"test density, {unit}", 1.0),
        ("accuracy", "clustering accuracy, %", 100.0),
    ]
    nothing = pd.Series([None] * len(trials))
    panels = {
        title: factor * trials.get(score, nothing).astype(float).to_numpy()
        for score, title, factor in scores
        if score in trials or score == "density"
    }
    return plot_sweep(labels, np.array(place), panels, rows["n_failed"].tolist())


def best_line(
    best: tuple[Trial, Mapping[str, Any]] | None, unit: str, folder: Path, kept: Sequence[str]
) -> str:
    """Say which trial is best, what of it is kept and where, and how to repeat it."""
    from cpmm.pipeline.sweeps.trial import summarize

    if best is None:
        return "No trial finished: see the failures above."
    trial, record = best
    where = f"In {folder}: its {' and '.join(kept)}" if kept else "Its weights are not kept"
    return (
        f"Best by validation: {trial.name}: {summarize(record, unit)}. {where}; this repeats it:"
        f"\n\n    {trial.command}"
    )


def metrics(
    sweep: str, rows: pd.DataFrame, best: tuple[Trial, Mapping[str, Any]] | None, unit: str
) -> dict[str, Any]:
    """What `dvc metrics` shows: the rows by their labels, and the best trial."""
    numbers = [c for c in rows if c.endswith(("_mean", "_sd")) and not c.startswith("seconds")]
    table = {
        row["row"]: {name: row[name] for name in ("n", "n_failed", *numbers) if pd.notna(row[name])}
        for _, row in rows.iterrows()
    }
    found = None
    if best is not None:
        trial, record = best
        found = {
            "trial": trial.name,
            "validation": record["validation"],
            "test": record["test"],
            "command": shlex.split(trial.command),
        }
    return {"sweep": sweep, "unit": unit, "rows": table, "best": found}


def _axes(rows: pd.DataFrame) -> list[str]:
    return rows.columns[: rows.columns.get_loc("row")].tolist()


def _shown(rows: pd.DataFrame) -> list[str]:
    return [score for score in SHOWN if f"{score}_mean" in rows]


def _find(rows: pd.DataFrame, wanted: Mapping[str, Any]) -> pd.Series | None:
    known = {name: value for name, value in wanted.items() if name in rows}
    if len(known) < len(wanted):
        return None
    match = rows
    for name, value in known.items():
        match = match[match[name] == show(value)]
    return match.iloc[0] if len(match) == 1 else None


def _compare(metric: str, better: pd.Series, worse: pd.Series) -> dict[str, Any]:
    """Whether ``better`` is better, and by more than the seeds' noise."""
    ours = {name: _mean_sd(row, metric) or "failed" for name, row in
            (("better", better), ("worse", worse))}  # fmt: skip
    a, b = better[f"{metric}_mean"], worse[f"{metric}_mean"]
    if pd.isna(a) or pd.isna(b):
        return {"ours": ours, "holds": "cannot be said: a row failed"}
    gain = (a - b) if metric in HIGHER else (b - a)
    errors = [
        row[f"{metric}_sd"] ** 2 / max(1, row["n"] - row["n_failed"] - row["n_stopped"])
        for row in (better, worse)
        if pd.notna(row[f"{metric}_sd"])
    ]
    holds = "yes" if gain > 0 else "no"
    if len(errors) < 2 or abs(gain) < 2 * sum(errors) ** 0.5:
        holds += ", within noise" if len(errors) == 2 else ", one seed"
    return {"ours": ours, "holds": holds}


def _mean_sd(row: pd.Series, score: str) -> str:
    return write_score(score, row[f"{score}_mean"], row[f"{score}_sd"])
