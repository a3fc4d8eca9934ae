"""Score the extracted mixture and its sanity rows on test data: data/<preset>/evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmm.pipeline.config import Config
from cpmm.pipeline.stage import publish, run_stage, scratch_folder

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from cpmm.baselines.direct import DirectMixture
    from cpmm.data import DataSplits
    from cpmm.mixture import Mixture
    from cpmm.pipeline.artifacts.store import Spaces
    from cpmm.pipeline.scores.ood import OodPoints
    from cpmm.pipeline.scores.scorer import Scorer


def main(folder: Path, config: Config) -> str:
    """Write ``evaluation`` for a preset."""
    import torch

    from cpmm.artifact import file_digest, seal_folder
    from cpmm.baselines.gaussian import fit_full_gaussian
    from cpmm.initialization import GROUPINGS
    from cpmm.mixture import Mixture
    from cpmm.pipeline.artifacts.store import load_prepared, open_spaces, write_json
    from cpmm.pipeline.config.fingerprints import (
        fingerprint_evaluation,
        fingerprint_mixture,
        fingerprint_prepared,
        fingerprint_spaces,
        needs_teacher,
    )
    from cpmm.pipeline.models.direct import start_direct, start_refined
    from cpmm.pipeline.scores.ood import read_ood
    from cpmm.pipeline.scores.scorer import Scorer

    data = load_prepared(folder / "prepared", fingerprint_prepared(config))
    mixture = Mixture.load(folder / "mixture", fingerprint=fingerprint_mixture(config))
    mixture = mixture.to(torch.float64)
    spaces = open_spaces(folder / "spaces", fingerprint_spaces(config))
    history = _read_history(folder, config)
    options, seed = config["evaluation"], config["seed"]
    ood = None if options["ood"] is None else read_ood(options["ood"], data)
    fingerprint = fingerprint_evaluation(config)
    scratch = scratch_folder(folder, "evaluate", fingerprint)
    out = scratch / "evaluation"
    (out / "figures").mkdir(parents=True, exist_ok=True)
    score = Scorer(data, "test", n_first=options["teacher_points"])

    floor = config["cpmm"]["log_diagonal_floor"]
    sizes = {"direct": mixture.components.n_components, "matched": mixture.n_clusters}
    starts = {
        name: start_direct(
            data, options["direct"], n, config["cpmm"]["n_factors"], floor, config["seed"]
        )
        for name, n in sizes.items()
    } | {"refined": start_refined(mixture, floor)}
    direct, matched, refined = (
        _optimize(name, start, config, data, scratch) for name, start in starts.items()
    )
    with torch.no_grad():
        gaussian = fit_full_gaussian(_draws(data, options["gaussian_draws"], seed))
        models = {
            "cpmm": {
                "name": f"CPMM: {_sizes(mixture)}",
                **score.mixture(mixture),
            },
            "refined": {
                "name": f"CPMM's components trained on, free of their trajectories: {_sizes(refined)}",
                **score.mixture(refined),
            },
            "direct": {
                "name": f"direct mixture of factor analyzers: {_sizes(direct)}",
                **score.density(direct.log_prob(score.z)),
                "n_components": direct.components.n_components,
                "n_parameters": direct.components.n_parameters,
            },
            "matched": {
                "name": f"direct mixture, a component a cluster: {_sizes(matched)}",
                **score.mixture(matched),
            },
            "gaussian": {
                "name": "one Gaussian, full covariance",
                **score.density(gaussian.log_prob(score.z)),
                "n_components": 1,
                "n_parameters": data.n_features * (data.n_features + 3) // 2,
            },
            "kmeans": {
                "name": f"k-means, {mixture.n_clusters} clusters",
                **_kmeans(score, mixture.n_clusters, options["kmeans_restarts"], seed),
            },
        }
        if config["cpmm"]["initialization"]["kind"] in GROUPINGS:
            models["groups"] = {
                "name": f"groups that initialize the trajectories ({config['cpmm']['initialization']['kind']}), "
                "of training points",
                **_groups(config, data),
            }
        told = {}
        if ood is not None:
            densities = {
                "cpmm": mixture,
                "refined": refined,
                "direct": direct,
                "matched": matched,
                "gaussian": gaussian,
            }
            told = {name: _tell_apart(model, score, ood) for name, model in densities.items()}
        if needs_teacher(config):
            models["teacher"], told["teacher"] = _score_teacher(folder, config, data, ood)
        discretization = _discretize(folder, config, data, score)
    metrics = _metrics(config, data, models, discretization)
    if ood is not None:
        metrics["ood"] = {
            "name": ood.name,
            "n_ood": len(ood.z),
            "models": {
                name: {"name": models[name]["name"], **found} for name, found in told.items()
            },
        }
    write_json(out / "rules.json", _rules(config, data, ood))
    _write_tables(out, score, mixture, discretization, metrics.get("ood"))
    _draw_figures(out, config, data, mixture, metrics, spaces, history)
    write_json(folder / "metrics.json", metrics)
    header = {"fingerprint": fingerprint, "metrics": file_digest(folder / "metrics.json")}
    seal_folder(out, "evaluation", header, {})
    publish(scratch, "evaluation", folder / "evaluation")
    return f"{_summarize(metrics)} -> {folder / 'evaluation'}"


def _optimize(
    name: str, start: DirectMixture, config: Config, data: DataSplits, scratch: Path
) -> Mixture:
    """Train a direct mixture on the likelihood of the data; the best epoch by validation."""
    import torch

    from cpmm.pipeline.models.direct import direct_training
    from cpmm.pipeline.models.fit import fit

    options = config["evaluation"]["direct"]
    module, rows = direct_training(data, options, start, config["seed"])
    (scratch / name).mkdir(exist_ok=True)
    fit(
        f"evaluate {name} mixture", module, rows, config["trainer"], scratch / name,
        options["gradient_clip"],
    )  # fmt: skip
    with torch.no_grad():
        return module.model.cpu().mixture().to(torch.float64)


def _metrics(
    config: Config, data: DataSplits, models: dict[str, Any], discretization: dict[str, float]
) -> dict[str, Any]:
    return {
        "preset": config["name"],
        "seed": config["seed"],
        "unit": data.preprocessing.density_unit[0],
        "n_test": len(data.raw["test"]),
        "models": models,
        "discretization": discretization,
    }


def _summarize(metrics: dict[str, Any]) -> str:
    models = metrics["models"]
    parts = [f"{name} {row['density']:.3f}" for name, row in models.items() if "density" in row]
    accuracy = models["cpmm"].get("accuracy")
    tail = "" if accuracy is None else f"; clustering accuracy {100 * accuracy:.1f} %"
    return f"test {metrics['unit']}: {', '.join(parts)}{tail}"


def _tell_apart(model: Any, score: Scorer, ood: OodPoints) -> dict[str, Any]:
    return ood.scores(score, model.log_prob(score.z), model.log_prob(ood.z))


def _groups(config: Config, data: DataSplits) -> dict[str, float]:
    """Score the groups that the trajectories are told, on the training points that they are of."""
    from cpmm.metrics import clustering_scores
    from cpmm.pipeline.models.mixtures import make_groups

    if data.label is None:
        return {}
    group = make_groups(config["cpmm"], data)
    return clustering_scores(
        data.label["train"].numpy(), group.numpy(), config["cpmm"]["n_clusters"]
    )


def _kmeans(score: Scorer, n_clusters: int, n_starts: int, seed: int) -> dict[str, float]:
    """Score k-means on the same split."""
    from cpmm.pipeline.models.direct import KMeansModel

    if score.label is None:
        return {}
    model = KMeansModel(score.data, n_clusters, n_starts, seed)
    return score.clusters(model.predict(score.split).numpy(), n_clusters)


def _score_teacher(
    folder: Path, config: Config, data: DataSplits, ood: OodPoints | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Density of the teacher by a solve at the stated tolerance, and how it tells points outside."""
    from cpmm.odes import Solver
    from cpmm.pipeline.artifacts.store import load_model
    from cpmm.pipeline.config.fingerprints import fingerprint_teacher
    from cpmm.pipeline.models.flows import make_teacher
    from cpmm.pipeline.models.runtime import compute_device
    from cpmm.pipeline.scores.scorer import Scorer, flow_log_prob
    from cpmm.seeds import seeded_generator

    teacher = make_teacher(config["teacher"], data, config["seed"])
    load_model(folder / "teacher", "teacher", teacher, fingerprint_teacher(config))
    teacher.solver = Solver(**config["evaluation"]["teacher_solver"])
    device = compute_device(config["trainer"], exact=True)
    teacher = teacher.to(device)
    n_points = config["evaluation"]["teacher_points"]
    score = Scorer(data, "test", n_points)

    def solve(z: Tensor, stream: int, what: str) -> Tensor:
        generator = seeded_generator(config["seed"], stream, device=device)
        batch_size = config["evaluation"]["batch_size"]
        return flow_log_prob(
            teacher, z, generator, batch_size, "evaluate teacher", f"points of {what}"
        )

    inside = solve(score.z, 31, "test")
    told = {}
    if ood is not None:
        told = ood.scores(score, inside, solve(ood.z[:n_points], 34, ood.name))
    name = "teacher (continuous normalizing flow)"
    if len(inside) < len(data.raw["test"]):
        name += f", first {len(inside)} test points"
    row = {
        "name": name,
        **score.density(inside),
        "n_points": len(inside),
        "n_parameters": sum(p.numel() for p in teacher.parameters()),
    }
    if len(inside) < len(data.raw["test"]):
        row["density_of_first"] = row["density"]
    return row, told


