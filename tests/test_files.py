from __future__ import annotations

import errno

import pytest

from cpmm.files import replace_file


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_names_the_file_itself(tmp_path):
    path = tmp_path / "file"

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(temporary))

    with pytest.raises(OSError, match="No space left on device") as caught:
        replace_file(path, fail)
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []
