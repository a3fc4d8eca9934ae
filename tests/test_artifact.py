from __future__ import annotations

import json

import pytest
import torch

from cpmm.artifact import load_artifact, load_header, replace_file, save_artifact

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


def test_load_returns_what_was_saved(tmp_path):
    save_artifact(tmp_path / "deep" / "folder", "teacher", TENSORS, {"seed": 3})
    tensors, header = load_artifact(tmp_path / "deep" / "folder", "teacher")
    assert set(tensors) == {"a", "b"}
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert header["seed"] == 3
    assert header["tensors"] == {"a": ["torch.float32", [2, 3]], "b": ["torch.int64", [2]]}
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


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, fail)
    assert path.read_text() == "old"


def test_tensors_of_another_save_raise(tmp_path):
    save_artifact(tmp_path, "cpmm", TENSORS, {})
    old = (tmp_path / "cpmm.json").read_text()
    save_artifact(tmp_path, "cpmm", {"a": torch.zeros(2, 3), "b": TENSORS["b"]}, {})
    (tmp_path / "cpmm.json").write_text(old)
    with pytest.raises(ValueError, match="belongs to another header"):
        load_artifact(tmp_path, "cpmm")


def test_a_sealed_file_that_is_no_safetensors_raises(tmp_path):
    save_artifact(tmp_path, "cpmm", TENSORS, {})
    header = json.loads((tmp_path / "cpmm.json").read_text())
    (tmp_path / "cpmm.safetensors").write_bytes(b"")
    header["sha256"] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "cpmm.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="no safetensors file"):
        load_artifact(tmp_path, "cpmm")


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", "\xff"])
def test_a_header_that_is_none_raises(tmp_path, text):
    save_artifact(tmp_path, "cpmm", TENSORS, {})
    (tmp_path / "cpmm.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"cpmm\.json"):
        load_header(tmp_path, "cpmm")


def test_a_header_cannot_replace_the_seal(tmp_path):
    save_artifact(tmp_path, "cpmm", TENSORS, {})
    with pytest.raises(ValueError, match="sha256"):
        save_artifact(tmp_path, "cpmm", {"a": torch.zeros(1)}, {"sha256": "0"})
    # What was refused has touched nothing.
    assert set(load_artifact(tmp_path, "cpmm")[0]) == {"a", "b"}


def test_a_header_that_json_cannot_hold_touches_nothing(tmp_path):
    save_artifact(tmp_path, "cpmm", TENSORS, {})
    with pytest.raises(ValueError, match="JSON"):
        save_artifact(tmp_path, "cpmm", {"a": torch.zeros(1)}, {"best": float("inf")})
    assert set(load_artifact(tmp_path, "cpmm")[0]) == {"a", "b"}
