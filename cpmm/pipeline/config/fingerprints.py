"""Fingerprints: what each artifact depends on, hashed from the configuration, input by input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from cpmm.pipeline.config import Config


def hash_of(*parts: object) -> str:
    """Hash configuration sections and the fingerprints of inputs, 16 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_files(options: Mapping[str, Any]) -> dict[str, str]:
    """Hash the files that options of a source name, by option; what is not there has none."""
    digests = {}
    for name in ("path", "label_path"):
        if options.get(name) and (path := Path(options[name])).is_file():
            state = path.stat()
            digests[name] = _digest_file(path.resolve(), state.st_mtime_ns, state.st_size)
    return digests


def check_digests(section: Mapping[str, Any], name: str, stage: str = "compose") -> None:
    """Refuse files of a source that are others than when the configuration was composed.

    Args:
        section: ``data`` or ``evaluation.ood``, as ``name`` says.
        name: Of the section.
        stage: Of DVC, that composes it.

    Raises:
        ValueError: If one has changed.
    """
    now = digest_files(section.get("options", {}))
    for option, digest in section.get("digests", {}).items():
        if now.get(option) != digest:
            raise ValueError(
                f"{section['options'][option]} ({name}.options.{option}) has changed since "
                f"the configuration was composed: run `dvc repro -f {stage}` first"
            )


@lru_cache(maxsize=16)
def _digest_file(path: Path, mtime_ns: int, size: int) -> str:
    """Hash a file once for all the trials of a sweep, as long as it looks the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# What a row of conf/baselines/ says for tables alone.
DESCRIPTION = ("title", "block", "paper")

# Rows of conf/baselines/ that evaluate reads, in the order of its report.
EVALUATED = ("refined", "direct", "matched", "gaussian", "kmeans", "groups")


def fingerprint_prepared(config: Config) -> str:
    """Fingerprint of ``prepared``."""
    return hash_of("prepared", config["data"])


def fingerprint_teacher(config: Config) -> str | None:
    """Fingerprint of ``teacher``; None where the configuration needs none."""
    if not needs_teacher(config):
        return None
    return hash_of(
        "teacher", config["teacher"], config["seed"], config["trainer"]["precision"],
        fingerprint_prepared(config),
    )  # fmt: skip


def fingerprint_spaces(config: Config) -> str:
    """Fingerprint of ``spaces``."""
    return hash_of(
        "spaces", config["spaces"], config["seed"], fingerprint_prepared(config),
        fingerprint_teacher(config),
    )  # fmt: skip


def fingerprint_cpmm(config: Config) -> str:
    """Fingerprint of ``cpmm``."""
    options = config["cpmm"]
    spaces = fingerprint_spaces(config) if options["curriculum"] else None
    precision = config["trainer"]["precision"]
    return hash_of(
        "cpmm", options, config["mixture"], precision, fingerprint_prepared(config), spaces
    )


def fingerprint_baseline(config: Config, row: str) -> str:
    """Fingerprint of a row of conf/baselines/, trained by its options and sizes that CPMM has.

    Rows of kind "curriculum" are trained by all of CPMM's options, with spaces or without; those of
    kind "groups" by its initialization, those of kind "refined" from the extracted mixture.
    """
    cpmm, evaluation = config["cpmm"], config["evaluation"]
    section = config["baselines"][row]
    options = {name: value for name, value in section.items() if name not in DESCRIPTION}
    sizes = [cpmm[name] for name in ("n_clusters", "n_factors", "log_diagonal_floor", "seed")]
    names = ("batch_size", "teacher_points", "teacher_solver", "ood")
    start = None
    if section["kind"] in ("curriculum", "groups"):
        start = fingerprint_cpmm(config)
    elif section["kind"] == "refined":
        start = fingerprint_mixture(config)
    return hash_of(
        "baseline", options, sizes, config["mixture"]["n_pseudotimes"],
        [evaluation[name] for name in names], config["trainer"]["precision"],
        fingerprint_prepared(config), start,
    )  # fmt: skip


def fingerprint_model(config: Config) -> str:
    """Fingerprint of what a trial trains."""
    model = config["model"]
    return fingerprint_cpmm(config) if model == "cpmm" else fingerprint_baseline(config, model)


def fingerprint_mixture(config: Config) -> str:
    """Fingerprint of ``mixture``."""
    return hash_of("mixture", config["mixture"], fingerprint_cpmm(config))


def fingerprint_evaluation(config: Config) -> str:
    """Fingerprint of ``evaluation``."""
    return hash_of(
        "evaluation", config["evaluation"], config["seed"], fingerprint_mixture(config),
        [fingerprint_baseline(config, row) for row in EVALUATED],
    )  # fmt: skip


def needs_teacher(config: Config) -> bool:
    """Whether the configuration trains through the spaces of a teacher."""
    return config["cpmm"]["curriculum"] and config["spaces"]["kind"] == "teacher"


def needs_spaces(config: Config, model: str) -> bool:
    """Whether a model, "cpmm" or a row of conf/baselines/, trains through spaces."""
    guided = model == "cpmm" or config["baselines"][model]["kind"] == "curriculum"
    return guided and config["cpmm"]["curriculum"]


def fingerprint_inputs(config: Config) -> tuple[str, str | None]:
    """Fingerprints of the data and the spaces that a trial needs, None where it needs no spaces."""
    spaces = fingerprint_spaces(config) if needs_spaces(config, config["model"]) else None
    return fingerprint_prepared(config), spaces


def fingerprint_options(config: Config) -> str:
    """Fingerprint of what a trial's row is of: all that trains and scores it, but for the code."""
    return hash_of(fingerprint_model(config), config["evaluation"]["ood"])


def fingerprint_trial(config: Config, model: str, seed: int) -> str | None:
    """Fingerprint of a trial of the preset; None of a model that its configuration has not."""
    if model != "cpmm" and model not in config["baselines"]:
        return None
    return fingerprint_options(config | {"model": model, "cpmm": config["cpmm"] | {"seed": seed}})
