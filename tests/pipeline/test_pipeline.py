"""The whole pipeline on sets small enough for seconds, as DVC runs it: stage by stage."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, STAGES, run_commands, score_mixture, stage_command

from cpmm.artifact import load_header
from cpmm.fitted import FittedMixture
from cpmm.mixture import Mixture
from cpmm.pipeline.artifacts.spaces import open_spaces
from cpmm.pipeline.artifacts.store import load_prepared
from cpmm.pipeline.config.code import reached_files
from cpmm.pipeline.models.trajectories import load_trajectories
from cpmm.pipeline.stage import load_config
from cpmm.pipeline.sweeps.plan import set_option
from cpmm.seeds import seeded_generator
from cpmm.trajectory import pseudotime_grid


def digest(folder):
    """Hash every file below a folder, by name; the configuration and unfinished work apart."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "config.yaml" and ".scratch" not in path.parts
    }


def run_all(folder, run_stage, stages=STAGES):
    for stage in stages:
        status, _, errors = run_stage(stage, folder)
        assert status == 0, f"{stage}: {errors}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished pipeline on digits, to be copied and not changed."""
    from conftest import TINY

    from cpmm.pipeline.config.compose import compose_preset

    folder = tmp_path_factory.mktemp("finished") / "digits"
    folder.mkdir()
    config = compose_preset("digits", TINY)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    printed = run_commands(folder)
    return folder, {stage: text.splitlines()[-1] for stage, text in printed.items()}


@pytest.fixture
def copied(finished, tmp_path):
    folder = tmp_path / "digits"
    shutil.copytree(finished[0], folder)
    return folder


def test_every_stage_says_what_it_wrote(finished):
    folder, lines = finished
    outputs = (  # of the stages that are commands here
        "prepared",
        "teacher",
        "spaces",
        "cpmm",
        "mixture",
        "evaluation",
        "report.html",
    )
    for (stage, line), output in zip(lines.items(), outputs, strict=True):
        assert line.startswith(f"{stage}: ")
        assert line.endswith(str(folder / output))
        assert (folder / output).exists()
    assert not list(folder.rglob("*.partial"))
    assert not list((folder / ".scratch").iterdir())


def test_metrics_hold_every_model(finished):
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    assert metrics["unit"] == "bits per dimension"
    models = metrics["models"]
    assert {
        "cpmm",
        "direct",
        "matched",
        "gaussian",
        "groups",
        "kmeans",
        "refined",
        "teacher",
    } == set(models)
    without = {"groups", "kmeans"}
    assert all(np.isfinite(row["density"]) for name, row in models.items() if name not in without)
    assert models["cpmm"]["n_components"] == models["direct"]["n_components"] == 30
    # One component a pixel and the logit's margin: the closed form is the same on any machine.
    assert 2.2 < models["gaussian"]["density"] < 2.4


def test_evaluate_reaches_no_training():
    reached = set(reached_files(ROOT / "workflows" / "evaluate.py"))
    assert "cpmm/pipeline/models/fitted.py" in reached
    training = {"cpmm/pipeline/models/fit.py", "cpmm/pipeline/models/baselines.py"}
    assert not training & reached
    assert not {name for name in reached if name.startswith("cpmm/training")}


@pytest.mark.parametrize("row", ["refined", "direct", "matched"])
def test_a_row_of_the_report_is_the_score_of_the_mixture_that_is_kept(row, finished):
    folder, _ = finished
    reported = json.loads((folder / "metrics.json").read_text())["models"][row]
    fitted = FittedMixture.load(folder / "baselines" / row / "mixture")
    data = load_prepared(folder / "prepared")
    nats = fitted.log_prob(data.raw["test"], seeded_generator(data.noise_seed, 2))
    assert float(fitted.density(nats).mean()) == pytest.approx(reported["density"], rel=1e-12)
    scores = score_mixture(fitted.mixture, data)
    if row == "direct":  # its components are no clusters of digits
        assert fitted.mixture.n_clusters == 30
        scores = {name: scores[name] for name in reported if name != "name"}
    assert {"name": reported["name"], **scores} == reported
    kept = json.loads((folder / "baselines" / row / "scores.json").read_text())
    assert {name: kept[name] for name in reported if name != "name"} == pytest.approx(scores)


