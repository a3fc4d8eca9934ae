import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, STAGES
from safetensors import SafetensorError

from cpmm.pipeline import errors, stage
from cpmm.pipeline.artifacts import files


@pytest.mark.parametrize("name", [*STAGES, "compose"])
def test_help_is_quick_and_needs_nothing(name):
    done = subprocess.run(
        [sys.executable, ROOT / "workflows" / f"{name}.py", "--help"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "usage:" in done.stdout


@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "is missing"), ("a: [", "is not YAML"), ("[]", "expected a mapping, got list")],
)
def test_a_bad_configuration_is_named(tmp_path, content, named):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=named) as error:
        stage.load_config(path)
    assert str(path) in str(error.value)


def test_scratch_of_other_work_is_dropped(tmp_path):
    first = stage.scratch_folder(tmp_path, "train_cpmm", "a")
    other = stage.scratch_folder(tmp_path, "train_teacher", "a")
    assert stage.scratch_folder(tmp_path, "train_cpmm", "a") == first
    second = stage.scratch_folder(tmp_path, "train_cpmm", "b")
    assert second != first
    assert not first.exists()
    assert second.exists()
    assert other.exists()


def test_a_cut_checkpoint_is_none(tmp_path):
    import torch

    path = tmp_path / "last.ckpt"
    assert not files.is_checkpoint(path)
    torch.save({"x": torch.zeros(1000)}, path)
    assert files.is_checkpoint(path)
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[:-100])
    assert not files.is_checkpoint(path)
    whole[whole.index(bytes(1000)) + 500] ^= 1
    path.write_bytes(whole)
    assert not files.is_checkpoint(path)  # torch.load would return the changed number


def make_artifact(folder, text):
    folder.mkdir(parents=True)
    (folder / "file").write_text(text)


def test_what_is_published_replaces_what_was_there(tmp_path):
    scratch, target = tmp_path / ".scratch", tmp_path / "teacher"
    for text in ("first", "second"):
        make_artifact(scratch / "teacher", text)
        stage.publish(scratch, "teacher", target)
        assert [path.name for path in target.iterdir()] == ["file"]
        assert (target / "file").read_text() == text
        assert not scratch.exists()


@pytest.mark.parametrize("kill_at", [1, 2])
def test_a_kill_while_publishing_loses_neither(tmp_path, monkeypatch, kill_at):
    scratch, target = tmp_path / ".scratch", tmp_path / "teacher"
    make_artifact(target, "old")
    make_artifact(scratch / "teacher", "new")
    moves = []

    def move(*paths):
        moves.append(paths)
        if len(moves) == kill_at:
            raise SystemExit("killed")
        return replace(*paths)

    replace = os.replace
    monkeypatch.setattr(os, "replace", move)
    with pytest.raises(SystemExit):
        stage.publish(scratch, "teacher", target)
    monkeypatch.undo()
    kept = sorted(path.read_text() for path in tmp_path.rglob("file"))
    assert kept == ["new", "old"]
    stage.publish(scratch, "teacher", target)
    assert (target / "file").read_text() == "new"


def test_what_cannot_be_published_leaves_the_old_in_place(tmp_path):
    target = tmp_path / "teacher"
    make_artifact(target, "old")
    (tmp_path / ".scratch").mkdir()
    with pytest.raises(FileNotFoundError):
        stage.publish(tmp_path / ".scratch", "teacher", target)
    assert (target / "file").read_text() == "old"


def test_temporary_files_lie_beside_the_work_and_go(tmp_path):
    before = tempfile.gettempdir()
    folder = tmp_path / ".scratch" / "train.tmp"
    make_artifact(folder, "of a run that was killed")
    with files.temporary_files_in(folder):
        assert list(folder.iterdir()) == []
        with tempfile.NamedTemporaryFile() as file:
            assert Path(file.name).parent == folder
    assert not folder.exists()
    assert tempfile.gettempdir() == before


FULL = "No space left on device"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, FULL), f"{FULL}: data/x: make space there, and run it again"),
        (OSError(errno.ENOSPC, FULL, "a"), f"{FULL}: a: make space there, and run it again"),
        (
            SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)"),
            f"{FULL}: data/x: make space there, and run it again",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "a"),
            "Read-only file system: a: make it writable, and run it again",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "a"),
            "Permission denied: a: see to its permissions, and run it again",
        ),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "Connection refused"),
        (ValueError("a is damaged (os error 5): mend it"), "a is damaged (os error 5): mend it"),
        (KeyError(), "KeyError"),
    ],
)
def test_an_error_names_the_place_and_what_to_do(error, said):
    assert errors.describe(error, Path("data/x")) == said


def test_a_failed_write_names_the_file_and_leaves_the_old(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("old")

    def write_half(self, text, encoding):
        self.write_bytes(text[:2].encode())
        raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match=FULL) as error:
        files.write_text(path, "newer")
    assert error.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    assert path.read_text() == "old"


LONG = "import sys; sys.path.insert(0, {root!r}); from cpmm.pipeline.stage import end_with_dvc; "
LONG += "end_with_dvc(0.05); print('running', flush=True); import time; time.sleep(60)"
SHELLS = {
    "direct": "exec {python} -c {code}",
    "below a shell": "{python} -c {code}; true",
}
# As DVC does: a shell runs the command, and only there is DVC_STAGE set.
DVC = "import subprocess, sys, os; subprocess.run(['bash', '-c', sys.argv[1]], env=os.environ | {'DVC_STAGE': 'x'})"


