"""A disk that is full, read-only or somebody else's: one clear line, and nothing that was good is lost."""

import json
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import STAGES, TINY, copy_project, project_environment

from cpmm.pipeline.config.fingerprints import EVALUATED

pytestmark = pytest.mark.slow

DISK_MIB = 96
NOBODY = 65534
PAGE = os.sysconf("SC_PAGE_SIZE")
SIZES = ["teacher.flow_matching_epochs=30", "cpmm.epochs_per_space=4"]
# What gives each stage work to do, and what it makes of it.
CHANGES = {
    "config": ({"seed": 5}, ["config.yaml"]),
    "prepare_data": ({"data": {"split_seed": 7}}, ["prepared"]),
    "train_teacher": ({"teacher": {"learning_rate": 0.004}}, ["teacher"]),
    "build_spaces": ({"spaces": {"n_spaces": 7}}, ["spaces"]),
    "train_cpmm": ({"cpmm": {"fine_tune_epochs": 12}}, ["cpmm"]),
    "extract_mixture": ({"mixture": {"n_pseudotimes": 4}}, ["mixture"]),
    "train_baseline": ({"baselines": {"direct": {"epochs": 3}}}, ["baselines/direct"]),
    "evaluate": ({"evaluation": {"discretizations": [3]}}, ["evaluation", "metrics.json"]),
    "report": ({"evaluation": {"discretizations": [3]}}, ["report.html"]),
    "sweep": ({"cpmm": {"learning_rate": 0.002}}, ["sweep"]),
}
BEFORE = {"extract_mixture": "train_cpmm", "report": "evaluate"}  # to be run with the change first
RESUMED = {
    "train_teacher": ("last.ckpt", "train_teacher | resuming after epoch "),
    "train_cpmm": ("last.ckpt", "train_cpmm | resuming after epoch "),
}
SWEEP = {
    "defaults": ["default"],
    "name": "full",
    "seeds": 1,
    "overrides": {
        "cpmm.pseudo_label_spaces": 0,
        "cpmm.curriculum": False,
        "cpmm.fine_tune_epochs": 30,
    },
    "parts": {"alone": {"grid": {"cpmm.initialization.kind": ["random", "kmeans"]}}},
}
# Of the most that a stage has on the disk, the share that there is room for.
SHARES = (0, 0.45, 0.8)


class Disk:
    """A small disk in a mount namespace of its own, which ends with the test."""

    def __init__(self):
        self.mount = Path(tempfile.mkdtemp(prefix="disk-"))
        # Process 1 of nothing: when the test closes its pipe, or dies, the disk is gone.
        script = f"mount -t tmpfs -o size={DISK_MIB}m,mode=755 tmpfs {self.mount} && echo ready && read -r _"
        self.holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "bash", "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if self.holder.stdout.readline() != "ready\n":
            reason = self.holder.stderr.read().strip()
            self.end()
            pytest.skip(f"no mount namespaces here: {reason}")
        self.path = Path(f"/proc/{self.holder.pid}/root{self.mount}")
        self.ballast = self.path / "ballast"

    def enter(self, capable=True):
        command = ["nsenter", "-t", str(self.holder.pid), "-m"]
        if not capable:  # like any user before files of another, yet able to reach this Python
            command += ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
        return command

    def run(self, *command, capable=True, timeout=300):
        project = self.mount / "project"
        environment = project_environment(project) | {
            "PYTHONDONTWRITEBYTECODE": "1", "RAY_USAGE_STATS_ENABLED": "0"
        }  # fmt: skip
        line = f"cd {project} && exec {shlex.join(command)}"
        return subprocess.run(
            [*self.enter(capable), "bash", "-c", line], env=environment, capture_output=True, text=True,
            timeout=timeout, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def remount(self, options):
        subprocess.run(
            [*self.enter(), "mount", "-o", f"remount,{options}", str(self.mount)], check=True
        )

    def fill(self, room):
        """Leave room for so many bytes."""
        size = self.room() - room
        with self.ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)

    def room(self):
        free = os.statvfs(self.path)
        return free.f_bavail * free.f_frsize

    @contextmanager
    def peak(self):
        """Yield a list whose only item becomes the most bytes that were in use beyond those at the start."""
        start, most, over = self.room(), [0], threading.Event()

        def look():
            while not over.wait(0.002):
                most[0] = max(most[0], start - self.room())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield most
        finally:
            over.set()
            thread.join()

    def free(self):
        self.ballast.unlink()

    def end(self):
        self.holder.stdin.close()
        self.holder.wait()
        for pipe in (self.holder.stdout, self.holder.stderr):
            pipe.close()
        self.mount.rmdir()


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("a disk of its own needs root")
    missing = [
        name for name in ("unshare", "nsenter", "mount", "setpriv") if not shutil.which(name)
    ]
    if missing:
        pytest.skip(f"a disk of its own needs {', '.join(missing)}")
    made = Disk()
    try:
        folder = copy_project(tmp_path_factory.mktemp("copy") / "project", [*TINY, *SIZES])
        (folder / "conf" / "sweep" / "full.yaml").write_text(yaml.safe_dump(SWEEP))
        params = yaml.safe_load((folder / "params.yaml").read_text()) | {"sweeps": ["full"]}
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        shutil.copytree(folder, made.path / "project")
        yield made
    finally:
        made.end()