def _discretize(folder: Path, config: Config, data: DataSplits, score: Scorer) -> dict[str, float]:
    """Density of the same trained trajectories at other numbers of pseudotimes."""
    import torch

    from cpmm.pipeline.models.mixtures import load_trajectories
    from cpmm.trajectory import pseudotime_grid

    trajectories = load_trajectories(folder, config, data)
    return {
        str(n): score.density(
            trajectories.mixture(pseudotime_grid(n)).to(torch.float64).log_prob(score.z)
        )["density"]
        for n in config["evaluation"]["discretizations"]
    }


def _rules(config: Config, data: DataSplits, ood: OodPoints | None) -> dict[str, str]:
    """One sentence for each figure: the rule that made it."""
    from cpmm.pipeline.config.fingerprints import needs_teacher

    pre, options = data.preprocessing, config["evaluation"]
    common = (
        f"mean over the {len(data.raw['test'])} test points, one noise sample of seed {data.noise_seed}, "
        f"computed in float64; floor of log d {config['cpmm']['log_diagonal_floor']:g}"
    )
    if pre.levels is None:
        density = f"-(log p(z) + log|dz/dx|) / M, nats, in units of the data; {common}"
    else:
        density = f"-(log p(z) + log|dz/dx|) / (M ln 2) + log2 {pre.levels} with {pre.description}; {common}"
    rules = {
        "density": density + ". Lower is better.",
        "density_standard_error": "Standard deviation over the test points divided by the root of their number.",
        "selection": "Weights are those of the fine-tuning epoch with the best validation likelihood.",
        "direct": "k-means and local factor analysis, shrinkage by validation likelihood, then Adam "
        f"for {options['direct']['epochs']} epochs; best epoch by validation.",
        "refined": "The extracted components as the start of the same Adam, for as many epochs.",
    }
    n_first = options["teacher_points"]
    if n_first is not None and n_first < len(data.raw["test"]):
        rules["density_of_first"] = (
            f"The same over the first {n_first} test points, which flows are scored on."
        )
    if data.label is not None:
        rules["accuracy"] = (
            "Share of test points whose cluster's class, matched one to one (Hungarian), is theirs."
        )
        rules["nmi"] = "Normalized mutual information, arithmetic mean."
        rules["ari"] = "Adjusted Rand index."
        rules["purity"] = "Share of test points in the commonest class of their cluster."
    if needs_teacher(config):
        solver = options["teacher_solver"]
        trace = (
            "exact"
            if data.n_features <= config["teacher"]["exact_trace_up_to"]
            else "Hutchinson, fixed seed"
        )
        rules["teacher"] = (
            f"{solver['method']}, tolerances {solver['rtol']:g}/{solver['atol']:g}; trace: {trace}"
        )
        n_points = options["teacher_points"]
        if n_points is not None and n_points < len(data.raw["test"]):
            rules["teacher"] += (
                f"; scored on the first {n_points} test points alone, its standard error is theirs, and they may "
                "be easier than all, as those of MNIST are: compare with the others' density_of_first, on the same "
                "points"
            )
        rules["teacher"] += "."
    if ood is not None:
        rules["ood"] = (
            f"The test points are told from the {len(ood.z)} points of {ood.name}, mapped by the "
            "preprocessing of the data that the models know with one noise sample of the same seed, by their "
            "log-density, higher for those known: area under the ROC curve, and average precision of the "
            "points known and of those outside. In units of the data, log p(z) + log|dz/dx|, and in the "
            "models' space, log p(z)."
        )
    return rules


