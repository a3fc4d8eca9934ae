"""What a worker of the sweep does beside training."""

import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
import ray
import torch
from conftest import ROOT, project_environment

from cpmm.pipeline.sweeps import progress as sweep_progress
from cpmm.pipeline.sweeps import worker as sweep_worker
from cpmm.pipeline.sweeps.reporter import Reporter, on_given_device, trial_scratch

WORKER = """
from cpmm.pipeline.sweeps.reporter import trial_scratch
with trial_scratch("0" * 16) as scratch:
    (scratch / "last.ckpt").write_text("half done")
    print(scratch, flush=True)
    input()
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def worker(temporary):
    """A worker in the midst of a trial, in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER], env=project_environment(ROOT), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.folder = process.stdout.readline().strip()
    assert process.folder.startswith(f"{temporary}/cpmm-{'0' * 16}-")
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_trial_leaves_alone_what_another_works_on(worker, temporary):
    with trial_scratch("1" * 16):
        pass
    assert [str(path) for path in temporary.iterdir()] == [worker.folder]


def test_a_trial_removes_what_a_killed_worker_left(worker, temporary):
    worker.kill()
    worker.wait()
    (temporary / "cpmm-notes").mkdir()
    with trial_scratch("1" * 16) as scratch:
        assert set(temporary.iterdir()) == {scratch, temporary / "cpmm-notes"}
    assert [path.name for path in temporary.iterdir()] == ["cpmm-notes"]


@pytest.mark.parametrize(("report_seconds", "n_reports"), [(0, 3), (3600, 0)])
def test_signs_of_life_are_reported_now_and_then(report_seconds, n_reports, tmp_path):
    preprocessing = SimpleNamespace(density_unit=("nats per dimension", 1.0, 0.0))
    data = SimpleNamespace(
        preprocessing=preprocessing, n_features=1, points=lambda split: (None, torch.zeros(1))
    )
    assignment = SimpleNamespace(options={"report_seconds": report_seconds})
    reports, trial = [], SimpleNamespace(fingerprint="1" * 16)
    reporter = Reporter(trial, assignment, tmp_path, data, reports.append)
    for _ in range(3):
        reporter.alive()
    assert reports == [{"fingerprint": "1" * 16, "alive": True}] * n_reports


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_a_gpu_does_is_not_the_trials_own_failure(error, monkeypatch):
    def train(*arguments):
        raise error("CUDA error")

    monkeypatch.setattr(sweep_worker, "train_here", train)
    assignment = SimpleNamespace(options={"workers": 1})
    with pytest.raises(sweep_worker.GPULost, match=f"{error.__name__}: CUDA error"):
        sweep_worker._train(SimpleNamespace(fingerprint="1" * 16), assignment)


@pytest.mark.parametrize(("gpus", "accelerator"), [([], "cpu"), ([0], "auto")])
def test_a_trial_that_is_given_no_gpu_takes_none(gpus, accelerator, monkeypatch):
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: gpus)
    config = {"trainer": {"accelerator": "auto", "devices": 1}}
    given = on_given_device(config)
    assert given == {"trainer": {"accelerator": accelerator, "devices": 1}}
    assert config["trainer"]["accelerator"] == "auto"


def images(n_trials):
    trials = [SimpleNamespace(fingerprint="0" * 16, name="cpmm, seed 0")]
    return SimpleNamespace(name="images", trials=trials, n_trials=n_trials)


@pytest.mark.parametrize("resumed_at", [0, 40, 60])
def test_the_rest_of_a_trial_is_judged_by_its_steps(resumed_at, capsys, monkeypatch):
    """Of 51 epochs of ten steps and 80 of 25, half the epochs are a third of the steps."""
    clock = [0.0]
    monkeypatch.setattr(sweep_progress.time, "monotonic", lambda: clock[0])
    progress = sweep_progress.Progress(images(1), 0, "bits")
    trial = SimpleNamespace(trial_id="a", config={"fingerprint": "0" * 16})
    steps = [10 * (epoch + 1) for epoch in range(51)]
    steps += [510 + 25 * (epoch + 1) for epoch in range(80)]
    for epoch in range(resumed_at, 131):
        clock[0] = 2.4 * (steps[epoch] - steps[resumed_at])  # 25 steps a minute
        report = {
            "phase": "fine-tuning", "step": steps[epoch], "n_steps": 2510,
            "progress": (epoch + 1) / 131, "validation_loss": 0.7,
        }  # fmt: skip
        progress.on_trial_result(0, [], trial, report)
    lines = capsys.readouterr().out.splitlines()
    for step in (785, 1260, 2485):
        (line,) = [line for line in lines if f" step {step}/" in line]
        found = re.fullmatch(
            r"sweep images \| 0/1 done, eta (.+) \| cpmm, seed 0: fine-tuning "
            rf"step {step}/2510 val 0.700 eta (.+)m",
            line,
        )
        assert float(found[2]) == pytest.approx((2510 - step) / 25, abs=0.051)
        if resumed_at == 0:  # of the sweep, only what was done in this process counts
            assert float(found[1].removesuffix("m")) == pytest.approx((2510 - step) / 25, rel=0.02)
    ended = {"fingerprint": "0" * 16, "status": "finished", "progress": 1.0, "step": 2510}
    progress.on_trial_result(0, [], trial, ended)
    assert progress._eta(clock[0]) == "0.0m"


def test_a_trial_that_ends_before_its_last_epoch_is_reported_has_nothing_left():
    progress = sweep_progress.Progress(images(2), 0, "bits")
    trial = SimpleNamespace(trial_id="a", config={"fingerprint": "0" * 16})
    report = {"phase": "space 1/51", "step": 500, "n_steps": 1310, "validation_loss": 0.7}
    progress.on_trial_result(0, [], trial, report | {"progress": 50 / 131})
    progress.on_trial_result(0, [], trial, {"progress": 1.0, "step": 2510, "status": "finished"})
    (row,) = progress.running.values()
    assert sweep_progress._share(row) == 1
    assert sweep_progress._eta(row, progress.started + 60) == "0.0m"