def command_of(stage, row="direct"):
    if stage == "config":
        return ["python", "workflows/compose.py", "digits", "data/digits/config.yaml"]
    if stage == "sweep":
        return [
            "python", "workflows/sweep.py", "preset=digits", "sweep=full", "ray.dashboard=false"
        ]  # fmt: skip
    rows = [row] if stage == "train_baseline" else []
    return ["python", f"workflows/{stage}.py", "data/digits/config.yaml", *rows]


@pytest.fixture(scope="module")
def good(disk, tmp_path_factory):
    """All artifacts of an undisturbed run, kept on another disk."""
    for stage in ("config", *STAGES, "sweep"):
        for row in EVALUATED if stage == "train_baseline" else [None]:
            done = disk.run(*command_of(stage, row))
            assert done.returncode == 0, done.stdout + done.stderr
    kept = tmp_path_factory.mktemp("good") / "data"
    shutil.copytree(disk.path / "project" / "data", kept, symlinks=True)
    return kept


class Case:
    """A stage that has new work to do, over the good artifacts of an earlier run."""

    def __init__(self, disk, good, stage):
        self.disk, self.good, self.stage = disk, good, stage
        self.project = disk.path / "project"
        self.digits = self.project / "data" / "digits"
        self.params = yaml.safe_load((self.project / "params.yaml").read_text())
        change, self.outputs = CHANGES[stage]
        changed = {**self.params, "overrides": merge(self.params["overrides"], change)}
        self.changed = yaml.safe_dump(changed)
        if stage == "sweep":
            self.outputs = ["sweep/full", "sweep/full.csv", "sweep/full.json"]

        self.config = None

    def reset(self):
        shutil.rmtree(self.project / "data")
        shutil.copytree(self.good, self.project / "data", symlinks=True)
        (self.project / "params.yaml").write_text(self.changed)
        if self.stage in ("config", "sweep"):
            return
        path = self.digits / "config.yaml"
        if self.config is None:
            done = self.disk.run(*command_of("config"))
            assert done.returncode == 0, done.stderr
            self.config = path.read_text()
            if self.stage in BEFORE:
                done = self.disk.run(*command_of(BEFORE[self.stage]))
                assert done.returncode == 0, done.stderr
                self.good = self.good.with_name(self.stage)
                shutil.rmtree(self.good, ignore_errors=True)
                shutil.copytree(self.project / "data", self.good, symlinks=True)
        path.write_text(self.config)

    def run(self, **options):
        return self.disk.run(*command_of(self.stage), **options)

    def made(self, folder=None):
        folder = folder or self.digits
        return {
            str(path.relative_to(folder)): content(path)
            for name in self.outputs
            for path in [folder / name, *sorted((folder / name).rglob("*"))]
            if path.is_file()
        }

    def end(self):
        (self.project / "params.yaml").write_text(yaml.safe_dump(self.params))


def content(path):
    """Of a file; the sweep's tables say what trials cost, which no two runs agree on."""
    if "sweep" in path.parts and path.suffix == ".csv":
        table = pd.read_csv(path)
        return table.drop(
            columns=[c for c in table if c.startswith(("seconds", "memory"))]
        ).to_csv()
    if "sweep" in path.parts and path.name == "sweep.json":  # the seal, of those tables too
        return {
            k: v for k, v in json.loads(path.read_text()).items() if k in ("kind", "fingerprint")
        }
    if "sweep" in path.parts and path.name == "table.json":
        rows = json.loads(path.read_text())["rows"]
        return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]
    return path.read_bytes()


def merge(one, other):
    merged = dict(one)
    for name, value in other.items():
        merged[name] = merge(one.get(name, {}), value) if isinstance(value, dict) else value
    return merged


@pytest.fixture
def case(request, disk, good):
    made = Case(disk, good, request.param)
    yield made
    made.end()


