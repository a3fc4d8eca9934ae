"""Score the extracted mixture and the models beside it on test data: data/<preset>/evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmm.pipeline.config import Config
from cpmm.pipeline.stage import publish, run_stage, scratch_folder

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from cpmm.data import DataSplits
    from cpmm.pipeline.models.fitted import Fitted
    from cpmm.pipeline.scores.ood import OodPoints


def main(folder: Path, config: Config) -> str:
    """Write ``evaluation`` for a preset."""
    import torch

    from cpmm.artifact import file_digest, seal_folder
    from cpmm.files import write_text
    from cpmm.mixture import Mixture
    from cpmm.pipeline.artifacts.files import write_json
    from cpmm.pipeline.artifacts.spaces import open_spaces
    from cpmm.pipeline.artifacts.store import load_prepared
    from cpmm.pipeline.config import fingerprints
    from cpmm.pipeline.models.fitted import NOT_TRAINED, load_baseline, of_mixture
    from cpmm.pipeline.scores.drawing import draw_figures, write_tables
    from cpmm.pipeline.scores.ood import read_ood
    from cpmm.pipeline.scores.rules import state_rules

    data = load_prepared(folder / "prepared", fingerprints.fingerprint_prepared(config))
    mixture = Mixture.load(
        folder / "mixture", fingerprint=fingerprints.fingerprint_mixture(config)
    ).to(torch.float64)
    spaces = open_spaces(folder / "spaces", fingerprints.fingerprint_spaces(config))
    history = _read_history(folder, config)
    ood = config["evaluation"]["ood"]
    ood = None if ood is None else read_ood(ood, data)
    models = {"cpmm": of_mixture(mixture, data, mixture.n_clusters, NOT_TRAINED)}
    models |= {row: load_baseline(row, folder, config, data) for row in fingerprints.EVALUATED}

    fingerprint = fingerprints.fingerprint_evaluation(config)
    scratch = scratch_folder(folder, "evaluate", fingerprint)
    out = scratch / "evaluation"
    (out / "figures").mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        metrics = _score(folder, config, data, models, ood)
    rules = state_rules(config, data, ood)
    write_json(out / "rules.json", rules)
    write_text(out / "model_card.md", _card(folder, metrics, rules))
    write_tables(out, data, mixture, metrics)
    draw_figures(out, config, data, mixture, metrics, spaces, history)
    write_json(folder / "metrics.json", metrics)
    header = {"fingerprint": fingerprint, "metrics": file_digest(folder / "metrics.json")}
    seal_folder(out, "evaluation", header, {})
    publish(scratch, "evaluation", folder / "evaluation")
    return f"{_summarize(metrics)} -> {folder / 'evaluation'}"


def _card(folder: Path, metrics: Config, rules: Config) -> str:
    """Write the model card of the mixture, with the figures of all models on the test points."""
    from cpmm.card import model_card
    from cpmm.fitted import FittedMixture
    from cpmm.pipeline.scores.tables import SCORES, TEST, write_score

    used = [name for name in TEST if any(name in row for row in metrics["models"].values())]
    scores = [
        {"model": row["name"]}
        | {SCORES[name].heading: write_score(name, row.get(name), nothing="-") for name in used}
        for row in metrics["models"].values()
    ]
    stated = [f"{metrics['n_test']} test points. {rules['density']} {rules['selection']}"]
    return model_card(FittedMixture.load(folder / "mixture"), scores, stated)


def _read_history(folder: Path, config: Config) -> pd.DataFrame:
    """Read how the CPMM was trained, checked against its seal."""
    import pandas as pd

    from cpmm.artifact import load_header, verify_files
    from cpmm.pipeline.config.fingerprints import fingerprint_cpmm

    header = load_header(folder / "cpmm", "cpmm", fingerprint_cpmm(config))
    verify_files(folder / "cpmm", header, {"history.csv"})
    return pd.read_csv(folder / "cpmm" / "history.csv")


def _score(
    folder: Path, config: Config, data: DataSplits, models: dict[str, Fitted], ood: OodPoints | None
) -> dict[str, Any]:
    """Score every model, CPMM's mixture first, and the teacher where there is one."""
    from cpmm.pipeline.config.fingerprints import needs_teacher
    from cpmm.pipeline.scores.rules import doubt_densities

    rows = {
        name: {"name": _describe(name, fitted, config), **_score_row(fitted, config, data, ood)}
        for name, fitted in models.items()
    }
    if needs_teacher(config):
        rows["teacher"] = _score_teacher(folder, config, data, ood)
    densities = {name: row["density"] for name, row in rows.items() if "density" in row}
    for name, doubt in doubt_densities(densities).items():
        rows[name]["notes"] = [*rows[name].get("notes", []), doubt]
    told = {name: row.pop("ood") for name, row in rows.items() if "ood" in row}
    metrics = {
        "preset": config["name"],
        "seed": config["seed"],
        "unit": data.preprocessing.density_unit[0],
        "n_test": len(data.raw["test"]),
        "models": rows,
        "discretization": _discretize(folder, config, data),
    }
    if ood is not None:
        named = {name: {"name": rows[name]["name"], **found} for name, found in told.items()}
        metrics["ood"] = {"name": ood.name, "n_ood": len(ood.z), "models": named}
    return metrics