@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
@pytest.mark.parametrize(
    "file", ["refined/mixture/mixture.safetensors", "kmeans/baseline.safetensors", "groups/baseline.json"]
)  # fmt: skip
def test_a_missing_or_damaged_baseline_is_named_with_what_makes_it(file, how, copied, run_stage):
    row = file.split("/")[0]
    before = digest(copied)
    damage(copied / "baselines" / file, how)
    status, _, errors = run_stage("evaluate", copied)
    (line,) = errors.splitlines()
    assert status == 1
    assert line.startswith(f"evaluate: error: {copied / 'baselines' / file} ")
    command = f"python workflows/train_baseline.py {copied / 'config.yaml'} {row}"
    assert line.endswith(f"; `{command}` trains this baseline alone")
    assert run_stage("train_baseline", copied, row)[0] == 0
    assert run_stage("evaluate", copied)[0] == 0
    assert digest(copied) == before


def test_an_initialization_without_groups_says_so_in_their_row(copied, run_stage):
    config = set_option(load_config(copied / "config.yaml"), "cpmm.initialization.kind", "random")
    config = set_option(config, "cpmm.pseudo_label_spaces", 0)
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    run_all(copied, run_stage, STAGES[3:-1])
    models = json.loads((copied / "metrics.json").read_text())["models"]
    assert models["groups"]["missing"] == "an initialization of kind 'random' makes none"
    assert "density" not in models["groups"]
    assert "kmeans" in models
    header = load_header(copied / "baselines" / "groups", "baseline")
    assert header["missing"] == "an initialization of kind 'random' makes none"
    scores = json.loads((copied / "baselines" / "groups" / "scores.json").read_text())
    assert scores == {"row": "groups", "unit": "bits per dimension"}


def test_the_mixture_is_the_trajectory(finished):
    folder, _ = finished
    data = load_prepared(folder / "prepared")
    trajectories = load_trajectories(folder, load_config(folder / "config.yaml"), data)
    with torch.no_grad():
        expected = trajectories.mixture(pseudotime_grid(3))
    got = Mixture.load(folder / "mixture")
    for name, value in vars(expected.components).items():
        assert torch.equal(value, getattr(got.components, name)), name


def test_the_first_space_is_latent_and_the_last_the_input(finished):
    folder, _ = finished
    data = load_prepared(folder / "prepared")
    spaces = open_spaces(folder / "spaces")
    assert len(spaces) == 5
    assert spaces.positions.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert torch.equal(spaces.validation(4), data.points("validation")[0].float().half().float())
    assert not torch.equal(spaces.validation(0), spaces.validation(4))
    shards = [path for path in (folder / "spaces" / "u" / "c").rglob("*") if path.is_file()]
    assert len(shards) == 5


def test_same_seed_same_files_other_seed_other_files(finished, make_folder, run_stage):
    folder, _ = finished
    again = make_folder("digits", name="again")
    run_all(again, run_stage, STAGES[:5])
    names = [name for name in digest(again) if not name.startswith("evaluation")]
    assert len(names) > 8
    for name in names:
        assert digest(again)[name] == digest(folder)[name], name
    other = make_folder("digits", "seed=1", name="other")
    run_all(other, run_stage, STAGES[:2])
    assert (
        digest(other)["prepared/prepared.safetensors"]
        == digest(folder)["prepared/prepared.safetensors"]
    )
    assert (
        digest(other)["teacher/teacher.safetensors"]
        != digest(folder)["teacher/teacher.safetensors"]
    )


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("rings", ["spaces=noise", "data.options.n=2200"]),
        ("spiral", ["cpmm.curriculum=false", "cpmm.initialization.kind=kmeans", "cpmm.pseudo_label_spaces=0",
                    "data.options.n=2200", "cpmm.ode=separate", "cpmm.diagonal=constant"]),
    ],
)  # fmt: skip
def test_curricula_without_a_teacher(preset, overrides, make_folder, run_stage):
    folder = make_folder(preset, *overrides)
    run_all(folder, run_stage)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["unit"] == "nats per dimension"
    assert "teacher" not in metrics["models"]
    assert (folder / "evaluation" / "figures" / "components.svg").is_file()


