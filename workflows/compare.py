"""Put CPMM and its baselines into one table, with what they cost: data/<preset>/comparison.

Reads the trials of the sweep ``table1``, a row a trial of a model, and what evaluate found in the pipeline's
own run; beside them stands the paper's Table 1, where the preset is one of its data sets.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmm.pipeline.artifacts.files import write_text
from cpmm.pipeline.config import Config
from cpmm.pipeline.config.fingerprints import fingerprint_trial, hash_of
from cpmm.pipeline.scores.published import TITLES, data_of, printed
from cpmm.pipeline.scores.tables import DETECTION, write_score
from cpmm.pipeline.stage import publish, run_stage, scratch_folder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SWEEP = "table1"
STATUSES = ("finished", "diverged", "failed", "lost", "stopped")
FAILED = STATUSES[1:4]
SCORES = ("density", "accuracy", "nmi")
COSTS = ("n_parameters", "seconds", "seconds_10k", "memory_gb")
SHARES = ("accuracy", "nmi", *DETECTION)  # in [0, 1]
NUMBERS = (*SCORES, *COSTS, *DETECTION)
LEVEL = 0.05  # of the test that judges rows, two-sided
NONE = "–"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        model: What the sweep calls it, or metrics.json.
        title: For people.
        paper: Row of the paper's Table 1 that it stands for; empty if there is none.
        evaluated: It is of the pipeline's own run, not of the sweep.
    """

    model: str
    title: str
    paper: str = ""
    evaluated: bool = False


BLOCKS: dict[str, tuple[Row, ...]] = {
    "CPMM": (
        Row("cpmm", "CPMM", "CPMM"),
        Row("refined", "CPMM's components trained on", evaluated=True),
    ),
    "mixtures": (
        Row("matched", "matched mixture", "Matched GMM"),
        Row("spectral_frechet", "spectral (Fréchet)", "GMM w/ S.Clust."),
        Row("spectral_overlap", "spectral (overlap)", "GMM w/ S.Clust."),
        Row("curriculum", "curriculum mixture", "GMM w/ Curr."),
        Row("continuous", "continuous mixture"),
    ),
    "circuits": (
        Row("einet_matched", "EiNet (matched)", "EiNet (Matched)"),
        Row("einet_large", "EiNet (large)", "EiNet (Large)"),
    ),
    "flows": (
        Row("teacher", "teacher", "Teacher", evaluated=True),
        Row("cnf_mlp", "CNF (MLP)", "FFJORD"),
        Row("cnf_conv", "CNF (conv)", "FFJORD"),
    ),
    "clustering only": (
        Row("vade", "VaDE", "VADE"),
        Row("autoencoder", "autoencoder + k-means"),
        Row("kmeans", "k-means"),
        Row("groups", "groups told (training points)", evaluated=True),
    ),
    "sanity rows": (
        Row("gaussian", "one Gaussian"),
        Row("gmm_full", "scikit-learn GMM (full)"),
        Row("gmm_diagonal", "scikit-learn GMM (diagonal)"),
    ),
}
OTHERS = "others"  # what the sweep has beside these
REPORTED = "reported, not rerun"
NOT_RERUN = {
    "SPC": "its published code picks its best epoch by ground-truth accuracy, so labels take part in the selection",
    "DLS": "there is no code to rerun under these rules",
}


def main(folder: Path, config: Config) -> str:
    """Write ``comparison`` for a preset."""
    from matplotlib import rc_context

    from cpmm.artifact import seal_folder
    from cpmm.pipeline.artifacts.store import verify_evaluation

    trials = read_trials(trials_of(folder), config)
    verify_evaluation(folder, config)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    rules = json.loads((folder / "evaluation" / "rules.json").read_text(encoding="utf-8"))
    table = compare(trials, metrics)
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
    n_failed = int(table["n_failed"].sum())
    return (
        f"{len(table)} rows, {len(trials)} trials, {n_failed} failed; {_headline(table, metrics['unit'])} -> "
        f"{folder / 'comparison'}"
    )


