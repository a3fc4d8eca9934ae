"""Print where the report of each preset is, its three main figures, and what git calls modified."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from cpmm.pipeline.config.root import ROOT
from cpmm.pipeline.errors import command
from cpmm.pipeline.stage import listed_presets


def summarize(folder: Path) -> str:
    """Say in a few lines what the evaluation of ``data/<preset>`` found.

    Raises:
        FileNotFoundError: If the preset has not been evaluated.
        ValueError: If its metrics are damaged.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `make repro` first")
    try:
        return _summary(json.loads(path.read_text()), folder)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): run `make repro` again") from error


def _summary(metrics: dict, folder: Path) -> str:
    models, cpmm = metrics["models"], metrics["models"]["cpmm"]
    peers = {"direct": "direct mixture", "gaussian": "full Gaussian"}
    densities = [f"{peers[k]} {_write(models[k], 'density')}" for k in peers if k in models]
    better = f"(lower is better; {', '.join(densities)})"
    lines = [
        f"{metrics['preset']}: {folder / 'report.html'}",
        f"  test density     {_write(cpmm, 'density')} {metrics['unit']} {better}",
    ]
    if "accuracy" in cpmm:
        other = models.get("kmeans", {}).get("accuracy")
        beside = "" if other is None else f" (k-means {100 * other:.1f} %)"
        lines.append(f"  clustering       {100 * cpmm['accuracy']:.1f} % accuracy{beside}")
    if "n_components" in cpmm:
        sizes = f"{cpmm['n_components']} components, {cpmm['n_parameters']} parameters"
        lines.append(f"  mixture          {sizes}")
    for name, row in models.items():
        lines += [
            f"  {name}: {note}" for note in (row.get("missing"), *row.get("notes", ())) if note
        ]
    return "\n".join(lines)


def _write(model: dict, score: str) -> str:
    return f"{model[score]:.3f}" if "missing" not in model else "none"


def explain_changes(root: Path) -> str:
    """Say in two lines why git calls results modified and what to do; nothing if it does not."""
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--", "dvc.lock", "data"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return ""
    names = [line[3:] for line in done.stdout.splitlines()]
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"Modified, says git: {shown}. Last digits differ on another processor, results with your "
        "own params.yaml or code.\n`git checkout dvc.lock data` brings the committed ones back; "
        "commit yours if you changed something on purpose."
    )


def main() -> None:
    """Summarize the presets of params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", help="folders of data/; those of params.yaml if none")
    presets = parser.parse_args().presets
    with command("summary"):
        for preset in presets or listed_presets():
            print(summarize(Path("data") / preset))
        if changes := explain_changes(ROOT):
            print(changes)


if __name__ == "__main__":
    main()
