"""The rules by which evaluate scores, in sentences for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cpmm.pipeline.config import Config
from cpmm.pipeline.config.fingerprints import needs_teacher

if TYPE_CHECKING:
    from cpmm.data import DataSplits
    from cpmm.pipeline.scores.ood import OodPoints


FAR = 5.0  # nats or bits per dimension; models of one data set lie within a few
REFERENCES = {"cpmm": "CPMM", "gaussian": "one Gaussian"}


def doubt_densities(densities: Mapping[str, float]) -> dict[str, str]:
    """Say of densities that are far off what to think of them, by model.

    The rule: more than :data:`FAR` per dimension from the better of CPMM's and the Gaussian's, or
    where there is neither, from the best.
    """
    found = {name: value for name, value in densities.items() if math.isfinite(value)}
    if not found:
        return {}
    best = min({name: found[name] for name in REFERENCES if name in found} or found, key=found.get)
    than = REFERENCES.get(best, "the best row")
    doubts = {}
    for name, value in found.items():
        far = f"{abs(value - found[best]):,.0f} per dimension"
        if value - found[best] > FAR:
            doubts[name] = (
                f"density far off: {far} worse than that of {than}. No fit, or a few test points "
                "far from all others, make such a mean"
            )
        elif found[best] - value > FAR:
            doubts[name] = (
                f"density far off: {far} better than that of {than}. Repeated points or features "
                "that follow from others make such a mean"
            )
    return doubts


def state_rules(config: Config, data: DataSplits, ood: OodPoints | None) -> dict[str, str]:
    """One sentence for each figure: the rule that made it."""
    n_first, direct = config["evaluation"]["teacher_points"], config["baselines"]["direct"]
    rules = {
        "density": _density(config, data) + ". Lower is better.",
        "density_far_off": f"A density more than {FAR:g} {data.preprocessing.density_unit[0]} from "
        "the better of CPMM's and the Gaussian's has a note.",
        "density_standard_error": "Standard deviation over the test points divided by the root "
        "of their number.",
        "selection": "Weights are those of the fine-tuning epoch with the best validation "
        "likelihood.",
        "direct": "k-means and local factor analysis, shrinkage by validation likelihood, then "
        f"Adam for {direct['epochs']} epochs; best epoch by validation.",
        "refined": "The extracted components as the start of the same Adam, for as many epochs.",
    }
    if config["baselines"]["matched"]["em_iterations"]:
        rules["matched"] = (
            "As the direct mixture, or by EM from the same start: the likelier on validation data."
        )
    if n_first is not None and n_first < len(data.raw["test"]):
        rules["density_of_first"] = (
            f"The same over the first {n_first} test points, which flows are scored on."
        )
    if data.label is not None:
        rules |= {
            "accuracy": "Share of test points whose cluster's class, matched one to one "
            "(Hungarian), is theirs.",
            "nmi": "Normalized mutual information, arithmetic mean.",
            "ari": "Adjusted Rand index.",
            "purity": "Share of test points in the commonest class of their cluster.",
        }
    if needs_teacher(config):
        rules["teacher"] = _teacher(config, data)
    if ood is not None:
        rules["ood"] = (
            f"The test points are told from the {len(ood.z)} points of {ood.name}, mapped by the "
            "preprocessing of the data that the models know with one noise sample of the same "
            "seed, by their log-density, higher for those known: area under the ROC curve, and "
            "average precision of the points known and of those outside. In units of the data, "
            "log p(z) + log|dz/dx|, and in the models' space, log p(z)."
        )
    return rules


def _density(config: Config, data: DataSplits) -> str:
    pre = data.preprocessing
    common = (
        f"mean over the {len(data.raw['test'])} test points, one noise sample of seed "
        f"{data.noise_seed}, computed in float64; "
        f"floor of log d {config['cpmm']['log_diagonal_floor']:g}"
    )
    if pre.levels is None:
        return f"-(log p(z) + log|dz/dx|) / M, nats, in units of the data; {common}"
    return (
        f"-(log p(z) + log|dz/dx|) / (M ln 2) + log2 {pre.levels} with {pre.description}; {common}"
    )


def _teacher(config: Config, data: DataSplits) -> str:
    solver, n_points = (config["evaluation"][name] for name in ("teacher_solver", "teacher_points"))
    exact = data.n_features <= config["teacher"]["exact_trace_up_to"]
    trace = "exact" if exact else "Hutchinson, fixed seed"
    rule = f"{solver['method']}, tolerances {solver['rtol']:g}/{solver['atol']:g}; trace: {trace}"
    if n_points is not None and n_points < len(data.raw["test"]):
        rule += (
            f"; scored on the first {n_points} test points alone, its standard error is theirs, "
            "and they may be easier than all, as those of MNIST are: compare with the others' "
            "density_of_first, on the same points"
        )
    return f"{rule}."
