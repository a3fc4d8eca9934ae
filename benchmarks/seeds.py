"""Repeat a preset's pipeline over seeds: mean and standard deviation of its test scores.

    python benchmarks/seeds.py digits --seeds 5 --jobs 2

Every seed draws the weights, the noise and the order of the data anew; the split stays. Finished
seeds are kept in .scratch/seeds and not run again while the configuration stays the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import yaml

from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.config.fingerprints import EVALUATED
from cpmm.pipeline.config.root import ROOT
from cpmm.pipeline.errors import command

COMMANDS = (
    *(("prepare_data",), ("train_teacher",), ("build_spaces",), ("train_cpmm",)),
    ("extract_mixture",),
    *(("train_baseline", row) for row in EVALUATED),
    ("evaluate",),
)


def run_seed(config: dict) -> pd.DataFrame:
    """Run the pipeline of one seed and return its scores, a row a model."""
    seed = config["seed"]
    folder = ROOT / ".scratch" / "seeds" / config["name"] / str(seed)
    text = yaml.safe_dump(config, sort_keys=False)
    path = folder / "config.yaml"
    if not path.is_file() or path.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").unlink(missing_ok=True)
        path.write_text(text)
    if not (folder / "metrics.json").is_file():
        for stage, *row in COMMANDS:
            words = [sys.executable, ROOT / "workflows" / f"{stage}.py", path, *row]
            done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
            if done.returncode:
                raise ChildProcessError(f"{stage} of seed {seed} failed: {done.stderr.strip()}")
            print(f"seed {seed} | {done.stdout.splitlines()[-1]}", flush=True)
    models = json.loads((folder / "metrics.json").read_text())["models"]
    rows = pd.DataFrame.from_dict(models, orient="index").drop(columns="name")
    rows = rows.drop(columns=["missing", "notes"], errors="ignore")
    return rows.assign(seed=seed).rename_axis("model").reset_index()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("overrides", nargs="*", help="in Hydra's syntax, such as cpmm.n_factors=4")
    parser.add_argument("--seeds", type=_positive, default=5, help="how many; default 5")
    parser.add_argument("--jobs", type=_positive, default=2, help="run side by side; default 2")
    parser.add_argument("--csv", type=Path, help="where to write the scores of every seed")
    arguments = parser.parse_args()
    with command("seeds"):
        configs = [
            compose_preset(arguments.preset, [*arguments.overrides, f"seed={seed}"])
            for seed in range(arguments.seeds)
        ]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            scores = pd.concat(pool.map(run_seed, configs), ignore_index=True)
        if arguments.csv:
            scores.to_csv(arguments.csv, index=False, float_format="%.5f")
    table = scores.groupby("model", sort=False)[["density", "accuracy", "nmi", "ari"]]
    print(pd.concat({"mean": table.mean(), "sd": table.std()}, axis=1).swaplevel(axis=1).round(4))


if __name__ == "__main__":
    main()
