"""What a CUDA device computes: what the CPU does, and the same each time."""

import gc
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import (
    ROOT,
    STAGES,
    TINY,
    copy_project,
    make_inputs,
    project_environment,
    train_trial,
)

from cpmm.mixture import Mixture
from cpmm.pipeline.artifacts.store import load_prepared
from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.models.flows import make_teacher
from cpmm.pipeline.models.runtime import compute_device
from cpmm.pipeline.models.trajectories import make_trajectories
from cpmm.seeds import seeded_generator
from cpmm.trajectory import pseudotime_grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

DEVICE, ACCELERATOR = "cuda", "gpu"
IMAGES = [  # the digits as the images that they are, through the layers of the presets of images
    *TINY, f"trainer.accelerator={ACCELERATOR}", "data.n_train=300", "teacher.field.kind=conv",
    "teacher.field.coordinates=true", "cpmm.field.kind=conv", "cpmm.field.coordinates=true",
    "cpmm.field.depth=2", "cpmm.weight_knots=3", "cpmm.initialization.kind=neighbours", "cpmm.pseudo_label_weight=0.1",
    "cpmm.batch_size=64", "cpmm.initialization.n_points=300",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data, teacher and spaces, made on the device."""
    return make_inputs(tmp_path_factory.mktemp("home") / "digits", IMAGES)


@pytest.fixture
def train(home, tmp_path):
    """Run a trial on the device; return its record and folder."""

    def train(*overrides, name="trial", **options):
        return train_trial(home, tmp_path / name, [*IMAGES, *overrides], **options)

    return train


def weights(scratch):
    return (scratch / "cpmm" / "cpmm.safetensors").read_bytes()


def started(home, dtype):
    """Trajectories that have left their start, and points, on the CPU."""
    config = compose_preset("digits", IMAGES)
    data = load_prepared(home / "prepared")
    x = data.points("train")[0].float()
    group = torch.arange(len(x)) % config["cpmm"]["n_clusters"]
    return make_trajectories(config["cpmm"], data, x, group).to(dtype), x[:100].to(dtype)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_density_and_gradients_are_those_of_the_cpu(home, dtype, rtol):
    found = []
    for device in ("cpu", DEVICE):
        compute_device({"precision": "tf32", "accelerator": "auto"}, exact=True)
        trajectories, x = started(home, dtype)
        trajectories, x = trajectories.to(device), x.to(device)
        log_prob = trajectories.mixture(pseudotime_grid(5, x)).log_prob(x)
        log_prob.mean().backward()
        grad = [p.grad.cpu() for p in trajectories.parameters() if p.grad is not None]
        found.append((log_prob.detach().cpu(), torch.cat([g.flatten() for g in grad])))
    (ours, ours_grad), (theirs, theirs_grad) = found
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
    assert float((ours_grad - theirs_grad).norm() / theirs_grad.norm()) < 100 * rtol


def test_a_flow_is_that_of_the_cpu(home):
    config = compose_preset("digits", [*IMAGES, "teacher.exact_trace_up_to=64"])
    data = load_prepared(home / "prepared")
    x = data.points("test")[0][:20]
    found = []
    for device in ("cpu", DEVICE):
        teacher = make_teacher(config["teacher"], data, 0).double().to(device)
        generator = seeded_generator(0, device=device)
        log_prob = teacher.log_prob(x.to(device), generator)
        u = teacher.transform(x.to(device), torch.tensor([0.5, 1.0]).double().to(device))
        found.append((log_prob.detach().cpu(), u.detach().cpu()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_stages_run_and_what_they_leave_is_read_without_the_device(make_folder, run_stage):
    folder = make_folder("digits", *IMAGES)
    for stage in STAGES:
        status, _, err = run_stage(stage, folder)
        assert (status, err) == (0, "")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert all(
        math.isfinite(row["density"]) for row in metrics["models"].values() if "density" in row
    )
    read = (
        "import sys, torch; from cpmm.mixture import Mixture; mixture = Mixture.load(sys.argv[1]); "
        "print(mixture.components.mean.device, torch.cuda.is_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", read, str(folder / "mixture")], env=project_environment(ROOT) |
        {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "cpu False\n"


@pytest.mark.parametrize("precision", ["32-true", "tf32", "bf16-mixed"])
def test_the_same_seed_gives_the_same_weights(train, precision):
    runs = [train(f"trainer.precision={precision}", name=name) for name in ("one", "two")]
    assert weights(runs[0][1]) == weights(runs[1][1])
    assert runs[0][0]["test"] == runs[1][0]["test"]


def test_a_run_that_was_cut_short_goes_on_as_if_it_had_not(train):
    whole = train(name="whole")

    def stop(module):
        if module.current_epoch == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(name="cut", listeners=[stop])
    cut = train(name="cut")
    assert weights(cut[1]) == weights(whole[1])
    assert cut[0]["test"] == whole[0]["test"]


def test_precision_changes_little(train):
    density = {
        name: train(f"trainer.precision={name}", "cpmm.fine_tune_epochs=20", name=name)[0]["test"]["density"]
        for name in ("32-true", "tf32", "bf16-mixed")
    }  # fmt: skip
    for name in ("tf32", "bf16-mixed"):
        assert density[name] == pytest.approx(density["32-true"], abs=0.02)  # bits per dimension


def test_memory_is_that_of_the_device(train):
    assert train()[0]["memory_gb"] == torch.cuda.max_memory_allocated() / 2**30 > 0


def test_too_little_memory_is_said(make_folder, run_stage, home):
    folder = make_folder("digits", *IMAGES)
    for name in ("prepared", "spaces", "teacher"):
        shutil.copytree(home / name, folder / name)
    gc.collect()  # what earlier trainings leave in cycles holds memory that this one could take
    torch.cuda.empty_cache()
    free = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(free + 1e-5)
    try:
        status, _, err = run_stage("train_cpmm", folder)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert status == 1
    assert err.startswith("train_cpmm: error: too little memory (CUDA out of memory.")


def test_what_was_half_done_on_the_device_goes_on_without_it(train):
    losses = []

    def keep(module):
        losses[:] = [row["train"] for row in module.history]

    def stop(module):
        keep(module)
        if module.current_epoch == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(listeners=[stop])
    before = losses[:4]  # the fifth epoch has no checkpoint yet
    record, _ = train("trainer.accelerator=cpu", listeners=[keep])
    assert record["status"] == "finished"
    assert losses[:4] == before


def test_trials_of_a_sweep_share_the_device(tmp_path):
    pytest.importorskip("ray")
    folder = copy_project(tmp_path / "project", IMAGES)
    sweep = {
        "defaults": ["default"],
        "name": "shared",
        "seeds": 2,
        "parts": {"a": {"grid": {"cpmm.n_factors": [2, 3]}}},
    }
    (folder / "conf" / "sweep" / "shared.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    done = subprocess.run(
        [sys.executable, str(folder / "workflows" / "sweep.py"), "sweep=shared", "ray.dashboard=false", "ray.gpus=0.5"],
        cwd=folder, env=project_environment(folder), capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{torch.cuda.device_count()} GPUs" in done.stdout
    records = [
        json.loads(path.read_text())
        for path in folder.glob("data/digits/.scratch/sweep/trials/*/record.json")
    ]
    assert [record["status"] for record in records] == ["finished"] * 4
    assert all(0 < record["memory_gb"] < 1 for record in records)
    assert (
        Mixture.load(
            next(folder.glob("data/digits/.scratch/sweep/trials/*/mixture"))
        ).components.n_components
        == 30
    )
