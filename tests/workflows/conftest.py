"""A pipeline small enough to run whole in seconds."""

import importlib
import sys
from pathlib import Path

import pytest
import yaml

import workflows.stage
from workflows.compose import compose_preset

ROOT = Path(__file__).resolve().parents[2]
STAGES = (
    "prepare_data",
    "train_teacher",
    "build_spaces",
    "train_cpmm",
    "extract_mixture",
    "evaluate",
    "report",
)
TINY = [
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "teacher.field.width=16",
    "teacher.field.depth=1",
    "teacher.flow_matching_epochs=3",
    "teacher.solver.n_steps=4",
    "teacher.n_draws=1",
    "spaces.n_spaces=5",
    "spaces.n_draws=1",
    "cpmm.field.width=8",
    "cpmm.field.depth=1",
    "cpmm.solver.n_steps=2",
    "cpmm.epochs_per_space=1",
    "cpmm.fine_tune_epochs=2",
    "cpmm.n_draws=1",
    "cpmm.n_pseudotimes=3",
    "mixture.n_pseudotimes=3",
    "evaluation.direct.epochs=2",
    "evaluation.direct.n_draws=1",
    "evaluation.discretizations=[3,5]",
    "evaluation.teacher_solver.method=rk4",
]


@pytest.fixture
def make_folder(tmp_path):
    """Make ``<name>/config.yaml`` of a tiny pipeline and return its folder."""

    def make(preset, *overrides, name=None):
        folder = tmp_path / (name or preset)
        folder.mkdir(exist_ok=True)
        config = compose_preset(preset, [*TINY, *overrides])
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        return folder

    return make


def stage_command(stage, folder):
    return [sys.executable, str(ROOT / "workflows" / f"{stage}.py"), str(folder / "config.yaml")]


@pytest.fixture
def run_stage(capsys, monkeypatch):
    """Run a stage as its command does, in this process; return its exit status and what it printed."""

    def run(stage, folder):
        module = importlib.import_module(f"workflows.{stage}")
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", str(folder / "config.yaml")])
        capsys.readouterr()
        try:
            workflows.stage.run_stage(module.main, module.__doc__)
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run
