"""The pipeline under DVC, in a copy of the project of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, STAGES, TINY, copy_project

LONG = {
    "train_teacher": "last.ckpt",
    "build_spaces": "progress.json",
    "train_cpmm": "last.ckpt",
}
LONGER = [
    "teacher.flow_matching_epochs=60", "spaces.n_spaces=21", "spaces.n_draws=8",
    "teacher.solver.n_steps=40", "cpmm.epochs_per_space=2",
]  # fmt: skip


def test_every_stage_is_a_file_and_names_code_that_exists():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert list(stages) == ["config", *STAGES, "train_baseline", "compare", "sweep"]
    for name, stage in stages.items():
        script = "compose" if name == "config" else name
        assert stage["cmd"].startswith(f"python workflows/{script}.py ")
        assert f"workflows/{script}.py" in stage["deps"]
        code = [path for path in stage["deps"] if not path.startswith("data/")]
        assert all((ROOT / path).exists() for path in code)
        assert code == sorted(code)


def dvc(folder, *arguments):
    # The stages' `python` is the one that runs the tests.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def repro(folder):
    process = dvc(folder, "repro", "report")
    printed, _ = process.communicate(timeout=500)
    return process.returncode, printed


@pytest.fixture
def project(tmp_path):
    """Make a copy of the project with tiny overrides in params.yaml."""
    return lambda name: copy_project(tmp_path / name, [*TINY, *LONGER])


def kill_stage(folder, stage, mark):
    """Start `dvc repro`, and kill the stage once it has left its first mark."""
    process = dvc(folder, "repro", "report")
    while process.poll() is None:
        if list(folder.glob(f"data/digits/.scratch/{stage}-*/{mark}")):
            for child in psutil.Process(process.pid).children(recursive=True):
                if any(part.endswith(f"{stage}.py") for part in child.cmdline()):
                    child.kill()
            break
        time.sleep(0.005)
    printed, _ = process.communicate(timeout=500)
    return process.returncode, printed


@pytest.mark.slow
def test_killed_stages_resume_and_a_second_repro_does_nothing(project):
    whole, killed = project("whole"), project("killed")
    status, printed = repro(whole)
    assert status == 0, printed
    for stage, mark in LONG.items():
        status, printed = kill_stage(killed, stage, mark)
        assert status != 0, f"{stage} ended before it could be killed: {printed}"
        assert f"failed to reproduce '{stage}@digits'" in printed
    status, printed = repro(killed)
    assert status == 0, printed
    for name in ("mixture.safetensors", "mixture.json"):
        paths = [folder / "data" / "digits" / "mixture" / name for folder in (whole, killed)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    before = (killed / "dvc.lock").read_bytes()
    status, printed = repro(killed)
    assert status == 0
    assert "Data and pipelines are up to date." in printed
    assert (killed / "dvc.lock").read_bytes() == before


@pytest.mark.slow
def test_a_comment_runs_the_composition_alone_and_a_value_what_reads_it(project):
    folder = project("edited")
    status, printed = repro(folder)
    assert status == 0, printed
    for edit, again in (
        ("# a comment\n", {"config"}),
        (None, {"config", "extract_mixture", "evaluate", "report", "train_cpmm"}),
    ):
        path = folder / "conf" / "mixture" / "default.yaml"
        if edit:
            path.write_text(edit + path.read_text())
        else:
            params = yaml.safe_load((folder / "params.yaml").read_text())
            params["overrides"]["mixture"]["n_pseudotimes"] = 4
            (folder / "params.yaml").write_text(yaml.safe_dump(params))
        status, printed = repro(folder)
        assert status == 0, printed
        ran = {
            line.split("'")[1].split("@")[0] for line in printed.splitlines() if "Running" in line
        }
        assert ran == again
