"""Compose the configuration of one preset from conf/ and the overrides in params.yaml."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from cpmm.pipeline.config.fingerprints import digest_files
from cpmm.pipeline.config.root import ROOT
from cpmm.pipeline.config.schema import (
    Rule,
    canonical,
    check_cpmm,
    check_options,
    leaves,
    options_with,
    show,
)  # fmt: skip
from cpmm.reading.overrides import quote, quote_word


def flatten(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Write nested overrides as Hydra's: ``{"teacher": {"epochs": 9}}`` as ``teacher.epochs=9``.

    Raises:
        ValueError: If a name or a value cannot be written so.
    """
    for name, value in overrides.items():
        if not isinstance(name, str) or "=" in name:
            raise ValueError(
                f"{prefix}{show(name)} is not the name of an option: look it up in conf/"
            )
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        elif value == {} or _is_plain(value):
            yield f"{prefix}{name}={quote(value)}"
        else:
            raise ValueError(
                f"{prefix}{name} is {show(value)}: expected a number, text (in quotes, "
                "if it looks like something else), true, false, null or a list of these"
            )


def compose_preset(
    preset: str, overrides: Sequence[str], primary: str = "config"
) -> dict[str, Any]:
    """Compose ``conf/config.yaml`` with a preset and overrides, resolved and in canonical form.

    Args:
        preset: A file of ``conf/preset/``, without its ending.
        overrides: In Hydra's syntax.
        primary: The file of ``conf/`` to start from: config, or sweep.

    Raises:
        ValueError: If the preset or an option is unknown, an override cannot be read, or a value is
            not what ``cpmm/pipeline/config/schema.py`` expects.
        OSError: If a file of the data cannot be read.
    """
    if preset not in known_presets():
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(known_presets())}")
    _require_ours(overrides)
    resolved = _resolve(primary, preset, overrides)
    options = option_rules(ROOT)
    check_options(resolved, _compose_plain(ROOT, primary, preset), options)
    resolved = canonical(resolved, options)
    check_cpmm(resolved["cpmm"])
    ood = resolved["evaluation"].get("ood")
    for name, source in (("data", resolved["data"]), ("evaluation.ood", ood)):
        if source is not None and "options" not in source:
            raise ValueError(f"{name}.options is missing: it cannot be left out")
        if source is not None and (digests := digest_files(source["options"])):
            source["digests"] = digests  # an edited file is another configuration
    return resolved


def missing_ood_files(config: Mapping[str, Any]) -> str | None:
    """Say that the files of the data set to be told apart are not at hand; None if they are.

    No error: trials go without it. But ``evaluate``, at the end of the pipeline, does not.
    """
    ood = config["evaluation"]["ood"]
    if ood is None or ood["source"] != "idx" or ood["options"]["mirror"]:
        return None
    options = ood["options"]
    places = [Path(place) for place in (options["folder"], options["cache"]) if place]
    for name in options["files"].values():
        names = (name, name.removesuffix(".gz"), f"{name}.gz")
        if not any((place / other).is_file() for place in places for other in names):
            return (
                f"evaluation.ood is {ood['name']}, and {name} is missing "
                f"(evaluation.ood.options.folder is {show(options['folder'])}): evaluate will "
                "refuse at the end; set the folder in params.yaml's overrides, or evaluation.ood "
                "to null"
            )
    return None


