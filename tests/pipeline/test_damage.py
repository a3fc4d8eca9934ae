"""Every file of every artifact is damaged in every way: it is noticed, named, and never a wrong number.

The script of damages: ``pytest -m slow tests/pipeline/test_damage.py -s`` prints how many there were.
"""

import errno
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import STAGES, TINY, copy_project, project_environment, train_evaluated

from cpmm.artifact import seal_folder
from cpmm.pipeline import stage
from cpmm.pipeline.artifacts import verify
from cpmm.pipeline.config import fingerprints
from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.sweeps.archive import Archive

# The stage that reads an artifact, and what that stage writes.
READERS = {
    "prepared": ("train_teacher", "teacher"),
    "teacher": ("build_spaces", "spaces"),
    "spaces": ("train_cpmm", "cpmm"),
    "cpmm": ("extract_mixture", "mixture"),
    "mixture": ("evaluate", "evaluation"),
    "baselines/refined": ("evaluate", "evaluation"),
    "baselines/groups": ("evaluate", "evaluation"),
    "evaluation": ("report", "report.html"),
    "metrics.json": ("report", "report.html"),
}
RINGS = [*TINY, "data.options.n=2200", "teacher.solver.n_steps=2", "baselines.direct.epochs=1"]
MARKER = Path(tempfile.gettempdir()) / f"executed-{os.getpid()}"


class Malicious:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self):
        return Path.touch, (MARKER,)


def flip(position):
    def damage(content):
        at = min(int(position * len(content)), len(content) - 1)
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return damage