def _write_tables(
    out: Path,
    score: Scorer,
    mixture: Mixture,
    discretization: dict[str, float],
    ood: dict[str, Any] | None,
) -> None:
    import pandas as pd

    from cpmm.metrics import confusion

    table = pd.DataFrame(
        {"n_pseudotimes": list(map(int, discretization)), "density": list(discretization.values())}
    )
    table.to_csv(out / "discretization.csv", index=False)
    cluster = mixture.predict(score.z).numpy()
    points = pd.DataFrame({"cluster": cluster})
    if score.label is not None:
        points.insert(0, "label", score.label)
        member = score.label >= 0
        counts = confusion(
            score.label[member], cluster[member], len(score.data.class_names), mixture.n_clusters
        )
        pd.DataFrame(counts, index=list(score.data.class_names)).to_csv(
            out / "confusion.csv", index_label="class"
        )
    points.to_csv(out / "clusters.csv", index=False)
    if ood is not None:
        rows = [
            {"model": model, "ood": ood["name"], "space": space, **row[space]}
            for model, row in ood["models"].items()
            for space in ("data", "mixture")
        ]
        pd.DataFrame(rows).to_csv(out / "ood.csv", index=False)


def _read_history(folder: Path, config: Config) -> pd.DataFrame:
    """Read how the CPMM was trained, checked against its seal."""
    import pandas as pd

    from cpmm.artifact import load_header, verify_files
    from cpmm.pipeline.config.fingerprints import fingerprint_cpmm

    header = load_header(folder / "cpmm", "cpmm", fingerprint_cpmm(config))
    verify_files(folder / "cpmm", header, {"history.csv"})
    return pd.read_csv(folder / "cpmm" / "history.csv")