def start_below_dvc(shell, kill_early=False):
    code = LONG.format(root=str(ROOT))
    if kill_early:
        code = f"import time; time.sleep(1); {code}"
    command = SHELLS[shell].format(python=sys.executable, code=f'"{code}"')
    return subprocess.Popen([sys.executable, "-c", DVC, command], stdout=subprocess.PIPE, text=True)


def is_gone(process, seconds):
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def stage_below(process):
    return next(
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.name().startswith("python")
    )


@pytest.mark.parametrize("shell", SHELLS)
def test_a_stage_ends_with_the_dvc_that_started_it(shell):
    dvc = start_below_dvc(shell)
    assert dvc.stdout.readline() == "running\n"
    stage_process = stage_below(dvc)
    assert not is_gone(stage_process, 0.5)
    dvc.kill()
    dvc.wait()
    assert is_gone(stage_process, 5)
    dvc.stdout.close()


@pytest.mark.skipif(
    "python" in " ".join(psutil.Process(1).cmdline()), reason="process 1 could pass for DVC"
)
def test_a_stage_ends_if_dvc_was_gone_before_it_looked():
    dvc = start_below_dvc("direct", kill_early=True)
    time.sleep(0.5)
    stage_process = stage_below(dvc)
    dvc.kill()
    dvc.wait()
    assert dvc.stdout.read() == ""  # to its end, which comes with the stage's
    assert is_gone(stage_process, 5)
    dvc.stdout.close()


def test_a_stage_run_by_hand_outlives_its_shell():
    code = LONG.format(root=str(ROOT))
    without = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    shell = subprocess.Popen(
        ["bash", "-c", f'nohup {sys.executable} -c "{code}" & echo $!; wait'],
        env=without, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    stage_process = psutil.Process(int(shell.stdout.readline()))
    assert shell.stdout.readline() == "running\n"
    try:
        shell.send_signal(signal.SIGKILL)
        shell.wait()
        assert not is_gone(stage_process, 1)
    finally:
        stage_process.kill()
        shell.stdout.close()


def fail_with(error):
    raise error


def lightning_without_a_gpu():
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    raise MisconfigurationException("No supported gpu backend found!")


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (lambda: torch.empty(2**50), "error: too little memory (4,294,967,296 MiB more were asked"),
        (lambda: np.empty(2**55), "Unable to allocate 256. PiB"),
        (lambda: bytes(2**62), "gradient=checkpoint or adjoint"),
        (lambda: fail_with(OSError(errno.ENOMEM, "Cannot allocate memory")), "lower a batch_size"),
        (lambda: torch.empty(2**31, 2**31, 2**31), "error: too little memory"),
        (lightning_without_a_gpu, "Set trainer.accelerator and trainer.devices"),
    ],
)
def test_what_libraries_say_of_a_machine_becomes_one_line(
    tmp_path, monkeypatch, capsys, fail, message
):
    (tmp_path / "config.yaml").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["train_cpmm.py", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as end:
        stage.run_stage(lambda folder, config: fail(), "")
    printed = capsys.readouterr().err
    assert end.value.code == 1
    assert printed.startswith("train_cpmm: error: ")
    assert message in printed
    assert printed.count("\n") == 1


def ended(error, **options):
    """How a command ends that raises an error."""
    with pytest.raises(SystemExit) as end, errors.command("name", **options):
        raise error
    return end.value.code


def test_a_command_ends_in_one_line(capsys):
    assert ended(OSError(errno.ENOSPC, FULL), place=Path("data/x")) == 1
    assert capsys.readouterr().err == (
        f"name: error: {FULL}: data/x: make space there, and run it again\n"
    )
    assert ended(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "name: interrupted; run it again to go on\n"
    assert ended(KeyboardInterrupt(), resumes=False) == 130
    assert capsys.readouterr().err == "name: interrupted\n"
    assert ended(ModuleNotFoundError("No module named 'ray.tune'", name="ray.tune")) == 1
    assert capsys.readouterr().err == (
        "name: error: ray is not installed: pip install 'cpmm[sweep]'\n"
    )


def test_a_module_of_ours_that_is_missing_is_a_bug():
    with pytest.raises(ModuleNotFoundError), errors.command("name"):
        raise ModuleNotFoundError("No module named 'cpmm.gone'", name="cpmm.gone")


def test_the_traceback_of_any_error_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("CPMM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="at fault"), errors.command("name"):
        raise ValueError("at fault")


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["train_cpmm.py", str(tmp_path / "config.yaml")])
    with pytest.raises(RuntimeError, match="must match the size"):
        stage.run_stage(lambda folder, config: torch.ones(2) + torch.ones(3), "")


def test_a_stage_computes_with_the_threads_that_are_asked_for(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text("{trainer: {threads: 3}}")
    monkeypatch.setattr(sys, "argv", ["train_cpmm.py", str(tmp_path / "config.yaml")])
    before = torch.get_num_threads()
    stage.run_stage(lambda folder, config: f"{torch.get_num_threads()} threads", "")
    assert capsys.readouterr().out == "train_cpmm: 3 threads\n"
    assert torch.get_num_threads() == before
