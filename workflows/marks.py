"""Fingerprints of the artifacts, from the configuration: what each one depends on, input by input."""

from __future__ import annotations

from workflows.stage import Config, fingerprint

# Options of ``cpmm`` that joined after artifacts were published: null leaves those valid.
LATER = ("weight_knots",)


def mark_prepared(config: Config) -> str:
    """Fingerprint of ``prepared``."""
    return fingerprint("prepared", config["data"])


def mark_teacher(config: Config) -> str | None:
    """Fingerprint of ``teacher``; None where the configuration needs none."""
    if not needs_teacher(config):
        return None
    return fingerprint(
        "teacher", config["teacher"], config["seed"], config["trainer"]["precision"],
        mark_prepared(config),
    )  # fmt: skip


def mark_spaces(config: Config) -> str:
    """Fingerprint of ``spaces``; an option that is null, such as a limit that is not set, is not in it."""
    options = {name: value for name, value in config["spaces"].items() if value is not None}
    return fingerprint(
        "spaces", options, config["seed"], mark_prepared(config), mark_teacher(config)
    )


def mark_cpmm(config: Config) -> str:
    """Fingerprint of ``cpmm``; an option of :data:`LATER` that is null is not in it."""
    options = config["cpmm"]
    options = {k: v for k, v in options.items() if v is not None or k not in LATER}
    spaces = mark_spaces(config) if options["curriculum"] else None
    precision = config["trainer"]["precision"]
    return fingerprint("cpmm", options, config["mixture"], precision, mark_prepared(config), spaces)


def mark_baseline(config: Config, row: str) -> str:
    """Fingerprint of a row of conf/baselines/, trained by its options and sizes that CPMM has.

    Rows of kind "curriculum" are trained by all of CPMM's options, with spaces or without.
    """
    cpmm, evaluation = config["cpmm"], config["evaluation"]
    sizes = [cpmm[name] for name in ("n_clusters", "n_factors", "log_diagonal_floor", "seed")]
    scored = [
        evaluation[name]
        for name in ("batch_size", "gaussian_draws", "teacher_points", "teacher_solver", "ood")
    ]
    return fingerprint(
        "baseline", config["baselines"][row], sizes, config["mixture"]["n_pseudotimes"], scored,
        config["trainer"]["precision"], mark_prepared(config),
        mark_cpmm(config) if config["baselines"][row]["kind"] == "curriculum" else None,
    )  # fmt: skip


def mark_model(config: Config) -> str:
    """Fingerprint of what a trial trains."""
    model = config["model"]
    return mark_cpmm(config) if model == "cpmm" else mark_baseline(config, model)


def mark_mixture(config: Config) -> str:
    """Fingerprint of ``mixture``."""
    return fingerprint("mixture", config["mixture"], mark_cpmm(config))


def mark_evaluation(config: Config) -> str:
    """Fingerprint of ``evaluation``."""
    return fingerprint(
        "evaluation", config["evaluation"], config["cpmm"]["n_factors"],
        config["cpmm"]["log_diagonal_floor"], config["seed"], mark_mixture(config),
    )  # fmt: skip


def needs_teacher(config: Config) -> bool:
    """Whether the configuration trains through the spaces of a teacher."""
    return config["cpmm"]["curriculum"] and config["spaces"]["kind"] == "teacher"


def needs_spaces(config: Config, model: str) -> bool:
    """Whether a model, "cpmm" or a row of conf/baselines/, trains through spaces."""
    guided = model == "cpmm" or config["baselines"][model]["kind"] == "curriculum"
    return guided and config["cpmm"]["curriculum"]


def marks_of_inputs(config: Config) -> tuple[str, str | None]:
    """Fingerprints of the data and the spaces that a trial needs, None where it needs no spaces."""
    spaces = mark_spaces(config) if needs_spaces(config, config["model"]) else None
    return mark_prepared(config), spaces
