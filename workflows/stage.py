"""What every stage shares: its command line, its configuration, its errors and its scratch folder."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

EXPECTED_ERRORS = (ValueError, FloatingPointError, OSError, MemoryError)
REMEDIES = {
    errno.ENOSPC: "make space there, and run it again",
    errno.EDQUOT: "make space there, and run it again",
    errno.EROFS: "make it writable, and run it again",
    errno.EACCES: "see to its permissions, and run it again",
    errno.EPERM: "see to its permissions, and run it again",
}
# In what torch says of it, a RuntimeError like any bug.
NO_MEMORY = ("allocate memory", "out of memory", "Storage size calculation overflowed")
PACKAGE = Path(__file__).resolve().parent.parent / "cpmm"

Config = dict[str, Any]


def run_stage(main: Callable[..., str], description: str, *arguments: str) -> None:
    """Run a stage from the command line: ``python workflows/<stage>.py data/<preset>/config.yaml``.

    Args:
        main: Takes the preset's folder, its configuration and the further arguments; returns the
            last line to print.
        description: One sentence for ``--help``.
        arguments: Names of further arguments of the command line.

    Exits with 1 and one message when the input is at fault; a bug shows its traceback.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "config", type=Path, help="composed configuration, data/<preset>/config.yaml"
    )
    for argument in arguments:
        parser.add_argument(argument)
    parsed = parser.parse_args()
    path, further = parsed.config, [getattr(parsed, argument) for argument in arguments]
    name = Path(sys.argv[0]).stem
    end_with_dvc()
    try:
        config = load_config(path)
        temporary = "-".join([name, *([fingerprint(further)] if further else [])])
        with (
            threads_of(config),
            temporary_files_in(path.parent / ".scratch" / f"{temporary}.tmp"),
        ):
            print(f"{name}: {main(path.parent, config, *further)}", flush=True)
    except Exception as error:
        expected = isinstance(error, EXPECTED_ERRORS) or system_error(error) is not None
        line = describe(error, path.parent) if expected else explain(error)
        if line is None:
            raise
        print(f"{name}: error: {line}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error if os.environ.get("CPMM_TRACEBACK") else None
    except KeyboardInterrupt:
        print(f"{name}: interrupted; run it again to go on", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


@contextmanager
def threads_of(config: Config) -> Iterator[None]:
    """Compute with the threads of torch that ``trainer.threads`` says; null leaves torch its choice.

    Their number decides in which order sums are taken, so the last digits of what is made, too.
    """
    threads = config.get("trainer", {}).get("threads")
    if not threads:
        yield
        return
    import torch  # after the arguments are parsed, so that --help is quick

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def end_with_dvc(every: float = 0.2) -> None:
    """End this process as soon as the DVC that started it is gone; what is run by hand stays.

    ``kill -9`` leaves DVC no time to end its stage, which would write beside that of the next
    ``dvc repro``. Nobody looks any more while Python itself ends, when all is written.

    Args:
        every: Seconds between looks.
    """
    stage = os.environ.get("DVC_STAGE")  # DVC gives it to its stages, and has none itself
    if stage is None:
        return
    import psutil

    chain = [psutil.Process()]  # to DVC, past shells: bash becomes the stage, fish stays above it
    while (parent := chain[-1].parent()) is not None:
        chain.append(parent)
        try:
            if parent.environ().get("DVC_STAGE") != stage:
                break
        except psutil.Error:
            break

    def whole() -> bool:
        try:
            return all(child.ppid() == parent.pid for child, parent in pairwise(chain))
        except psutil.Error:
            return False

    def watch() -> None:
        while whole():
            time.sleep(every)
        os._exit(1)  # nothing to tidy up: files are replaced in one move, Ray's processes follow

    if not _could_be_dvc(chain[-1]):
        os._exit(1)
    threading.Thread(target=watch, name="end with DVC", daemon=True).start()


def _could_be_dvc(process: Any) -> bool:
    """False for what adopts orphans, such as init: then DVC was gone before anybody looked."""
    import psutil

    words = []
    for describe_process in (process.name, process.exe, process.cmdline):
        with suppress(psutil.Error):
            words.append(str(describe_process()))
    return any("python" in word.lower() or "dvc" in word for word in words)


def load_config(path: Path) -> Config:
    """Read a composed configuration.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not a YAML mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: `dvc repro` composes it from conf/")
    try:
        config = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"{path} is damaged, it is not YAML: {said}: `dvc repro` makes it again"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} is no configuration: expected a mapping, got {type(config).__name__}"
        )
    return config


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Let libraries put their temporary files into ``folder``, which is gone afterwards.

    Lightning moves a checkpoint from there onto the last one. From another disk, such as that of
    ``/tmp``, the move would be a copy, and one that is cut short would leave neither.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before, tempfile.tempdir = tempfile.tempdir, str(folder.resolve())
    try:
        yield
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)


def describe(error: BaseException, place: Path | None = None) -> str:
    """Say what went wrong in one line, and for want of space or rights, what to do.

    Args:
        error: What was raised.
        place: Where the work is done, for what names no file.
    """
    cause = system_error(error)
    if cause is None:
        return str(error) or type(error).__name__
    remedy = REMEDIES.get(cause.errno)
    named = cause.filename or (remedy and place)
    said = f"{cause.strerror}: {named}" if named else cause.strerror
    return f"{said}: {remedy}" if remedy else said


def system_error(error: BaseException) -> OSError | None:
    """The operating system's error that ``error`` is, or wraps: safetensors only tells its number."""
    if isinstance(error, OSError):
        return error if error.strerror else None
    if isinstance(error, EXPECTED_ERRORS):
        return None
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return None


def write_text(path: Path, text: str) -> None:
    """Write a file in one move; of a write that fails nothing is left."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


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


def digest_files(options: Mapping[str, Any]) -> dict[str, str]:
    """Hash the files that options of a source name, by option; what is not there has none."""
    digests = {}
    for name in ("path", "label_path"):
        if options.get(name) and (path := Path(options[name])).is_file():
            state = path.stat()
            digests[name] = _digest_file(path.resolve(), state.st_mtime_ns, state.st_size)
    return digests


def check_digests(section: Mapping[str, Any], name: str, stage: str = "config") -> None:
    """Refuse files of a source that are others than when the configuration was composed.

    Args:
        section: ``data`` or ``evaluation.ood``.
        name: Of the section.
        stage: Of DVC, that composes it.

    Raises:
        ValueError: If one has changed.
    """
    now = digest_files(section.get("options", {}))
    for option, digest in section.get("digests", {}).items():
        if now.get(option) != digest:
            raise ValueError(
                f"{section['options'][option]} ({name}.options.{option}) has changed since the configuration was "
                f"composed: run `dvc repro -f {stage}` first"
            )


@lru_cache(maxsize=16)
def _digest_file(path: Path, mtime_ns: int, size: int) -> str:
    """Hash a file once for all the trials of a sweep, as long as it looks the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    code = code_fingerprint(*sorted(Path(__file__).parent.glob("*.py")))
    scratch = root / f"{stage}-{fingerprint(mark, code)}"
    for other in root.glob(f"{stage}-*"):
        if other != scratch:
            shutil.rmtree(other, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch


def publish(scratch: Path, name: str, target: Path) -> None:
    """Move ``scratch/name`` onto ``target`` and drop the scratch folder: the stage is done.

    What was at ``target`` is first moved aside: until the end, both are on the disk.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = scratch / f"{name}.previous"
    shutil.rmtree(aside, ignore_errors=True)
    if target.is_dir():
        os.replace(target, aside)
    try:
        os.replace(scratch / name, target)
    except OSError:
        if aside.is_dir():
            os.replace(aside, target)
        raise
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
