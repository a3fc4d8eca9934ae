"""What a worker of the sweep does beside training."""

import subprocess
import sys
import tempfile

import pytest
from conftest import ROOT, project_environment

from workflows.sweeps.worker import trial_scratch

WORKER = """
from workflows.sweeps.worker import trial_scratch
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
