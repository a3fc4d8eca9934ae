"""Put what evaluate found into one HTML page that needs no other file and no network.

Reads ``config.yaml``, ``metrics.json`` and ``evaluation/`` of ``data/<preset>/``, writes
``report.html`` there. The page depends on its inputs and on the installed versions alone, so that a
repeated run writes the same bytes.
"""

from __future__ import annotations

import base64
import csv
import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cpmm.pipeline.artifacts.files import write_text
from cpmm.pipeline.artifacts.store import verify_evaluation
from cpmm.pipeline.scores.published import data_of, printed_ood
from cpmm.pipeline.scores.tables import DENSITY_SPACES
from cpmm.pipeline.stage import run_stage

MIME = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass(frozen=True)
class Picture:
    """A figure of the page: name of its file, heading, how to read it, where the paper has it."""

    name: str
    heading: str
    caption: str
    paper: str | None = None


PICTURES = (
    Picture(
        "spaces",
        "The curriculum of spaces",
        "The same points in several spaces, from the latent one (v = 1), where they should look "
        "like Gaussian noise, to the input (v = 0). The mixture is trained on each in turn; a "
        "gradual change from one to the next is what keeps that training stable. Grey levels of "
        "images are scaled for each row; panels of points have scales of their own, and show two "
        "principal components (PC) where there are more than two features.",
        "Figure 2",
    ),
    Picture(
        "samples",
        "Data and samples",
        "Left, data by their true class, if they have one (grey crosses have none); right, as the "
        "mixture draws them, by the cluster that they come from. Classes and clusters are numbered "
        "independently, so colours and rows need not agree; shapes should.",
        "Figure 3",
    ),
    Picture(
        "trajectories",
        "Means along the trajectories",
        "One trajectory a row, or a path, from pseudotime 0 (left, or light) to 1 (right, or dark "
        "and ending in a square). Neighbours should change smoothly. Faded images and hollow "
        "points are components that are the most likely one for no point and could be dropped.",
        "Figures 4 and 5",
    ),
    Picture(
        "components",
        "Components over the data",
        "An ellipse of equal likelihood for every extracted component. Colour is the cluster, the "
        "shade darkens with pseudotime; grey points are data.",
        "Figure 1",
    ),
    Picture(
        "history",
        "Training",
        "Losses by step; lower is better. Bands are the spaces of the curriculum: each has units "
        "of its own, so a drop between spaces is no progress in itself. Only the part after the "
        "dotted line, fine-tuning on the input, compares with itself; the star is the epoch that "
        "was kept.",
    ),
    Picture(
        "confusion",
        "Classes and clusters",
        "Each row is a class, each column a cluster, in the order of the classes they are matched "
        "with; frames mark the matches, shade the share of the class. Everything outside the "
        "frames counts against the accuracy.",
    ),
    Picture(
        "discretization",
        "How many pseudotimes",
        "Density when the trained trajectories are extracted at other numbers of pseudotimes; "
        "lower is better. A flat line says that the sum over components stands well for the "
        "continuous mixture of Eq. 2.",
    ),
)


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _density(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


# Columns of the table: key, heading, format, and which end is best: -1 low, 1 high, 0 neither.
COLUMNS: tuple[tuple[str, str, Callable[[float], str], int], ...] = (
    ("density", "Density", _density, -1),
    ("density_of_first", "Density on the flows' points", _density, -1),
    ("accuracy", "Accuracy", _percent, 1),
    ("nmi", "NMI", _density, 1),
    ("ari", "ARI", _density, 1),
    ("purity", "Purity", _percent, 1),
    ("n_components", "Components", _count, 0),
    ("n_parameters", "Parameters", _count, 0),
)
# Of the table of another data set: key, heading.
DETECTION = (("auroc", "AUROC"), ("aupr", "AUPR in"), ("aupr_out", "AUPR out"))
CLUSTERING = ("accuracy", "nmi", "ari", "purity")


def main(folder: Path, config: dict) -> str:
    """Write the report of a preset."""
    verify_evaluation(folder, config)
    return f"wrote {write_report(folder, config)}"


def write_report(folder: Path, config: dict) -> Path:
    """Write ``report.html`` into ``folder``.

    Args:
        folder: ``data/<preset>``, with ``metrics.json`` and ``evaluation`` made by evaluate.
        config: The composed configuration, shown at the end.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: If ``metrics.json`` or ``rules.json`` is missing.
        ValueError: If a file is damaged, or has no model called cpmm.
    """
    evaluation = folder / "evaluation"
    metrics = _read_json(folder / "metrics.json")
    rules = _read_json(evaluation / "rules.json")
    models = metrics.get("models")
    if not isinstance(models, dict) or "cpmm" not in models:
        raise ValueError(
            f'{folder / "metrics.json"} has no models.cpmm: expected {{"models": {{"cpmm": '
            '{"name": ..., "density": ...}, ...}}}, run evaluate again'
        )
    names = {key: heading for key, heading, _, _ in COLUMNS}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    unit = metrics.get("unit", "nats per dimension")
    figures, absent = inline_figures(evaluation / "figures")
    html = environment.get_template("report.html.jinja").render(
        preset=metrics.get("preset", folder.name),
        seed=metrics.get("seed", "–"),
        n_test=metrics.get("n_test"),
        unit=unit,
        cards=[
            describe_density(models, unit),
            describe_clustering(models),
            describe_size(models),
        ],
        table=tabulate(models),
        rules={names.get(key, key.replace("_", " ")): str(rule) for key, rule in rules.items()},
        ood=tabulate_ood(metrics),
        figures=figures,
        absent=absent,
        confusion=read_confusion(evaluation / "confusion.csv"),
        discretization=[
            (g, _show(metrics["discretization"], g, _density))
            for g in sorted(metrics.get("discretization") or {}, key=float)
        ],
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100),
        versions={"Python": platform.python_version(), "PyTorch": metadata.version("torch")},
    )
    path = folder / "report.html"
    write_text(path, html)
    return path