def trials_of(folder: Path) -> Path:
    """Where the sweep of a preset has its trials."""
    return folder / "sweep" / SWEEP / "trials.csv"


def fingerprint_comparison(folder: Path) -> str:
    """Fingerprint of ``comparison``: of the bytes of all that it is made from."""
    from cpmm.artifact import file_digest

    inputs = (
        trials_of(folder),
        folder / "metrics.json",
        folder / "evaluation" / "evaluation.json",  # seals the rules
        Path(__file__).with_name("published.csv"),
    )
    return hash_of("comparison", *map(file_digest, inputs))


def read_trials(path: Path, config: Config) -> pd.DataFrame:
    """Read the trials of the sweep, in its order.

    Args:
        path: Of the table.
        config: The preset's, of which the trials must be.

    Returns:
        Columns model, seed, status, steps, reason and all of NUMBERS, NaN where there is none.

    Raises:
        FileNotFoundError: If the sweep was not run.
        ValueError: If the table is damaged, or of a sweep with other axes or of another configuration.
    """
    import pandas as pd

    again = f"`python workflows/sweep.py preset={path.parents[2].name} sweep={SWEEP}`"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {again} makes it")

    def damaged(what: object) -> ValueError:
        return ValueError(f"{path} is damaged: {what}: restore it with `dvc pull`, or run {again}")

    try:
        text = path.read_bytes().decode()
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise damaged(error) from error
    if not rows or not text.endswith("\n"):
        raise damaged("it has no trials" if not rows else "its last line is cut short")
    if missing := {"model", "seed", "status"} - set(rows[0]):
        raise damaged(f"it lacks the columns {', '.join(sorted(missing))}")
    trials, seen = [], set()
    for line, row in enumerate(rows, 2):
        where = f"trial {line - 1} ({row['model']}, seed {row['seed']})"
        if None in row or None in row.values() or not row["model"]:
            raise damaged(f"trial {line - 1} has no model, or as many values as there are columns")
        if row["status"] not in STATUSES:
            raise damaged(f"{where} has status {row['status']!r}, not one of {', '.join(STATUSES)}")
        key = (row["model"], row["seed"])
        if key in seen:
            raise damaged(f"{where} is there twice, a sweep whose only axis is model has it once")
        seen.add(key)
        texts = {name: row.get(name, "") for name in ("model", "seed", "status", "steps", "reason")}
        try:
            int(row["seed"])
            numbers = {name: _read_number(name, row.get(name, "")) for name in NUMBERS}
        except ValueError as error:
            raise damaged(f"{where}: {error}") from error
        fingerprint = row.get("fingerprint")
        if not fingerprint or fingerprint != fingerprint_trial(
            config, row["model"], int(row["seed"])
        ):
            said = (
                "is of another configuration than"
                if fingerprint
                else "has no fingerprint to compare with"
            )
            raise ValueError(
                f"{path}: {where} {said} {path.parents[2] / 'config.yaml'}: run the sweep {SWEEP} of this preset "
                f"again, with overrides in params.yaml alone: {again}"
            )
        trials.append(texts | numbers)
    trials = pd.DataFrame(trials)
    done = trials[trials["status"] == "finished"]
    for score in SCORES:
        counts = done.groupby("model")[score].agg(["count", "size"])
        part = counts.index[(counts["count"] > 0) & (counts["count"] < counts["size"])]
        if len(part):
            raise damaged(f"only some finished trials of {', '.join(part)} have {score}")
    return trials


