"""Write the paper's tables and figures as far as presets were evaluated, small files to be committed.

    python workflows/paper.py                        what data/ holds of MNIST and Fashion-MNIST
    python workflows/paper.py mnist fashion_mnist --out docs/results/paper
    python workflows/paper.py mnist --keep           what the tables have of others stays

Tables 1 and 3 have the paper's column, that of small measured anchors, and one for each preset; "-" stands where
nothing was measured. Figures 2, 4 and 5 are those that evaluate drew. A preset's sweep of models,
``table1``, or of a single row, such as one over seeds, is a column of its own, with mean and standard deviation.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpmm.pipeline.artifacts.files import write_text
from cpmm.pipeline.artifacts.store import verify_evaluation
from cpmm.pipeline.config import Config
from cpmm.pipeline.config.fingerprints import fingerprint_trial
from cpmm.pipeline.errors import command
from cpmm.pipeline.scores.published import TITLES, Figure, data_of, published
from cpmm.pipeline.scores.tables import DENSITY_SPACES
from cpmm.pipeline.stage import load_config

LARGEST_FIGURE = 300_000  # bytes
# Number in the paper, name of evaluate's figure, data set.
FIGURES = (
    (2, "spaces", "mnist"),
    (2, "spaces", "fashion_mnist"),
    (4, "trajectories", "mnist"),
    (5, "trajectories", "fashion_mnist"),
)
PERCENT = ("accuracy", "auroc", "aupr", "aupr_out")
# Models of a sweep by the names of evaluate's rows that they share a row of the paper with.
EVALUATED = {
    "matched": "matched",
    "spectral_frechet": "direct",
    "gaussian": "gaussian",
}
RECORD = ("data", "ood", "row", "source", "space", "metric", "value", "spread")
DETECTION = {"auroc": "AUROC", "aupr": "AUPR", "aupr_out": "AUPR out"}


@dataclass(frozen=True)
class Column:
    """What was measured in one evaluation, or in a sweep.

    Attributes:
        name: Of the preset, and of the sweep if there is one.
        data: Data set of the paper.
        values: Value and spread by model and metric, or by model, space and metric of Table 3.
        ood: Data set that was told apart; None if none was.
        note: How it was made, one sentence.
    """

    name: str
    data: str
    values: Mapping[tuple[str, ...], tuple[float, float | None]]
    ood: str | None
    note: str


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
            f"{folder.name} is no preset of the paper's images: its name must begin with {' or '.join(TITLES)}"
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
            f"{folder / 'metrics.json'} is in {metrics['unit']}, the paper's images are in bits per dimension"
        )
    values = {}
    for model, row in metrics["models"].items():
        for metric in ("density", "accuracy"):
            if metric in row:
                values[model, metric] = (row[metric], row.get(f"{metric}_standard_error"))
    ood = metrics.get("ood")
    for model, row in ood["models"].items() if ood else ():
        for space, _ in DENSITY_SPACES:
            for metric in DETECTION:
                values[model, space, metric] = (row[space][metric], None)
    return Column(
        folder.name, data, values, ood["name"] if ood else None, _describe_preset(config, metrics)
    )


def read_sweeps(folder: Path) -> tuple[list[Column], list[str]]:
    """Read a preset's sweeps of models, such as ``table1``, and those of a single row: CPMM over seeds.

    Returns:
        Their columns; and what was left out because its trials are of another configuration than the
        preset's, a line each.

    Raises:
        ValueError: If a table is damaged, or not the one that its metrics were written with.
    """
    config = load_config(folder / "config.yaml")
    columns, left_out = [], []
    for path in sorted((folder / "sweep").glob("*.csv")):
        rows = _read_csv(path)
        if not rows or (len(rows) > 1 and "model" not in rows[0]):
            continue
        if not _is_of(config, path.with_suffix("") / "trials.csv"):
            left_out.append(
                f"left out {path}: its trials are of another configuration than {folder / 'config.yaml'}; "
                "run the sweep with overrides in params.yaml alone"
            )
            continue
        values, counts, agree = {}, [], True
        try:
            told = json.loads(path.with_suffix(".json").read_text())["rows"]
            for row in rows:
                model = row.get("model") or "cpmm"
                for metric in ("density", "accuracy"):
                    if row.get(f"{metric}_mean"):
                        mean = float(row[f"{metric}_mean"])
                        values[EVALUATED.get(model, model), metric] = (
                            mean,
                            _number(row[f"{metric}_sd"]),
                        )
                        agree &= told[row["row"]][f"{metric}_mean"] == mean
                counts.append(int(row["n"]) - int(row["n_failed"]) - int(row["n_stopped"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} and its .json are no table of a sweep ({error!r}): run the sweep again"
            ) from error
        if not agree:
            raise ValueError(
                f"{path} is not what {path.with_suffix('.json')} was written with: run the sweep again"
            )
        if values:
            name = f"{folder.name}, sweep {path.stem}"
            done = "-".join(str(n) for n in sorted({min(counts), max(counts)}))
            note = f"mean ± standard deviation over {done} seeds, test points"
            if done == "1":
                note = "one seed, test points"
            note += _describe_sweep(config, {row.get("model") or "cpmm" for row in rows})
            columns.append(Column(name, data_of(folder.name), values, None, note))
    return columns, left_out


def _describe_sweep(config: Config, models: Set[str]) -> str:
    """What is to be known of the rows of a sweep beside the number of their seeds."""
    parts = []
    n_points = config["evaluation"]["teacher_points"]
    if n_points is not None and any(
        config["baselines"].get(m, {}).get("kind") == "flow" for m in models
    ):
        parts.append(f", flows: the first {n_points} of them")
    if "matched" in models and config["baselines"]["matched"]["em_iterations"]:
        parts.append(
            ", Matched GMM: the likelier of Adam and EM by validation, that of a preset is by Adam"
        )
    return "".join(parts)


def _is_of(config: Config, path: Path) -> bool:
    """Whether the trials of a sweep are those of a preset's configuration, but for the model and the seed."""
    return all(
        trial["fingerprint"]
        == fingerprint_trial(config, trial.get("model") or config["model"], int(trial["seed"]))
        for trial in _read_csv(path)
    )


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
    values: dict[str, dict[tuple[str, ...], tuple[float, float | None]]] = {}
    columns = []
    try:
        for number in (1, 3):
            figures = [figure for figure in published() if figure.table == number]
            model = {figure.row: figure.model for figure in figures}
            for row in _read_csv(out / f"table{number}.csv"):
                space = (row["space"],) if row["space"] else ()
                found = float(row["value"]), _number(row["spread"])
                values.setdefault(row["source"], {})[(model[row["row"]], *space, row["metric"])] = (
                    found
                )
        for row in _read_csv(out / "columns.csv"):
            if row["name"] not in replaced:
                columns.append(
                    Column(
                        row["name"], row["data"], values[row["name"]], row["ood"] or None, row["note"]
                    )
                )  # fmt: skip
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error.filename} is missing: leave --keep out to write all anew"
        ) from error
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{out}: its tables are not as they were written ({error!r}): `git checkout` them, or leave --keep out"
        ) from error
    return columns


