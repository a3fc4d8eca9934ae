"""Ways to run a sweep: searches that adapt, several workers a trial, new processes, bad disks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pandas as pd
import psutil
import pytest
import yaml
from conftest import TINY, copy_project, project_environment

SWEEP = {
    "defaults": ["default"],
    "name": "modes",
    "seeds": 2,
    "overrides": {
        "cpmm.pseudo_label_spaces": 0,
        "cpmm.curriculum": False,
        "cpmm.fine_tune_epochs": 40,
    },
    "parts": {"a": {"grid": {"cpmm.initialization.kind": ["random", "kmeans"]}}},
}
SEARCH = {
    "kind": "optuna",
    "n_samples": 6,
    "space": {"cpmm.learning_rate": {"loguniform": [1e-4, 1e-1]}},
}


@pytest.fixture
def project(tmp_path):
    def make(name="project", **changes):
        folder = copy_project(tmp_path / name, TINY)
        path = folder / "conf" / "sweep" / "modes.yaml"
        path.write_text(yaml.safe_dump({**SWEEP, **changes}, sort_keys=False))
        return folder

    return make


def start(folder, *options, **environment):
    return subprocess.Popen(
        [sys.executable, str(folder / "workflows" / "sweep.py"), "sweep=modes",
         "ray.dashboard=false", "ray.checkpoint_seconds=0.5", "ray.report_seconds=0.5", *options],
        cwd=folder, env=project_environment(folder) | environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(folder, *options, timeout=400, **environment):
    process = start(folder, *options, **environment)
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def trials(folder):
    table = pd.read_csv(folder / "data" / "digits" / "sweep" / "modes" / "trials.csv")
    return table.drop(columns=["seconds", "seconds_10k", "memory_gb"])


def wait_for(condition, seconds=400):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.1)


def records(archive):
    return list(archive.glob("trials/*/record.json"))


@pytest.mark.slow
def test_a_killed_search_goes_on_with_what_it_has_tried(project):
    folder = project(
        parts={}, seeds=1, search=SEARCH, scheduler={"kind": "asha", "grace_epochs": 5}
    )
    archive = folder / "data" / "digits" / ".scratch" / "sweep"
    process = start(folder)
    wait_for(lambda: len(records(archive)) >= 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {path: path.read_bytes() for path in records(archive)}
    status, out, err = run(folder)
    assert status == 0, err
    assert f"same configuration: resuming, 6 trials, {len(before)} done before" in out
    assert all(path.read_bytes() == content for path, content in before.items())
    table = trials(folder)
    # What was running when the driver died was gone on with; nothing is counted twice.
    assert len(table) == 6
    assert table["learning_rate"].is_unique
    assert set(table["status"]) <= {"finished", "stopped"}
    assert (table["status"] == "stopped").any()


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["asha", "fifo"])
@pytest.mark.parametrize("kind", ["grid", "optuna"])
def test_trials_may_go_through_a_curriculum_before_they_can_be_compared(project, kind, scheduler):
    space = SEARCH | {"n_samples": 2} if kind == "optuna" else {"kind": "grid"}
    folder = project(
        parts={}, seeds=1 if kind == "optuna" else 2, search=space,
        scheduler={"kind": scheduler, "grace_epochs": 1},
        overrides={"cpmm.pseudo_label_spaces": 0, "cpmm.fine_tune_epochs": 3},
    )  # fmt: skip
    status, _, err = run(folder, "ray.report_seconds=0")
    assert status == 0, err
    table = trials(folder)
    assert len(table) == 2
    assert (table["status"] == "finished").any()
    assert set(table["status"]) <= {"finished", "stopped"}


@pytest.mark.slow
def test_a_search_of_fewer_points_than_samples_ends(project):
    few = SEARCH | {"n_samples": 5, "space": {"cpmm.n_factors": {"choice": [1, 2]}}}
    folder = project(parts={}, seeds=1, search=few)
    status, out, err = run(folder)
    assert status == 0, err
    table = trials(folder)
    assert 1 <= len(table) <= 2
    assert table["n_factors"].is_unique
    assert f"{len(table)} trials in place of 5" in out


@pytest.mark.slow
def test_new_processes_for_each_trial_give_the_same_table(project):
    reused, fresh = project("reused"), project("fresh")
    assert run(reused)[0] == 0
    assert run(fresh, "ray.reuse_actors=false")[0] == 0
    pd.testing.assert_frame_equal(trials(reused), trials(fresh), check_exact=True)


@pytest.mark.slow
def test_two_workers_train_a_trial_together(project):
    raising = {
        "overrides": {  # not all of ten groups have one of ten points
            "cpmm.initialization.kind": "kmeans", "cpmm.pseudo_label_weight": 0.1,
            "cpmm.curriculum": True, "spaces.n_train": 10,
        }
    }  # fmt: skip
    folder = project(seeds=1, parts=SWEEP["parts"] | {"raising": raising})
    status, _, err = run(folder, "ray.workers=2", "ray.cpus=1", timeout=800)
    assert status == 0, err
    table = trials(folder)
    assert table["status"].tolist() == ["finished", "finished", "failed"]
    assert "raise spaces.n_train" in table["reason"].iloc[2]
    alone = project("alone", seeds=1)
    assert run(alone)[0] == 0
    # Each worker draws its own noise: the same training, not the same numbers.
    difference = (table["density"][:2] - trials(alone)["density"]).abs()
    assert (difference < 0.05).all()
    assert (difference > 0).all()


@pytest.mark.slow
def test_numbers_that_break_where_two_workers_train_together_end_the_trial_at_once(project):
    breaking = {"cpmm.learning_rate": 1e9, "cpmm.gradient_clip": 1e9, "cpmm.n_warmup_epochs": 0}
    parts = {
        "whole": {"overrides": {"cpmm.fine_tune_epochs": 1}},
        "breaking": {"overrides": breaking},
    }
    folder = project(seeds=1, parts=parts)
    status, out, err = run(folder, "ray.workers=2", "ray.cpus=1", timeout=400)
    assert status == 0, err
    assert trials(folder)["status"].tolist() == ["finished", "diverged"], out


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_ends_with_a_clear_error_and_the_sweep_can_go_on(project, tmp_path):
    folder, small = project(), tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        status, out, err = run(folder, f"ray.storage={small}")
        assert status == 1
        assert "sweep: error: writing trials/" in err
        assert "No space left on device" in err
        assert "the same command goes on" in err
        assert not (folder / "data" / "digits" / "sweep").exists()
        subprocess.run(["mount", "-o", "remount,size=50m", str(small)], check=True)
        status, out, err = run(folder, f"ray.storage={small}")
        assert status == 0, err
        assert "same configuration: resuming" in out
        assert trials(folder)["status"].tolist() == ["finished"] * 4
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.slow
def test_a_lost_storage_ends_with_a_clear_error(project, tmp_path):
    folder, storage = project(), tmp_path / "storage"
    process = start(folder, f"ray.storage={storage}")
    wait_for(lambda: list(storage.glob("trials/*/last.ckpt")))
    shutil.move(storage, tmp_path / "elsewhere")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "the archive is no longer there" in err
    assert not storage.exists()
    shutil.move(tmp_path / "elsewhere", storage)
    status, out, err = run(folder, f"ray.storage={storage}")
    assert status == 0, err
    assert "same configuration: resuming" in out
    metrics = json.loads((folder / "data" / "digits" / "sweep" / "modes.json").read_text())
    assert metrics["best"]["test"]["density"] > 0


@pytest.mark.slow
def test_a_trial_that_asks_for_too_much_memory_fails_alone(project):
    parts = {
        "modest": {"overrides": {"cpmm.initialization.kind": "random"}},
        # Terabytes of weights: torch is refused the memory.
        "greedy": {"overrides": {"cpmm.field.depth": 2, "cpmm.field.width": 10**6}},
    }
    folder = project(parts=parts, seeds=1)
    status, _, err = run(folder)
    assert status == 0, err
    table = trials(folder)
    assert table["status"].tolist() == ["finished", "failed"]
    assert "too little memory" in table["reason"].iloc[1]


@pytest.mark.slow
def test_a_worker_that_is_killed_from_outside_is_recorded_with_the_likely_cause(project):
    folder = project(seeds=1, overrides={**SWEEP["overrides"], "cpmm.fine_tune_epochs": 4000})
    process = start(folder, "ray.max_failures=0", "ray.max_concurrent=1")
    killed, end = 0, time.monotonic() + 200
    while process.poll() is None and time.monotonic() < end:
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if child.name().startswith("ray::ImplicitFu"):
                    child.kill()
                    killed += 1
        time.sleep(0.5)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert killed >= 2
    assert trials(folder)["status"].tolist() == ["lost"] * 2
    assert trials(folder)["reason"].str.contains("when memory runs out .* lower ray").all()


@pytest.mark.slow
def test_workers_killed_for_their_memory_are_recorded_and_tried_again(project):
    folder = project(seeds=1)
    # Ray kills workers where the node uses more than a hundredth of its memory.
    status, out, err = run(folder, "ray.max_failures=0", RAY_memory_usage_threshold="0.01")
    assert status == 0, err
    assert trials(folder)["status"].tolist() == ["lost"] * 2
    assert trials(folder)["reason"].str.contains("memory").all()
    assert "2 failed" in out
    status, out, err = run(folder)
    assert status == 0, err
    assert "same configuration: resuming, 2 trials, 0 done before" in out
    assert trials(folder)["status"].tolist() == ["finished"] * 2


@pytest.mark.slow
def test_what_no_node_offers_is_said_in_time(project):
    status, _, err = run(project(), "ray.gpus=3", "ray.resources_seconds=1")
    assert status == 1
    assert "a trial's worker asks for {'CPU': 1.0, 'GPU': 3.0}, but no node offers that" in err


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_says_so_publishes_nothing_and_goes_on(project, sent):
    folder = project()
    archive = folder / "data" / "digits" / ".scratch" / "sweep"
    process = start(folder)
    wait_for(lambda: list(archive.glob("trials/*/last.ckpt")))
    process.send_signal(sent)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == "sweep: interrupted; run it again to go on"
    assert not (folder / "data" / "digits" / "sweep").exists()
    status, out, err = run(folder)
    assert status == 0, err
    assert "same configuration: resuming" in out
    assert trials(folder)["status"].tolist() == ["finished"] * 4
