"""Fingerprints of the artifacts, from the configuration: what each one depends on, input by input."""

from __future__ import annotations

from workflows.stage import Config, fingerprint


def mark_prepared(config: Config) -> str:
    """Fingerprint of ``prepared``."""
    return fingerprint("prepared", config["data"])


def mark_teacher(config: Config, prepared: str) -> str:
    """Fingerprint of ``teacher``, trained on the data with the fingerprint ``prepared``."""
    return fingerprint(
        "teacher", config["teacher"], config["seed"], config["trainer"]["precision"], prepared
    )


def mark_spaces(config: Config, prepared: str, teacher: str | None) -> str:
    """Fingerprint of ``spaces``; ``teacher`` is None where the spaces need none."""
    return fingerprint("spaces", config["spaces"], config["seed"], prepared, teacher)


def mark_cpmm(config: Config, prepared: str, spaces: str | None) -> str:
    """Fingerprint of ``cpmm``; ``spaces`` is None without a curriculum."""
    precision = config["trainer"]["precision"]
    return fingerprint("cpmm", config["cpmm"], config["mixture"], precision, prepared, spaces)


def needs_teacher(config: Config) -> bool:
    """Whether the configuration trains through the spaces of a teacher."""
    return config["cpmm"]["curriculum"] and config["spaces"]["kind"] == "teacher"


def marks_of_inputs(config: Config) -> tuple[str, str | None]:
    """Fingerprints of the data and the spaces that training needs, None where it needs no spaces."""
    prepared = mark_prepared(config)
    if not config["cpmm"]["curriculum"]:
        return prepared, None
    teacher = mark_teacher(config, prepared) if needs_teacher(config) else None
    return prepared, mark_spaces(config, prepared, teacher)
