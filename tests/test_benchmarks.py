from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_benchmark_runs_and_its_peers_agree(tmp_path):
    file = tmp_path / "speed.json"
    command = [sys.executable, "benchmarks/speed.py", "--quick", "--repeats", "1", "--json", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parts = json.loads(file.read_text())["parts"]
    assert list(parts) == ["density", "step", "reading", "writing"]
    by_name = {row["name"]: row for row in parts["density"]}
    assert by_name["torch MixtureSameFamily, low rank, 512 points"]["unit"] == "x our time"
    assert any(name.startswith("pomegranate") for name in by_name)  # timed, or said to be missing


def test_an_unknown_part_is_refused():
    command = [sys.executable, "benchmarks/speed.py", "density", "speed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no part speed: choose among density, step, reading, writing" in done.stderr
