"""What scheduling costs: no-op trials through the sweep's driver, on a cluster of simulated nodes.

    python benchmarks/sweep_scheduling.py --trials 1000 --nodes 8

Every trial asks the archive for its record, reports once and leaves a record, as real ones do.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import psutil

from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.errors import command
from cpmm.pipeline.sweeps import cluster
from cpmm.pipeline.sweeps.plan import make_trial


def no_op(config: dict, assignment: object) -> None:
    """Do all that a trial does but train."""
    from ray import tune

    from cpmm.pipeline.sweeps.reporter import call
    from cpmm.pipeline.sweeps.worker import final_report

    fingerprint, record = config["fingerprint"], {"status": "finished", "validation": 0.0}
    call(assignment.archive.record, fingerprint)
    call(assignment.archive.save_record, fingerprint, record)
    tune.report(final_report(fingerprint, record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--cpus", type=int, default=1, help="of each simulated node")
    arguments = parser.parse_args()
    with command("sweep_scheduling", resumes=False):
        result = measure(arguments)
        print(json.dumps(result))
        if missing := arguments.trials - result["recorded"]:
            raise ChildProcessError(f"{missing} trials left no record")


def measure(arguments: argparse.Namespace) -> dict:
    """Run the trials; count and time them."""
    overrides = ["ray.dashboard=false", "ray.resources_seconds=60"]
    config = compose_preset("digits", overrides, "sweep")
    cluster.prepare_environment(config["ray"])
    from ray.cluster_utils import Cluster

    from cpmm.pipeline.sweeps.archive import Archive
    from cpmm.pipeline.sweeps.driver import run_trials
    from cpmm.pipeline.sweeps.progress import Progress
    from cpmm.pipeline.sweeps.sweep import Sweep

    template = compose_preset("digits", [])
    # As many trials as asked for; they differ by their seeds.
    trials = [make_trial("digits", (), seed, [], template, "") for seed in range(arguments.trials)]
    head = {"num_cpus": 0, "object_store_memory": 10**8}
    simulated = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(arguments.nodes):
        simulated.add_node(num_cpus=arguments.cpus, object_store_memory=10**8)
    options = config["ray"] | {"address": simulated.address}
    driver = psutil.Process()
    before = driver.memory_info().rss
    try:
        with tempfile.TemporaryDirectory() as folder, cluster.connected(options, 0, 1) as line:
            print(line, flush=True)
            archive = Archive(str(Path(folder) / "archive"))
            section = config["sweep"] | {"name": "no-op"}
            sweep = Sweep("digits", trials, section, options, archive, Path(folder))
            progress = Progress(sweep, 0, "bits")
            progress._say = lambda line: None
            started = time.monotonic()
            run_trials(sweep, {}, progress, no_op)
            seconds = time.monotonic() - started
            n_done = sum(archive.record(trial.fingerprint) is not None for trial in trials)
    finally:
        simulated.shutdown()
    return {
        "trials": arguments.trials,
        "nodes": arguments.nodes,
        "cores": os.cpu_count(),
        "seconds": round(seconds, 1),
        "trials_per_second": round(arguments.trials / seconds, 2),
        "driver_mib_before": before >> 20,
        "driver_mib_after": driver.memory_info().rss >> 20,
        "recorded": n_done,
    }


if __name__ == "__main__":
    main()
