"""Print where the report of each preset is, and its three main figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

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
    models = metrics["models"]
    cpmm = models["cpmm"]
    peers = {"direct": "direct mixture", "gaussian": "full Gaussian"}
    densities = ", ".join(
        f"{name} {models[key]['density']:.3f}" for key, name in peers.items() if key in models
    )
    lines = [
        f"{metrics['preset']}: {folder / 'report.html'}",
        f"  test density     {cpmm['density']:.3f} {metrics['unit']} (lower is better; "
        f"{densities})",
    ]
    if "accuracy" in cpmm:
        other = models.get("kmeans", {}).get("accuracy")
        beside = "" if other is None else f" (k-means {100 * other:.1f} %)"
        lines.append(f"  clustering       {100 * cpmm['accuracy']:.1f} % accuracy{beside}")
    lines.append(
        f"  mixture          {cpmm['n_components']} components, {cpmm['n_parameters']} parameters"
    )
    return "\n".join(lines)


def main() -> None:
    """Summarize the presets of params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("presets", nargs="*", help="folders of data/; those of params.yaml if none")
    presets = parser.parse_args().presets
    with command("summary"):
        for preset in presets or listed_presets():
            print(summarize(Path("data") / preset))


if __name__ == "__main__":
    main()
