"""Put CPMM and its baselines into one table, with what they cost: data/<preset>/comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmm.files import write_text
from cpmm.pipeline.config import Config
from cpmm.pipeline.config.fingerprints import hash_of
from cpmm.pipeline.scores import published
from cpmm.pipeline.scores.comparison import LEVEL, Comparison, Seeds, compare_rows
from cpmm.pipeline.scores.rules import doubt_densities
from cpmm.pipeline.scores.tables import (
    COSTS,
    OOD,
    SCORES,
    is_number,
    write_digits,
    write_score,
    write_table,
)
from cpmm.pipeline.stage import publish, run_stage, scratch_folder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SWEEP = "table1"
SHOWN = ("density", "accuracy", "nmi")
JUDGED = {"density": "density", "accuracy": "clustering accuracy"}
NONE = "–"
# Models that are no rows of conf/baselines/, whose files say the same of them: what tables call
# them, under which heading they stand, and beside which row of the paper's Table 1.
MODELS = {
    "cpmm": {"title": "CPMM", "block": "CPMM", "paper": "CPMM"},
    "teacher": {"title": "teacher", "block": "flows", "paper": "Teacher"},
}
# Headings in their order; others follow, then what has none, and what only the paper has.
BLOCKS = ("CPMM", "mixtures", "circuits", "flows", "clustering only", "sanity rows")
OTHERS = "others"
REPORTED = "reported, not rerun"
NOT_RERUN = {
    "SPC": "its published code picks its best epoch by ground-truth accuracy, so labels take part "
    "in the selection",
    "DLS": "there is no code to rerun under these rules",
}


def main(folder: Path, config: Config) -> str:
    """Write ``comparison`` for a preset."""
    from matplotlib import rc_context

    from cpmm.artifact import seal_folder
    from cpmm.pipeline.artifacts.store import verify_evaluation
    from cpmm.pipeline.scores.trials import read_trials

    trials = read_trials(sweep_of(folder), config)
    verify_evaluation(folder, config)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    rules = json.loads((folder / "evaluation" / "rules.json").read_text(encoding="utf-8"))
    table = compare(trials, metrics, config)
    fingerprint = fingerprint_comparison(folder)
    scratch = scratch_folder(folder, "compare", fingerprint)
    out = scratch / "comparison"
    out.mkdir(exist_ok=True)
    write_text(out / "table1.csv", table.to_csv(index=False, lineterminator="\n"))
    write_text(out / "table1.md", markdown(table, metrics, rules, config))
    with rc_context({"svg.hashsalt": "cpmm"}):
        draw(table, metrics["unit"]).savefig(out / "costs.svg", metadata={"Date": None})
    seal_folder(out, "comparison", {"fingerprint": fingerprint}, {})
    publish(scratch, "comparison", folder / "comparison")
    return (
        f"{len(table)} rows, {len(trials)} trials, {table['n_failed'].sum()} failed; "
        f"{_headline(table, metrics['unit'])} -> {folder / 'comparison'}"
    )


def sweep_of(folder: Path) -> Path:
    """Where a preset has the sweep of its models."""
    return folder / "sweep" / SWEEP


def fingerprint_comparison(folder: Path) -> str:
    """Fingerprint of ``comparison``: of the bytes of all that it is made from."""
    from cpmm.artifact import file_digest

    inputs = (
        sweep_of(folder) / "sweep.json",  # seals the trials
        folder / "metrics.json",
        folder / "evaluation" / "evaluation.json",  # seals the rules
        folder / "config.yaml",  # the names of the rows
        published.PATH,
    )
    return hash_of("comparison", *map(file_digest, inputs))


def describe(model: str, config: Config) -> dict[str, Any]:
    """Say what tables call a model, its block, and its row of the paper's Table 1."""
    unknown = {"title": model, "block": OTHERS, "paper": None}
    return unknown | MODELS.get(model, {}) | config["baselines"].get(model, {})


