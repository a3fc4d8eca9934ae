"""The pipeline under DVC, in a copy of the project of its own."""

import os
import subprocess
import sys
import time
from modulefinder import ModuleFinder
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, STAGES, TINY, copy_code, copy_project

from cpmm.pipeline.config import code

LONG = {
    "train_teacher": "last.ckpt",
    "build_spaces": "progress.json",
    "train_cpmm": "last.ckpt",
}
LONGER = [
    "teacher.flow_matching_epochs=60", "spaces.n_spaces=21", "spaces.n_draws=8",
    "teacher.solver.n_steps=40", "cpmm.epochs_per_space=2",
]  # fmt: skip
STAGE_CODE = sorted(path.stem for path in (ROOT / "workflows").glob("*.py"))


def test_every_stage_is_a_file_and_reads_its_own_code_and_lists_none():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    scripts = {name: Path(stage["cmd"].split()[1]).stem for name, stage in stages.items()}
    assert set(scripts.values()) == set(STAGE_CODE) - {"trial"}  # the sweep's command for one row
    assert {name for name in scripts if name != scripts[name]} == {"train_compared_baseline"}
    assert set(STAGES) <= set(stages)
    for name, stage in stages.items():
        assert stage["cmd"].startswith(f"python workflows/{scripts[name]}.py ")
        code = [path for path in stage.get("deps", []) if not path.startswith("data/")]
        assert all((ROOT / path).exists() and not path.endswith(".py") for path in code)
        read = [item for item in stage.get("params", []) if isinstance(item, dict)]
        hashes = [item["data/code.yaml"] for item in read if "data/code.yaml" in item]
        assert hashes == ([] if name == "hash_code" else [[f"{scripts[name]}.hash"]])
    assert stages["hash_code"]["deps"] == ["cpmm", "workflows"]
    assert (
        stages["train_compared_baseline"]["matrix"]["preset"] == "${compared}"
    )  # tables have no cnf_conv


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of the code, in which it is looked for."""
    copy_code(tmp_path)
    monkeypatch.setattr(code, "PACKAGE", tmp_path / "cpmm")
    monkeypatch.setattr(code, "SCRIPTS", tmp_path / "workflows")
    return tmp_path


def hashes(tree):
    """The hash of each stage's code, read anew from the files."""
    for function in (code.reached_files, code._digest):
        function.cache_clear()
    return {n: code.code_fingerprint(tree / "workflows" / f"{n}.py") for n in STAGE_CODE}


def found_by_python(tree, stage):
    """What Python's own finder says a script reaches: it follows the compiled code."""
    finder = ModuleFinder(path=[str(tree)], excludes=["workflows"])  # no package
    finder.run_script(str(tree / "workflows" / f"{stage}.py"))
    files = [Path(module.__file__) for module in finder.modules.values() if module.__file__]
    return {path.relative_to(tree).as_posix() for path in files}


def test_an_edited_comment_changes_the_hashes_of_just_the_stages_that_reach_the_file(tree):
    reached = {stage: found_by_python(tree, stage) for stage in STAGE_CODE}
    before = hashes(tree)
    files = [*(tree / "cpmm").rglob("*.py"), *(tree / "workflows").glob("*.py")]
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content + b"# a comment\n")
        after = hashes(tree)
        changed = {stage for stage in STAGE_CODE if after[stage] != before[stage]}
        name = path.relative_to(tree).as_posix()
        assert changed == {stage for stage in STAGE_CODE if name in reached[stage]}, name
        path.write_bytes(content)
    assert hashes(tree) == before


def test_a_new_import_is_found_by_itself(tree):
    before = hashes(tree)
    (tree / "cpmm" / "new.py").write_text("VALUE = 1\n")
    assert hashes(tree) == before
    path = tree / "workflows" / "report.py"
    path.write_text(path.read_text() + "\n\ndef late():\n    from cpmm.new import VALUE\n")
    code._imported_files.cache_clear()
    imported = hashes(tree)
    assert {stage for stage in STAGE_CODE if imported[stage] != before[stage]} == {"report"}
    assert "cpmm/new.py" in code.code_digests(path)
    (tree / "cpmm" / "new.py").write_text("VALUE = 2\n")
    assert hashes(tree)["report"] != imported["report"]


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


def stages_run(printed):
    lines = [line for line in printed.splitlines() if line.startswith("Running stage '")]
    return {line.split("'")[1].split("@")[0] for line in lines}


@pytest.mark.slow
def test_an_edit_runs_what_reads_it(tmp_path):
    folder = copy_project(tmp_path / "edited", TINY)
    status, printed = repro(folder)
    assert status == 0, printed
    known = yaml.safe_load((folder / "data" / "code.yaml").read_text())
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["overrides"]["mixture"]["n_pseudotimes"] = 4
    edits = {
        "conf/mixture/default.yaml": {"compose"},
        "params.yaml": {"compose", *STAGES[3:]},
    }
    # The stages write the same bytes again, so none after them runs.
    for name in ("cpmm/figures.py", "cpmm/spaces.py", "workflows/prepare_data.py"):
        reach = {stage for stage in ("compose", *STAGES) if name in known[stage]["files"]}
        assert 0 < len(reach) < len(STAGES)
        edits[name] = {"hash_code"} | reach
    for name, again in edits.items():
        path = folder / name
        text = (
            f"# a comment\n{path.read_text()}" if name != "params.yaml" else yaml.safe_dump(params)
        )
        path.write_text(text)
        status, printed = repro(folder)
        assert status == 0, printed
        assert stages_run(printed) == again, name