def compare(trials: pd.DataFrame, metrics: Mapping[str, Any]) -> pd.DataFrame:
    """Lay out the models in blocks: of scores means and standard deviations over seeds, of costs medians.

    The standard deviation is that of the seeds (n - 1), none for a single one. Trials that failed
    are counted, and do not enter the means. ``_n`` counts the seeds of what not all may have.

    Args:
        trials: As :func:`read_trials` returns them.
        metrics: Those of evaluate.
    """
    import pandas as pd

    data = data_of(str(metrics.get("preset")))
    groups = dict(iter(trials.groupby("model", sort=False)))
    detected = (metrics.get("ood") or {}).get("models", {})
    rows = []
    for block, members in BLOCKS.items():
        for row in members:
            if row.evaluated and row.model in metrics["models"]:
                found = _of_evaluation(metrics["models"][row.model], detected.get(row.model, {}))
            elif not row.evaluated and row.model in groups:
                found = _of_sweep(groups.pop(row.model))
            else:
                continue
            head = {"block": block, "model": row.model, "name": row.title}
            rows.append(head | found | _of_paper(data, row.paper))
    for model, group in groups.items():
        rows.append({"block": OTHERS, "model": model, "name": model} | _of_sweep(group))
    for name in NOT_RERUN if data else ():
        head = {"block": REPORTED, "model": name, "name": name, "source": "paper"}
        rows.append(head | {"n_seeds": 0, "n_failed": 0, "n_stopped": 0} | _of_paper(data, name))
    columns = ["block", "model", "name", "source", "n_seeds", "n_failed", "n_stopped"]
    columns += [f"{score}_{moment}" for score in SCORES for moment in ("mean", "sd")]
    columns += ["n_parameters", *(f"{c}_{what}" for c in COSTS[1:] for what in ("median", "n"))]
    columns += [f"{score}_{what}" for score in DETECTION for what in ("mean", "sd", "n")]
    columns += ["paper_density", "paper_accuracy", "failures"]
    table = pd.DataFrame(rows, columns=columns).fillna({"failures": ""})
    numbers = columns[columns.index("density_mean") : -1]
    whole = ["n_parameters", *(f"{name}_n" for name in (*COSTS[1:], *DETECTION))]
    return table.astype(dict.fromkeys(numbers, float)).astype(dict.fromkeys(whole, "Int64"))


def judge(table: pd.DataFrame, metric: str) -> dict[str, list[tuple[str, float]]] | None:
    """Compare the rows with CPMM by a score.

    Returns:
        Names and by how much they are better, from the best: ``better`` and ``worse`` by Welch's
        t-test of the seeds' means, ``level`` where it tells no difference, ``single`` where one of
        the two has a single seed, and thus no such test. None without CPMM.
    """
    from scipy.stats import ttest_ind_from_stats

    sign = -1 if metric == "density" else 1
    own = table[(table["model"] == "cpmm") & table[f"{metric}_mean"].notna()]
    if own.empty:
        return None
    own = own.iloc[0]
    found = {"better": [], "level": [], "worse": [], "single": []}
    for _, row in table.iterrows():
        if row["model"] == "cpmm" or math.isnan(row[f"{metric}_mean"]):
            continue
        gain = sign * (row[f"{metric}_mean"] - own[f"{metric}_mean"])
        of = [r[key] for r in (own, row) for key in (f"{metric}_mean", f"{metric}_sd", "n_seeds")]
        if min(own["n_seeds"], row["n_seeds"]) < 2:
            kind = "single"
        elif ttest_ind_from_stats(*of, equal_var=False).pvalue < LEVEL:
            kind = "better" if gain > 0 else "worse"
        else:
            kind = "level"
        found[kind].append((row["name"], gain))
    return {kind: sorted(rows, key=lambda item: -item[1]) for kind, rows in found.items()}


