"""Compose the configuration of one preset from conf/ and the overrides in params.yaml."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def flatten(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Write nested overrides as Hydra's: ``{"teacher": {"epochs": 9}}`` as ``teacher.epochs=9``."""
    for name, value in overrides.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={_quote(value)}"


def compose_preset(preset: str, overrides: list[str]) -> dict[str, Any]:
    """Compose ``conf/config.yaml`` with a preset and overrides, everything resolved.

    Args:
        preset: A file of ``conf/preset/``, without its ending.
        overrides: In Hydra's syntax.

    Raises:
        ValueError: If the preset or an option is unknown, or an override cannot be read.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = sorted(path.stem for path in (ROOT / "conf" / "preset").glob("*.yaml"))
    if preset not in known:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(known)}")
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("config", overrides=[f"preset={preset}", *overrides])
            resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        cause = str(error.__cause__ or error).splitlines()
        detail = " ".join(line.strip() for line in [str(error).splitlines()[0], *cause[:2]])
        raise ValueError(
            f"preset {preset!r} cannot be composed with overrides {overrides}: {detail} "
            "(the options are those of conf/)"
        ) from error
    return resolved


def main() -> None:
    """Write the composed configuration of a preset."""
    import yaml

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", help="a file of conf/preset/, without .yaml")
    parser.add_argument("target", type=Path, help="where to write, data/<preset>/config.yaml")
    arguments = parser.parse_args()
    try:
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        overrides = params.get("overrides") or {}
        if not isinstance(overrides, Mapping):
            raise ValueError(f"overrides in params.yaml must be a mapping: got {overrides!r}")
        config = compose_preset(arguments.preset, list(flatten(overrides)))
        arguments.target.parent.mkdir(parents=True, exist_ok=True)
        arguments.target.write_text(yaml.safe_dump(config, sort_keys=False))
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"config: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"config: wrote {arguments.target}")


def _quote(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return value if value.isidentifier() else f"'{escaped}'"
    if isinstance(value, list):
        return f"[{','.join(map(_quote, value))}]"
    if isinstance(value, Mapping):
        return "{}"
    return str(value)


if __name__ == "__main__":
    main()
