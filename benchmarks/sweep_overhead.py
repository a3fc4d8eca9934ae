"""What the sweep adds to training: its wall time beside the sum of its trials' pure training times.

    python benchmarks/sweep_overhead.py --trials 16 --workers 2

Pure training is what Lightning's loop takes inside a trial; the wall time runs from when the last
worker is up to the last record; start-up is reported apart. Results of the preset are not kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.config.root import ROOT
from cpmm.pipeline.errors import command
from cpmm.pipeline.sweeps import cluster
from cpmm.pipeline.sweeps.plan import plan_trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of every trial, in Hydra's syntax")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    with command("sweep_overhead", resumes=False):
        print(json.dumps(measure(arguments)))


def measure(arguments: argparse.Namespace) -> dict:
    """Run the trials, and compare wall time with training time."""
    config = compose_preset("digits", [], "sweep")
    cluster.prepare_environment(config["ray"])
    from cpmm.pipeline.sweeps.archive import Archive
    from cpmm.pipeline.sweeps.driver import run_trials
    from cpmm.pipeline.sweeps.inputs import locate_inputs, size_of
    from cpmm.pipeline.sweeps.progress import Progress
    from cpmm.pipeline.sweeps.shared import share
    from cpmm.pipeline.sweeps.sweep import Sweep
    from cpmm.pipeline.sweeps.trial import trial_code

    overrides = [
        "cpmm.curriculum=false", "cpmm.pseudo_label_spaces=0", "cpmm.initialization.kind=kmeans",
        f"cpmm.fine_tune_epochs={arguments.epochs}", *arguments.overrides,
    ]  # fmt: skip
    section = config["sweep"] | {"name": "overhead", "seeds": arguments.trials, "parts": {}}
    options = config["ray"] | {"max_concurrent": arguments.workers, "dashboard": False}
    trials = plan_trials("digits", section, [], overrides, trial_code())
    located = locate_inputs(trials[0].config, ROOT / "data" / "digits")
    began = time.time()
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster.connected(options, size_of(located), arguments.workers) as line,
    ):
        print(line, flush=True)
        archive = Archive(str(Path(folder) / "archive"))
        inputs = {trials[0].inputs: share(located)}
        sweep = Sweep("digits", trials, section, options, archive, Path(folder))
        run_trials(sweep, inputs, Progress(sweep, 0, "bits"))
        records = [archive.record(trial.fingerprint) for trial in trials]
    starts = sorted(record["worker"]["began"] for record in records)
    ended = max(record["worker"]["ended"] for record in records)
    up = starts[arguments.workers - 1]
    # What the first workers had trained before the last one was up does not count for either side.
    early = sum(up - start for start in starts[: arguments.workers - 1])
    pure = sum(record["seconds"] for record in records)
    ideal = (pure - early) / arguments.workers
    return {
        "trials": len(trials),
        "workers": arguments.workers,
        "start_up_seconds": round(up - began, 1),
        "wall_seconds": round(ended - up, 1),
        "pure_training_seconds": round(pure, 1),
        "ratio": round((ended - up) / ideal, 3),
    }


if __name__ == "__main__":
    main()
