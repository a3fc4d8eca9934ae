"""A pipeline small enough to run whole in seconds."""

import contextlib
import importlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import cpmm.pipeline.stage
from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.config.fingerprints import EVALUATED
from cpmm.pipeline.scores.scorer import Scorer
from cpmm.pipeline.sweeps.inputs import locate_inputs, open_inputs
from cpmm.pipeline.sweeps.trial import run_trial

ROOT = Path(__file__).resolve().parents[2]
STAGES = (
    "prepare_data",
    "train_teacher",
    "build_spaces",
    "train_cpmm",
    "extract_mixture",
    "train_baseline",
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
    "baselines.direct.epochs=2",
    "baselines.direct.n_draws=1",
    "evaluation.discretizations=[3,5]",
    "evaluation.teacher_solver.method=rk4",
]

# What presets of one's own data cannot do without.
NEEDED = {
    name: [f"data.options.path=x.{name[:3]}", "cpmm.n_clusters=3"]
    for name in ("csv", "npy", "npy_images")
}


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


def stage_command(stage, folder, *arguments):
    script = ROOT / "workflows" / f"{stage}.py"
    return [sys.executable, str(script), str(folder / "config.yaml"), *arguments]


def train_evaluated(folder):
    """Train the rows of conf/baselines/ that evaluate reads, in this process."""
    config = cpmm.pipeline.stage.load_config(folder / "config.yaml")
    with cpmm.pipeline.stage.threads_of(config):
        for row in EVALUATED:
            importlib.import_module("workflows.train_baseline").main(folder, config, row)


def run_commands(folder):
    """Run the whole pipeline of a preset by its commands; return what each stage printed.

    But the baselines, for time, are trained in this process.
    """
    printed = {}
    for stage in STAGES:
        if stage == "train_baseline":
            train_evaluated(folder)
            continue
        done = subprocess.run(
            stage_command(stage, folder), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{stage}: {done.stderr}"
        printed[stage] = done.stdout
    return printed


def run_stages(folder):
    """Run the whole pipeline of a preset in this process; return what each stage printed."""
    config, printed = cpmm.pipeline.stage.load_config(folder / "config.yaml"), {}
    for stage in STAGES:
        if stage == "train_baseline":
            train_evaluated(folder)
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out), cpmm.pipeline.stage.threads_of(config):
            importlib.import_module(f"workflows.{stage}").main(folder, config)
        printed[stage] = out.getvalue()
    return printed


def clone_project(folder):
    """Clone what git holds of the project, whatever was made or edited in the work tree since."""
    if not (ROOT / ".git").exists():
        pytest.skip("this copy of the project has no git: nothing says what it should hold")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    return folder


def read_committed(name):
    """Read a file as git holds it; as it is, where there is no git."""
    if not (ROOT / ".git").exists():
        return (ROOT / name).read_text()
    command = ["git", "show", f"HEAD:{name}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def copy_code(folder):
    """Copy the code and conf/ as they are, committed or not, and nothing that a run has made."""
    (folder / ".dvc").mkdir(parents=True, exist_ok=True)
    for name in (".dvc/config", ".dvcignore", ".gitattributes", ".gitignore", "dvc.yaml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("conf", "cpmm", "workflows"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore, dirs_exist_ok=True)


def copy_project(folder, overrides):
    """Copy the project, without what it has made, with overrides of its own in params.yaml."""
    copy_code(folder)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    nested = {}
    for item in overrides:
        *groups, last = item.split("=")[0].split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = yaml.safe_load(item.split("=", 1)[1])
    params = {"presets": ["digits"], "sweeps": ["table2"], "baselines": [], "compared": []}
    params["overrides"] = nested
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


def project_environment(folder):
    """Environment in which a copy of the project runs its own code, with this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def make_inputs(folder, options):
    """Make data, teacher and spaces of digits in ``folder``, by the stages; return it."""
    config = compose_preset("digits", options)
    for stage in STAGES[:3]:
        importlib.import_module(f"workflows.{stage}").main(folder, config)
    return folder


def train_trial(home, scratch, options, **how):
    """Run a trial of digits on the inputs in ``home``; return its record and its folder."""
    config = compose_preset("digits", options)
    scratch.mkdir(exist_ok=True)
    inputs = open_inputs(locate_inputs(config, home))
    return run_trial(config, *inputs, "fingerprint", scratch, **{"quiet": True} | how), scratch


def score_mixture(mixture, data):
    """Scores of a mixture in float64 on test points, as records and reports have them."""
    score, fa = Scorer(data, "test"), mixture.components
    return {
        **score.density(mixture.log_prob(score.z)),
        **score.clusters(mixture.predict(score.z).numpy(), mixture.n_clusters),
        "n_components": fa.n_components,
        "n_parameters": fa.n_parameters,
    }


def check_last_step(module):
    """A listener: the steps that were told to come are those that came."""
    if module.current_epoch + 1 == module.n_epochs:
        assert module.global_step == module.n_steps


@pytest.fixture
def run_stage(capsys, monkeypatch):
    """Run a stage as its command does, in this process; return its exit status and what it printed.

    ``train_baseline`` trains the row that is given, or each that evaluate reads.
    """

    def run(stage, folder, *rows):
        module = importlib.import_module(f"workflows.{stage}")
        baseline = stage == "train_baseline"
        capsys.readouterr()
        status = 0
        for row in (rows or EVALUATED) if baseline else [None]:
            arguments = [str(folder / "config.yaml"), *([row] if row else [])]
            monkeypatch.setattr(sys, "argv", [f"{stage}.py", *arguments])
            try:
                cpmm.pipeline.stage.run_stage(
                    module.main, module.__doc__, *(["row"] if baseline else [])
                )
            except SystemExit as end:
                status = end.code
            if status:
                break
        return status, *capsys.readouterr()

    return run