def compare(trials: pd.DataFrame, metrics: Mapping[str, Any], config: Config) -> pd.DataFrame:
    """Lay out the models in blocks: mean scores over seeds, their deviations, and median costs.

    The standard deviation is that of the seeds (n - 1), none for a single one. Trials that failed
    are counted, and do not enter the means. ``_n`` counts the seeds of what not all may have.

    Args:
        trials: As :func:`read_trials` returns them.
        metrics: Those of evaluate.
        config: The preset's, which describes the rows.
    """
    import pandas as pd

    data = published.data_of(str(metrics.get("preset")))
    found = {model: _of_sweep(group) for model, group in trials.groupby("model", sort=False)}
    detected = (metrics.get("ood") or {}).get("models", {})
    for model, scores in metrics["models"].items():
        if model != "cpmm" and model not in found:  # of CPMM the table has the sweep's seeds alone
            found[model] = _of_evaluation(scores, detected.get(model, {}))
    rows = []
    for model, row in found.items():
        about = describe(model, config)
        head = {"block": about["block"], "model": model, "name": about["title"]}
        rows.append(head | row | _of_paper(data, about["paper"]))
    for name in NOT_RERUN if data else ():
        head = {"block": REPORTED, "model": name, "name": name, "source": "paper"}
        rows.append(head | {"n_seeds": 0, "n_failed": 0, "n_stopped": 0} | _of_paper(data, name))
    own = [row["block"] for row in rows if row["block"] not in (OTHERS, REPORTED)]
    order = list(dict.fromkeys([*BLOCKS, *own, OTHERS, REPORTED]))
    rows.sort(key=lambda row: (order.index(row["block"]), row["model"] != "cpmm"))
    columns = ["block", "model", "name", "source", "n_seeds", "n_failed", "n_stopped"]
    columns += [f"{score}_{moment}" for score in SHOWN for moment in ("mean", "sd")]
    columns += ["n_parameters", *(f"{c}_{what}" for c in COSTS[1:] for what in ("median", "n"))]
    columns += [f"{score}_{what}" for score in OOD for what in ("mean", "sd", "n")]
    columns += ["paper_density", "paper_accuracy", "failures"]
    _add_doubts(rows)
    noted = ["notes"] if any(row.get("notes") for row in rows) else []
    table = pd.DataFrame(rows, columns=columns + noted).fillna({"failures": "", "notes": ""})
    numbers = columns[columns.index("density_mean") : -1]
    whole = ["n_parameters", *(f"{name}_n" for name in (*COSTS[1:], *OOD))]
    return table.astype(dict.fromkeys(numbers, float)).astype(dict.fromkeys(whole, "Int64"))


def judge(table: pd.DataFrame, metric: str) -> dict[str, list[tuple[str, Comparison]]] | None:
    """Compare the rows with CPMM by a score.

    Returns:
        Names and comparisons by their verdicts, from the best row to the worst; None without CPMM.
    """
    table = table[table[f"{metric}_mean"].notna()]
    seeds = {
        row["model"]: Seeds(row[f"{metric}_mean"], row[f"{metric}_sd"], row["n_seeds"])
        for _, row in table.iterrows()
    }
    if (own := seeds.pop("cpmm", None)) is None:
        return None
    names = dict(zip(table["model"], table["name"], strict=True))
    pairs = [(names[model], compare_rows(metric, row, own)) for model, row in seeds.items()]
    pairs.sort(key=lambda pair: -pair[1].gain)
    return {
        verdict: [pair for pair in pairs if pair[1].verdict == verdict]
        for verdict in ("better", "level", "worse", "single")
    }


def markdown(
    table: pd.DataFrame, metrics: Mapping[str, Any], rules: Mapping[str, str], config: Config
) -> str:
    """Write the table for people, what is measured where, and which rows are better than CPMM.

    Args:
        table: As :func:`compare` returns it.
        metrics: Those of evaluate.
        rules: A sentence for each of its figures.
        config: The preset's.
    """
    import pandas as pd

    own = next((row for _, row in table.iterrows() if row["model"] == "cpmm"), {})
    cells = pd.DataFrame([_cells(row, own) for _, row in table.iterrows()])
    density = SCORES["density"].heading
    cells = cells[[c for c in cells if c == density or (cells[c] != NONE).any()]]
    lines = []
    for block, rows in cells.groupby(table["block"], sort=False):
        title = f"**{block[0].upper()}{block[1:]}**"
        lines += [[title, *[""] * (len(cells.columns) - 1)], *rows.to_numpy()]
    text = [f"# Table 1 for {metrics['preset']}: CPMM and its baselines", ""]
    text += [*write_table(list(cells), lines), "", *_verdicts(table, metrics["unit"])]
    text += ["", "## What is measured where", ""]
    notes = [
        *_notes_on_rows(table, metrics, config),
        *_notes_on_scores(table, metrics, rules, config),
        *_notes_on_costs(table),
        *_notes_on_absent(table, metrics, config),
    ]
    text += [f"- {note}" for note in notes]
    if "notes" in table:
        noted = table[table["notes"] != ""]
        text += [f"- {row['name']}: {row['notes']}." for _, row in noted.iterrows()]
    if (failed := table[table["failures"] != ""]).size:
        text += ["", "## Trials that did not finish", ""]
        for _, row in failed.iterrows():
            lost = row["n_failed"] + row["n_stopped"]
            text.append(f"- {row['name']}, {lost} of {row['n_seeds'] + lost}: {row['failures']}")
    return "\n".join([*text, ""])


