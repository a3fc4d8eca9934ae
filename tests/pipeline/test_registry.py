"""Artifacts as a colleague gets them: from the remote in the repository, and by revision."""

import hashlib
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, TINY, copy_project, project_environment


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
    """Everything that git keeps of this project, as it is now, and nothing else."""
    listed = run(ROOT, "git", "ls-files", "-co", "--exclude-standard").splitlines()
    for file in listed:
        if (ROOT / file).is_file():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, tmp_path / file)
    git(tmp_path, "init", "-q")
    return tmp_path


def test_a_clone_has_all_after_a_pull_and_nothing_to_do(clone):
    assert not (clone / "data" / "digits" / "mixture").exists()
    lock = (clone / "dvc.lock").read_bytes()
    dvc(clone, "pull")
    assert "Data and pipelines are up to date." in dvc(clone, "repro")
    assert (clone / "dvc.lock").read_bytes() == lock
    assert "are whole" in run(clone, sys.executable, "workflows/verify.py")
    assert (clone / "data" / "digits" / "report.html").read_text().rstrip().endswith("</html>")
    code = (
        "import torch; from cpmm.fitted import FittedMixture as F; m = F.load('data/digits/mixture'); "
        "g = torch.Generator().manual_seed(0); x, _ = m.sample(100, g); "
        "print(float(m.density(m.log_prob(x, g)).mean()))"
    )
    assert 1 < float(run(clone, sys.executable, "-c", code)) < 3


def test_git_carries_no_file_of_an_artifact():
    stages = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    outs = [out["path"] for stage in stages.values() for out in stage.get("outs", [])]
    carried = subprocess.run(
        ["git", "ls-files", "--cached", "data"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    folders = tuple(f"{path}/" for path in outs)
    assert not [path for path in carried if path.startswith(folders)]


def test_the_remote_in_the_repository_is_small_and_holds_what_the_lock_names_and_no_more():
    files = [path for path in (ROOT / "data" / "remote").rglob("*") if path.is_file()]
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) < 2**20
    assert sum(sizes) < 18 * 2**20  # spaces 7 MB, baselines 6, sweeps 1
    params = yaml.safe_load((ROOT / "params.yaml").read_text())["presets"]
    stages = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    outs = [out for stage in stages.values() for out in stage.get("outs", [])]
    named = {out["md5"] for out in outs if out["path"].split("/")[1] in params}
    held = {"".join(path.parts[-2:]) for path in files}
    folders = [path for path in files if path.name.endswith(".dir")]
    for path in folders:
        named |= {item["md5"] for item in yaml.safe_load(path.read_text())}
    assert held <= named, "objects that no artifact needs: see docs/artifacts.md"
    for path in files:
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        assert digest == "".join(path.parts[-2:]).removesuffix(".dir")


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
