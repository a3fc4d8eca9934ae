"""What every stage shares: its command line, its configuration, its errors and its scratch folder."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

EXPECTED_ERRORS = (ValueError, FloatingPointError, OSError, MemoryError)
# In what torch says of it, a RuntimeError like any bug.
NO_MEMORY = ("allocate memory", "out of memory", "Storage size calculation overflowed")
PACKAGE = Path(__file__).resolve().parent.parent / "cpmm"

Config = dict[str, Any]


def run_stage(main: Callable[[Path, Config], str], description: str) -> None:
    """Run a stage from the command line: ``python workflows/<stage>.py data/<preset>/config.yaml``.

    Args:
        main: Takes the preset's folder and its configuration; returns the last line to print.
        description: One sentence for ``--help``.

    Exits with 1 and one message when the input is at fault; a bug shows its traceback.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "config", type=Path, help="composed configuration, data/<preset>/config.yaml"
    )
    path = parser.parse_args().config
    name = Path(sys.argv[0]).stem
    try:
        config = load_config(path)
        threads = config.get("trainer", {}).get("threads")
        if threads:
            import torch  # after the arguments are parsed, so that --help is quick

            torch.set_num_threads(threads)
        print(f"{name}: {main(path.parent, config)}", flush=True)
    except EXPECTED_ERRORS as error:
        print(f"{name}: error: {describe(error)}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error if os.environ.get("CPMM_TRACEBACK") else None
    except Exception as error:
        if (line := explain(error)) is None:
            raise
        print(f"{name}: error: {line}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error if os.environ.get("CPMM_TRACEBACK") else None
    except KeyboardInterrupt:
        print(f"{name}: interrupted; run it again to go on", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def load_config(path: Path) -> Config:
    """Read a composed configuration.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not a YAML mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: `dvc repro` composes it from conf/")
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} is no configuration: expected a mapping, got {type(config).__name__}"
        )
    return config


def describe(error: BaseException) -> str:
    """Say what went wrong in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def explain(error: Exception) -> str | None:
    """Say what to do about an error of a library that no check of ours can foresee; None for a bug."""
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY):
        sizes = "n_clusters, n_pseudotimes, a field's width, a batch_size or n_draws"
        return f"too little memory ({text[:200]}): lower what the stage multiplies: {sizes}"
    if type(error).__name__ == "MisconfigurationException":  # Lightning's, imported where it trains
        return f"{text[:200]} Set trainer.accelerator and trainer.devices to what this machine has."
    return None


def fingerprint(*parts: object) -> str:
    """Hash configuration sections and the fingerprints of inputs, 16 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_fingerprint(*files: Path) -> str:
    """Hash the source of the method, and further files: work half done by other code is not resumed."""
    digest = hashlib.sha256()
    method = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "figures.py")
    for path in [*method, *files]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def scratch_folder(folder: Path, stage: str, mark: str) -> Path:
    """Make the folder where a stage keeps its unfinished work between runs.

    DVC deletes a stage's outputs before it runs, so what is to be resumed lies elsewhere. The
    leftovers of other configurations of the same stage are removed.

    Args:
        folder: ``data/<preset>``.
        stage: Name of the stage.
        mark: Fingerprint of all that the work depends on.
    """
    root = folder / ".scratch"
    scratch = root / f"{stage}-{fingerprint(mark, code_fingerprint())}"
    for other in root.glob(f"{stage}-*"):
        if other != scratch:
            shutil.rmtree(other, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch


def publish(scratch: Path, name: str, target: Path) -> None:
    """Move ``scratch/name`` onto ``target`` and drop the scratch folder: the stage is done."""
    if target.is_dir():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(scratch / name, target)
    shutil.rmtree(scratch, ignore_errors=True)


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a whole checkpoint file: a zip archive, of which torch checks no CRC."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (FileNotFoundError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError):
        return False


def pick(config: Mapping[str, Any], *names: str) -> Config:
    """Take entries of a mapping, for keyword arguments named as in conf/."""
    return {name: config[name] for name in names}
