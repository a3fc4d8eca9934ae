"""The archive of a sweep on a local file system; failures are simulated at pyarrow."""

import errno
import json
import os
import re
import shutil

import pytest
from pyarrow import fs

from cpmm.pipeline.sweeps.archive import CHECKPOINT, RECORD, SCHEMA, Archive, ArchiveError


class Disk(fs.LocalFileSystem):
    """A file system that refuses what a test chooses, and notes the order of writes."""

    def __init__(self):
        super().__init__()
        self.error, self.refuses, self.moved = None, (), []

    def _refuse(self, verb):
        if verb in self.refuses:
            raise self.error

    def open_output_stream(self, path, *args, **kwargs):
        self._refuse("open")
        stream = super().open_output_stream(path, *args, **kwargs)
        return Full(stream, self.error) if "write" in self.refuses else stream

    def open_input_stream(self, path, *args, **kwargs):
        self._refuse("read")
        return super().open_input_stream(path, *args, **kwargs)

    def move(self, source, target):
        self._refuse("move")
        super().move(source, target)
        self.moved.append(target)

    def delete_file(self, path):
        self._refuse("delete")
        super().delete_file(path)

    def get_file_info(self, what):
        self._refuse("list" if isinstance(what, fs.FileSelector) else "look")
        return super().get_file_info(what)