DAMAGES = {
    "first bit flipped": flip(0),
    "bit flipped at a third": flip(1 / 3),
    "bit flipped at two thirds": flip(2 / 3),
    "last bit flipped": flip(1),
    "cut to half": lambda content: content[: len(content) // 2],
    "a byte short": lambda content: content[:-1],
    "a byte more": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "a pickle": lambda content: pickle.dumps(Malicious()),
    "missing": lambda content: None,
}


def run_all(folder, run_stage):
    for name in STAGES:
        status, _, errors = run_stage(name, folder)
        assert status == 0, f"{name}: {errors}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two finished pipelines of the same shapes, on rings of two seeds, to be copied."""
    root = tmp_path_factory.mktemp("made")
    for name, seed in (("rings", 0), ("other", 1)):
        (root / name).mkdir()
        config = compose_preset("rings", [*RINGS, f"data.options.seed={seed}"])
        (root / name / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        for step in STAGES:
            if step == "train_baseline":
                train_evaluated(root / name)
            else:
                importlib.import_module(f"workflows.{step}").main(root / name, config)
    return root


@pytest.fixture
def copies(made, tmp_path):
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data" / "rings", tmp_path / "data" / "other"


def content_of(path):
    if path.is_file():
        return path.read_bytes()
    return {p.relative_to(path): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def refused(copies, run_stage):
    """Check that the reader of an artifact refuses it and leaves its own output as it was."""
    folder, _ = copies

    def check(artifact, *named):
        reader, output = READERS[artifact]
        before = content_of(folder / output)
        status, _, errors = run_stage(reader, folder)
        message = [line for line in errors.splitlines() if ": error: " in line]
        assert status == 1, f"{artifact} was taken: {named}"
        assert len(message) == 1, errors
        assert message[0].startswith(f"{reader}: error: ")
        assert all(name in message[0] for name in named), message[0]
        assert content_of(folder / output) == before
        assert not MARKER.exists(), f"{artifact} was executed"
        return message[0]

    return check


def header_of(artifact):
    """The kind of an artifact, which its header is named by."""
    return "baseline" if artifact.startswith("baselines/") else artifact


def files_of(folder, artifact):
    path = folder / artifact
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("artifact", READERS)
def test_every_file_damaged_in_every_way(artifact, copies, refused):
    folder, other = copies
    counts = Counter()
    for path in files_of(folder, artifact):
        content = path.read_bytes()
        elsewhere = (other / path.relative_to(folder)).read_bytes()
        damages = DAMAGES | {"that of another preset": lambda _, elsewhere=elsewhere: elsewhere}
        for kind, damage in damages.items():
            changed = damage(content)
            if changed == content:  # nothing to notice: both presets have the same file
                continue
            path.unlink() if changed is None else path.write_bytes(changed)
            message = refused(artifact, path.name)
            assert "dvc repro" in message or "git checkout" in message
            path.write_bytes(content)
            counts[kind] += 1
    print(f"\n{artifact}: {sum(counts.values())} damages noticed: {dict(counts)}")
    assert sum(counts.values()) >= len(DAMAGES) - 1


@pytest.mark.slow
def test_shards_of_one_store_exchanged(copies, refused):
    folder, _ = copies
    first, second = (folder / "spaces" / "u" / "c" / i / "0" / "0" for i in "13")
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    refused("spaces", "u/c/1/0/0", "damaged, or belongs to another artifact")


@pytest.mark.parametrize("artifact", [name for name in READERS if name != "metrics.json"])
def test_a_whole_artifact_of_another_preset_an_empty_folder_and_none(artifact, copies, refused):
    folder, other = copies
    shutil.rmtree(folder / artifact)
    shutil.copytree(other / artifact, folder / artifact)
    kind = header_of(artifact)
    theirs = json.loads((other / artifact / f"{kind}.json").read_text())["fingerprint"]
    config = stage.load_config(folder / "config.yaml")
    row = [Path(artifact).name] if kind == "baseline" else []
    ours = getattr(fingerprints, f"fingerprint_{kind}")(config, *row)
    refused(artifact, f"fingerprint {theirs}, expected {ours}", "another preset", "dvc checkout")
    shutil.rmtree(folder / artifact)
    (folder / artifact).mkdir()
    refused(artifact, f"{kind}.json is missing", "dvc pull")
    (folder / artifact).rmdir()
    refused(artifact, f"{kind}.json is missing", "dvc pull")


@pytest.mark.parametrize("artifact", [name for name in READERS if name != "metrics.json"])
def test_an_older_schema_and_another_version(artifact, copies, refused, monkeypatch):
    folder, _ = copies
    kind = header_of(artifact)
    header = json.loads((folder / artifact / f"{kind}.json").read_text())
    own = {
        k: v
        for k, v in header.items()
        if k not in ("schema", "version", "files", "tensors", "seal", "kind")
    }
    for name, value, named in (
        ("SCHEMA", 1, "of schema 2, got kind"), ("__version__", "0.0.9", "written by cpmm 0.0.9, this is")
    ):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(f"cpmm.artifact.{name}", value)
            seal_folder(folder / artifact, kind, own, header["tensors"])
        refused(artifact, f"{kind}.json", named, "dvc repro")


@contextmanager
def as_nobody():
    """Without the rights of root, which no permission binds."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(mine)


@pytest.mark.parametrize("artifact", READERS)
def test_files_that_must_not_be_read(artifact, made, run_stage):
    with tempfile.TemporaryDirectory() as parent:  # pytest's own folders are closed to others
        folder = Path(parent) / "rings"
        shutil.copytree(made / "rings", folder)
        for path in (Path(parent), *Path(parent).rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        for path in files_of(folder, artifact)[:3]:
            path.chmod(0)
            with as_nobody():
                status, _, errors = run_stage(READERS[artifact][0], folder)
            assert status == 1
            assert os.strerror(errno.EACCES) in errors
            assert str(path) in errors
            path.chmod(0o666)


def test_a_planted_checkpoint_is_neither_executed_nor_taken(copies, run_stage):
    folder, _ = copies
    config = stage.load_config(folder / "config.yaml")
    for step, output, fingerprint in (
        ("train_teacher", "teacher", fingerprints.fingerprint_teacher(config)),
        ("train_cpmm", "cpmm", fingerprints.fingerprint_cpmm(config)),
    ):
        before = content_of(folder / output)
        whole = Path(tempfile.gettempdir()) / f"whole-{os.getpid()}.ckpt"
        torch.save({"state_dict": Malicious()}, whole)
        for content in (
            whole.read_bytes(),
            pickle.dumps(Malicious()),
            b"",
            whole.read_bytes()[:-9],
        ):
            scratch = stage.scratch_folder(folder, step, fingerprint)
            (scratch / "last.ckpt").write_bytes(content)
            status, printed, errors = run_stage(step, folder)
            assert status == 0, errors
            assert f"{scratch / 'last.ckpt'} is no checkpoint" in printed
            assert "starting afresh" in printed
            assert not MARKER.exists()
            assert content_of(folder / output) == before
        whole.unlink()


def test_planted_configurations_and_sweep_records_are_not_executed(copies, run_stage, tmp_path):
    folder, _ = copies
    tag = f"!!python/object/apply:os.mkdir ['{MARKER}']\n"
    for content in (tag.encode(), f"name: {tag}".encode(), pickle.dumps(Malicious()), b"\xff\xfe"):
        (folder / "config.yaml").write_bytes(content)
        status, _, errors = run_stage("prepare_data", folder)
        assert status == 1
        assert "config.yaml" in errors
        assert not MARKER.exists()
    archive = Archive(str(tmp_path / "archive"))
    archive.write("trials/abc/record.json", pickle.dumps(Malicious()))
    assert archive.record("abc") is None
    assert not MARKER.exists()


def test_the_planted_pickle_would_leave_a_mark():
    pickle.loads(pickle.dumps(Malicious()))
    assert MARKER.exists()
    MARKER.unlink()
    path = Path(tempfile.gettempdir()) / f"object-{os.getpid()}.npy"
    np.save(path, np.array([Malicious()], object))
    np.load(path, allow_pickle=True)
    assert MARKER.exists()
    MARKER.unlink()
    path.unlink()


def dvc(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, env=project_environment(folder),
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_what_dvc_keeps_is_verified_byte_by_byte_and_the_ways_out_lead_out(tmp_path, monkeypatch):
    project = copy_project(tmp_path / "project", TINY)
    for arguments in (
        ("repro", "report"), ("remote", "add", "--local", "-d", "mine", str(tmp_path / "remote")),
        ("remote", "modify", "--local", "mine", "verify", "true"), ("push",),
    ):  # fmt: skip
        status, printed = dvc(project, *arguments)
        assert status == 0, printed
    subprocess.run(["git", "add", "-A"], cwd=project, check=True)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "commit", "-qm", "made"], cwd=project, check=True)
    monkeypatch.setattr(verify, "ROOT", project)
    monkeypatch.chdir(project)

    def faults():
        return {name: fault for name, fault in verify.verify_preset("digits") if fault}

    assert faults() == {}
    n = 0
    home = project / "data" / "digits"
    paths = [p for p in sorted(home.rglob("*")) if p.is_file() and ".scratch" not in p.parts]
    paths = [p for p in paths if p.name != ".gitignore"]
    for path in paths:
        content, times = path.read_bytes(), path.stat()
        for kind in ("bit flipped at a third", "cut to half", "missing"):
            changed = DAMAGES[kind](content)
            path.unlink()  # a link to DVC's cache is not written through
            if changed is not None:
                path.write_bytes(changed)
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            found = faults()
            if path.name != "config.yaml":  # without it, no fingerprint can be known
                assert len(found) == 1, (path, kind, found)
            assert any(path.name in fault and "dvc repro" in fault for fault in found.values()), (
                found
            )
            path.unlink(missing_ok=True)
            path.write_bytes(content)
            n += 1
    assert faults() == {}
    print(f"\n{n} damages of {len(paths)} files found by verify.py")

    # The sweep was not run here, so targets are named. DVC's cache is damaged too where the workspace links to it, then the remote helps.
    victim = home / "mixture" / "mixture.safetensors"
    victim.unlink()
    victim.write_bytes(b"damaged")
    status, printed = dvc(project, "checkout", "--force", "-d", "report")
    assert (status, faults()) == (0, {}), printed
    for cached in (project / ".dvc" / "cache" / "files").rglob("*"):
        if cached.is_file():
            cached.chmod(0o644)
            cached.write_bytes(flip(0.5)(cached.read_bytes()))
    for name in ("prepared", "teacher", "spaces", "cpmm", "mixture", "evaluation"):
        shutil.rmtree(home / name)
    assert len(faults()) == 6
    status, printed = dvc(project, "pull", "--force", "-d", "report")
    assert (status, faults()) == (0, {}), printed
    (home / "metrics.json").write_text("{}")
    subprocess.run(["git", "checkout", "-q", "data/digits/metrics.json"], cwd=project, check=True)
    assert faults() == {}
