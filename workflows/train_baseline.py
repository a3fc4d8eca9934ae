"""Train and score a row of conf/baselines/: data/<preset>/baselines/<row>."""

from __future__ import annotations

from pathlib import Path

from cpmm.pipeline.config import Config
from cpmm.pipeline.config.fingerprints import (
    fingerprint_baseline,
    fingerprint_mixture,
    fingerprint_prepared,
    fingerprint_spaces,
    needs_spaces,
)  # fmt: skip
from cpmm.pipeline.stage import publish, run_stage, scratch_folder


def main(folder: Path, config: Config, row: str) -> str:
    """Write ``baselines/<row>`` for a preset."""
    if row not in config["baselines"]:
        known = ", ".join(config["baselines"])
        raise ValueError(f"there is no baseline {row!r}: choose one of conf/baselines/: {known}")

    from cpmm.mixture import Mixture
    from cpmm.pipeline.artifacts.files import write_json
    from cpmm.pipeline.artifacts.spaces import open_spaces
    from cpmm.pipeline.artifacts.store import load_prepared
    from cpmm.pipeline.errors import reason_of
    from cpmm.pipeline.models.baselines import train_baseline
    from cpmm.pipeline.models.fitted import NOT_TRAINED, Fitted, save_baseline
    from cpmm.pipeline.scores.ood import read_ood
    from cpmm.pipeline.scores.scorer import Scorer, score_baseline

    data = load_prepared(folder / "prepared", fingerprint_prepared(config))
    spaces = extracted = None
    if needs_spaces(config, row):
        spaces = open_spaces(folder / "spaces", fingerprint_spaces(config))
    if config["baselines"][row]["kind"] == "refined":
        extracted = Mixture.load(folder / "mixture", fingerprint=fingerprint_mixture(config))
    ood = config["evaluation"]["ood"]
    ood = None if ood is None else read_ood(ood, data)
    fingerprint = fingerprint_baseline(config, row)
    scratch = scratch_folder(folder, "train_baseline", fingerprint, row)
    training = scratch / "training"
    try:
        fitted = train_baseline(row, config, data, spaces, training, extracted=extracted)
        score = Scorer(data, fitted.split, fitted.n_points, config["evaluation"]["teacher_points"])
        scores = score_baseline(fitted, score, config["cpmm"]["n_clusters"], ood, timed=False)
    except Exception as error:  # a row without a model must not cost what has been trained
        if (reason := reason_of(error)) is None:
            raise
        fitted, scores = Fitted(None, NOT_TRAINED, missing=reason), {}
    out = scratch / row
    out.mkdir(exist_ok=True)
    unit = data.preprocessing.density_unit[0]
    write_json(out / "scores.json", {"row": row, "unit": unit, **scores})
    save_baseline(row, fitted, out, config, data, fingerprint)
    publish(scratch, row, folder / "baselines" / row)
    said = [f"{name} {scores[name]:.3f}" for name in ("density", "accuracy") if name in scores]
    what = f"{fitted.split} {', '.join(said)}" if said else "nothing to score"
    if fitted.missing:
        what = f"a row without a model: {fitted.missing}"
    told = f" ({fitted.note})" if fitted.note else ""
    return f"{row}: {what}{told} -> {folder / 'baselines' / row}"


if __name__ == "__main__":
    run_stage(main, __doc__, "row")
