"""What pip installs: one package, and as much beside it as somebody asks for."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from cpmm.pipeline.config.code import reached_files
from cpmm.pipeline.errors import EXTRAS
from cpmm.preprocessing import Preprocessing
from tests.test_fitted import make_mixture, save

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"benchmarks", "cases", "conftest", "cpmm", "tests", "workflows"}
# What a folder or file may import beside the core; the first that fits counts.
NEEDS = {
    "cpmm/baselines/": "train",
    "cpmm/cli/": "cli",
    "cpmm/export.py": "onnx",
    "cpmm/figures.py": "cli",
    "cpmm/fonts.py": "cli",
    "cpmm/plots.py": "cli",
    "cpmm/pipeline/sweeps/": "sweep",
    "cpmm/reading/": "cli",
    "cpmm/pipeline/": "workflow",
    "cpmm/": "train",
    "workflows/": "sweep",
    "benchmarks/": "sweep benchmarks",
    "tests/": "sweep servers test",
}
USE = """
import sys, torch
from cpmm.fitted import FittedMixture
fitted, generator = FittedMixture.load(sys.argv[1]), torch.Generator().manual_seed(0)
x, cluster = fitted.sample(50, generator)
scores = fitted.log_prob(x, generator)
predicted = fitted.cluster_responsibilities(x, generator).argmax(1)
assert x.shape == (50, 2) and scores.isfinite().all() and set(predicted.tolist()) <= {0, 1}
assert len(set(cluster.tolist())) == 2
"""
COUNT = "from importlib.metadata import distributions as d; print(*sorted({x.name for x in d()}))"


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def names_of(requirements):
    return {canonical(re.match(r"[\w.-]+", text)[0]) for text in requirements} - {"cpmm"}


def declared(extras):
    """Distributions that the core and some extras name, and the extras within them."""
    found, left = names_of(PROJECT["dependencies"]), extras.split()
    while left:
        requirements = PROJECT["optional-dependencies"][left.pop()]
        found |= names_of(requirements)
        within = [text for text in requirements if text.startswith("cpmm[")]
        left += [extra for text in within for extra in text[5:-1].split(",")]
    return found


DISTRIBUTIONS = metadata.packages_distributions()


def distributions_of(module):
    """Who brings a module, by what is installed; else one that is called as it is."""
    return {canonical(name) for name in DISTRIBUTIONS.get(module, [module])}


def third_party(path):
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module.partition(".")[0])
    return modules - OURS - set(sys.stdlib_module_names)


def test_what_is_imported_is_declared_by_the_extra_of_its_room():
    missing = set()
    for room in ("cpmm", "workflows", "benchmarks", "tests"):
        for path in sorted((ROOT / room).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            known = declared(next(NEEDS[start] for start in NEEDS if name.startswith(start)))
            unknown = {m for m in third_party(path) if not distributions_of(m) & known}
            missing |= {(name, module) for module in unknown}
    assert missing == set()


def test_a_mixture_needs_the_core_alone():
    files = reached_files(ROOT / "cpmm" / "fitted.py").values()
    assert set().union(*map(third_party, files)) <= {"numpy", "safetensors", "torch"}
    assert declared("") == {"numpy", "safetensors", "torch"}


def test_the_remedy_for_a_missing_module_names_the_extra_that_declares_it():
    for extra, modules in EXTRAS.items():
        own = names_of(PROJECT["optional-dependencies"][extra])
        assert set().union(*map(distributions_of, modules)) & own == own
        assert all(distributions_of(module) & own for module in modules)


def run(*command, cwd, check=True):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the code as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "cpmm", folder / "source" / "cpmm", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = ["wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"]
    run(sys.executable, "-m", "pip", *command, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


class Environment:
    """A virtual environment with nothing in it, used in a folder with nothing in it."""

    def __init__(self, folder):
        venv.create(folder / "venv", with_pip=False)
        self.bin, self.folder = folder / "venv" / "bin", folder / "empty"
        self.folder.mkdir()
        # Torch by pip, as in the Makefile.
        self.pip("--no-deps", "--no-compile", "torch")

    def pip(self, *what):
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "-q"]
        run(*pip, "-c", ROOT / "constraints.txt", *what, cwd=self.folder)

    def install(self, what):
        uv = shutil.which("uv")
        if uv is None:
            return self.pip(what)
        pip = [uv, "pip", "install", "-q", "--python", self.bin / "python"]
        return run(*pip, "-c", ROOT / "constraints.txt", what, cwd=self.folder)

    def python(self, *arguments):
        return run(self.bin / "python", *arguments, cwd=self.folder).stdout

    def cpmm(self, *arguments, check=True):
        return run(self.bin / "cpmm", *arguments, cwd=self.folder, check=check)

    def end_of(self, *arguments):
        """The one line in which a command fails."""
        done = self.cpmm(*arguments, check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
        return done.stderr.strip()


@pytest.mark.slow
def test_the_wheel_is_one_package_and_states_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        text = opened.read(next(n for n in names if n.endswith("METADATA"))).decode()
    tops = {name.partition("/")[0] for name in names}
    assert [top for top in tops if not top.endswith(".dist-info")] == ["cpmm"]
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "cpmm").rglob("*.py")}
    kept = sources | {"cpmm/py.typed", "cpmm/pipeline/scores/published.csv"}
    assert {name for name in names if name.startswith("cpmm/")} == kept
    for line in (
        "Author: the cpmm developers",
        "Classifier: Typing :: Typed",
        "License-Expression: MIT",
    ):
        assert f"\n{line}\n" in text


@pytest.mark.slow
def test_the_core_alone_uses_a_mixture_and_a_missing_extra_is_named(wheel, tmp_path, generator):
    pre = Preprocessing(None, None, (1.0, -2.0), (0.5, 3.0))
    mixture = save(tmp_path / "mixture", make_mixture(generator, 2), pre, None)
    place = Environment(tmp_path)
    place.install(str(wheel))
    packages = place.python("-c", COUNT).split()
    print(f"{len(packages)} packages: {', '.join(packages)}")
    assert len(packages) <= 14
    place.python("-c", USE, mixture)
    (place.folder / "x.csv").write_text("x0,x1\n0.5,1.5\n")
    points = [mixture, "x.csv"]
    remedy = "is not installed: pip install 'cpmm[cli]'"
    for command in (["score", *points], ["predict", *points], ["sample", mixture]):
        assert place.end_of(*command).endswith(f"pandas {remedy}")
    plot = place.end_of("plot", mixture, "--kind", "components", "--out", "x.png")
    assert plot.endswith(f" {remedy}")

    place.install(f"{wheel}[cli]")
    assert "clusters" in place.cpmm("info", mixture).stdout
    place.cpmm("sample", mixture, "-n", 50, "--out", "drawn.csv")
    scores = place.cpmm("score", mixture, "drawn.csv").stdout
    assert len(scores.splitlines()) == 51
    assert len(place.cpmm("predict", mixture, "drawn.csv").stdout.splitlines()) == 51
    place.cpmm("plot", mixture, "--kind", "components", "--out", "x.png")
    assert (place.folder / "x.png").stat().st_size > 1000
    address = place.end_of("info", "dvc+.#data/digits/mixture")
    assert address.endswith(": pip install 'cpmm[workflow]'")
