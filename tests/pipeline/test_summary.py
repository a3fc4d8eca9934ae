import json
import subprocess
import sys

import pytest

from cpmm.cli import summary

METRICS = {
    "preset": "digits",
    "unit": "bits/dim",
    "models": {
        "cpmm": {"density": 2.0, "accuracy": 0.875, "n_components": 6, "n_parameters": 99},
        "direct": {"density": 2.25},
        "kmeans": {"accuracy": 0.75},
    },
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "digits"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "dvc.lock").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(summary, "ROOT", tmp_path)
    monkeypatch.setattr(summary, "listed_presets", lambda: ["digits"])
    monkeypatch.setattr(sys, "argv", ["summary"])
    return tmp_path


def printed(capsys):
    summary.main()
    return capsys.readouterr().out.splitlines()


def git(*arguments):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True)


def test_the_main_figures_are_printed_and_nothing_more_without_git(root, capsys, monkeypatch):
    figures = [
        "digits: data/digits/report.html",
        "  test density     2.000 bits/dim (lower is better; direct mixture 2.250)",
        "  clustering       87.5 % accuracy (k-means 75.0 %)",
        "  mixture          6 components, 99 parameters",
    ]
    assert printed(capsys) == figures  # no repository
    monkeypatch.setenv("PATH", "")
    assert printed(capsys) == figures  # no git


def test_what_git_calls_modified_is_explained(root, capsys):
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "as published")
    (root / "data" / "digits" / "own.json").write_text("{}")  # not in git: nothing to bring back
    (root / "params.yaml").write_text("presets: [digits]\noverrides: {}\n")
    assert len(printed(capsys)) == 4
    for path in (root / "dvc.lock", root / "data" / "digits" / "metrics.json"):
        path.write_text(path.read_text() + "\n")
    why, remedy = printed(capsys)[4:]
    assert why.startswith(
        "Modified, says git: data/digits/metrics.json, dvc.lock. Last digits differ"
    )
    assert remedy.startswith("`git checkout dvc.lock data` brings the committed ones back")
    git("checkout", "-q", "dvc.lock", "data")
    assert len(printed(capsys)) == 4


def test_a_preset_that_was_not_evaluated_is_named(root, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["summary", "rings"])
    with pytest.raises(SystemExit):
        summary.main()
    assert capsys.readouterr().err.startswith("summary: error: data/rings/metrics.json is missing")
