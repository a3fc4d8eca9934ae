import subprocess
import sys

import pytest
import torch
from conftest import ROOT, STAGES

from workflows import stage


@pytest.mark.parametrize("name", [*STAGES, "compose", "summary"])
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
    assert not stage.is_checkpoint(path)
    torch.save({"x": torch.zeros(1000)}, path)
    assert stage.is_checkpoint(path)
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[:-100])
    assert not stage.is_checkpoint(path)
    whole[whole.index(bytes(1000)) + 500] ^= 1
    path.write_bytes(whole)
    assert not stage.is_checkpoint(path)  # torch.load would return the changed number


def lightning_without_a_gpu():
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    raise MisconfigurationException("No supported gpu backend found!")


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (lambda: torch.empty(2**50), "error: too little memory"),
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


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["train_cpmm.py", str(tmp_path / "config.yaml")])
    with pytest.raises(RuntimeError, match="must match the size"):
        stage.run_stage(lambda folder, config: torch.ones(2) + torch.ones(3), "")
