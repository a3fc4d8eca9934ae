"""The inputs of trials: found in ``data/<preset>``, or made there by the pipeline's stages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cpmm.files import write_text
from cpmm.pipeline.config import Config
from cpmm.pipeline.config.code import SCRIPTS
from cpmm.pipeline.config.fingerprints import (
    fingerprint_inputs,
    fingerprint_prepared,
    fingerprint_spaces,
    fingerprint_teacher,
    needs_spaces,
)

if TYPE_CHECKING:
    from cpmm.data import DataSplits
    from cpmm.pipeline.artifacts.spaces import Spaces

STAGES = {"prepared": "prepare_data", "teacher": "train_teacher", "spaces": "build_spaces"}


@dataclass(frozen=True)
class Located:
    """Where the inputs of a trial lie."""

    prepared: Path  # folder of the data
    spaces: Path | None  # the zarr store of the curriculum, None without one
    fingerprints: tuple[str, str | None]  # of both


def locate_inputs(config: Config, home: Path) -> Located:
    """Find the inputs of a configuration in ``data/<preset>``, or make them in its scratch folder.

    What the pipeline has made from the same options is used as it is. The rest is made by the
    commands of the same stages, and kept for other trials and sweeps.

    Raises:
        ChildProcessError: If a stage fails; names it, and gives its own error.
    """
    data = prepare(config, home)
    if not needs_spaces(config, config["model"]):
        return Located(data, None, fingerprint_inputs(config))
    inputs = {"prepared": data}
    if teacher := fingerprint_teacher(config):
        inputs["teacher"] = _find_or_make("teacher", teacher, home, config, inputs)
    spaces = _find_or_make("spaces", fingerprint_spaces(config), home, config, inputs)
    return Located(data, spaces, fingerprint_inputs(config))


def prepare(config: Config, home: Path) -> Path:
    """Find the data of a configuration, or make them, as :func:`locate_inputs` does."""
    return _find_or_make("prepared", fingerprint_prepared(config), home, config, {})


def find_prepared(config: Config, home: Path) -> Path | None:
    """Find the data of a configuration, if they have been made."""
    fingerprint = fingerprint_prepared(config)
    made = home / ".scratch" / "inputs" / f"prepared-{fingerprint}" / "prepared"
    places = (home / "prepared", made)
    found = (place for place in places if _fingerprint_or_none(place, False) == fingerprint)
    return next(found, None)


def open_inputs(located: Located) -> tuple[DataSplits, Spaces | None]:
    """Read the data and open the spaces.

    Raises:
        ValueError: If they are damaged, or not those that were located.
    """
    from cpmm.pipeline.artifacts.spaces import open_spaces
    from cpmm.pipeline.artifacts.store import load_prepared

    prepared, spaces = located.fingerprints
    data = load_prepared(located.prepared, prepared)
    return data, None if located.spaces is None else open_spaces(located.spaces, spaces)


def size_of(located: Located) -> int:
    """Bytes of the inputs on disk."""
    folders = [located.prepared, *([located.spaces] if located.spaces else [])]
    return sum(p.stat().st_size for folder in folders for p in folder.rglob("*") if p.is_file())


def _find_or_make(
    name: str, fingerprint: str, home: Path, config: Config, inputs: Mapping[str, Path]
) -> Path:
    """Return the folder of an input that has this fingerprint; a stage makes it from others."""
    made = home / ".scratch" / "inputs" / f"{name}-{fingerprint}"
    if _fingerprint_or_none(home / name, whole=False) == fingerprint:
        return home / name
    # DVC does not keep these files, so damage can only be mended by making them again: read all.
    if _fingerprint_or_none(made / name, whole=True) == fingerprint:
        return made / name
    made.mkdir(parents=True, exist_ok=True)
    for other, path in inputs.items():
        link = made / other
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(path, made))
    # Trials go without another data set whose files are missing, and say so.
    config = {**config, "evaluation": {**config["evaluation"], "ood": None}}
    write_text(made / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    print(f"inputs | making {name} {fingerprint}", flush=True)
    _run_stage(STAGES[name], made)
    shutil.rmtree(made / ".scratch", ignore_errors=True)
    return made / name


def _fingerprint_or_none(folder: Path, whole: bool) -> str | None:
    """Fingerprint of an input, None if it is not there or unfit for use."""
    from cpmm.artifact import load_header, verify_files

    try:
        header = load_header(folder, folder.name)
        verify_files(folder, header, header["files"] if whole else ())
    except (FileNotFoundError, ValueError):
        return None
    return header["fingerprint"]


def _run_stage(stage: str, folder: Path) -> None:
    """Run the command of a stage on ``<folder>/config.yaml``, and pass on what it prints.

    Raises:
        ChildProcessError: If it fails; says what the stage says is at fault.
        KeyboardInterrupt: If it was interrupted.
    """
    command = [sys.executable, str(SCRIPTS / f"{stage}.py"), str(folder / "config.yaml")]
    start, reason = f"{stage}: error: ", None
    # With this variable, a stage ends as soon as the process that started it is gone.
    environment = {"DVC_STAGE": "inputs", **os.environ}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith(start):
                reason = line.removeprefix(start).strip()
            else:
                print(line, end="", file=sys.stderr, flush=True)
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode:
        reason = reason or f"it ended with exit status {process.returncode}"
        raise ChildProcessError(f"{stage}: {reason}")