def draw(table: pd.DataFrame, unit: str) -> Figure:
    """Draw density against parameters and against the time of 10,000 densities."""
    from cpmm.figures import plot_costs

    shown = table[table["density_mean"].notna()]
    return plot_costs(
        shown["name"].tolist(),
        shown["block"].tolist(),
        shown["density_mean"].to_numpy(float),
        shown["density_sd"].to_numpy(float),
        {
            "parameters": shown["n_parameters"].to_numpy(float, na_value=math.nan),
            "seconds for 10,000 log-densities": shown["seconds_10k_median"].to_numpy(float),
        },
        f"{unit}, lower is better",
    )


def _of_sweep(group: pd.DataFrame) -> dict[str, Any]:
    from cpmm.pipeline.scores.trials import over_seeds

    done = group[group["status"] == "finished"]
    row = {"source": "sweep", "n_seeds": len(done), **over_seeds(group, (*SHOWN, *OOD))}
    row |= {f"{name}_median": done[name].median() for name in COSTS}
    row |= {f"{name}_n": done[name].count() for name in (*COSTS, *OOD)}
    row["n_parameters"] = round(row["n_parameters_median"], 0)
    said = dict.fromkeys(note for note in done.get("note", ()) if note)
    return row | {"failures": _explain(group), "notes": "; ".join(said)}


def _of_evaluation(model: Mapping[str, Any], detected: Mapping[str, Any]) -> dict[str, Any]:
    row = {"source": "evaluation", "n_seeds": 1, "n_failed": 0, "n_stopped": 0}
    row |= {f"{score}_mean": model.get(score) for score in SHOWN}
    row |= {f"{name}_mean": detected.get(space, {}).get(key) for name, (space, key) in OOD.items()}
    if "missing" in model:
        row |= {"n_seeds": 0, "n_failed": 1, "failures": f"no model: {model['missing']}"}
    said = [*model.get("notes", ()), *filter(None, [detected.get("missing")])]
    return row | {"n_parameters": model.get("n_parameters"), "notes": "; ".join(said)}


def _of_paper(data: str | None, row: str | None) -> dict[str, float | None]:
    return {f"paper_{metric}": published.printed(data, row, metric) for metric in JUDGED}


def _add_doubts(rows: list[dict[str, Any]]) -> None:
    """Note on the rows of the sweep which densities are far off; those of evaluate have notes."""
    densities = {row["model"]: row.get("density_mean") for row in rows}
    doubts = doubt_densities({m: value for m, value in densities.items() if is_number(value)})
    for row in rows:
        doubt = doubts.get(row["model"])
        if row["source"] == "sweep" and doubt:
            row["notes"] = "; ".join(filter(None, [row.get("notes"), doubt]))


def _explain(group: pd.DataFrame) -> str:
    """Say why trials did not finish, those with the same reason together."""
    seeds: dict[str, list[str]] = {}
    for _, trial in group[group["status"] != "finished"].iterrows():
        at = f" at step {trial['steps']:.0f}" if is_number(trial["steps"]) else ""
        reason = " ".join(trial["reason"].split())
        if not reason:
            reason = "by the scheduler" if trial["status"] == "stopped" else "no reason recorded"
        seeds.setdefault(f"{trial['status']}{at}: {reason}", []).append(str(trial["seed"]))
    return "; ".join(
        f"seed{'s' if len(own) > 1 else ''} {', '.join(own)}: {why}" for why, own in seeds.items()
    )


