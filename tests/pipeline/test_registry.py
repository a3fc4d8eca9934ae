"""Artifacts as a colleague gets them: from the remote in the repository, and by revision."""

import hashlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, TINY, clone_project, copy_code, copy_project, project_environment

# Tests that read dvc.lock, params.yaml or data/.
JUDGES = ("lists", "registry")


def run(folder, *command, check=True):
    done = subprocess.run(
        command, cwd=folder, env=project_environment(folder), capture_output=True, text=True,
        timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done.stdout + done.stderr


def dvc(folder, *arguments):
    return run(folder, sys.executable, "-m", "dvc", *arguments)


def git(folder, *arguments):
    return run(folder, "git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments)


@pytest.fixture
def clone(tmp_path):
    """What git holds of this project, and nothing else."""
    return clone_project(tmp_path / "clone")


def test_a_clone_has_all_after_a_pull_and_nothing_to_do(clone):
    assert not (clone / "data" / "digits" / "mixture").exists()
    lock = (clone / "dvc.lock").read_bytes()
    dvc(clone, "pull")
    assert "Data and pipelines are up to date." in dvc(clone, "repro", "--dry")  # or fail at once
    assert "Data and pipelines are up to date." in dvc(clone, "repro")
    assert (clone / "dvc.lock").read_bytes() == lock
    assert "are whole" in run(clone, sys.executable, "-m", "cpmm.pipeline.artifacts.verify")
    assert (clone / "data" / "digits" / "report.html").read_text().rstrip().endswith("</html>")
    code = (
        "import torch; from cpmm.fitted import FittedMixture as F; m = F.load('data/digits/mixture'); "
        "g = torch.Generator().manual_seed(0); x, _ = m.sample(100, g); "
        "print(float(m.density(m.log_prob(x, g)).mean()))"
    )
    assert 1 < float(run(clone, sys.executable, "-c", code)) < 3


def locked_outs(clone):
    stages = yaml.safe_load((clone / "dvc.lock").read_text())["stages"]
    return [out for stage in stages.values() for out in stage.get("outs", [])]


def test_git_carries_no_file_of_an_artifact(clone):
    carried = git(clone, "ls-files", "data").splitlines()
    folders = tuple(f"{out['path']}/" for out in locked_outs(clone))
    assert not [path for path in carried if path.startswith(folders)]


def test_the_remote_in_the_repository_is_small_and_holds_what_the_lock_names_and_no_more(clone):
    files = [path for path in (clone / "data" / "remote").rglob("*") if path.is_file()]
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) < 2**20
    assert sum(sizes) < 18 * 2**20  # spaces 7 MB, baselines 6, sweeps 1
    params = yaml.safe_load((clone / "params.yaml").read_text())["presets"]
    named = {out["md5"] for out in locked_outs(clone) if out["path"].split("/")[1] in params}
    held = {"".join(path.parts[-2:]) for path in files}
    folders = [path for path in files if path.name.endswith(".dir")]
    for path in folders:
        named |= {item["md5"] for item in yaml.safe_load(path.read_text())}
    assert held <= named, "objects that no artifact needs: see docs/artifacts.md"
    for path in files:
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        assert digest == "".join(path.parts[-2:]).removesuffix(".dir")


@pytest.mark.slow
def test_what_a_user_has_made_in_the_work_tree_is_not_judged(clone):
    copy_code(clone)
    shutil.copytree(ROOT / "tests", clone / "tests", dirs_exist_ok=True)
    git(clone, "add", "-A", "cpmm", "conf", "workflows", "tests", "dvc.yaml")
    git(clone, "commit", "-qm", "as here", "--allow-empty")
    for path in (clone / "dvc.lock", *clone.glob("data/digits/**/*.json")):  # other last digits
        text = re.sub(r"(md5: \w{30})\w\w", r"\g<1>00", path.read_text())
        path.write_text(re.sub(r"(\.\d{8})\d+", r"\1", text))
    params = "presets: [rings]\nsweeps: []\nbaselines: [mine]\ncompared: []\noverrides: {seed: 3}\n"
    (clone / "params.yaml").write_text(params)
    (clone / "data" / "code.yaml").write_text("compose: {hash: 0123456789abcdef}\n")
    for name in (".scratch/train_cpmm-abc/last.ckpt", "trial/record.json", "prepared/arrays"):
        path = clone / "data" / "digits" / name
        path.parent.mkdir(parents=True)
        path.write_text("half of it")
    files = [f"tests/pipeline/test_{name}.py" for name in JUDGES]
    printed = run(clone, sys.executable, "-m", "pytest", "-q", "-m", "not slow", *files)
    assert " passed" in printed


@pytest.mark.slow
def test_the_commands_of_docs_artifacts(tmp_path):
    project = copy_project(tmp_path / "project", TINY)
    dvc(project, "remote", "add", "--local", "-d", "mine", str(tmp_path / "store"))
    values = {}
    for tag, n_clusters in (("digits-1", 10), ("digits-2", 9)):
        params = yaml.safe_load((project / "params.yaml").read_text())
        params["overrides"]["cpmm"]["n_clusters"] = n_clusters
        (project / "params.yaml").write_text(yaml.safe_dump(params))
        dvc(project, "repro", "report")
        dvc(project, "push")
        git(project, "add", "-A")
        git(project, "commit", "-qm", tag)
        git(project, "tag", tag)
        values[tag] = (project / "data/digits/mixture/mixture.json").read_bytes()
    assert values["digits-1"] != values["digits-2"]

    dvc(project, "get", ".", "data/digits/mixture", "--rev", "digits-1", "-o", "mixture-1")
    assert (project / "mixture-1" / "mixture.json").read_bytes() == values["digits-1"]
    dvc(project, "get", ".", "data/digits/report.html", "--rev", "digits-1", "-o", "report-1.html")
    assert "n_clusters: 10" in (project / "report-1.html").read_text()
    code = (
        "import dvc.api, json; print(json.loads(dvc.api.read('data/digits/mixture/mixture.json', "
        "repo='.', rev='digits-1'))['cluster_sizes'])"
    )
    assert str([3] * 10) in run(project, sys.executable, "-c", code)
    printed = run(
        project, sys.executable, "-m", "cpmm", "info", "dvc+.@digits-1#data/digits/mixture"
    )
    assert "clusters                 10" in printed

    printed = dvc(project, "metrics", "diff", "digits-1", "digits-2")
    assert "models.cpmm.density" in printed
    targets = ("--targets", "data/digits/config.yaml")
    printed = dvc(project, "params", "diff", "digits-1", "digits-2", *targets)
    assert "cpmm.n_clusters" in printed

    for path in ("mixture-1", "report-1.html"):
        run(project, "rm", "-r", path)
    git(project, "checkout", "-q", "digits-1")
    dvc(project, "checkout", "-d", "report")  # the sweep was not run here
    assert (project / "data/digits/mixture/mixture.json").read_bytes() == values["digits-1"]
    assert "Data and pipelines are up to date." in dvc(project, "repro", "report")
    git(project, "switch", "-q", "-")
    dvc(project, "checkout", "-d", "report")  # the sweep was not run here
    git(project, "checkout", "digits-1", "--", "conf", "params.yaml", "dvc.lock", "data")
    dvc(project, "checkout", "-d", "report")  # the sweep was not run here
    assert "Data and pipelines are up to date." in dvc(project, "repro", "report")