def markdown(
    table: pd.DataFrame,
    metrics: Mapping[str, Any],
    rules: Mapping[str, str],
    config: Config,
) -> str:
    """Write the table for people, what is measured where, and which rows are better than CPMM.

    Args:
        table: As :func:`compare` returns it.
        metrics: Those of evaluate.
        rules: A sentence for each of its figures.
        config: The preset's.
    """
    from cpmm.pipeline.scores.tables import write_line

    unit, data = metrics["unit"], data_of(str(metrics.get("preset")))
    own = table[table["model"] == "cpmm"]
    own = own.iloc[0] if len(own) else {}
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("model", lambda row: row["name"]),
        ("seeds", _seeds),
        ("density", lambda row: _mean_sd(row, "density")),
        ("paper", lambda row: _show(row["paper_density"], "{:.2f}")),
        ("accuracy, %", lambda row: _mean_sd(row, "accuracy")),
        ("paper, %", lambda row: _show(row["paper_accuracy"], "{:.2f}", 100)),
        ("NMI", lambda row: _mean_sd(row, "nmi")),
        ("parameters", lambda row: _show(row["n_parameters"], "{:,.0f}")),
        ("training", lambda row: _time(row, own, "seconds")),
        ("10,000 densities", lambda row: _time(row, own, "seconds_10k")),
        (
            "memory, GB",
            lambda row: _show(row["memory_gb_median"], "{:.2g}") + _partly(row, "memory_gb"),
        ),
        ("AUROC, mixture's space, %", lambda row: _mean_sd(row, "auroc")),
        ("AUROC, data's space, %", lambda row: _mean_sd(row, "auroc_data")),
    ]
    shown = [(*column, [column[1](row) for _, row in table.iterrows()]) for column in columns]
    shown = [column for column in shown if set(column[2]) - {NONE} or column[0] == "density"]
    lines = [
        f"# Table 1 for {metrics['preset']}: CPMM and its baselines",
        "",
        write_line([heading for heading, _, _ in shown]),
        write_line(["---", *["---:"] * (len(shown) - 1)]),
    ]
    block = None
    for index in range(len(table)):
        if table["block"][index] != block:
            block = table["block"][index]
            title = f"**{block[0].upper()}{block[1:]}**"
            lines.append(write_line([title, *[""] * (len(shown) - 1)]))
        lines.append(write_line([cells[index] for _, _, cells in shown]))
    lines += ["", *_verdicts(table, unit), "", "## What is measured where", ""]
    lines += [f"- {note}" for note in _notes(table, metrics, rules, config, data)]
    if notes := _failures(table):
        lines += ["", "## Trials that did not finish", "", *notes]
    return "\n".join([*lines, ""])


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
    done = group[group["status"] == "finished"]
    row = {
        "source": "sweep",
        "n_seeds": len(done),
        "n_failed": int(group["status"].isin(FAILED).sum()),
        "n_stopped": int((group["status"] == "stopped").sum()),
        "failures": _explain(group),
    }
    for name in (*SCORES, *DETECTION):
        row[f"{name}_mean"], row[f"{name}_sd"] = done[name].mean(), done[name].std()
    for name in COSTS:
        row[f"{name}_median"] = done[name].median()
    row |= {f"{name}_n": done[name].count() for name in NUMBERS}
    return row | {"n_parameters": round(row["n_parameters_median"], 0)}


def _of_evaluation(model: Mapping[str, Any], detected: Mapping[str, Any]) -> dict[str, Any]:
    row = {"source": "evaluation", "n_seeds": 1, "n_failed": 0, "n_stopped": 0}
    row |= {f"{score}_mean": model.get(score) for score in SCORES}
    row |= {
        f"{name}_mean": detected.get(space, {}).get(score)
        for name, (space, score) in DETECTION.items()
    }
    return row | {"n_parameters": model.get("n_parameters")}


def _of_paper(data: str | None, row: str) -> dict[str, float | None]:
    accuracy = printed(data, row, "accuracy")
    return {
        "paper_density": printed(data, row, "density"),
        "paper_accuracy": None if accuracy is None else round(accuracy / 100, 6),
    }


def _explain(group: pd.DataFrame) -> str:
    """Say why trials did not finish, those with the same reason together."""
    seeds: dict[str, list[str]] = {}
    for _, trial in group[group["status"] != "finished"].iterrows():
        at = f" at step {trial['steps'].removesuffix('.0')}" if trial["steps"] else ""
        reason = " ".join(trial["reason"].split())
        if not reason:
            reason = "by the scheduler" if trial["status"] == "stopped" else "no reason recorded"
        seeds.setdefault(f"{trial['status']}{at}: {reason}", []).append(trial["seed"])
    return "; ".join(
        f"seed{'s' if len(own) > 1 else ''} {', '.join(own)}: {why}" for why, own in seeds.items()
    )