def _cells(row: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, str]:
    """Write a row for people, by the headings of its columns; ``own`` is CPMM's."""

    def paper(metric: str) -> str:
        return write_score(metric, row[f"paper_{metric}"], nothing=NONE, digits=2)

    def scores(*names: str) -> dict[str, str]:
        return {SCORES[name].heading: _mean_sd(row, name) for name in names}

    done = row["n_seeds"]
    n = done + row["n_failed"] + row["n_stopped"]
    seeds = str(n) if n == done else f"{done} of {n}"
    return {
        "model": row["name"],
        "seeds": NONE if row["source"] == "paper" else seeds,
        **scores("density"),
        "paper": paper("density"),
        **scores("accuracy"),
        "paper, %": paper("accuracy"),
        **scores("nmi"),
        "parameters": write_score("n_parameters", row["n_parameters"], nothing=NONE),
        **{SCORES[name].heading: _cost(row, own, name) for name in COSTS[1:]},
        **scores("auroc", "auroc_data"),
    }


def _verdicts(table: pd.DataFrame, unit: str) -> list[str]:
    if "cpmm" not in set(table["model"]):
        return ["The sweep has no CPMM: nothing is compared with it."]
    lines = []
    for metric, title in JUDGED.items():
        if table[f"{metric}_mean"].isna().all():
            continue
        what = f"{title} ({unit})" if metric == "density" else title
        if line := _verdict(table, metric, what):
            lines += [line, ""]
    return lines[:-1] or ["Nothing beside CPMM finished that could be compared with it."]


def _verdict(table: pd.DataFrame, metric: str, what: str) -> str:
    """Say which rows are better than CPMM by a score, which are worse, and which not judged."""
    found = judge(table, metric)
    if found is None:
        return f"In {what} CPMM has no score: nothing is compared with it."
    named = {
        verdict: ", ".join(_write_gain(metric, *pair) for pair in pairs)
        for verdict, pairs in found.items()
    }
    judged = any(found[verdict] for verdict in ("better", "level", "worse"))
    parts = []
    if judged:
        parts.append(
            f"In {what}, {named['better'] or 'no row'} "
            f"beat{'' if len(found['better']) > 1 else 's'} CPMM, "
            f"judged by the seeds (Welch's t-test, p < {LEVEL})."
        )
        parts += [f"No such difference: {named['level']}."] if found["level"] else []
        parts += [f"Worse: {named['worse']}."] if found["worse"] else []
    if found["single"]:
        start = "Not judged, one seed" if judged else f"In {what} no row is judged, one seed"
        parts.append(f"{start}: {named['single']}.")
    return " ".join(parts)


def _write_gain(metric: str, name: str, found: Comparison) -> str:
    unit = " points" if SCORES[metric].unit == "%" else ""
    size = write_score(metric, abs(found.gain)) + unit
    if found.verdict in ("better", "worse"):
        return f"{name} by {size}"
    return f"{name} {size} {'better' if found.gain > 0 else 'worse'}"


def _notes_on_rows(table: pd.DataFrame, metrics: Mapping[str, Any], config: Config) -> list[str]:
    sources = table.groupby("source")["name"].agg(", ".join)
    notes = [
        f"Means ± standard deviations over the seeds of the sweep `{SWEEP}`, on the "
        f"{metrics['n_test']:,} test points. Where one seed finished there is no ±. Costs are "
        "medians over the seeds, which one slow trial does not change. Where not all seeds have "
        "a number, it says how many do.",
        "Verdicts: their standard errors are over seeds only; all rows have the same test points, "
        "and which points these are is not part of the error.",
    ]
    if "evaluation" in sources:
        notes.append(
            f"Of the pipeline's own run, its seed {metrics['seed']} alone: {sources['evaluation']}."
        )
    if "refined" in set(table["model"]):
        notes.append(
            f"{describe('refined', config)['title']}: on their own likelihood, free of their "
            "trajectories."
        )
    return notes