def describe_density(models: dict, unit: str) -> dict[str, Any]:
    """Say how the density of CPMM compares; lower is better."""
    own = models["cpmm"]
    others = {"direct": "direct mixture", "gaussian": "single Gaussian"}
    if "matched" in models:
        others["matched"] = "direct mixture of one component a cluster"
    return {
        "title": "Density",
        "value": _show(own, "density", _density),
        "unit": f"{unit}, lower is better",
        "others": [
            (name, _show(models.get(key, {}), "density", _density)) for key, name in others.items()
        ],
        "verdict": " ".join(
            compare_density(own, models.get(key, {}), name) for key, name in others.items()
        ),
    }


def compare_density(own: dict, other: dict, name: str) -> str:
    """Put the difference of two densities into a sentence.

    Differences within two standard errors, added as if the models were independent, are called
    level. Both are scored on the same points, so this errs on the side of caution.
    """
    if not (_has(own, "density") and _has(other, "density")):
        return f"No comparison with the {name}."
    difference = own["density"] - other["density"]
    errors = [
        m["density_standard_error"] for m in (own, other) if _has(m, "density_standard_error")
    ]
    if abs(difference) <= 2 * math.hypot(*errors):
        return f"Level with the {name}, within two standard errors."
    word = "Better" if difference < 0 else "Worse"
    return f"{word} than the {name} by {_density(abs(difference))}."


def describe_clustering(models: dict) -> dict[str, Any]:
    """Say how the clusters of CPMM compare with the classes; higher is better."""
    own, other = models["cpmm"], models.get("kmeans", {})
    if not _has(own, "accuracy"):
        verdict = f"Not scored: {_reason(own, 'accuracy', models)}."
    elif not _has(other, "accuracy"):
        verdict = "No comparison with k-means."
    else:
        points = 100 * (own["accuracy"] - other["accuracy"])
        word = "Better" if points > 0 else "Worse"
        verdict = f"{word} than k-means by {abs(points):.1f} points."
        if round(abs(points), 1) == 0:
            verdict = "Level with k-means."
    return {
        "title": "Clustering accuracy",
        "value": _show(own, "accuracy", _percent),
        "unit": "of test points, higher is better",
        "others": [("k-means", _show(other, "accuracy", _percent))],
        "verdict": verdict,
    }


def describe_size(models: dict) -> dict[str, Any]:
    """Say how large the mixture is once its ODE is gone."""
    own, other = models["cpmm"], models.get("direct", {})
    return {
        "title": "Extracted mixture",
        "value": _show(own, "n_components", _count),
        "unit": f"components, {_show(own, 'n_parameters', _count)} parameters",
        "others": [
            ("direct mixture", _show(other, "n_components", _count)),
            ("its parameters", _show(other, "n_parameters", _count)),
        ],
        "verdict": "What is stored and used; the neural ODE and the teacher are not needed.",
    }


