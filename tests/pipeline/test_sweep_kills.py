"""Driver, workers and whole nodes are killed at random moments; the table stays the same."""

import random
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import yaml
from conftest import TINY, copy_project, project_environment

N_KILLS = 20
SWEEP = {
    "defaults": ["default"],
    "name": "killed",
    "seeds": 4,
    "overrides": {
        "cpmm.pseudo_label_spaces": 0,
        "cpmm.curriculum": False,
        "cpmm.fine_tune_epochs": 150,
    },
    "parts": {
        "alone": {"grid": {"cpmm.initialization.kind": ["random", "kmeans"]}},
        "guided": {
            "overrides": {"cpmm.initialization.kind": "gaussian", "cpmm.curriculum": True},
            "grid": {"cpmm.ode": ["shared", "separate"]},
        },
    },
}
OPTIONS = [
    "sweep=killed",
    "ray.checkpoint_seconds=0.5",
    "ray.max_failures=100",
    "ray.report_seconds=0.5",
]


@pytest.fixture
def project(tmp_path):
    def make(name):
        folder = copy_project(tmp_path / name, [*TINY, "cpmm.epochs_per_space=25"])
        path = folder / "conf" / "sweep" / "killed.yaml"
        path.write_text(yaml.safe_dump(SWEEP, sort_keys=False))
        return folder

    return make


def start_sweep(folder, log, *options):
    return subprocess.Popen(
        [sys.executable, str(folder / "workflows" / "sweep.py"), *OPTIONS, *options],
        cwd=folder, env=project_environment(folder), stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip


def table(folder):
    """Everything that the sweep found; what it took is another matter."""
    trials = pd.read_csv(folder / "data" / "digits" / "sweep" / "killed" / "trials.csv")
    return trials.drop(columns=["seconds", "seconds_10k", "memory_gb"])


def running_trials():
    """Processes of this test's own cluster that run a trial."""
    running = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::ImplicitFunc"):
            running.append(process)
    return running


@pytest.mark.slow
def test_twenty_random_kills_leave_the_same_table(project, tmp_path):
    from ray.cluster_utils import Cluster

    whole, killed = project("whole"), project("killed")
    with (tmp_path / "whole.log").open("w") as log:
        assert start_sweep(whole, log, "ray.dashboard=false").wait(600) == 0
    assert len(table(whole)) == 16

    chance = random.Random(0)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 2 * 10**8}
    )
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=2 * 10**8) for _ in range(2)]
    kills = {"driver": 0, "worker": 0, "node": 0}
    log_path = tmp_path / "killed.log"
    try:
        with log_path.open("w") as log:
            driver = start_sweep(killed, log, f"ray.address={cluster.address}")
            deadline = time.monotonic() + 1500
            while sum(kills.values()) < N_KILLS and driver.poll() is None:
                assert time.monotonic() < deadline, f"after {kills} no trial runs any more"
                time.sleep(0.5)
                if not running_trials():
                    continue
                time.sleep(chance.uniform(0, 8))
                kind = chance.choice(list(kills))
                if kind == "worker":
                    for process in running_trials()[:1]:
                        process.kill()
                if kind == "driver":
                    driver.send_signal(signal.SIGKILL)
                    driver.wait()
                    driver = start_sweep(killed, log, f"ray.address={cluster.address}")
                elif kind == "node":
                    lost = nodes.pop(chance.randrange(2))
                    cluster.remove_node(lost, allow_graceful=False)
                    nodes.append(cluster.add_node(num_cpus=1, object_store_memory=2 * 10**8))
                kills[kind] += 1
                print(f"{sum(kills.values())}: {kind}", flush=True)
            status = driver.wait(900)
    finally:
        cluster.shutdown()
    printed = log_path.read_text()
    print(kills, printed[-3000:])
    assert status == 0, printed[-3000:]
    assert sum(kills.values()) == N_KILLS, f"the sweep ended after {kills}"
    pd.testing.assert_frame_equal(table(killed), table(whole), check_exact=True)
    assert printed.count("same configuration: resuming") == kills["driver"]