def split_preset(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Take ``preset=...`` out of a command line's overrides; digits if it is not there."""
    chosen = [item.split("=", 1)[1] for item in overrides if item.startswith("preset=")]
    rest = [item for item in overrides if not item.startswith("preset=")]
    return (chosen[-1] if chosen else "digits"), rest


def known_presets() -> list[str]:
    """Names of the files in ``conf/preset/``."""
    return sorted(path.stem for path in (ROOT / "conf" / "preset").glob("*.yaml"))


def known_sweeps() -> list[str]:
    """Names of the files in ``conf/sweep/``, but for the one that all start from."""
    paths = (ROOT / "conf" / "sweep").glob("*.yaml")
    return sorted(path.stem for path in paths if path.stem != "default")


def overrides_of(preset: str, overrides: Mapping[str, Any]) -> list[str]:
    """Take from the overrides in params.yaml those that concern a preset, in Hydra's syntax.

    Entries named after a preset hold for that preset alone, the others for every one.

    Raises:
        ValueError: If they are not mappings from options to values.
    """
    known = known_presets()
    for name in (None, *known):
        found = overrides if name is None else overrides.get(name)
        if found is not None and not isinstance(found, Mapping):
            where = "overrides" if name is None else f"overrides.{name}"
            raise ValueError(
                f"{where} in params.yaml is {show(found)}: expected a mapping, such as {{seed: 3}}"
            )
    common = {name: value for name, value in overrides.items() if name not in known}
    return [*flatten(common), *flatten(overrides.get(preset) or {})]


def read_overrides(preset: str, path: Path = ROOT / "params.yaml") -> list[str]:
    """Read those overrides in params.yaml that concern a preset, in Hydra's syntax.

    Raises:
        ValueError: If the file is no YAML, or what it says cannot be an override.
        OSError: If it cannot be read.
    """
    import yaml

    text = path.read_bytes()
    try:
        params = yaml.safe_load(text)
    # Dates that do not exist and numbers with too many digits are plain ValueErrors.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(params, Mapping):
        raise ValueError(f"{path.name} is {show(params)}: expected presets and overrides")
    try:
        return overrides_of(preset, {} if params.get("overrides") is None else params["overrides"])
    except RecursionError as error:
        raise ValueError(f"overrides in {path.name} contain themselves, or are too deep") from error


@lru_cache
def option_rules(root: Path = ROOT) -> dict[str, Rule]:
    """The rule of every option, those of each file of ``conf/baselines/`` included."""
    return options_with(_compose_plain(root, "config", None)["baselines"])


@lru_cache
def _compose_plain(root: Path, primary: str, preset: str | None) -> dict[str, Any]:
    """Compose a preset, or none, without overrides: what there must be."""
    from omegaconf import OmegaConf

    with _open_conf(root) as compose:
        plain = compose(primary, overrides=["~preset" if preset is None else f"preset={preset}"])
    return OmegaConf.to_container(plain, resolve=True)


def _resolve(primary: str, preset: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Compose a preset with overrides, as :func:`compose_preset` does, unchecked."""
    from omegaconf import OmegaConf

    try:
        with _open_conf(ROOT) as compose:
            config = compose(primary, overrides=[f"preset={preset}", *overrides])
        missing = sorted(OmegaConf.missing_keys(config))
        resolved = None if missing else OmegaConf.to_container(config, resolve=True)
    except Exception as error:  # Hydra fails in any way, and nothing of ours runs in there
        _require_readable(preset, overrides)
        lines = [*str(error).splitlines()[:1], *str(error.__cause__ or error).splitlines()[:2]]
        detail = " ".join(dict.fromkeys(line.strip() for line in lines))
        raise ValueError(
            f"preset {preset!r} cannot be composed with overrides {show(list(overrides), 300)}: "
            f"{detail[:300]} (the options are those of conf/)"
        ) from error
    rules = option_rules(ROOT)  # null stands for what is to be given, where it is no value
    plain = leaves(OmegaConf.to_container(config))
    missing += [n for n, v in plain if v is None and n in rules and not rules[n].accepts(None)]
    if missing:
        raise ValueError(
            f"preset {preset!r} needs a value for {' and '.join(missing)}: write "
            f"{' '.join(f'{name}=VALUE' for name in missing)} after trial.py or sweep.py, or set "
            f"{' and '.join(f'overrides.{preset}.{name}' for name in missing)} in params.yaml"
        )
    return resolved


@contextmanager
def _open_conf(root: Path) -> Iterator[Callable[..., Any]]:
    """Give Hydra's ``compose`` of ``conf/``, where ``baselines: "*"`` is every file there."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(group="baselines", name="*", node=_compose_rows(root))
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        yield compose


@lru_cache
def _compose_rows(root: Path) -> dict[str, Any]:
    """Compose all of ``conf/baselines/`` once: more files than the rest of conf/ has together."""
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    rows = sorted(path.stem for path in (root / "conf" / "baselines").glob("*.yaml"))
    every = {"defaults": [{f"/baselines@{row}": row} for row in rows]}
    ConfigStore.instance().store(name="every_row", node=every)
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        return OmegaConf.to_container(compose("every_row"))


def _require_ours(overrides: Sequence[str]) -> None:
    for item in overrides:
        key = item.lstrip("+~").split("=")[0].strip()
        if key == "preset" or key.split(".")[0].split("/")[0] == "hydra":
            raise ValueError(
                f"{show(item)} cannot be an override: presets are named in params.yaml or by "
                "preset=... on a command line, and Hydra's own options change nothing"
            )


def _require_readable(preset: str, overrides: Sequence[str]) -> None:
    """Say of an override whose value Hydra does not take for one text how to write it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for item in overrides:
        key, separator, value = item.partition("=")
        try:
            read = not OverridesParser.create().parse_override(item).is_sweep_override()
        except HydraException:
            read = False
        except (ValueError, RecursionError):  # a number or lists beyond all limits
            read = True
        if separator and not read:
            right = quote_word(f"{key}={quote(value)}")
            raise ValueError(
                f"preset {preset!r} cannot be composed with {show(item)}: text with brackets, "
                "commas, =, quotes or letters beyond ASCII stands in quotes of its own. If this is "
                f"text, write {right if len(right) < 1000 else 'it so'}"
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