def _score_row(
    fitted: Fitted, config: Config, data: DataSplits, ood: OodPoints | None
) -> dict[str, Any]:
    """Scores of a model with its ``notes``, or under ``missing`` why it has none."""
    from cpmm.pipeline.scores.scorer import Scorer, score_baseline

    if fitted.missing is not None:
        return {"missing": fitted.missing}
    score = Scorer(data, fitted.split, fitted.n_points, config["evaluation"]["teacher_points"])
    try:
        scores = score_baseline(fitted, score, config["cpmm"]["n_clusters"], ood, timed=False)
    except FloatingPointError as error:
        return {"missing": str(error)}
    return scores | ({} if fitted.note is None else {"notes": [fitted.note]})


def _describe(row: str, fitted: Fitted, config: Config) -> str:
    """Name a model for the report."""
    kind = config["cpmm"]["initialization"]["kind"]
    names = {
        "cpmm": "CPMM",
        "refined": "CPMM's components trained on, free of their trajectories",
        "direct": "direct mixture of factor analyzers",
        "matched": "direct mixture, a component a cluster",
        "gaussian": "one Gaussian, full covariance",
        "kmeans": f"k-means, {config['cpmm']['n_clusters']} clusters",
        "groups": f"groups that initialize the trajectories ({kind}), of training points",
    }
    if (mixture := fitted.mixture) is None:
        return names[row]
    sizes, fa = set(mixture.cluster_sizes), mixture.components
    regular = len(sizes) == 1 and sizes != {1}
    count = f"{mixture.n_clusters} x {sizes.pop()}" if regular else f"{fa.n_components}"
    return f"{names[row]}: {count} components, R = {fa.n_factors}"


def _score_teacher(
    folder: Path, config: Config, data: DataSplits, ood: OodPoints | None
) -> dict[str, Any]:
    """Density by a solve at the stated tolerance, and how the teacher tells points outside."""
    from cpmm.odes import Solver
    from cpmm.pipeline.artifacts.store import load_model
    from cpmm.pipeline.config.fingerprints import fingerprint_teacher
    from cpmm.pipeline.models.flows import flow_log_prob, make_teacher
    from cpmm.pipeline.models.runtime import compute_device
    from cpmm.pipeline.scores.scorer import Scorer
    from cpmm.seeds import seeded_generator

    options = config["evaluation"]
    teacher = make_teacher(config["teacher"], data, config["seed"])
    load_model(folder / "teacher", "teacher", teacher, fingerprint_teacher(config))
    teacher.solver = Solver(**options["teacher_solver"], name="evaluation.teacher_solver")
    device = compute_device(config["trainer"], exact=True)
    teacher = teacher.to(device)
    score = Scorer(data, "test", options["teacher_points"])

    def solve(z: Tensor, stream: int, what: str) -> Tensor:
        generator = seeded_generator(config["seed"], stream, device=device)
        title, what = "evaluate teacher", f"points of {what}"
        return flow_log_prob(teacher, z, generator, options["batch_size"], title, what)

    some = len(score.z) < len(data.raw["test"])
    row = {
        "name": "teacher (continuous normalizing flow)"
        + (f", first {len(score.z)} test points" if some else ""),
    }
    try:
        inside = solve(score.z, 31, "test")
        row |= score.density(inside)
    except FloatingPointError as error:
        return row | {"missing": str(error)}
    row["n_points"] = len(inside)
    row["n_parameters"] = sum(p.numel() for p in teacher.parameters())
    if some:
        row["density_of_first"] = row["density"]
    if ood is not None:
        others = ood.z[: options["teacher_points"]]
        row["ood"] = ood.tell(score, inside, lambda: solve(others, 34, ood.name))
    return row


def _discretize(folder: Path, config: Config, data: DataSplits) -> dict[str, float | None]:
    """Density of the same trained trajectories at other numbers of pseudotimes; None: none."""
    import torch

    from cpmm.pipeline.models.trajectories import load_trajectories
    from cpmm.pipeline.scores.scorer import Scorer
    from cpmm.trajectory import pseudotime_grid

    trajectories, score = load_trajectories(folder, config, data), Scorer(data, "test")
    densities: dict[str, float | None] = {}
    for n in config["evaluation"]["discretizations"]:
        mixture = trajectories.mixture(pseudotime_grid(n)).to(torch.float64)
        try:
            densities[str(n)] = score.density(mixture.log_prob(score.z))["density"]
        except FloatingPointError:
            densities[str(n)] = None
    return densities


def _summarize(metrics: dict[str, Any]) -> str:
    models = metrics["models"]
    parts = [f"{name} {row['density']:.3f}" for name, row in models.items() if "density" in row]
    accuracy = models["cpmm"].get("accuracy")
    tail = "" if accuracy is None else f"; clustering accuracy {100 * accuracy:.1f} %"
    return f"test {metrics['unit']}: {', '.join(parts)}{tail}"


if __name__ == "__main__":
    run_stage(main, __doc__)
