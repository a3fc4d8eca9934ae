"""The sweep's results: a table of rows over seeds, a figure, claims checked, the best trial."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cpmm.pipeline.config import Config
from cpmm.pipeline.config.fingerprints import fingerprint_options
from cpmm.pipeline.scores.comparison import LEVEL, Seeds, compare_rows
from cpmm.pipeline.scores.rules import doubt_densities
from cpmm.pipeline.scores.tables import COSTS, OOD, SCORES, TEST, write_line, write_score
from cpmm.pipeline.scores.trials import FAILED, over_seeds
from cpmm.pipeline.sweeps.plan import METRICS, Trial, show
from cpmm.pipeline.sweeps.trial import explain, summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Sequence[tuple[Trial, Mapping[str, Any]]]
SHOWN = ("validation", "density", "accuracy", "nmi", "auroc", "aupr")  # as far as they are there


def trials_table(results: Results) -> pd.DataFrame:
    """One row a trial: axes, seed, fingerprint, status, scores, and the command that repeats it."""
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
                **{score: test[score] for score in TEST if score in test},
                "steps": record.get("steps", record.get("step")),
                **{cost: record.get(cost, test.get(cost)) for cost in COSTS},
                **{score: record[score] for score in OOD if score in record},
                "reason": record.get("reason"),
                **({"note": record["note"]} if "note" in record else {}),
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
    scores = [name for name in ("validation", *TEST, *OOD, "seconds") if name in trials]
    rows = []
    for _, group in trials.groupby(keys, sort=False):
        trial, _ = results[group.index[0]]
        records = [results[index][1] for index in group.index]
        failures = [explain(record) for record in records if record["status"] in FAILED]
        notes = dict.fromkeys(record["note"] for record in records if "note" in record)
        rows.append(
            {
                **group.iloc[0][axes].to_dict(),
                "row": trial.label,
                "n": len(group),
                **over_seeds(group, scores),
                "failures": "; ".join(failures),
                "notes": "; ".join(notes),
            }
        )
    densities = {row["row"]: row["density_mean"] for row in rows if "density_mean" in row}
    doubts = doubt_densities(densities)
    for row in rows:
        row["notes"] = "; ".join(filter(None, [row["notes"], doubts.get(row["row"])]))
    table = pd.DataFrame(rows).drop(columns="seconds_sd")
    return table if any(table["notes"]) else table.drop(columns="notes")


def best_trial(results: Results) -> tuple[Trial, Mapping[str, Any]] | None:
    """The finished trial with the best validation density; labels and test data have no say."""
    finished = [(t, r) for t, r in results if r["status"] == "finished"]
    scored = [(t, r) for t, r in finished if r["validation"] is not None]
    return min(scored, key=lambda item: item[1]["validation"], default=None)


def check_claims(rows: pd.DataFrame, claims: Sequence[Config]) -> list[dict[str, Any]]:
    """Compare pairs of rows with what a paper says of them.

    A difference that Welch's t-test of the seeds' means does not tell from none is within noise.

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
        f"Densities in {unit}, lower is better; mean ± standard deviation over the seeds of a "
        "row. Trials are chosen by their validation density alone.",
    ]
    if "auroc_mean" in rows:
        lines.append("AUROC and AUPR: how well log-density tells another data set apart.")
    lines.append("")
    axes, scores = _axes(rows), _shown(rows)
    header = _header(axes, scores)
    table = [header, ["---"] * len(header), *cells_of(rows, axes, scores)]
    lines += map(write_line, table)
    if claims:
        lines += [
            "", "## The paper's claims", "",
            "From the row that should be worse to the one that should be better. Differences with "
            f"p ≥ {LEVEL} in Welch's t-test of the seeds are within noise.",
            "", write_line(["claim", "paper", "here", "holds"]), write_line(["---"] * 4),
        ]  # fmt: skip
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
        note = "; ".join(filter(None, (failed, stopped, row.get("notes"))))
        cells.append([*(str(row[a]) for a in axes), str(row["n"]), *numbers, note])
    return cells