def _draw_figures(
    out: Path,
    config: Config,
    data: DataSplits,
    mixture: Mixture,
    metrics: Config,
    spaces: Spaces,
    history: pd.DataFrame,
) -> None:
    """Draw what the report shows into ``out/figures``, the same bytes for the same inputs."""
    import numpy as np
    import torch
    from matplotlib import rc_context

    from cpmm import figures
    from cpmm.metrics import confusion, match_clusters
    from cpmm.seeds import seeded_generator

    z, _ = data.points("test")
    label = None if data.label is None else data.label["test"].numpy()
    cluster = mixture.predict(z)
    shown = np.unique(np.linspace(0, len(spaces) - 1, 7).round().astype(int))
    n_shown = 10 if data.image_shape else 1000
    carried = np.stack([spaces.validation(int(i))[:n_shown].numpy() for i in shown])
    n_shown = carried.shape[1]  # the first of the validation points, fewer where fewer are carried
    drawn = {
        "spaces": figures.plot_spaces(
            carried,
            spaces.positions[shown].numpy(),
            None if data.label is None else data.label["validation"][:n_shown].numpy(),
            data.image_shape,
        ),
        "history": figures.plot_history(
            history,
            len(spaces) if config["cpmm"]["curriculum"] else 0,
        ),
        "discretization": figures.plot_discretization(
            [int(n) for n in metrics["discretization"]],
            list(metrics["discretization"].values()),
            metrics["unit"],
        ),
    }
    shown_as = data.preprocessing.inverse if data.image_shape else lambda points: points
    samples, component = mixture.sample(len(z), seeded_generator(config["seed"], 33))
    drawn["samples"] = figures.plot_samples(
        shown_as(z).numpy(),
        shown_as(samples).numpy(),
        label,
        mixture.cluster[component].numpy(),
        data.image_shape,
    )
    match = names = None
    if label is not None:
        member = label >= 0
        match = match_clusters(label[member], cluster.numpy()[member], mixture.n_clusters)
        table = confusion(
            label[member], cluster.numpy()[member], len(data.class_names), mixture.n_clusters
        )
        drawn["confusion"] = figures.plot_confusion(table, data.class_names, match)
        names = [data.class_names[c] if c >= 0 else "-" for c in match]
    means = mixture.components.mean.split(mixture.cluster_sizes)
    if len(set(mixture.cluster_sizes)) == 1:  # idle components dropped leave no common pseudotimes
        best = torch.cat([mixture.joint_log_prob(part).argmax(1) for part in z.split(2048)])
        share = torch.bincount(best, minlength=mixture.components.n_components) / len(z)
        weight = torch.bincount(cluster, minlength=mixture.n_clusters) / len(z)
        drawn["trajectories"] = figures.plot_trajectory_means(
            np.stack([shown_as(mean).numpy() for mean in means]),
            data.image_shape,
            [
                f"cluster {c}{'' if names is None else f' = {names[c]!r}'}, {100 * weight[c]:.0f} %"
                for c in range(mixture.n_clusters)
            ],
            share.reshape(mixture.n_clusters, -1).numpy(),
            shown_as(z).numpy(),
        )
    if data.n_features == 2:
        drawn["components"] = figures.plot_components(
            mixture.components.mean.numpy(),
            mixture.components.covariance().numpy(),
            mixture.cluster.numpy(),
            z.numpy(),
        )
    with rc_context({"svg.hashsalt": "cpmm"}):
        for name, figure in drawn.items():
            figure.savefig(out / "figures" / f"{name}.svg", metadata={"Date": None})


def _draws(data: DataSplits, n_draws: int, seed: int) -> Tensor:
    from cpmm.seeds import seeded_generator

    return data.draw(n_draws, seeded_generator(seed, 32))


def _sizes(mixture: Mixture) -> str:
    sizes, fa = set(mixture.cluster_sizes), mixture.components
    regular = len(sizes) == 1 and sizes != {1}
    count = f"{mixture.n_clusters} x {sizes.pop()}" if regular else f"{fa.n_components}"
    return f"{count} components, R = {fa.n_factors}"


if __name__ == "__main__":
    run_stage(main, __doc__)