def _verdicts(table: pd.DataFrame, unit: str) -> list[str]:
    if "cpmm" not in set(table["model"]):
        return ["The sweep has no CPMM: nothing is compared with it."]
    lines = []
    for metric, what in (("density", f"density ({unit})"), ("accuracy", "clustering accuracy")):
        if table[f"{metric}_mean"].isna().all():
            continue
        found = judge(table, metric)
        if found is None:
            lines += [f"In {what} CPMM has no figure: nothing is compared with it.", ""]
            continue
        named = {
            kind: ", ".join(_gain(item, metric, kind) for item in rows)
            for kind, rows in found.items()
        }
        judged = any(found[kind] for kind in ("better", "level", "worse"))
        parts = []
        if judged:
            parts.append(
                f"In {what}, {named['better'] or 'no row'} beat{'' if len(found['better']) > 1 else 's'} CPMM, "
                f"judged by the seeds (Welch's t-test, p < {LEVEL})."
            )
            parts += [f"No such difference: {named['level']}."] if found["level"] else []
            parts += [f"Worse: {named['worse']}."] if found["worse"] else []
        if found["single"]:
            start = "Not judged, one seed" if judged else f"In {what} no row is judged, one seed"
            parts.append(f"{start}: {named['single']}.")
        if parts:
            lines += [" ".join(parts), ""]
    return lines[:-1] or ["Nothing beside CPMM finished that could be compared with it."]


def _notes(
    table: pd.DataFrame,
    metrics: Mapping[str, Any],
    rules: Mapping[str, str],
    config: Config,
    data: str | None,
) -> list[str]:
    """One sentence for each group of figures: where it comes from."""
    options = config["evaluation"]
    names = {row.model: row.title for members in BLOCKS.values() for row in members}
    sources = table.groupby("source")["name"].agg(", ".join)
    notes = [
        f"Means ± standard deviations over the seeds of the sweep `{SWEEP}`, on the "
        f"{metrics['n_test']:,} test points; a ± is missing where one seed finished. Costs are medians over the "
        "seeds, since whatever else the machine did distorts single ones. Where not all seeds have a figure, "
        "their number stands behind it.",
        "Verdicts: the standard errors in them are over seeds only; all rows have the same test points, whose choice "
        "is not in them.",
    ]
    if "evaluation" in sources:
        notes.append(
            f"Of the pipeline's own run, its seed {metrics['seed']} alone: {sources['evaluation']}."
        )
    if "refined" in set(table["model"]):
        notes.append(f"{names['refined']}: on their own likelihood, free of their trajectories.")
    notes.append(f"Density, {metrics['unit']}: {rules['density']}")
    flows, n_points = table[table["block"] == "flows"], options["teacher_points"]
    if len(flows):
        easier = ", which may be easier than all, as MNIST's are,"
        first = "" if n_points is None else f" on the first {n_points} points of a split{easier}"
        notes.append(
            f"Flows: densities{first} by {options['teacher_solver']['method']} at the tolerances "
            f"{options['teacher_solver']['rtol']:g}/{options['teacher_solver']['atol']:g}."
        )
    grey = [
        names[model]
        for model in ("vade", "autoencoder")
        if model in set(table["model"]) and config["baselines"][model]["likelihood"] == "bernoulli"
    ]
    if grey and metrics["unit"] == "bits per dimension":
        notes.append(
            f"{', '.join(grey)}: of raw grey levels k / (n - 1), without the others' dequantization and logit; "
            "they give no density."
        )
    if "accuracy" in rules:
        notes.append(f"Accuracy: {rules['accuracy']} NMI: {rules['nmi']}")
    if table["n_parameters"].notna().any():
        notes.append("Parameters: of the model that is used, of CPMM the extracted mixture's.")
    if table["seconds_median"].notna().any():
        notes.append(
            "Training: wall-clock time of a trial on the machine of the sweep, without the teacher and the "
            "spaces, which are made before it; in brackets how many times that of CPMM."
        )
    if table["seconds_10k_median"].notna().any():
        notes.append(
            "10,000 densities: time for the log-densities of as many points on that machine, scaled from fewer; "
            "mixtures and circuits in float64 on the CPU, flows where they were trained; in brackets how many times that of CPMM."
        )
    if table["memory_gb_median"].notna().any():
        notes.append(
            "Memory: peak of the trial's process above what it held before; on a GPU that of its own."
        )
    if metrics.get("ood") and table["auroc_mean"].notna().any():
        notes.append(
            f"AUROC: telling the test points from those of {metrics['ood']['name']} by their log-density, in "
            "the mixture's space and in that of the data."
        )
    if data:
        notes.append(
            f"Paper: its Table 1, {TITLES[data]}; its FFJORD stands beside both CNFs, its GMM w/ S.Clust. "
            "beside both spectral rows."
        )
        notes += [f"{name}, of the paper alone: {reason}." for name, reason in NOT_RERUN.items()]
    absent = [name for model, name in names.items() if model not in set(table["model"])]
    if absent:
        notes.append(f"Not there: {', '.join(absent)}.")
    return notes