def assert_refused(case, done, reason, remedy):
    """One line that names the place and the remedy, and the artifacts of the run before, untouched."""
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "Traceback" not in said
    [line] = [line for line in said.splitlines() if "error" in line.lower()]
    assert line.startswith(f"{case.stage}: error: "), line
    assert reason in line
    assert remedy in line or ("ray.storage" in line and "put that right" in line)
    assert "data" in line.split(reason)[1] or "/data/digits" in line, line
    assert case.made() == case.made(case.good / "digits")
    return line


@pytest.mark.parametrize("case", CHANGES, indirect=True)
def test_a_full_disk_costs_nothing_but_time(case):
    case.reset()
    before = case.made()
    with case.disk.peak() as peak:
        done = case.run()
    assert done.returncode == 0, done.stdout + done.stderr
    expected = case.made()
    assert expected != before
    # A file that is written at once may be in place before anybody has looked.
    most = max(peak[0], sum((case.digits / name).stat().st_size for name in expected))
    cases = Counter()
    for pages in sorted({int(most * share) // PAGE for share in SHARES}):
        case.reset()
        case.disk.fill(pages * PAGE)
        try:
            done = case.run()
        finally:
            case.disk.free()
        if done.returncode == 0 and pages:
            cases["room enough"] += 1
            continue
        line = assert_refused(case, done, "No space left on device", "space")
        cases["refused"] += 1
        fingerprint, resuming = RESUMED.get(case.stage, (None, None))
        begun = fingerprint and list(case.digits.glob(f".scratch/{case.stage}-*/{fingerprint}"))
        done = case.run()
        assert done.returncode == 0, done.stdout + done.stderr
        assert case.made() == expected
        if begun:
            cases["resumed"] += 1
            assert resuming in done.stdout
        assert list(case.digits.rglob("*.partial")) == []
        assert {p.name for p in case.digits.glob(".scratch/*")} <= {"sweep", "ray"}
        print(f"{case.stage}, room for {pages * PAGE} of {most} bytes: {line}")
    print(case.stage, dict(cases))
    assert cases["refused"] >= (1 if case.stage == "config" else 2)  # which is one page
    assert case.stage not in RESUMED or cases["resumed"]


@pytest.mark.parametrize("case", CHANGES, indirect=True)
def test_a_read_only_disk_is_named(case):
    case.reset()
    case.disk.remount("ro")
    try:
        done = case.run()
    finally:
        case.disk.remount("rw")
    print(assert_refused(case, done, "Read-only file system", "writable"))
    done = case.run()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CHANGES, indirect=True)
def test_missing_permission_is_named(case):
    case.reset()
    data = case.project / "data"
    for path in [data, *data.rglob("*")]:
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    done = case.run(capable=False)
    print(assert_refused(case, done, "Permission denied", "permissions"))


def repro(disk):
    return disk.run("python", "-m", "dvc", "repro", "extract_mixture", timeout=900)


def tracked(project):
    """Bytes of every file that DVC has locked."""
    stages = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    paths = [project / out["path"] for stage in stages.values() for out in stage["outs"]]
    return {
        str(file.relative_to(project)): file.read_bytes()
        for path in paths
        for file in [path, *sorted(path.rglob("*"))]
        if file.is_file()
    }


def test_dvc_goes_on_when_there_is_space_again(disk, tmp_path):
    project = disk.path / "project"
    shutil.rmtree(project / "data", ignore_errors=True)
    before = (project / "params.yaml").read_text()
    kept = tmp_path / "kept"
    try:
        done = repro(disk)
        assert done.returncode == 0, done.stdout + done.stderr
        shutil.copytree(project, kept)
        params = yaml.safe_load(before)
        params["overrides"] = merge(params["overrides"], {"data": {"split_seed": 7}})
        changed = yaml.safe_dump(params)
        (project / "params.yaml").write_text(changed)
        with disk.peak() as peak:
            done = repro(disk)
        assert done.returncode == 0, done.stdout + done.stderr
        expected = tracked(project)
        for share in (0, 0.3, 0.7):
            shutil.rmtree(project)
            shutil.copytree(kept, project)
            (project / "params.yaml").write_text(changed)
            disk.fill(int(peak[0] * share))
            try:
                done = repro(disk)
            finally:
                disk.free()
            said = done.stdout + done.stderr
            assert done.returncode != 0, said
            print(
                f"dvc repro, room for {share:.0%} of {peak[0]} bytes:\n{said[-1500:]}", flush=True
            )
            assert "No space left on device" in said
            done = repro(disk)
            assert done.returncode == 0, done.stdout + done.stderr
            assert tracked(project) == expected
            done = disk.run("python", "-m", "dvc", "status", "extract_mixture")
            assert done.stdout.strip() == "Data and pipelines are up to date."
    finally:
        (project / "params.yaml").write_text(before)
