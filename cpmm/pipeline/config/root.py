"""Where the checkout is: conf/, data/ and the scripts of workflows/ lie there."""

from __future__ import annotations

from pathlib import Path


def find_root() -> Path:
    """Find the checkout that this package lies in, else the one around the current folder."""
    here = Path.cwd().resolve()
    for folder in (Path(__file__).resolve().parents[3], here, *here.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "conf").is_dir():
            return folder
    return here


ROOT = find_root()
