"""Compose the configuration of one preset from conf/ and the overrides in params.yaml."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from workflows.stage import describe, end_with_dvc, write_text

ROOT = Path(__file__).resolve().parent.parent


def flatten(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Write nested overrides as Hydra's: ``{"teacher": {"epochs": 9}}`` as ``teacher.epochs=9``."""
    for name, value in overrides.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={_quote(value)}"


def compose_preset(
    preset: str, overrides: Sequence[str], primary: str = "config"
) -> dict[str, Any]:
    """Compose ``conf/config.yaml`` with a preset and overrides, everything resolved.

    Args:
        preset: A file of ``conf/preset/``, without its ending.
        overrides: In Hydra's syntax.
        primary: The file of ``conf/`` to start from: config, or sweep.

    Raises:
        ValueError: If the preset or an option is unknown, or an override cannot be read.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if preset not in known_presets():
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(known_presets())}")
    try:
        plain = _compose_plain(primary, preset)
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose(primary, overrides=[f"preset={preset}", *overrides])
        for missing in sorted(OmegaConf.missing_keys(config)):
            raise ValueError(
                f"preset {preset!r} needs a value for {missing}: set overrides.{preset}.{missing} in "
                "params.yaml"
            )
        resolved = OmegaConf.to_container(config, resolve=True)
        require_same_types(plain, resolved)
    except (HydraException, OmegaConfBaseException) as error:
        cause = str(error.__cause__ or error).splitlines()
        detail = " ".join(line.strip() for line in [str(error).splitlines()[0], *cause[:2]])
        raise ValueError(
            f"preset {preset!r} cannot be composed with overrides {list(overrides)}: {detail} "
            "(the options are those of conf/)"
        ) from error
    return resolved


def split_preset(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Take ``preset=...`` out of a command line's overrides; digits if it is not there."""
    chosen = [item.split("=", 1)[1] for item in overrides if item.startswith("preset=")]
    rest = [item for item in overrides if not item.startswith("preset=")]
    return (chosen[-1] if chosen else "digits"), rest


def known_presets() -> list[str]:
    """Names of the files in ``conf/preset/``."""
    return sorted(path.stem for path in (ROOT / "conf" / "preset").glob("*.yaml"))


def overrides_of(preset: str, overrides: Mapping[str, Any]) -> list[str]:
    """Take from the overrides in params.yaml those that concern a preset, in Hydra's syntax.

    Entries named after a preset hold for that preset alone, the others for every one.
    """
    common = {name: value for name, value in overrides.items() if name not in known_presets()}
    return [*flatten(common), *flatten(overrides.get(preset) or {})]


def require_same_types(
    plain: Mapping[str, Any], changed: Mapping[str, Any], prefix: str = ""
) -> None:
    """Check that no override put text where a number or a switch belongs, or the reverse.

    Raises:
        ValueError: If one did; names the option.
    """
    for name, before in plain.items():
        after = changed.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            require_same_types(before, after, f"{prefix}{name}.")
        elif before not in (None, "???") and after is not None:
            expected = (int, float) if type(before) in (int, float) else type(before)
            if not isinstance(after, expected) or isinstance(after, bool) != isinstance(
                before, bool
            ):
                raise ValueError(
                    f"{prefix}{name} is {after!r}: expected a value like {before!r}, the one in conf/"
                )


def main() -> None:
    """Write the composed configuration of a preset."""
    import yaml

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", help="a file of conf/preset/, without .yaml")
    parser.add_argument("target", type=Path, help="where to write, data/<preset>/config.yaml")
    arguments = parser.parse_args()
    end_with_dvc()
    try:
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        overrides = params.get("overrides") or {}
        if not isinstance(overrides, Mapping):
            raise ValueError(f"overrides in params.yaml must be a mapping: got {overrides!r}")
        config = compose_preset(arguments.preset, overrides_of(arguments.preset, overrides))
        arguments.target.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.target, yaml.safe_dump(config, sort_keys=False))
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"config: error: {describe(error, arguments.target)}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"config: wrote {arguments.target}")


@lru_cache
def _compose_plain(primary: str, preset: str) -> dict[str, Any]:
    """Compose a preset without overrides, to compare types with."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        plain = compose(primary, overrides=[f"preset={preset}"])
    return OmegaConf.to_container(plain, resolve=True)


def _quote(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        if value.isidentifier() and value.lower() not in ("null", "true", "false", "nan", "inf"):
            return value
        # Hydra takes backslashes as they are, but for those before a quote.
        return "'" + re.sub(r"(\\*)'", r"\1\1\\'", value + "'")[:-2] + "'"
    if isinstance(value, list):
        return f"[{','.join(map(_quote, value))}]"
    if isinstance(value, Mapping):
        return "{}"
    return str(value)


if __name__ == "__main__":
    main()
