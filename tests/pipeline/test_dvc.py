"""The pipeline under DVC, in a copy of the project of its own."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, STAGES, TINY, copy_project

from workflows import trial

LONG = {
    "train_teacher": "last.ckpt",
    "build_spaces": "progress.json",
    "train_cpmm": "last.ckpt",
}
LONGER = [
    "teacher.flow_matching_epochs=60", "spaces.n_spaces=21", "spaces.n_draws=8",
    "teacher.solver.n_steps=40", "cpmm.epochs_per_space=2",
]  # fmt: skip
# What these do changes no result: the command line, overrides that are composed and checked, where a
# sweep's trials run and are kept, and how that is shown.
HARMLESS = {
    "workflows/stage.py", "workflows/compose.py", "workflows/schema.py", "workflows/sweeps/archive.py",
    "workflows/sweeps/cluster.py", "workflows/sweeps/progress.py", "workflows/sweeps/remote.py",
}  # fmt: skip
# But in a sweep, no trial runs: of these some names and a fingerprint are taken.
TRIALS = {"workflows/sweeps/plan.py", "workflows/trial.py"}


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
    assert stages["train_baseline"]["matrix"]["preset"] == "${compared}"  # tables have no cnf_conv


def imports(path):
    """Modules of the project that a file imports anywhere in it, as paths."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {f"{name.replace('.', '/')}.py" for name in names}
    return {path for path in paths if (ROOT / path).is_file()}


def closure(path, within, ends=()):
    """A file and all in ``within`` that it imports, directly or through others that are no ``ends``."""
    seen, left = set(), {path}
    while left:
        seen |= left
        found = set().union(*map(imports, left.difference(ends)))
        left = {path for path in found if path.startswith(within)} - seen
    return seen


@pytest.mark.parametrize("stage", ["config", *STAGES, "train_baseline", "compare", "sweep"])
def test_a_stage_depends_on_all_the_code_that_it_imports(stage):
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]["deps"]
    # Of cpmm/, workflows/models.py imports more than any one of the other stages runs.
    whole = stage in ("evaluate", "train_baseline", "sweep")
    script = "compose" if stage == "config" else stage
    within = ("workflows/", "cpmm/") if whole else "workflows/"
    needed = closure(f"workflows/{script}.py", within, () if stage == "sweep" else TRIALS)
    named = {path for path in needed if any(path == d or path.startswith(f"{d}/") for d in deps)}
    assert needed - named - HARMLESS == set()


def test_the_sweep_and_the_baselines_depend_on_the_code_that_marks_a_trial():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    code = {path.relative_to(ROOT).as_posix() for path in trial.CODE}
    for stage in ("sweep", "train_baseline"):
        assert code <= set(stages[stage]["deps"])


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