def table_1(columns: Sequence[Column]) -> tuple[str, str]:
    """Density and clustering accuracy, as Markdown and CSV."""
    lines = [
        "# Table 1: bits per dimension (BPD, lower is better) and clustering accuracy (Acc., %)",
        "",
        "Paper: as printed there. Anchor: small runs of another implementation, one seed, untuned, alpha 1e-6. "
        "The others are this project's, from sealed evaluations; ± is the standard error over test points, for sweeps "
        'the standard deviation over seeds. "-": the paper has none, or it was not measured.',
    ]
    records = []
    for data, title in TITLES.items():
        figures = [figure for figure in published() if figure.table == 1 and figure.data == data]
        own = [column for column in columns if column.data == data]
        header = ["model", "paper BPD", "paper Acc.", "anchor BPD"]
        header += [f"{column.name} {short}" for column in own for short in ("BPD", "Acc.")]
        rows = []
        for name, group in _by_row(figures).items():
            of = {figure.metric: figure for figure in group}
            model, density, accuracy = group[0].model, of.get("density"), of.get("accuracy")
            cells = [
                _cell(density and density.paper, "", 2),
                _cell(accuracy and accuracy.paper, "", 2),
                _cell(density and density.anchor, "", 3),
            ]
            for figure in group:
                records += _printed(figure)
            for column in own:
                for metric in ("density", "accuracy"):
                    value, spread = column.values.get((model, metric), (None, None))
                    cells.append(_cell(value, metric, 3, spread))
                    if value is not None:
                        records.append([data, "", name, column.name, "", metric, value, spread])
            rows.append([name, *cells])
        lines += ["", f"## {title}", "", *_markdown(header, rows), *_notes(own)]
    return "\n".join([*lines, ""]), _csv(RECORD, records)


