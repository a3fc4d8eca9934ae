"""Put what evaluate found into one HTML page that needs no other file and no network.

It depends on its inputs and on the installed versions alone: a repeated run writes the same bytes.
"""

from __future__ import annotations

import base64
import csv
import json
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cpmm.files import write_text
from cpmm.pipeline.artifacts.store import verify_evaluation
from cpmm.pipeline.scores.published import data_of, printed
from cpmm.pipeline.scores.tables import OOD, SCORES, SPACES, is_number, write_score
from cpmm.pipeline.stage import run_stage

NONE = "–"
MIME = {".svg": "image/svg+xml", ".png": "image/png"}


class Picture(NamedTuple):
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


# Columns of the table of models, as far as a model has them.
COLUMNS = tuple(
    name for name, score in SCORES.items() if score.of in ("density", "clusters", "size")
)
PRINTED = ("auroc", "aupr")  # in the paper's Table 3


def main(folder: Path, config: dict) -> str:
    """Write the report of a preset."""
    return f"wrote {write_report(folder, config)}"


def write_report(folder: Path, config: dict) -> Path:
    """Write ``report.html`` into ``folder``.

    Args:
        folder: ``data/<preset>``, with ``metrics.json`` and ``evaluation`` made by evaluate.
        config: The composed configuration, shown at the end.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If one is not what evaluate wrote for this configuration.
    """
    verify_evaluation(folder, config)
    evaluation = folder / "evaluation"
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    rules = json.loads((evaluation / "rules.json").read_text(encoding="utf-8"))
    models = metrics["models"]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    unit = metrics["unit"]
    figures, absent = inline_figures(evaluation / "figures")
    html = environment.get_template("report.html.jinja").render(
        preset=metrics["preset"],
        seed=metrics["seed"],
        n_test=metrics["n_test"],
        unit=unit,
        cards=[describe_density(models, unit), describe_clustering(models), describe_size(models)],
        table=tabulate(models),
        rules={
            SCORES[key].title if key in SCORES else key.replace("_", " "): str(rule)
            for key, rule in rules.items()
        },
        ood=tabulate_ood(metrics),
        figures=figures,
        absent=absent,
        confusion=read_confusion(evaluation / "confusion.csv"),
        discretization=[
            (g, write_score("density", metrics["discretization"][g], nothing=NONE))
            for g in sorted(metrics["discretization"], key=float)
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
        "value": _show(own, "density"),
        "unit": f"{unit}, lower is better",
        "others": [(name, _show(models.get(key, {}), "density")) for key, name in others.items()],
        "verdict": " ".join(
            compare_density(own, models.get(key, {}), name) for key, name in others.items()
        ),
    }


def compare_density(own: dict, other: dict, name: str) -> str:
    """Put the difference of two densities of one run into a sentence.

    There are no seeds here that could be compared as in a sweep. Differences within two standard
    errors over the test points, added as if the models were independent, are called level. Both are
    scored on the same points, so this errs on the side of caution.
    """
    if not (_has(own, "density") and _has(other, "density")):
        return f"No comparison with the {name}."
    gain = SCORES["density"].gain(own["density"], other["density"])
    errors = [m.get("density_standard_error") for m in (own, other)]
    if abs(gain) <= 2 * math.hypot(*filter(is_number, errors)):
        return f"Level with the {name}, within two standard errors."
    word = "Better" if gain > 0 else "Worse"
    return f"{word} than the {name} by {write_score('density', abs(gain))}."


def describe_clustering(models: dict) -> dict[str, Any]:
    """Say how the clusters of CPMM compare with the classes; higher is better."""
    own, other = models["cpmm"], models.get("kmeans", {})
    if not _has(own, "accuracy"):
        verdict = f"Not scored: {_reason(own, 'accuracy', models)}."
    elif not _has(other, "accuracy"):
        verdict = "No comparison with k-means."
    else:
        gain = own["accuracy"] - other["accuracy"]
        points = write_score("accuracy", abs(gain))
        verdict = f"{'Better' if gain > 0 else 'Worse'} than k-means by {points} points."
        if float(points) == 0:
            verdict = "Level with k-means."
    return {
        "title": "Clustering accuracy",
        "value": _show(own, "accuracy", " %"),
        "unit": "of test points, higher is better",
        "others": [("k-means", _show(other, "accuracy", " %"))],
        "verdict": verdict,
    }


def describe_size(models: dict) -> dict[str, Any]:
    """Say how large the mixture is once its ODE is gone."""
    own, other = models["cpmm"], models.get("direct", {})
    return {
        "title": "Extracted mixture",
        "value": _show(own, "n_components"),
        "unit": f"components, {_show(own, 'n_parameters')} parameters",
        "others": [
            ("direct mixture", _show(other, "n_components")),
            ("its parameters", _show(other, "n_parameters")),
        ],
        "verdict": "What is stored and used; the neural ODE and the teacher are not needed.",
    }


def tabulate(models: dict) -> dict[str, Any]:
    """Lay the models out in rows, with a numbered note for every reason why a value is missing.

    Returns:
        ``headings``, ``rows`` of a name, notes and cells (text, note, whether it is the best), and
        ``notes``.
    """
    columns = [c for c in COLUMNS if any(c in m for m in models.values()) or c == "density"]
    headings = [_heading(column) for column in columns]
    best = {column: _best(models, column) for column in columns}
    notes: list[str] = []
    rows = []
    for name, model in models.items():
        cells = []
        own = [_number(note, notes) for note in model.get("notes", ())]
        for key, heading in zip(columns, headings, strict=True):
            cell = {"heading": heading, "note": None, "best": name in best[key]}
            if not _has(model, key):
                cell["note"] = _number(_reason(model, key, models), notes)
            spread = model.get(f"{key}_standard_error")
            cells.append(cell | {"text": write_score(key, model.get(key), spread, NONE)})
        rows.append({"name": model.get("name", name), "notes": own, "cells": cells})
    return {"headings": headings, "rows": rows, "notes": notes}


def tabulate_ood(metrics: dict) -> dict[str, Any] | None:
    """Lay out how the models tell another data set apart, with the paper's scores where it has any.

    Returns:
        ``name`` of that data set, ``headings``, ``rows`` of a name, notes and cells, ``notes``, and
        ``paper``, which says whether the paper has the pair; None if there is no other data set.
    """
    ood = metrics.get("ood")
    if not ood:
        return None
    data, name = data_of(str(metrics["preset"])), ood["name"]
    columns = [column for space in SPACES for column in OOD if OOD[column][0] == space]
    headings = [_heading(column) for column in columns]
    paper = {
        model: {metric: printed(data, model, metric, name) for metric in PRINTED}
        for model in ood["models"]
    }
    has_paper = any(value is not None for row in paper.values() for value in row.values())
    if has_paper:
        headings += [f"{SCORES[metric].title}, paper, %" for metric in PRINTED]
    rows = []
    notes: list[str] = []
    for model, row in ood["models"].items():
        said = [row.get("missing"), *metrics.get("models", {}).get(model, {}).get("notes", ())]
        own = [_number(note, notes) for note in said if note]
        values = [(column, row.get(OOD[column][0], {}).get(OOD[column][1])) for column in columns]
        values += paper[model].items() if has_paper else ()
        cells = [write_score(column, value, nothing=NONE) for column, value in values]
        rows.append({"name": row.get("name", model), "notes": own, "cells": cells})
    table = {"name": name, "headings": headings, "rows": rows, "notes": notes}
    return table | {"paper": has_paper}


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


def _has(model: dict, key: str) -> bool:
    return is_number(model.get(key))


def _show(model: dict, key: str, unit: str = "") -> str:
    return write_score(key, model[key]) + unit if _has(model, key) else NONE


def _heading(name: str) -> str:
    heading = SCORES[name].heading
    return heading[0].upper() + heading[1:]


def _best(models: dict, key: str) -> list[str]:
    """Models with the best value; the teacher is no mixture: it is a bound, not a competitor."""
    rivals = {name: m[key] for name, m in models.items() if name != "teacher" and _has(m, key)}
    if SCORES[key].lower_is_better is None or len(rivals) < 2:
        return []
    best = (min if SCORES[key].lower_is_better else max)(rivals.values())
    return [name for name, value in rivals.items() if value == best]


def _number(note: str, notes: list[str]) -> int:
    """Number of a note, which joins the others if it is new."""
    if note not in notes:
        notes.append(note)
    return notes.index(note) + 1


def _reason(model: dict, key: str, models: dict) -> str:
    """Say why a value is missing, by what else is there."""
    if model.get("missing"):
        return model["missing"]
    if model.get(key) is not None:
        return f"not a finite number ({model[key]})"
    if SCORES[key].of == "clusters":
        if any(_has(m, key) for m in models.values()):
            return "no clusters to compare with the classes"
        return "no labels to compare with"
    if SCORES[key].of == "density":
        return "the model gives no density"
    return "not measured for this model"


if __name__ == "__main__":
    run_stage(main, __doc__)