def terminal_table(title: str, rows: pd.DataFrame) -> Any:
    """The table as rich prints it."""
    from rich.table import Table

    axes, scores = _axes(rows), _shown(rows)
    table = Table(title=title, title_justify="left")
    for name in _header(axes, scores):
        table.add_column(name, justify="left" if name in (*axes, "failures") else "right")
    means = rows["validation_mean"].astype(float)
    best = means.idxmin() if means.notna().any() else None
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
    titles = {"density": f"test density, {unit}", "accuracy": "clustering accuracy, %"}
    nothing = pd.Series([None] * len(trials))
    panels = {
        title: SCORES[score].factor * trials.get(score, nothing).astype(float).to_numpy()
        for score, title in titles.items()
        if score in trials or score == "density"
    }
    return plot_sweep(labels, np.array(place), panels, rows["n_failed"].tolist())


def write_tables(
    folder: Path,
    results: Results,
    rows: pd.DataFrame,
    claims: Sequence[Config],
    unit: str,
    text: str,
) -> None:
    """Write the trials, the rows with their claims, the figure and ``text`` into a folder."""
    from matplotlib import rc_context

    from cpmm.pipeline.artifacts.files import write_json

    trials_table(results).to_csv(folder / "trials.csv", index=False)
    (folder / "table.md").write_text(text)
    records = json.loads(rows.to_json(orient="records"))
    write_json(folder / "table.json", {"unit": unit, "rows": records, "claims": claims})
    with rc_context({"svg.hashsalt": "cpmm"}):
        draw(results, rows, unit).savefig(folder / "rows.svg", metadata={"Date": None})


def print_tables(title: str, rows: pd.DataFrame, claims: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows and the claims."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(terminal_table(title, rows))
    for claim in claims:
        ours = f"{claim['ours']['worse']} -> {claim['ours']['better']}"
        print(f"claim: {claim['claim']}: {claim['holds']} ({claim['metric']} {ours})")


def best_line(
    best: tuple[Trial, Mapping[str, Any]] | None, unit: str, folder: Path, kept: Sequence[str]
) -> str:
    """Say which trial is best, what of it is kept and where, and how to repeat it."""
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
    found = best and {
        "trial": best[0].name, "validation": best[1]["validation"], "test": best[1]["test"],
        "command": shlex.split(best[0].command),
    }  # fmt: skip
    return {"sweep": sweep, "unit": unit, "rows": table, "best": found}


def _axes(rows: pd.DataFrame) -> list[str]:
    return rows.columns[: rows.columns.get_loc("row")].tolist()


def _shown(rows: pd.DataFrame) -> list[str]:
    return [score for score in SHOWN if f"{score}_mean" in rows]


def _find(rows: pd.DataFrame, wanted: Mapping[str, Any]) -> pd.Series | None:
    for name, value in wanted.items():
        rows = rows[rows[name] == show(value)] if name in rows else rows[:0]
    return rows.iloc[0] if len(rows) == 1 else None


def _header(axes: Sequence[str], scores: Sequence[str]) -> list[str]:
    return [*axes, "seeds", *(SCORES[score].heading for score in scores), "failures"]


def _compare(metric: str, better: pd.Series, worse: pd.Series) -> dict[str, Any]:
    """Whether ``better`` is better, and by more than the seeds' noise."""
    rows = {"better": better, "worse": worse}
    ours = {name: _mean_sd(row, metric) or "failed" for name, row in rows.items()}
    if "failed" in ours.values():
        return {"ours": ours, "holds": "cannot be said: a row failed"}
    found = compare_rows(metric, *(_seeds(row, metric) for row in rows.values()))
    noise = {"level": ", within noise", "single": ", one seed"}.get(found.verdict, "")
    return {"ours": ours, "holds": ("yes" if found.gain > 0 else "no") + noise}


def _seeds(row: pd.Series, metric: str) -> Seeds:
    n_done = row["n"] - row["n_failed"] - row["n_stopped"]
    return Seeds(row[f"{metric}_mean"], row[f"{metric}_sd"], n_done)


def _mean_sd(row: pd.Series, score: str) -> str:
    return write_score(score, row[f"{score}_mean"], row[f"{score}_sd"])