def table_3(columns: Sequence[Column]) -> tuple[str, str]:
    """How well densities tell the other data set apart, as Markdown and CSV."""
    lines = [
        "# Table 3: telling another data set apart by log-density, %, higher is better",
        "",
        "AUROC and AUPR have the points of the data set that is modelled as positives, AUPR out those of the other one. "
        "The paper does not state the space of its densities, and its CNF is FFJORD. Anchor: small runs of another "
        'implementation. "-": the paper has none, or it was not measured.',
    ]
    records = []
    for data, ood in (("mnist", "fashion_mnist"), ("fashion_mnist", "mnist")):
        figures = [f for f in published() if (f.table, f.data, f.ood) == (3, data, ood)]
        own = [column for column in columns if (column.data, column.ood) == (data, ood)]
        header = ["model", "space", "paper AUROC", "paper AUPR", "anchor AUROC", "anchor AUPR"]
        header += [f"{column.name} {short}" for column in own for short in DETECTION.values()]
        rows = []
        for name, group in _by_row(figures).items():
            model = group[0].model
            for figure in group:
                records += _printed(figure)
            for space, where in DENSITY_SPACES:
                told = [
                    _cell(_stated(group, source, space, metric), "", 2)
                    for source in ("paper", "anchor")
                    for metric in ("auroc", "aupr")
                ]
                cells = [where, *told]
                for column in own:
                    for metric in DETECTION:
                        value, _ = column.values.get((model, space, metric), (None, None))
                        cells.append(_cell(value, metric, 2))
                        if value is not None:
                            records.append(
                                [data, ood, name, column.name, space, metric, value, None]
                            )
                rows.append([name, *cells])
        title = f"## {TITLES[data]} known, {TITLES[ood]} told apart"
        lines += ["", title, "", *_markdown(header, rows), *_notes(own)]
    return "\n".join([*lines, ""]), _csv(RECORD, records)


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
        ValueError: As :func:`read_preset`, :func:`read_sweeps` and :func:`kept_columns`, or if a figure is too
            large.
    """
    columns, said = [], []
    for folder in (folders := list(folders)):
        columns.append(read_preset(folder))
        sweeps, left_out = read_sweeps(folder)
        columns += sweeps
        said += left_out
    if keep:
        columns = sorted(columns + kept_columns(out, columns), key=lambda column: column.name)
    header = ["name", "data", "ood", "note"]
    told = [[column.name, column.data, column.ood, column.note] for column in columns]
    texts = {"columns.csv": _csv(header, told)}
    for number, table in ((1, table_1), (3, table_3)):
        texts[f"table{number}.md"], texts[f"table{number}.csv"] = table(columns)
    for folder in folders:
        for number, figure, data in FIGURES:
            path = folder / "evaluation" / "figures" / f"{figure}.svg"
            if data != data_of(folder.name):
                continue
            if not path.is_file():
                said.append(f"no figure {number} of {folder.name}: evaluate drew no {figure}")
                continue
            name = f"figure{number}_{folder.name}.svg"
            texts[name] = shrink_svg(path.read_text(encoding="utf-8"))
            size = len(texts[name].encode())
            if size > LARGEST_FIGURE:
                raise ValueError(
                    f"{path} has {size} bytes in its smallest form, more than the {LARGEST_FIGURE} that are "
                    f"committed: leave {folder.name} out"
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
    folders = [path.parent for path in sorted(root.glob("*/metrics.json"))]
    folders = [folder for folder in folders if data_of(folder.name)]
    if not folders:
        raise FileNotFoundError(
            f"{root} holds no evaluated preset of {' or '.join(TITLES.values())}: name one in params.yaml, say "
            "where its files are, and run `dvc repro report`"
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


def _by_row(figures: Iterable[Figure]) -> dict[str, list[Figure]]:
    rows: dict[str, list[Figure]] = {}
    for figure in figures:
        rows.setdefault(figure.row, []).append(figure)
    return rows


def _stated(group: Iterable[Figure], source: str, space: str, metric: str) -> float | None:
    """The figure of a row of Table 3 by ``source``, paper or anchor, in a space or in none."""
    found = [
        getattr(figure, source)
        for figure in group
        if figure.metric == metric and figure.space in ("", space)
    ]
    return found[0] if found else None


def _printed(figure: Figure) -> list[list[Any]]:
    """Records of the paper's figure and the anchor, percent as shares like our own."""
    factor = 100 if figure.metric in PERCENT else 1
    start = [figure.data, figure.ood, figure.row]
    return [
        [*start, source, figure.space, figure.metric, round(value / factor, 6), None]
        for source in ("paper", "anchor")
        if (value := getattr(figure, source)) is not None
    ]


def _cell(value: float | None, metric: str, digits: int, spread: float | None = None) -> str:
    """Write a value; those of PERCENT are shares."""
    if value is None:
        return "-"
    factor, digits = (100, 2) if metric in PERCENT else (1, digits)
    text = f"{factor * value:.{digits}f}"
    return text if spread is None else f"{text} ± {factor * spread:.{digits}f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _notes(columns: Sequence[Column]) -> list[str]:
    if not columns:
        return ["", "Not measured yet."]
    return ["", *(f"- {column.name}: {column.note}." for column in columns)]


def _csv(header: Sequence[str], records: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(records)
    return text.getvalue()


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _number(text: str) -> float | None:
    return float(text) if text else None


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
        "--keep", action="store_true", help="what the tables in --out have of other presets and sweeps stays"
    )  # fmt: skip
    arguments = parser.parse_args()
    with command("paper", arguments.out):
        folders = [arguments.data / preset for preset in arguments.presets]
        try:
            lines = write_paper(
                folders or evaluated_presets(arguments.data), arguments.out, arguments.keep
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"metrics or configuration lack {error}") from error
        for line in lines:
            print(f"paper: {line}")


if __name__ == "__main__":
    main()