class Full:
    """A stream on a device that takes half of what it is given."""

    def __init__(self, stream, error):
        self.stream, self.error = stream, error

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stream.close()

    def write(self, content):
        self.stream.write(content[: len(content) // 2])
        raise self.error


@pytest.fixture
def archive(tmp_path):
    archive = Archive(str(tmp_path / "archive"))
    archive.files = Disk()
    return archive


def refuse(archive, *verbs, number=errno.ENOSPC):
    archive.files.refuses, archive.files.error = verbs, OSError(number, os.strerror(number))


def files(archive):
    """Everything below the root, whatever its name."""
    return sorted(
        os.path.relpath(os.path.join(folder, name), archive.root)
        for folder, _, names in os.walk(archive.root)
        for name in names
    )


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_is_written_is_read(scheme, tmp_path):
    archive = Archive(f"{scheme}{tmp_path}/new/folder")
    archive.write("trials/a/last.ckpt", b"one")
    archive.write("trials/a/last.ckpt", b"two")
    archive.write_json("sweeps/s.json", {"a": [1, None, "ü"]})
    assert archive.read("trials/a/last.ckpt") == b"two"
    assert archive.read_json("sweeps/s.json") == {"a": [1, None, "ü"]}
    assert archive.has("trials/a/last.ckpt")
    assert (tmp_path / "new" / "folder" / "trials" / "a" / "last.ckpt").read_bytes() == b"two"
    again = Archive(f"{scheme}{tmp_path}/new/folder", create=False)
    assert again.read("trials/a/last.ckpt") == b"two"


def test_what_is_not_there_is_none(archive):
    assert archive.read("trials/a/last.ckpt") is None
    assert archive.read_json("trials/a/record.json") is None
    assert archive.record("a") is None
    assert archive.names("trials/a") == []
    assert not archive.has("trials/a/last.ckpt")
    archive.delete("trials/a/last.ckpt")
    archive.delete_record("a")


def test_a_file_is_replaced_in_one_step(archive):
    archive.write("f", b"before")
    seen = []
    move = archive.files.move
    archive.files.move = lambda *paths: (seen.append(archive.read("f")), move(*paths))
    archive.write("f", b"after")
    assert seen == [b"before"]
    assert archive.read("f") == b"after"


def test_names_are_those_of_whole_files(archive, tmp_path):
    for name in ("mixture/b", "mixture/sub/a", "mixtures/c", "record.json"):
        archive.write(f"trials/m/{name}", b"x")
    (tmp_path / "archive" / "trials" / "m" / "mixture" / "b.12345678.partial").write_bytes(b"half")
    assert archive.names("trials/m/mixture") == ["trials/m/mixture/b", "trials/m/mixture/sub/a"]
    assert "trials/m/mixture/b" in archive.names("")
    assert len(archive.names("trials")) == 4


def test_fetch_copies_a_folder(archive, tmp_path):
    archive.write("trials/m/mixture/mixture.json", b"{}")
    archive.write("trials/m/mixture/sub/a", b"a" * 100_000)
    archive.write("trials/m/cpmm/cpmm.json", b"no")
    archive.fetch("trials/m/mixture", tmp_path / "here" / "mixture")
    got = {p.name: p.read_bytes() for p in (tmp_path / "here").rglob("*") if p.is_file()}
    assert got == {"mixture.json": b"{}", "a": b"a" * 100_000}
    archive.fetch("trials/none", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_record_is_written_after_its_files_and_the_checkpoint_goes(archive):
    archive.write(f"trials/m/{CHECKPOINT}", b"state")
    archive.files.moved.clear()
    archive.save_record("m", {"status": "finished"}, {"mixture/a": b"a", "cpmm/b": b"b"})
    names = [path.removeprefix(f"{archive.root}/trials/m/") for path in archive.files.moved]
    assert sorted(names[:2]) == ["cpmm/b", "mixture/a"]
    assert names[2:] == [RECORD]
    assert not archive.has(f"trials/m/{CHECKPOINT}")
    assert archive.record("m") == {"schema": SCHEMA, "status": "finished"}
    archive.delete_record("m")
    assert archive.record("m") is None
    assert archive.read("trials/m/mixture/a") == b"a"


def test_without_its_files_there_is_no_record_and_the_checkpoint_stays(archive):
    archive.write(f"trials/m/{CHECKPOINT}", b"state")
    refuse(archive, "write")
    with pytest.raises(ArchiveError, match="mixture/a"):
        archive.save_record("m", {"status": "finished"}, {"mixture/a": b"ab"})
    archive.files.refuses = ()
    assert archive.record("m") is None
    assert archive.read(f"trials/m/{CHECKPOINT}") == b"state"


@pytest.mark.parametrize(
    "content",
    [b"", b'{"schema": 1, "status": "fini', b"\xff\xfe\x00", b"[1]", b"3", b"null",
     json.dumps({"schema": SCHEMA + 1, "status": "finished"}).encode(), b'{"status": "finished"}'],
)  # fmt: skip
def test_a_record_that_is_damaged_or_of_another_schema_is_none(content, archive):
    archive.write(f"trials/m/{RECORD}", content)
    assert archive.record("m") is None
    archive.save_record("m", {"status": "finished"})
    assert archive.record("m")["status"] == "finished"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("verb", ["open", "write", "move", "look"])
def test_a_write_that_fails_says_what_to_do_and_leaves_nothing(verb, number, archive):
    archive.write("trials/m/record.json", b"before")
    before = files(archive)
    refuse(archive, verb, number=number)
    with pytest.raises(ArchiveError) as error:
        archive.write("trials/m/record.json", b"after")
    assert re.search(
        rf"^writing trials/m/record\.json in ray\.storage '{archive.uri}' failed: "
        rf"{os.strerror(number)}; .*the same command goes on",
        str(error.value),
    )
    archive.files.refuses = ()
    assert files(archive) == before
    assert archive.read("trials/m/record.json") == b"before"


@pytest.mark.parametrize(
    ("verb", "call", "said"),
    [
        ("read", lambda a: a.read("x/y"), "reading x/y"),
        ("read", lambda a: a.record("m"), "reading trials/m/record.json"),
        ("list", lambda a: a.names("x"), "listing x"),
        ("look", lambda a: a.has("x/y"), "looking for x/y"),
        ("delete", lambda a: a.delete("x/y"), "deleting x/y"),
    ],
)
def test_other_failures_say_what_failed(verb, call, said, archive):
    archive.write("x/y", b"1")
    refuse(archive, verb, number=errno.EACCES)
    with pytest.raises(ArchiveError, match=rf"{said} in ray.storage .* failed: Permission denied;"):
        call(archive)


def test_an_archive_that_has_gone_is_not_made_again(archive, tmp_path):
    shutil.rmtree(tmp_path / "archive")
    with pytest.raises(ArchiveError, match=r"writing a/b .*the archive is no longer there"):
        archive.write("a/b", b"1")
    with pytest.raises(ArchiveError, match="no longer there"):
        archive.save_record("m", {"status": "finished"}, {"mixture/a": b"a"})
    assert not (tmp_path / "archive").exists()


def test_an_archive_is_made_only_where_it_may(tmp_path):
    with pytest.raises(ArchiveError, match=r"no longer there|cannot be used"):
        Archive(str(tmp_path / "none"), create=False).write("a", b"1")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("uri", ["{}/file/below", "gopher://bucket", "s3://a?b=c", "file://"])
def test_a_root_that_cannot_be_used_is_named(uri, tmp_path):
    (tmp_path / "file").write_text("no folder")
    uri = uri.format(tmp_path)
    with pytest.raises(ArchiveError, match=rf"^ray\.storage '{re.escape(uri)}' cannot be used: ."):
        Archive(uri)


def test_a_root_without_permission_is_named(tmp_path, monkeypatch):
    # Permissions do not bind every account that tests run as, so the refusal is simulated.
    class Locked(Disk):
        def __init__(self):
            super().__init__()
            self.refuses, self.error = ("open",), OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("cpmm.pipeline.sweeps.archive.fs.LocalFileSystem", Locked)
    with pytest.raises(ArchiveError, match="cannot be used: Permission denied"):
        Archive(str(tmp_path / "archive"))


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Archive("~/archive").write("a", b"1")
    assert (tmp_path / "archive" / "a").read_bytes() == b"1"
