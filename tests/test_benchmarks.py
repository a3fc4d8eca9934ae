from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from cpmm.artifact import file_digest
from cpmm.pipeline.artifacts.store import load_prepared
from cpmm.pipeline.config.compose import compose_preset
from workflows import evaluate, prepare_data, train_teacher

ROOT = Path(__file__).parents[1]
TEACHER = [
    "teacher.field.width=16",
    "teacher.field.depth=1",
    "teacher.solver.n_steps=4",
    "teacher.n_draws=1",
    "teacher.flow_matching_epochs=3",
    "evaluation.teacher_points=50",
]


@pytest.mark.slow
def test_the_benchmark_runs_and_its_peers_agree(tmp_path):
    file = tmp_path / "speed.json"
    command = [sys.executable, "benchmarks/speed.py", "--quick", "--repeats", "1", "--json", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parts = json.loads(file.read_text())["parts"]
    assert list(parts) == ["density", "step", "einsum", "reading", "writing"]
    by_name = {row["name"]: row for row in parts["density"]}
    assert by_name["torch MixtureSameFamily, low rank, 512 points"]["unit"] == "x our time"
    assert any(name.startswith("pomegranate") for name in by_name)  # timed, or said to be missing
    assert any(row["name"].startswith("SPFlow Einet") for row in parts["einsum"])


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nopreset"], 1, "seeds: error: unknown preset 'nopreset'"),
        (["digits", "cpmm.n_factor=3"], 1, "seeds: error: preset 'digits' cannot be composed"),
        (["digits", "--seeds", "0"], 2, "--seeds: expected a whole number of at least 1, got '0'"),
    ],
)
def test_seeds_at_fault_are_named(arguments, status, said):
    command = [sys.executable, "benchmarks/seeds.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False)
    assert said in done.stderr


def test_an_unknown_part_is_refused():
    command = [sys.executable, "benchmarks/speed.py", "density", "speed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no part speed: choose among density, step, einsum, reading, writing" in done.stderr


def run_teachers(*arguments):
    command = [sys.executable, "benchmarks/teachers.py", "digits", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_teachers_are_trained_and_scored_as_by_the_pipeline_and_a_failure_is_recorded(tmp_path):
    folder, config = tmp_path / "digits", compose_preset("digits", TEACHER)
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for stage in (prepare_data, train_teacher):
        stage.main(folder, config)
    with torch.no_grad():
        data = load_prepared(folder / "prepared")
        row = evaluate._score_teacher(folder, config, data, ood=None)
    before = {path: file_digest(path) for path in folder.rglob("*") if path.is_file()}
    records = {}
    for name, options in {"anew": [], "trained": ["--trained", "--refine-rate", "1e9"]}.items():
        file = tmp_path / f"{name}.json"
        size = ("--likelihood-epochs", 1, "--likelihood-points", 128, "--likelihood-batch", 64)
        done = run_teachers("--data", folder, *size, "--points", 50, "--out", file, *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n|") == 5  # a header of two lines, three arms
        records[name] = json.loads(file.read_text())["arms"]
        density = records[name]["flow matching"]["density"]
        # Another process may sum in another order.
        assert density == pytest.approx(row["density"], rel=1e-5)
        assert records[name]["maximum likelihood"]["phases"][0]["steps"] == 2
    refined = [arms["flow matching, then maximum likelihood"] for arms in records.values()]
    assert [len(arm.get("phases", ())) for arm in refined] == [2, 0]
    assert refined[1]["status"] == "failed"
    assert "the teacher has diverged" in refined[1]["reason"]
    assert {path: file_digest(path) for path in folder.rglob("*") if path.is_file()} == before


def test_a_trained_teacher_has_no_epochs_to_choose():
    done = run_teachers("--trained", "--flow-matching-epochs", 3)
    assert done.returncode == 2
    assert "leave out --flow-matching-epochs" in done.stderr
