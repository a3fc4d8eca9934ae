"""Sweeps on a local Ray, in a copy of the project."""

import json
import shlex
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from conftest import TINY, copy_project, project_environment

from cpmm.artifact import load_header
from cpmm.pipeline.artifacts.store import verify_sweep

SWEEP = {
    "defaults": ["default"],
    "name": "small",
    "seeds": 2,
    "overrides": {"cpmm.pseudo_label_spaces": 0},
    "parts": {
        "alone": {
            "overrides": {"cpmm.curriculum": False},
            "grid": {"cpmm.initialization.kind": ["random", "kmeans"]},
        },
        "guided": {"overrides": {"cpmm.initialization.kind": "gaussian"}},
        "diverging": {
            "overrides": {
                "cpmm.initialization.kind": "gaussian",
                "cpmm.learning_rate": 1e6,
                "cpmm.gradient_clip": 1e9,
            }
        },
        "raising": {
            "overrides": {
                "cpmm.initialization.kind": "kmeans",
                "model": "spectral_frechet",
                "baselines.spectral_frechet.merge.neighbour": 999,
            }
        },
    },
}


def write_sweep(folder, **changes):
    sweep = {**SWEEP, **changes}
    (folder / "conf" / "sweep" / f"{sweep['name']}.yaml").write_text(
        yaml.safe_dump(sweep, sort_keys=False)
    )


def command(folder, script, *arguments, timeout=300):
    return subprocess.run(
        [sys.executable, str(folder / "workflows" / f"{script}.py"), *arguments],
        cwd=folder, env=project_environment(folder), capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Run a sweep with rows that finish, diverge and raise; return the project and the output."""
    folder = copy_project(tmp_path_factory.mktemp("sweep") / "project", TINY)
    write_sweep(folder)
    done = command(folder, "sweep", "sweep=small", "ray.dashboard=false")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def results(folder, name="small"):
    home = folder / "data" / "digits" / "sweep"
    trials = pd.read_csv(home / name / "trials.csv")
    return home, trials, pd.read_csv(home / f"{name}.csv").set_index("row")


def test_every_row_is_in_the_table_and_failures_are_shown_as_failures(swept):
    folder, printed = swept
    home, trials, rows = results(folder)
    assert len(trials) == 10
    assert trials.groupby("status").size().to_dict() == {"finished": 6, "diverged": 2, "failed": 2}
    assert rows["n_failed"].tolist() == [0, 0, 0, 2, 2]
    assert rows["density_mean"].notna().tolist() == [True, True, True, False, False]
    assert "diverged at step" in printed
    text = (home / "small" / "table.md").read_text()
    assert "ValueError: baselines.spectral_frechet.merge.neighbour is 999" in text
    assert "10 trials, 4 failed" in printed


def test_what_a_row_and_its_data_tell_ends_before_any_trial(swept):
    folder, _ = swept
    done = command(folder, "sweep", "sweep=small", "cpmm.n_factors=65", "--plan")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("sweep: error: sweep small, row alone random: cpmm.n_factors (R) is 65")


def test_all_that_is_written_is_sealed(swept):
    folder, _ = swept
    home, _, _ = results(folder)
    verify_sweep(home / "small")
    header = load_header(home / "small", "sweep")
    assert set(header["beside"]) == {"small.csv", "small.json"}
    assert {"trials.csv", "table.md", "table.json", "rows.svg"} <= set(header["files"])
    assert "mixture/mixture.safetensors" in header["files"]


def test_the_best_trial_is_chosen_by_validation_and_its_command_repeats_it(swept, tmp_path):
    folder, printed = swept
    home, trials, _ = results(folder)
    best = json.loads((home / "small.json").read_text())["best"]
    finished = trials[trials["status"] == "finished"]
    assert best["validation"] == pytest.approx(finished["validation"].min(), abs=1e-15)
    assert shlex.join(best["command"]) in printed
    done = command(folder, "trial", *best["command"][2:], "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "record.json").read_text())
    assert (again["validation"], again["test"]) == (best["validation"], best["test"])
    mixtures = [f / "mixture" / "mixture.safetensors" for f in (tmp_path, home / "small")]
    assert mixtures[0].read_bytes() == mixtures[1].read_bytes()


def test_the_same_command_has_nothing_left_to_do_and_another_says_what_it_takes_over(swept):
    folder, _ = swept
    home, _, _ = results(folder)
    before = (home / "small" / "table.md").read_bytes()
    done = command(folder, "sweep", "sweep=small", "ray.dashboard=false")
    assert "all done: 10 trials, 10 done before" in done.stdout
    assert "Ray" not in done.stdout.splitlines()[0]
    assert (home / "small" / "table.md").read_bytes() == before
    write_sweep(folder, parts={"alone": SWEEP["parts"]["alone"]})
    done = command(folder, "sweep", "sweep=small", "cpmm.noise=0.02", "--plan")
    assert done.stdout.count("cpmm.noise=0.02") == 4
    done = command(folder, "sweep", "sweep=small")
    assert "other trials asked for than before, 4 trials, 4 done before" in done.stdout
    write_sweep(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep=none"], "unknown sweep=none: choose one of ablation"),
        (["preset=none"], "unknown preset 'none'"),
        (["cpmm.n_factors=three"], "cpmm.n_factors is 'three'"),
        (["sweep.seeds=0"], "sweep.seeds is 0"),
        (["ray.cpus=none"], "ray.cpus is 'none'"),
        (["ray.inputs=post"], "ray.inputs is 'post': choose one of driver, remote"),
        (["ray.storage=/proc/nowhere"], "ray.storage '/proc/nowhere' cannot be used"),
    ],
)
def test_bad_options_end_with_one_clear_line(swept, arguments, message):
    folder, _ = swept
    arguments = arguments if "sweep=none" in arguments else ["sweep=small", *arguments]
    done = command(folder, "sweep", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