def _notes_on_scores(
    table: pd.DataFrame, metrics: Mapping[str, Any], rules: Mapping[str, str], config: Config
) -> list[str]:
    options, models = config["evaluation"], set(table["model"])
    notes = [f"Density, {metrics['unit']}: {rules['density']}"]
    if (table["block"] == "flows").any():
        n_points, solver = options["teacher_points"], options["teacher_solver"]
        easier = ", which may be easier than all, as MNIST's are,"
        first = "" if n_points is None else f" on the first {n_points} points of a split{easier}"
        notes.append(
            f"Flows: densities{first} by {solver['method']} at the tolerances "
            f"{solver['rtol']:g}/{solver['atol']:g}."
        )
    grey = [
        describe(model, config)["title"]
        for model, row in config["baselines"].items()
        if model in models and row.get("likelihood") == "bernoulli"
    ]
    if grey and metrics["unit"] == "bits per dimension":
        notes.append(
            f"{', '.join(grey)}: of raw grey levels k / (n - 1), without the others' "
            "dequantization and logit; they give no density."
        )
    if "accuracy" in rules:
        notes.append(f"Accuracy: {rules['accuracy']} NMI: {rules['nmi']}")
    if metrics.get("ood") and table["auroc_mean"].notna().any():
        notes.append(
            "AUROC: how well log-density tells the test points from those of "
            f"{metrics['ood']['name']}, in the models' space and in units of the data."
        )
    return notes


def _notes_on_costs(table: pd.DataFrame) -> list[str]:
    notes = {
        "n_parameters": "Parameters: of the model that is used, of CPMM the extracted mixture's.",
        "seconds_median": "Training: wall-clock time of a trial on the machine of the sweep, "
        "without the teacher and the spaces, which are made before it; in brackets how many times "
        "that of CPMM.",
        "seconds_10k_median": "10,000 densities: time for the log-densities of as many points on "
        "that machine, scaled from fewer; mixtures and circuits in float64 on the CPU, flows where "
        "they were trained; in brackets how many times that of CPMM.",
        "memory_gb_median": "Memory: peak of the trial's process above what it held before; on a "
        "GPU that of its own.",
    }
    return [note for column, note in notes.items() if table[column].notna().any()]


def _notes_on_absent(table: pd.DataFrame, metrics: Mapping[str, Any], config: Config) -> list[str]:
    """What is the paper's alone, and which models are not in the table."""
    notes = []
    if data := published.data_of(str(metrics.get("preset"))):
        notes.append(
            f"Paper: its Table 1, {published.TITLES[data]}; its FFJORD stands beside both CNFs, "
            "its GMM w/ S.Clust. beside both spectral rows."
        )
        notes += [f"{name}, of the paper alone: {reason}." for name, reason in NOT_RERUN.items()]
    models = dict.fromkeys([*MODELS, *config["baselines"]])
    absent = [describe(m, config)["title"] for m in models if m not in set(table["model"])]
    return [*notes, f"Not there: {', '.join(absent)}."] if absent else notes


def _headline(table: pd.DataFrame, unit: str) -> str:
    found = judge(table, "density")
    if found is None:
        return "no CPMM to compare with"
    own = table[table["model"] == "cpmm"].iloc[0]
    n = sum(len(found[verdict]) for verdict in ("better", "level", "worse"))
    return f"CPMM {_mean_sd(own, 'density')} {unit}, beaten by {len(found['better'])} of {n} rows"


def _mean_sd(row: Mapping[str, Any], score: str) -> str:
    text = write_score(score, row[f"{score}_mean"], row[f"{score}_sd"], nothing=NONE)
    return text + _partly(row, score)


def _cost(row: Mapping[str, Any], own: Mapping[str, Any], name: str) -> str:
    """Write a cost; of a duration also how many times that of CPMM it is."""
    value, unit = row[f"{name}_median"], own.get(f"{name}_median")
    text = write_score(name, value, nothing=NONE)
    if text != NONE and SCORES[name].unit == "s" and is_number(unit) and unit > 0:
        text += f" ({write_digits(value / unit)}×)"
    return text + _partly(row, name)


def _partly(row: Mapping[str, Any], name: str) -> str:
    """How many seeds have a score, where that is not all."""
    n = row.get(f"{name}_n")
    return f" ({n} of {row['n_seeds']} seeds)" if is_number(n) and 0 < n < row["n_seeds"] else ""


if __name__ == "__main__":
    run_stage(main, __doc__)
