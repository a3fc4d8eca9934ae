"""Write the paper's tables and figures, as far as presets were evaluated: small files for git.

    python benchmarks/paper.py                        what data/ holds of MNIST and Fashion-MNIST
    python benchmarks/paper.py mnist fashion_mnist --out docs/results/paper
    python benchmarks/paper.py mnist --keep           what the tables have of others stays

Tables 1 and 3 have the paper's column, that of small measured anchors, and one for each preset; "-"
stands where nothing was measured. Figures 2, 4 and 5 are those that evaluate drew. A preset's sweep
of models, ``table1``, or of a single row, such as one over seeds, is a column of its own, with mean
and standard deviation.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from cpmm.files import write_text
from cpmm.pipeline.artifacts.store import verify_evaluation
from cpmm.pipeline.config import Config
from cpmm.pipeline.errors import command
from cpmm.pipeline.scores.published import TITLES, PublishedScore, data_of, published
from cpmm.pipeline.scores.tables import OOD, SCORES, SPACES, write_score, write_table
from cpmm.pipeline.scores.trials import OtherConfigurationError, over_seeds, read_trials
from cpmm.pipeline.stage import load_config

LARGEST_FIGURE = 300_000  # bytes
FIGURES = {  # of evaluate's, by data set and number in the paper
    "mnist": {2: "spaces", 4: "trajectories"},
    "fashion_mnist": {2: "spaces", 5: "trajectories"},
}
# Models of a sweep that share a row of the paper with a model of evaluate's.
SAME_ROW = {"spectral_frechet": "direct"}
RECORD = ("data", "ood", "row", "source", "space", "metric", "value", "spread")
Values = Mapping[tuple[str, str, str], tuple[float, float | None]]


class Table(NamedTuple):
    """How a table of the paper is laid out.

    Attributes:
        text: Above it.
        parts: Titles by the data set that is modelled and the one that is told from it.
        metrics: Their headings.
        spaces: Names for people of the spaces that have lines of their own.
        printed: Sources beside our own columns, "paper" or "anchor", and their metrics.
    """

    text: str
    parts: Mapping[tuple[str, str], str]
    metrics: Mapping[str, str]
    spaces: Mapping[str, str]
    printed: Sequence[tuple[str, str]]


TABLES = {
    1: Table(
        "# Table 1: bits per dimension (BPD, lower is better) and clustering accuracy (Acc., %)\n\n"
        "Paper: as printed there. Anchor: small runs of another implementation, one seed, untuned, "
        "alpha 1e-6. The others are this project's, from sealed evaluations; ± is the standard "
        "error over test points, for sweeps the standard deviation over seeds. "
        '"-": the paper has none, or it was not measured.',
        {(data, ""): title for data, title in TITLES.items()},
        {"density": "BPD", "accuracy": "Acc."},
        {"": ""},
        [("paper", "density"), ("paper", "accuracy"), ("anchor", "density")],
    ),
    3: Table(
        "# Table 3: telling another data set apart by log-density, %, higher is better\n\n"
        "AUROC and AUPR have the points of the data set that is modelled as positives, AUPR out "
        "those of the other one. The paper does not state the space of its densities, and its CNF "
        "is FFJORD. Anchor: small runs of another implementation. "
        '"-": the paper has none, or it was not measured.',
        {
            (data, ood): f"{TITLES[data]} known, {TITLES[ood]} told apart"
            for data, ood in (("mnist", "fashion_mnist"), ("fashion_mnist", "mnist"))
        },
        {metric: SCORES[metric].title for metric in ("auroc", "aupr", "aupr_out")},
        SPACES,
        [(source, metric) for source in ("paper", "anchor") for metric in ("auroc", "aupr")],
    ),
}


class Column(NamedTuple):
    """What was measured in one evaluation, or in a sweep.

    Attributes:
        name: Of the preset, and of the sweep if there is one.
        data: Data set of the paper.
        ood: Data set that was told apart; empty if none was.
        note: How it was made, one sentence.
        values: Value and spread by model, space (empty in Table 1) and metric.
    """

    name: str
    data: str
    ood: str
    note: str
    values: Values


def read_preset(folder: Path) -> Column:
    """Read the evaluation of a preset, checked against its seal and its configuration.

    Raises:
        FileNotFoundError: If it was not evaluated, or a file is missing.
        ValueError: If a file is damaged or of another configuration, or the preset is no image set
            of the paper's.
    """
    data = data_of(folder.name)
    if data is None:
        raise ValueError(
            f"{folder.name} is no preset of the paper's images: its name must begin with "
            f"{' or '.join(TITLES)}"
        )
    if not (folder / "metrics.json").is_file():
        raise FileNotFoundError(
            f"{folder / 'metrics.json'} is missing: `dvc repro` evaluates the preset"
        )
    config = load_config(folder / "config.yaml")
    verify_evaluation(folder, config)
    metrics = json.loads((folder / "metrics.json").read_text())
    if metrics["unit"] != "bits per dimension":
        raise ValueError(
            f"{folder / 'metrics.json'} is in {metrics['unit']}, the paper's images are in bits "
            "per dimension"
        )
    values = {
        (model, "", metric): (row[metric], row.get(f"{metric}_standard_error"))
        for model, row in metrics["models"].items()
        for metric in TABLES[1].metrics
        if metric in row
    }
    ood = metrics.get("ood") or {"name": "", "models": {}}
    for model, row in ood["models"].items():
        values |= {
            (model, space, key): (row[space][key], None)
            for space, key in OOD.values()
            if space in row
        }
    return Column(folder.name, data, ood["name"], _describe_preset(config, metrics), values)


def read_sweeps(folder: Path) -> tuple[list[Column], list[str]]:
    """Read a preset's sweeps of models, such as ``table1``, and those of CPMM alone over seeds.

    Returns:
        Their columns; and what was left out because its trials are of another configuration than
        the preset's, a line each.

    Raises:
        FileNotFoundError: If a file of a sweep is missing.
        ValueError: If one is damaged.
    """
    config = load_config(folder / "config.yaml")
    columns, left_out = [], []
    for path in sorted((folder / "sweep").glob("*.csv")):
        rows = pd.read_csv(path)
        if len(rows) > 1 and "model" not in rows:
            continue
        try:
            trials = read_trials(path.with_suffix(""), config)
        except OtherConfigurationError as error:
            left_out.append(f"left out {path}: {error}")
            continue
        values = {}
        for model, group in trials.groupby("model", sort=False):
            found = over_seeds(group, TABLES[1].metrics)
            for metric in TABLES[1].metrics:
                if not math.isnan(mean := found[f"{metric}_mean"]):
                    values[SAME_ROW.get(model, model), "", metric] = (mean, found[f"{metric}_sd"])
        if values:
            name, note = f"{folder.name}, sweep {path.stem}", _describe_sweep(config, trials)
            columns.append(Column(name, data_of(folder.name), "", note, values))
    return columns, left_out


def _describe_sweep(config: Config, trials: pd.DataFrame) -> str:
    """Say over how many seeds the rows of a sweep are, and what else is to be known of them."""
    counts = trials["status"].eq("finished").groupby(trials["model"]).sum()
    done = "-".join(str(n) for n in sorted({counts.min(), counts.max()}))
    note = f"mean ± standard deviation over {done} seeds, test points"
    if done == "1":
        note = "one seed, test points"
    rows = {model: config["baselines"].get(model, {}) for model in counts.index}
    n_points = config["evaluation"]["teacher_points"]
    if n_points is not None and any(row.get("kind") == "flow" for row in rows.values()):
        note += f", flows: the first {n_points} of them"
    if rows.get("matched", {}).get("em_iterations"):
        note += (
            ", Matched GMM: the likelier of Adam and EM by validation, that of a preset is by Adam"
        )
    return note


def kept_columns(out: Path, but: Iterable[Column]) -> list[Column]:
    """Read the columns that the tables in ``out`` have, made where those presets were evaluated.

    Args:
        out: Folder of tables that :func:`write_paper` wrote.
        but: Columns that take the place of those of the same name.

    Raises:
        FileNotFoundError: If there are no tables.
        ValueError: If they are damaged.
    """
    replaced = {column.name for column in but}
    values: dict[str, dict[tuple[str, str, str], tuple[float, float | None]]] = {}

    def read(name: str) -> list[dict[str, str]]:
        return pd.read_csv(out / name, keep_default_na=False, dtype=str).to_dict("records")

    try:
        for number in TABLES:
            model = {score.row: score.model for score in published() if score.table == number}
            for row in read(f"table{number}.csv"):
                key = (model[row["row"]], row["space"], row["metric"])
                spread = float(row["spread"]) if row["spread"] else None
                values.setdefault(row["source"], {})[key] = (float(row["value"]), spread)
        return [
            Column(**row, values=values[row["name"]])
            for row in read("columns.csv")
            if row["name"] not in replaced
        ]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error.filename} is missing: leave --keep out to write all anew"
        ) from error
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{out}: its tables are not as they were written ({error!r}): `git checkout` them, or "
            "leave --keep out"
        ) from error


def lay_out(number: int, columns: Sequence[Column]) -> tuple[str, str]:
    """Write a table of the paper as Markdown and CSV."""
    table, lines, records = TABLES[number], [TABLES[number].text], []
    for (data, ood), title in table.parts.items():
        own = [column for column in columns if column.data == data and ood in ("", column.ood)]
        shown = [*table.printed, *((column.name, m) for column in own for m in table.metrics)]
        cells = []
        scores = [s for s in published() if (s.table, s.data, s.ood) == (number, data, ood)]
        for row, group in groupby(scores, lambda score: score.row):
            found = _collect(list(group), own, table)
            records += [(data, ood, row, *key, *value) for key, value in found.items()]
            for space, where in table.spaces.items():
                written = [_cell(found, source, space, metric) for source, metric in shown]
                cells.append([row, *([where] if where else []), *written])
        header = ["model", *(["space"] if any(table.spaces.values()) else [])]
        header += [f"{source} {table.metrics[metric]}" for source, metric in shown]
        notes = [f"- {column.name}: {column.note}." for column in own] or ["Not measured yet."]
        lines += ["", f"## {title}", "", *write_table(header, cells), "", *notes]
    return "\n".join([*lines, ""]), _csv(RECORD, records)


def _collect(scores: Sequence[PublishedScore], columns: Iterable[Column], table: Table) -> Values:
    """Values and spreads of a row by source, space and metric: the paper's, the anchor's, ours."""
    printed = {
        (source, score.space, score.metric): (value, None)
        for score in scores
        for source in ("paper", "anchor")
        if (value := getattr(score, source)) is not None
    }
    return printed | {
        (column.name, space, metric): column.values[key]
        for space in table.spaces
        for column in columns
        for metric in table.metrics
        if (key := (scores[0].model, space, metric)) in column.values
    }


def _cell(found: Values, source: str, space: str, metric: str) -> str:
    of_any_space = found.get((source, "", metric), (None, None))
    value, spread = found.get((source, space, metric), of_any_space)
    digits = 2 if source == "paper" or SCORES[metric].unit == "%" else None
    return write_score(metric, value, spread, "-", digits)


def shrink_svg(text: str) -> str:
    """Store the grey and opaque images inside an SVG in one channel instead of four."""
    from PIL import Image

    def shrink(found: re.Match) -> str:
        image = Image.open(io.BytesIO(base64.b64decode(found[2])))
        channels = image.convert("RGBA").split()
        red = channels[0].tobytes()
        is_grey = all(channel.tobytes() == red for channel in channels[1:3])
        if not is_grey or channels[3].getextrema() != (255, 255):
            return found[0]
        packed = io.BytesIO()
        channels[0].save(packed, "PNG", optimize=True)
        return found[1] + base64.b64encode(packed.getvalue()).decode()

    return re.sub(r"(data:image/png;base64,)([A-Za-z0-9+/=\s]+)", shrink, text)


def write_paper(folders: Iterable[Path], out: Path, keep: bool = False) -> list[str]:
    """Write the tables and figures.

    Args:
        folders: ``data/<preset>`` of each evaluated preset.
        out: Made if missing.
        keep: Whether what ``out`` has of other presets and sweeps stays.

    Returns:
        What was written, and what could not be, a line each.

    Raises:
        FileNotFoundError: As :func:`read_preset` and :func:`kept_columns`.
        ValueError: As :func:`read_preset`, :func:`read_sweeps` and :func:`kept_columns`, or if a
            figure is too large.
    """
    columns, said = [], []
    for folder in (folders := list(folders)):
        columns.append(read_preset(folder))
        sweeps, left_out = read_sweeps(folder)
        columns += sweeps
        said += left_out
    if keep:
        columns = sorted(columns + kept_columns(out, columns), key=lambda column: column.name)
    texts = {"columns.csv": _csv(Column._fields[:-1], [column[:-1] for column in columns])}
    for number in TABLES:
        texts[f"table{number}.md"], texts[f"table{number}.csv"] = lay_out(number, columns)
    for folder in folders:
        for number, figure in FIGURES[data_of(folder.name)].items():
            path = folder / "evaluation" / "figures" / f"{figure}.svg"
            if not path.is_file():
                said.append(f"no figure {number} of {folder.name}: evaluate drew no {figure}")
                continue
            name = f"figure{number}_{folder.name}.svg"
            texts[name] = shrink_svg(path.read_text(encoding="utf-8"))
            if (size := len(texts[name].encode())) > LARGEST_FIGURE:
                raise ValueError(
                    f"{path} has {size} bytes in its smallest form, more than the "
                    f"{LARGEST_FIGURE} that are committed: leave {folder.name} out"
                )
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(out / name, text)
    return [*said, f"{', '.join(texts)} -> {out}"]


def evaluated_presets(root: Path) -> list[Path]:
    """Folders of the presets of the paper's images that have metrics.

    Raises:
        FileNotFoundError: If there is none.
    """
    paths = sorted(root.glob("*/metrics.json"))
    folders = [path.parent for path in paths if data_of(path.parent.name)]
    if not folders:
        raise FileNotFoundError(
            f"{root} holds no evaluated preset of {' or '.join(TITLES.values())}: name one in "
            "params.yaml, say where its files are, and run `dvc repro report`"
        )
    return folders


def _describe_preset(config: Config, metrics: Mapping[str, Any]) -> str:
    data, models = config["data"], metrics["models"]
    kind = data.get("map", {}).get("kind", "none")
    learned = "no learned map"
    if kind != "none":
        learned = f"learned map: {kind} of {data['map']['n_bins']} bins"
    if data["standardize"] == "whitened":
        learned += ", whitened by M (M + 1) / 2 more parameters, the same for all models"
    parts = [
        f"alpha {data['alpha']:g}",
        f"noise seed {data['noise_seed']}",
        f"floor of log d {config['cpmm']['log_diagonal_floor']:g}",
        learned,
        f"seed {metrics['seed']}",
        f"{metrics['n_test']} test points",
        models["cpmm"]["name"],
    ]
    if config["cpmm"].get("weight_knots"):
        parts[-1] += f", the field's weights at {config['cpmm']['weight_knots']} pseudotimes"
    if config["cpmm"]["curriculum"] and config["spaces"]["kind"] == "noise":
        parts.append("noise in place of the teacher")
    if config["trainer"]["precision"] != "32-true":
        parts.append(f"trained with {config['trainer']['precision']}")
    if "teacher" in models:
        parts.append(models["teacher"]["name"])
    return ", ".join(parts)


def _csv(header: Sequence[str], records: Iterable[Sequence[Any]]) -> str:
    return pd.DataFrame(records, columns=list(header)).to_csv(index=False, lineterminator="\n")


def main() -> None:
    """Write the paper's tables and figures from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "presets", nargs="*", help="whose names begin with mnist or fashion_mnist; all if none"
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the presets")
    parser.add_argument("--out", type=Path, default=Path("docs/results/paper"), help="%(default)s")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="what the tables in --out have of other presets and sweeps stays",
    )
    arguments = parser.parse_args()
    with command("paper", arguments.out):
        folders = [arguments.data / preset for preset in arguments.presets]
        try:
            folders = folders or evaluated_presets(arguments.data)
            lines = write_paper(folders, arguments.out, arguments.keep)
        except (KeyError, TypeError) as error:
            raise ValueError(f"metrics or configuration lack {error}") from error
        for line in lines:
            print(f"paper: {line}")


if __name__ == "__main__":
    main()
