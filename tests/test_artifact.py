from __future__ import annotations

import pytest
import torch

from cpmm.artifact import (
    load_artifact,
    load_header,
    save_artifact,
    seal_folder,
    verify_files,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


def test_load_returns_what_was_saved(tmp_path):
    save_artifact(tmp_path / "deep" / "folder", "teacher", TENSORS, {"seed": 3})
    tensors, header = load_artifact(tmp_path / "deep" / "folder", "teacher")
    assert set(tensors) == {"a", "b"}
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert header["seed"] == 3
    assert header["tensors"] == {"a": ["float32", [2, 3]], "b": ["int64", [2]]}
    assert load_header(tmp_path / "deep" / "folder", "teacher") == header


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for folder in ("first", "second"):
        save_artifact(tmp_path / folder, "cpmm", TENSORS, {"seed": 3})
    for name in ("cpmm.json", "cpmm.safetensors"):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("first", "second"))
        assert first == second


def test_no_temporary_file_is_left(tmp_path):
    save_artifact(tmp_path, "cpmm", TENSORS, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpmm.json", "cpmm.safetensors"]


def test_tensors_of_another_save_raise(tmp_path):
    save_artifact(tmp_path, "cpmm", TENSORS, {})
    old = (tmp_path / "cpmm.json").read_text()
    save_artifact(tmp_path, "cpmm", {"a": torch.zeros(2, 3), "b": TENSORS["b"]}, {})
    (tmp_path / "cpmm.json").write_text(old)
    with pytest.raises(ValueError, match="belongs to another artifact"):
        load_artifact(tmp_path, "cpmm")


def test_a_sealed_file_that_is_no_safetensors_raises(tmp_path):
    (tmp_path / "cpmm.safetensors").write_bytes(b"")
    seal_folder(tmp_path, "cpmm", {}, {})
    with pytest.raises(ValueError, match="no safetensors file"):
        load_artifact(tmp_path, "cpmm")


def test_shapes_that_the_header_does_not_announce_raise_and_name_both(tmp_path):
    save_artifact(tmp_path, "cpmm", TENSORS, {})
    seal_folder(tmp_path, "cpmm", {}, {"a": ["float32", [3, 2]]})
    with pytest.raises(ValueError, match=r"holds .*\[2, 3\].* announces .*\[3, 2\]"):
        load_artifact(tmp_path, "cpmm")


def test_every_file_of_the_folder_is_sealed(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "history.csv").write_text("step,train\n1,2.5\n")
    (tmp_path / "figures" / "a.svg").write_text("<svg/>")
    save_artifact(tmp_path, "cpmm", TENSORS, {})
    assert set(load_header(tmp_path, "cpmm")["files"]) == {
        "cpmm.safetensors", "figures/a.svg", "history.csv"
    }  # fmt: skip
    (tmp_path / "history.csv").write_text("step,train\n1,2.4\n")
    with pytest.raises(ValueError, match=r"history\.csv is damaged"):
        load_artifact(tmp_path, "cpmm")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_header_cannot_name_files_elsewhere(tmp_path, name):
    with pytest.raises(ValueError, match="outside"):
        verify_files(tmp_path, {"kind": "cpmm", "files": {name: "0"}}, [name])


def test_an_artifact_of_another_version_raises_and_names_both(tmp_path, monkeypatch):
    monkeypatch.setattr("cpmm.artifact.__version__", "0.9.4")
    save_artifact(tmp_path, "cpmm", TENSORS, {})
    monkeypatch.setattr("cpmm.artifact.__version__", "0.9.5")
    load_artifact(tmp_path, "cpmm")
    monkeypatch.setattr("cpmm.artifact.__version__", "0.10.0")
    with pytest.raises(ValueError, match=r"written by cpmm 0\.9\.4, this is cpmm 0\.10\.0"):
        load_artifact(tmp_path, "cpmm")


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", "\xff"])
def test_a_header_that_is_none_raises(tmp_path, text):
    save_artifact(tmp_path, "cpmm", TENSORS, {})
    (tmp_path / "cpmm.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"cpmm\.json"):
        load_header(tmp_path, "cpmm")


def test_a_header_cannot_replace_the_seal(tmp_path):
    save_artifact(tmp_path, "cpmm", TENSORS, {})
    with pytest.raises(ValueError, match="seal"):
        save_artifact(tmp_path, "cpmm", {"a": torch.zeros(1)}, {"files": {}})
    # What was refused has touched nothing.
    assert set(load_artifact(tmp_path, "cpmm")[0]) == {"a", "b"}


def test_a_header_that_json_cannot_hold_touches_nothing(tmp_path):
    save_artifact(tmp_path, "cpmm", TENSORS, {})
    with pytest.raises(ValueError, match="JSON"):
        save_artifact(tmp_path, "cpmm", {"a": torch.zeros(1)}, {"best": float("inf")})
    assert set(load_artifact(tmp_path, "cpmm")[0]) == {"a", "b"}
