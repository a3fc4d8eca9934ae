"""Read every byte that DVC keeps for the presets, and compare it with dvc.lock and the seals.

    python -m cpmm.pipeline.artifacts.verify               the presets of params.yaml
    python -m cpmm.pipeline.artifacts.verify digits rings

`dvc status` looks at times and sizes of files that it has seen before, this at their contents.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from cpmm.artifact import load_header, verify_files
from cpmm.pipeline.artifacts.store import verify_sweep
from cpmm.pipeline.config import Config, fingerprints
from cpmm.pipeline.config.root import ROOT
from cpmm.pipeline.errors import EXPECTED_ERRORS, command, describe, fail
from cpmm.pipeline.stage import listed_presets, load_config

SEALED = ("prepared", "teacher", "spaces", "cpmm", "mixture", "evaluation")
REMEDY = "`dvc checkout --force` or `dvc pull --force` restores it, `dvc repro` makes it again"
REMEDY_GIT = "`git checkout` restores it, `dvc repro` makes it again"


def verify_preset(preset: str) -> Iterator[tuple[str, str | None]]:
    """Check the outputs of a preset one by one.

    Yields:
        The path of an output and what is wrong with it, None if nothing is.

    Raises:
        ValueError: If dvc.lock cannot be read, or knows no such preset.
    """
    config: Config = {}
    for name, digest in _locked_outs(preset):
        path = Path(os.path.relpath(ROOT / name))
        try:
            if path.name == "config.yaml":
                config = load_config(path)
            _verify_digest(path, digest, REMEDY_GIT if _is_in_git(path) else REMEDY)
            if path.name in SEALED:
                fingerprint = getattr(fingerprints, f"fingerprint_{path.name}")
                _verify_seal(path, path.name, fingerprint(config))
            elif path.parent.name == "baselines":
                _verify_seal(path, "baseline", fingerprints.fingerprint_baseline(config, path.name))
            elif path.parent.name == "sweep" and path.is_dir():
                verify_sweep(path)
        except EXPECTED_ERRORS as error:
            yield name, describe(error)
        except (KeyError, TypeError) as error:  # of a configuration that is itself damaged
            yield name, f"its fingerprint cannot be known, as config.yaml lacks {error}"
        else:
            yield name, None


def _locked_outs(preset: str) -> list[tuple[str, str]]:
    """Paths of a preset's outputs and their hashes, in the order of the pipeline."""
    path = ROOT / "dvc.lock"
    try:
        stages = yaml.safe_load(path.read_text())["stages"]
        found = [
            (out["path"], out["md5"])
            for stage in stages.values()
            for out in stage.get("outs", [])
            if out["path"].startswith(f"data/{preset}/")
        ]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): `git checkout dvc.lock`") from error
    if not found:
        raise ValueError(f"dvc.lock knows nothing of preset {preset!r}: run `dvc repro` first")
    return sorted(found, key=lambda item: not item[0].endswith("config.yaml"))


def _verify_digest(path: Path, digest: str, remedy: str) -> None:
    """Compare an output with its hash in dvc.lock; a folder's is that of the list of its files."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {remedy}")
    if not digest.endswith(".dir"):
        if path.is_dir() or _md5(path) != digest:
            raise ValueError(f"{path} is not what dvc.lock says: {remedy}")
        return
    files = {f.relative_to(path).as_posix(): f for f in path.rglob("*") if f.is_file()}
    listed = [{"md5": _md5(files[name]), "relpath": name} for name in sorted(files)]
    text = json.dumps(listed, sort_keys=True)
    if _is_listing(text.encode(), digest):
        return
    expected = _listed_in_cache(digest)
    got = {item["relpath"]: item["md5"] for item in listed}
    named = sorted({name for name, _ in expected.items() ^ got.items()})
    where = ", ".join(named[:5]) + (", ..." if len(named) > 5 else "")
    where = f"{path}: {where}" if expected else str(path)
    raise ValueError(f"{where} differs from what dvc.lock says: {remedy}")


def _listed_in_cache(digest: str) -> dict[str, str]:
    """Files of a folder and their hashes by DVC's cache; empty if it is not there or damaged."""
    path = ROOT / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:]
    try:
        text = path.read_bytes()
    except OSError:
        return {}
    if not _is_listing(text, digest):
        return {}
    return {item["relpath"]: item["md5"] for item in json.loads(text)}


def _is_listing(text: bytes, digest: str) -> bool:
    return hashlib.md5(text, usedforsecurity=False).hexdigest() + ".dir" == digest


def _verify_seal(folder: Path, kind: str, fingerprint: str | None) -> None:
    header = load_header(folder, kind, fingerprint)
    verify_files(folder, header, header["files"])


def _is_in_git(path: Path) -> bool:
    return path.name in ("config.yaml", "metrics.json") or (
        path.parent.name == "sweep" and path.suffix != ""
    )


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def main() -> None:
    """Verify presets from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", help="folders of data/; those of params.yaml if none")
    presets = parser.parse_args().presets
    n_bad = n_absent = n_all = 0
    with command("verify"):
        for preset in presets or listed_presets():
            for name, fault in verify_preset(preset):
                n_all, n_bad = n_all + 1, n_bad + (fault is not None)
                n_absent += not (ROOT / name).exists()
                print(f"{name}: {'whole' if fault is None else fault}", flush=True)
    if n_bad:
        absent = f", {n_absent} of them not there" if n_absent else ""
        fail("verify", f"error: {n_bad} of {n_all} outputs are not whole{absent}")
    print(f"verify: {n_all} outputs are whole")


if __name__ == "__main__":
    main()
