"""What every stage shares: its command line, its configuration and its scratch folder."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from cpmm.pipeline.artifacts.files import temporary_files_in
from cpmm.pipeline.config import Config
from cpmm.pipeline.config.code import SCRIPTS, code_fingerprint
from cpmm.pipeline.config.fingerprints import hash_of
from cpmm.pipeline.config.root import ROOT
from cpmm.pipeline.errors import command


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
    parser.add_argument("config", type=Path, help="the composed data/<preset>/config.yaml")
    for argument in arguments:
        parser.add_argument(argument)
    parsed = parser.parse_args()
    path, further = parsed.config, [getattr(parsed, argument) for argument in arguments]
    name = Path(sys.argv[0]).stem
    temporary = "-".join([name, *([hash_of(further)] if further else [])])
    with command(name, path.parent):
        end_with_dvc()
        config = load_config(path)
        with threads_of(config), temporary_files_in(path.parent / ".scratch" / f"{temporary}.tmp"):
            print(f"{name}: {main(path.parent, config, *further)}", flush=True)


@contextmanager
def threads_of(config: Config) -> Iterator[None]:
    """Compute with as many threads as ``trainer.threads`` says; null leaves torch its choice.

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
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: `dvc repro` composes it from conf/")
    try:
        config = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        said = f"it is not YAML: {' '.join(str(error).split())}"
        raise ValueError(f"{path} is damaged, {said}: `dvc repro` makes it again") from error
    if not isinstance(config, dict):
        got = type(config).__name__
        raise ValueError(f"{path} is no configuration: expected a mapping, got {got}")
    return config


def listed_presets() -> list[str]:
    """Read which presets params.yaml lists.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it lists none.
    """
    import yaml

    path = ROOT / "params.yaml"
    try:
        return list(yaml.safe_load(path.read_bytes())["presets"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{path} lists no presets: {' '.join(str(error).split())}") from error


def scratch_folder(folder: Path, stage: str, fingerprint: str, part: str = "") -> Path:
    """Make the folder where a stage keeps its unfinished work between runs.

    DVC deletes a stage's outputs before it runs, so what is to be resumed lies elsewhere. The
    leftovers of other configurations of the same stage are removed.

    Args:
        folder: ``data/<preset>``.
        stage: Name of the stage, a file of workflows/.
        fingerprint: Fingerprint of all that the work depends on, but for the code, which is found.
        part: Which of several runs of the stage, such as a baseline's row.
    """
    root = folder / ".scratch"
    name = f"{stage}-{part}" if part else stage
    code = code_fingerprint(SCRIPTS / f"{stage}.py")
    scratch = root / f"{name}-{hash_of(fingerprint, code)}"
    for other in root.glob(f"{name}-*"):
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
