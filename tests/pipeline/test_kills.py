"""Every stage under `dvc repro` is killed at random moments; what comes out is the same.

pytest -m slow tests/pipeline/test_kills.py -s      # prints each kill
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import STAGES, TINY, copy_project, project_environment

from cpmm.pipeline.config.fingerprints import EVALUATED

KILLS_BY_STAGE = 6
SEED = 0
VICTIMS = ("stage", "stage and its children", "dvc", "dvc and everything")
ADDRESS = {
    name: f"{name}@digits" for name in ("config", *STAGES)
} | {"train_baseline": "train_baseline@digits-direct", "sweep": "sweep@digits-killed"}  # fmt: skip
BASELINES = {f"train_baseline@digits-{row}" for row in EVALUATED}
SECONDS_TO_END = 20  # for all that descends from a victim; Ray's processes are the slow ones
SIZES = [
    "teacher.flow_matching_epochs=20", "teacher.solver.n_steps=10", "spaces.n_spaces=7", "spaces.n_draws=2",
    "cpmm.epochs_per_space=3", "baselines.direct.epochs=8",
]  # fmt: skip
SWEEP = {
    "defaults": ["default"],
    "name": "killed",
    "seeds": 2,
    "overrides": {
        "cpmm.pseudo_label_spaces": 0,
        "cpmm.curriculum": False,
        "cpmm.fine_tune_epochs": 25,
    },
    "parts": {"alone": {"grid": {"cpmm.initialization.kind": ["random", "kmeans"]}}},
}
MARK = "CPMM_TEST_OF_KILLS"


class Project:
    """A copy of the project, in git, and every process that descends from its commands."""

    def __init__(self, folder):
        self.folder = copy_project(folder, [*TINY, *SIZES])
        self.digits = self.folder / "data" / "digits"
        (folder / "conf" / "sweep" / "killed.yaml").write_text(yaml.safe_dump(SWEEP))
        params = yaml.safe_load((folder / "params.yaml").read_text()) | {"sweeps": ["killed"]}
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        path = folder / "conf" / "ray" / "default.yaml"
        options = yaml.safe_load(path.read_text())
        path.write_text(
            yaml.safe_dump(options | {"checkpoint_seconds": 0.5, "report_seconds": 0.5})
        )
        self.git("add", "-A")
        self.git("-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-qm", "all")
        self.log = folder.with_suffix(".log")
        # Not below tmp_path: the paths of Ray's sockets must be short.
        self.temporary = Path(tempfile.mkdtemp(prefix="kills-"))

    def git(self, *arguments):
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=self.folder, check=True, capture_output=True, text=True
        ).stdout

    def dvc(self, *arguments):
        environment = project_environment(self.folder) | {
            MARK: str(self.folder), "TMPDIR": str(self.temporary)
        }  # fmt: skip
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dvc", *arguments], cwd=self.folder, env=environment, stdout=log,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def repro(self, *arguments):
        began = self.log.stat().st_size if self.log.exists() else 0
        status = self.dvc("repro", *arguments).wait(600)
        printed = self.log.read_bytes()[began:].decode()
        assert status == 0, printed[-4000:]
        return printed

    def processes(self):
        """All that descend from a command of this project, whoever their parent is now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.folder):
                    found.append(process)
        return found

    def outputs(self):
        """Bytes of every file that DVC tracks, by path, without what a run took."""
        lock = yaml.safe_load((self.folder / "dvc.lock").read_text())["stages"]
        assert set(lock) == set(ADDRESS.values()) | BASELINES
        files = {}
        for stage in lock.values():
            for out in stage["outs"]:
                path = self.folder / out["path"]
                for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                    if file.is_file():
                        files[str(file.relative_to(self.folder))] = without_times(file)
        return files


def without_times(file):
    """Content of a file; the sweep's tables say what trials cost, which no two runs agree on."""
    if "sweep" not in file.parts:
        return file.read_bytes()
    if file.suffix == ".csv":
        import pandas as pd

        table = pd.read_csv(file)
        return table.drop(
            columns=[c for c in table if c.startswith(("seconds", "memory"))]
        ).to_csv()
    if file.name == "sweep.json":  # the seal, of those tables too
        return {
            k: v for k, v in json.loads(file.read_text()).items() if k in ("kind", "fingerprint")
        }
    if file.name == "table.json":
        content = json.loads(file.read_text())
        for row in content["rows"]:
            for name in [name for name in row if name.startswith("seconds")]:
                del row[name]
        return content
    return file.read_bytes()


def wait_for_stage(dvc, stage):
    """The process of a stage, once DVC has started it; None if DVC ended without."""
    while dvc.poll() is None:
        with suppress(psutil.Error):
            for child in psutil.Process(dvc.pid).children():
                if child.environ().get("DVC_STAGE") == ADDRESS[stage]:
                    return child
        time.sleep(0.01)
    return None


