"""Train the teacher, a continuous normalizing flow: data/<preset>/teacher."""

from __future__ import annotations

from pathlib import Path

from cpmm.pipeline.config import Config, pick
from cpmm.pipeline.config.fingerprints import (
    fingerprint_prepared,
    fingerprint_teacher,
    needs_teacher,
)  # fmt: skip
from cpmm.pipeline.stage import publish, run_stage, scratch_folder


def main(folder: Path, config: Config) -> str:
    """Write ``teacher`` for a preset."""
    from cpmm.artifact import save_artifact
    from cpmm.pipeline.artifacts.store import load_prepared
    from cpmm.pipeline.models.fit import drawn_rows, fit, save_trained
    from cpmm.pipeline.models.flows import make_teacher
    from cpmm.training.teacher import TeacherTraining

    if not needs_teacher(config):
        save_artifact(folder / "teacher", "teacher", {}, {"fingerprint": None, "trained": False})
        return "not needed: the curriculum of this configuration has no teacher"
    data = load_prepared(folder / "prepared", fingerprint_prepared(config))
    options, seed = config["teacher"], config["seed"]
    fingerprint = fingerprint_teacher(config)
    scratch = scratch_folder(folder, "train_teacher", fingerprint)
    module = TeacherTraining(
        make_teacher(options, data, seed),
        **pick(
            options, "flow_matching_epochs", "likelihood_epochs", "kinetic_weight",
            "jacobian_weight", "learning_rate", "n_warmup_epochs",
        ),
        seed=seed,
    )  # fmt: skip
    rows = drawn_rows(data, **pick(options, "n_draws", "batch_size"), seed=seed)
    fit("train_teacher", module, rows, config["trainer"], scratch, options["gradient_clip"])
    save_trained(scratch / "teacher", "teacher", module, fingerprint)
    publish(scratch, "teacher", folder / "teacher")
    return f"best validation loss {module.best['value']:.4f} -> {folder / 'teacher'}"


if __name__ == "__main__":
    run_stage(main, __doc__)