def _failures(table: pd.DataFrame) -> list[str]:
    lines = []
    for _, row in table[table["failures"] != ""].iterrows():
        n = row["n_seeds"] + row["n_failed"] + row["n_stopped"]
        lost = f"{row['n_failed'] + row['n_stopped']} of {n}"
        lines.append(f"- {row['name']}, {lost}: {row['failures']}")
    return lines


def _headline(table: pd.DataFrame, unit: str) -> str:
    found = judge(table, "density")
    if found is None:
        return "no CPMM to compare with"
    own = table[table["model"] == "cpmm"].iloc[0]
    n = sum(len(found[kind]) for kind in ("better", "level", "worse"))
    return f"CPMM {_mean_sd(own, 'density')} {unit}, beaten by {len(found['better'])} of {n} rows"


def _gain(item: tuple[str, float], metric: str, kind: str) -> str:
    name, gain = item
    size = f"{abs(gain):.3f}" if metric == "density" else f"{100 * abs(gain):.1f} points"
    if kind in ("better", "worse"):
        return f"{name} by {size}"
    return f"{name} {size} {'better' if gain > 0 else 'worse'}"


def _read_number(name: str, text: str) -> float:
    if not text:
        return math.nan
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{name} is {text}")
    if name in SHARES and not -1e-9 <= value <= 1 + 1e-9:
        raise ValueError(f"{name} is {text}, not a share in [0, 1]")
    if name in COSTS and value < 0:
        raise ValueError(f"{name} is {text}, below 0")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _show(value: object, form: str, factor: float = 1) -> str:
    return form.format(factor * value).replace("-", "−") if _is_number(value) else NONE


def _mean_sd(row: Mapping[str, Any], score: str) -> str:
    text = write_score(score, row[f"{score}_mean"], row[f"{score}_sd"], nothing=NONE)
    return text + _partly(row, score)


def _partly(row: Mapping[str, Any], name: str) -> str:
    """How many seeds a figure is of, where that is not all."""
    n = row.get(f"{name}_n")
    return f" ({n} of {row['n_seeds']} seeds)" if _is_number(n) and 0 < n < row["n_seeds"] else ""


def _seeds(row: Mapping[str, Any]) -> str:
    if row["source"] == "paper":
        return NONE
    n = row["n_seeds"] + row["n_failed"] + row["n_stopped"]
    return str(n) if n == row["n_seeds"] else f"{row['n_seeds']} of {n}"


def _time(row: Mapping[str, Any], own: Mapping[str, Any], name: str) -> str:
    value, unit = row[f"{name}_median"], own.get(f"{name}_median")
    if not _is_number(value):
        return NONE
    text = _duration(value)
    if _is_number(unit) and unit > 0:
        text += f" ({_digits(value / unit)}×)"
    return text + _partly(row, name)


def _duration(seconds: float) -> str:
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds / 3600)} h"


def _digits(value: float) -> str:
    """Two digits that count, all of those before the point."""
    if value >= 10 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{1 - math.floor(math.log10(value))}f}"


if __name__ == "__main__":
    run_stage(main, __doc__)