def is_over(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def kill(victim, dvc, stage):
    """Kill -9, parents first, so that none can tidy up after another."""
    tree = [stage, *stage.children(recursive=True)]
    chosen = {
        "stage": [stage],
        "stage and its children": tree,
        "dvc": [psutil.Process(dvc.pid)],
        "dvc and everything": [psutil.Process(dvc.pid), *tree],
    }[victim]
    for process in chosen:
        with suppress(psutil.Error):
            process.kill()


def seconds_until_gone(project):
    began = time.monotonic()
    while left := project.processes():
        waited = time.monotonic() - began
        assert waited < SECONDS_TO_END, [(p.pid, p.cmdline()) for p in left]
        time.sleep(0.05)
    return time.monotonic() - began


def measure(project):
    """Make everything, undisturbed; seconds that each stage took."""
    seconds = {}
    dvc = project.dvc("repro")
    for stage in ADDRESS:
        process = wait_for_stage(dvc, stage)
        assert process is not None, project.log.read_text()[-4000:]
        began = time.monotonic()
        while not is_over(process):
            time.sleep(0.01)
        seconds[stage] = time.monotonic() - began
    assert dvc.wait(600) == 0, project.log.read_text()[-4000:]
    return seconds


def forced(again):
    """Options for a stage that DVC knows the result of, and would take from its cache."""
    return ["-f", "-s"] if again else []


def kill_once(project, stage, victim, moment, again):
    """Run DVC, and kill after ``moment`` seconds of the stage; None if that has ended before."""
    began = project.log.stat().st_size if project.log.exists() else 0
    dvc = project.dvc("repro", *forced(again), ADDRESS[stage])
    process = wait_for_stage(dvc, stage)
    assert process is not None, project.log.read_bytes()[began:].decode()[-4000:]
    time.sleep(moment)
    missed = is_over(process)
    if not missed:
        kill(victim, dvc, process)
    status = dvc.wait(600)
    took = seconds_until_gone(project)
    printed = project.log.read_bytes()[began:].decode()
    if missed or status == 0:
        assert status == 0, printed[-4000:]
        return None
    expected = -9 if victim.startswith("dvc") else 255
    assert status == expected, (status, printed[-4000:])
    return took


@pytest.fixture
def make_project(tmp_path):
    made = []

    def make(name):
        made.append(Project(tmp_path / name))
        return made[-1]

    yield make
    for project in made:
        for process in project.processes():  # of a test that failed
            process.kill()
        shutil.rmtree(project.temporary, ignore_errors=True)


@pytest.mark.slow
def test_what_is_killed_again_and_again_comes_out_the_same(make_project):
    whole = make_project("whole")
    seconds = measure(whole)
    print({stage: round(value, 1) for stage, value in seconds.items()}, flush=True)
    seconds_until_gone(whole)

    killed = make_project("killed")
    chance = random.Random(SEED)
    kills, slowest, missed = Counter(), Counter(), 0
    for stage in ADDRESS:
        victims = [*VICTIMS, *chance.choices(VICTIMS, k=KILLS_BY_STAGE - len(VICTIMS))]
        chance.shuffle(victims)
        again = False
        while victims:
            moment = chance.uniform(0, seconds[stage])
            took = kill_once(killed, stage, victims[0], moment, again)
            again = again or took is None
            missed += took is None
            if took is None and stage == "sweep":  # what its archive knows would not run again
                shutil.rmtree(killed.digits / ".scratch" / "sweep")
            if took is not None:
                victim = victims.pop(0)
                kills[stage, victim] += 1
                slowest[victim] = max(slowest[victim], took)
                print(
                    f"{kills.total()}: {stage}, {victim}, after {moment:.2f} of {seconds[stage]:.2f} s; "
                    f"nothing left after {took:.1f} s",
                    flush=True,
                )
        assert "Running stage" in killed.repro(*forced(again), ADDRESS[stage])
    assert kills.total() >= 50
    print({stage: [kills[stage, victim] for victim in VICTIMS] for stage in ADDRESS}, VICTIMS)
    print(f"{missed} ended before their kill; slowest end:", dict(slowest), flush=True)

    killed.repro()
    assert "Data and pipelines are up to date." in killed.repro()
    before, after = whole.outputs(), killed.outputs()
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name]] == []
    killed_status = subprocess.run(
        [sys.executable, "-m", "dvc", "status"], cwd=killed.folder, env=project_environment(killed.folder),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert killed_status.stdout.strip() == "Data and pipelines are up to date."
    assert killed.git("status", "--porcelain", "-uall") == whole.git(
        "status", "--porcelain", "-uall"
    )
    assert list(killed.folder.rglob("*.partial")) == []
    assert left_in(killed.digits / ".scratch") <= {"sweep", "ray"}
    assert left_in(killed.folder / ".dvc" / "tmp") == left_in(whole.folder / ".dvc" / "tmp")
    for project in (whole, killed):
        assert not list(project.temporary.glob("cpmm-*")), "left by trials"
        cached = [path for path in (project.folder / ".dvc" / "cache").rglob("*") if path.is_file()]
        assert not [path for path in cached if path.name.endswith(".tmp")]
        print(
            f"{project.folder.name}: {len(cached)} files in DVC's cache, among temporary files "
            f"{sorted(left_in(project.temporary))}"
        )


def left_in(folder):
    return {path.name for path in folder.iterdir()}