def tabulate(models: dict) -> dict[str, Any]:
    """Lay the models out in rows, with a numbered note for every reason why a value is missing.

    Returns:
        ``headings``, ``rows`` of a name and cells (text, note, whether it is the best), ``notes``.
    """
    columns = [c for c in COLUMNS if any(c[0] in m for m in models.values()) or c[0] == "density"]
    best = {}
    for key, _, _, sign in columns:
        # The teacher is no mixture: it is shown as a bound, not as a competitor.
        values = [m[key] for name, m in models.items() if name != "teacher" and _has(m, key)]
        best[key] = (
            max(values, key=lambda value: sign * value) if sign and len(values) > 1 else None
        )
    notes: list[str] = []
    rows = []
    for name, model in models.items():
        cells = []
        for key, heading, form, _ in columns:
            text, note = _show(model, key, form), None
            if not _has(model, key):
                reason = _reason(model, key, models)
                if reason not in notes:
                    notes.append(reason)
                note = notes.index(reason) + 1
            elif key == "density" and _has(model, "density_standard_error"):
                text += f" ± {model['density_standard_error']:.3f}"
            is_best = _has(model, key) and name != "teacher" and model[key] == best[key]
            cells.append({"heading": heading, "text": text, "note": note, "best": is_best})
        rows.append({"name": model.get("name", name), "cells": cells})
    return {"headings": [heading for _, heading, _, _ in columns], "rows": rows, "notes": notes}


def tabulate_ood(metrics: dict) -> dict[str, Any] | None:
    """Lay out how the models tell another data set apart, with the paper's figures where it has any.

    Returns:
        ``name`` of that data set, ``headings``, ``rows`` of a name and cells, ``paper``, whether the
        paper has the pair; None if there is no other data set.
    """
    ood = metrics.get("ood")
    if not ood:
        return None
    data, name = data_of(str(metrics.get("preset"))), ood["name"]
    columns = [(space, key) for space, _ in DENSITY_SPACES for key, _ in DETECTION]
    rows, has_paper = [], False
    for model, row in ood["models"].items():
        cells = [_show(row.get(space, {}), key, _percent) for space, key in columns]
        for key, _ in DETECTION[:2]:
            figure = printed_ood(data, name, model, key)
            has_paper = has_paper or figure is not None
            cells.append("–" if figure is None else _percent(figure / 100))
        rows.append({"name": row.get("name", model), "cells": cells})
    headings = [f"{title}, {where}" for _, where in DENSITY_SPACES for _, title in DETECTION]
    if has_paper:
        headings += [f"{title}, paper" for _, title in DETECTION[:2]]
    else:
        rows = [row | {"cells": row["cells"][: len(headings)]} for row in rows]
    return {"name": name, "headings": headings, "rows": rows, "paper": has_paper}


def inline_figures(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Encode the figures that exist, an SVG file before a PNG file of the same name.

    Data URIs in ``img`` keep each drawing's identifiers and styles to itself.

    Returns:
        Figures in the order of the page, and the names of those that do not exist.
    """
    figures, absent = [], []
    for picture in PICTURES:
        paths = [folder / (picture.name + suffix) for suffix in MIME]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            absent.append(picture.name)
            continue
        data = base64.b64encode(path.read_bytes()).decode()
        source = f"data:{MIME[path.suffix]};base64,{data}"
        figures.append({"picture": picture, "source": source})
    return figures, absent


def read_confusion(path: Path) -> list[list[str]] | None:
    """Read the table of classes by clusters: a header row and rows that begin with their class."""
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.reader(file) if row]


def _read(path: Path, stage: str) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the {stage} stage, or `dvc pull`")
    return path.read_text(encoding="utf-8")


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(_read(path, "evaluate"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}): run evaluate again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}: expected a JSON object")
    return values


def _has(model: dict, key: str) -> bool:
    value = model.get(key)
    return isinstance(value, int | float) and math.isfinite(value)


def _show(model: dict, key: str, form: Callable[[float], str]) -> str:
    return form(model[key]).replace("-", "−") if _has(model, key) else "–"


def _reason(model: dict, key: str, models: dict) -> str:
    """Say why a value is missing, by what else is there."""
    if model.get(key) is not None:
        return f"not a finite number ({model[key]})"
    if key in CLUSTERING and not any(_has(m, key) for m in models.values()):
        return "no labels to compare with"
    if key in CLUSTERING:
        return "no clusters to compare with the classes"
    if key in ("density", "density_of_first"):
        return "the model gives no density"
    return "not measured for this model"


if __name__ == "__main__":
    run_stage(main, __doc__)