def test_a_table_without_labels(tmp_path, make_folder, run_stage, generator):
    path = tmp_path / "table.csv"
    x = torch.randn(300, 3, generator=generator) @ torch.randn(3, 3, generator=generator)
    lines = ["a,b,c", *(",".join(f"{v:.6f}" for v in row) for row in x.tolist())]
    path.write_text("\n".join(lines) + "\n")
    folder = make_folder(
        "csv", f"data.options.path={path}", "data.n_validation=50", "data.n_test=50",
        "cpmm.n_clusters=3", "mixture.drop_idle=true",
    )  # fmt: skip
    run_all(folder, run_stage)
    models = json.loads((folder / "metrics.json").read_text())["models"]
    assert "accuracy" not in models["cpmm"]
    assert np.isfinite(models["cpmm"]["density"])


LONG = {"train_teacher": "teacher", "build_spaces": "spaces", "train_cpmm": "cpmm"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", LONG)
def test_killed_and_resumed_equals_uninterrupted(stage, make_folder, run_stage):
    longer = [
        "teacher.flow_matching_epochs=60", "spaces.n_spaces=21", "spaces.n_draws=8",
        "teacher.solver.n_steps=40", "cpmm.epochs_per_space=2",
    ]  # fmt: skip
    whole = make_folder("digits", *longer, name="whole")
    stages = STAGES[: STAGES.index(stage) + 1]
    run_all(whole, run_stage, stages)
    killed = make_folder("digits", *longer, name="killed")
    for earlier in stages[:-1]:
        shutil.copytree(
            whole / LONG.get(earlier, "prepared"), killed / LONG.get(earlier, "prepared")
        )
    fingerprint = {"build_spaces": "progress.json"}.get(stage, "last.ckpt")
    n_kills = 0
    while n_kills < 3:
        process = subprocess.Popen(
            stage_command(stage, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        seen = {path: path.stat().st_mtime_ns for path in killed.glob(f".scratch/*/{fingerprint}")}
        while process.poll() is None:
            now = {
                path: path.stat().st_mtime_ns for path in killed.glob(f".scratch/*/{fingerprint}")
            }
            if now != seen:  # it has got further than the last time
                time.sleep(0.05 * n_kills)
                break
            time.sleep(0.005)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        n_kills += 1
    assert n_kills == 3, "the stage ended before it could be killed"
    status, printed, errors = run_stage(stage, killed)
    assert status == 0, errors
    if stage != "build_spaces":
        assert "resuming after epoch" in printed
    out = LONG[stage]
    assert digest(killed / out) == digest(whole / out)
    assert not list(killed.rglob("*.partial"))


def damage(path, how):
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flip":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
@pytest.mark.parametrize(
    ("artifact", "stage"),
    [
        ("prepared/prepared.safetensors", "train_teacher"),
        ("teacher/teacher.safetensors", "build_spaces"),
        ("spaces/u/c/2/0/0", "train_cpmm"),
        ("cpmm/cpmm.safetensors", "extract_mixture"),
    ],
)
def test_a_damaged_artifact_is_named(artifact, stage, how, copied, run_stage):
    damage(copied / artifact, how)
    out = {"extract_mixture": "mixture"}.get(stage) or LONG[stage]
    before = digest(copied / out)
    status, _, errors = run_stage(stage, copied)
    assert status == 1
    message = [line for line in errors.splitlines() if line.startswith(f"{stage}: error: ")]
    assert len(message) == 1, errors
    assert artifact.split("/")[0] in message[0]
    assert "dvc checkout" in message[0]
    assert digest(copied / out) == before, "an earlier result was lost"


@pytest.mark.parametrize(
    ("stage", "override", "named"),
    [
        ("prepare_data", "data.source=digit", "data.source is 'digit'"),
        ("prepare_data", "data.alpha=0.7", "data.alpha"),
        ("prepare_data", "data.n_test=1797", "data.n_test"),
        ("prepare_data", "data.standardize=all", "data.standardize is 'all'"),
        ("train_teacher", "teacher.field.kind=cnn", "field.kind is 'cnn'"),
        ("train_teacher", "teacher.learning_rate=1.0e+30", "teacher.learning_rate"),
        ("train_teacher", "trainer.precision=8bit", "trainer.precision is '8bit'"),
        ("build_spaces", "spaces.n_spaces=1", "spaces.n_spaces is 1"),
        ("build_spaces", "spaces.dtype=bfloat16", "spaces.dtype is 'bfloat16'"),
        ("train_cpmm", "cpmm.n_clusters=0", "cpmm.n_clusters"),
        ("train_cpmm", "cpmm.n_factors=65", "R <= M = 64"),
        ("train_cpmm", "cpmm.n_pseudotimes=0", "must be at least 1"),
        ("train_cpmm", "cpmm.solver.method=rk5", "solver.method is 'rk5'"),
        ("train_cpmm", "cpmm.ode=both", "cpmm.ode is 'both'"),
        ("train_cpmm", "cpmm.initialization.kind=magic", "cpmm.initialization.kind is 'magic'"),
        ("train_cpmm", "cpmm.learning_rate=1.0e+30", "cpmm.learning_rate"),
        ("train_cpmm", "mixture.n_pseudotimes=0", "must be at least 1"),
    ],
)
def test_a_bad_option_is_named(stage, override, named, copied, run_stage):
    """Written past the composition, which would refuse most of them."""
    name, value = override.split("=")
    config = set_option(load_config(copied / "config.yaml"), name, yaml.safe_load(value))
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    before = digest(copied)
    status, _, errors = run_stage(stage, copied)
    assert status == 1
    message = [line for line in errors.splitlines() if line.startswith(f"{stage}: error: ")]
    assert len(message) == 1, errors
    assert named in message[0]
    assert "Traceback" not in errors
    assert digest(copied) == before, "an earlier result was lost"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("a,b\n1,2\n3,\n5,6\n", "b"),
        ("a,b\n1,2\n3,x\n5,6\n", "'x'"),
        ("a,b\n1,2\n1,4\n1,6\n1,8\n1,9\n1,3\n", "constant: 'a'"),
    ],
)
def test_a_bad_table_is_named(content, named, tmp_path, make_folder, run_stage):
    path = tmp_path / "table.csv"
    path.write_text(content)
    folder = make_folder(
        "csv", f"data.options.path={path}", "data.n_validation=2", "data.n_test=2",
        "cpmm.n_clusters=3",
    )  # fmt: skip
    status, _, errors = run_stage("prepare_data", folder)
    assert status == 1
    assert errors.startswith("prepare_data: error: ")
    assert named in errors
    assert errors.count("\n") == 1


def test_missing_images_say_where_they_were_looked_for(tmp_path, make_folder, run_stage):
    folder = make_folder("mnist", f"data.options.folder={tmp_path}", "cpmm.weight_knots=null")
    status, _, errors = run_stage("prepare_data", folder)
    assert status == 1
    assert errors.startswith("prepare_data: error: ")
    assert str(tmp_path) in errors
    assert "data.options.mirror" in errors


def test_a_folder_without_write_permission(copied, run_stage, monkeypatch):
    # Permissions do not bind every account that tests run as, so the refusal is simulated.
    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    status, _, errors = run_stage("prepare_data", copied)
    assert status == 1
    assert errors.startswith(f"prepare_data: error: Permission denied: {copied}")
    assert (copied / "prepared" / "prepared.json").is_file()


def test_an_output_in_the_way(copied, run_stage):
    shutil.rmtree(copied / ".scratch", ignore_errors=True)
    (copied / ".scratch").write_text("a file where the scratch folder belongs")
    status, _, errors = run_stage("prepare_data", copied)
    assert status == 1
    assert errors.startswith("prepare_data: error: ")
    assert str(copied / ".scratch") in errors
