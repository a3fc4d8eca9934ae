"""Inputs of trials: those of the pipeline where they fit, others made once; no Ray."""

import shutil
import signal

import pytest
import torch
import yaml
from conftest import ROOT, TINY, project_environment

from cpmm.artifact import load_header
from cpmm.pipeline.artifacts.store import load_prepared
from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.config.fingerprints import fingerprint_inputs, fingerprint_teacher
from cpmm.pipeline.sweeps import inputs
from cpmm.pipeline.sweeps.inputs import Located, locate_inputs, open_inputs, size_of
from workflows import build_spaces, prepare_data, train_teacher

SMALL = [*TINY, "data.n_train=120", "spaces.n_spaces=3", "teacher.flow_matching_epochs=1"]


def configure(*overrides):
    return compose_preset("digits", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What the pipeline's stages have made, to be copied and not changed."""
    folder, config = tmp_path_factory.mktemp("finished") / "digits", configure()
    for stage in (prepare_data, train_teacher, build_spaces):
        stage.main(folder, config)
    return folder


@pytest.fixture
def home(finished, tmp_path, monkeypatch):
    """A copy of it, in which further inputs are made in this process, which is quicker."""
    stages = {stage.__name__.rpartition(".")[2]: stage for stage in
              (prepare_data, train_teacher, build_spaces)}  # fmt: skip

    def run_here(stage, folder):
        stages[stage].main(folder, yaml.safe_load((folder / "config.yaml").read_text()))

    monkeypatch.setattr(inputs, "_run_stage", run_here)
    shutil.copytree(finished, tmp_path / "digits")
    return tmp_path / "digits"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Put scripts of a test's own in the place of stages; each may import what it stands for."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    monkeypatch.setattr(inputs, "SCRIPTS", scripts)
    for name, value in project_environment(ROOT).items():
        monkeypatch.setenv(name, value)

    def write(stage, *lines):
        imports = f"import sys\nfrom workflows import {stage} as stage\n"
        end = "from cpmm.pipeline.stage import run_stage\nrun_stage(stage.main, stage.__doc__)\n"
        (scripts / f"{stage}.py").write_text("\n".join([imports, *lines, end]))

    return write


def made(home):
    """Names of what was made beside the pipeline, without their fingerprints."""
    return sorted(path.name.split("-")[0] for path in (home / ".scratch" / "inputs").glob("*"))


def test_fingerprints_are_those_in_the_artifacts(finished):
    fingerprints = fingerprint_inputs(configure())
    assert fingerprints == tuple(
        load_header(finished / name, name)["fingerprint"] for name in ("prepared", "spaces")
    )
    assert (
        fingerprint_teacher(configure())
        == load_header(finished / "teacher", "teacher")["fingerprint"]
    )


def test_what_the_pipeline_has_made_is_used_as_it_is(home, capsys):
    located = locate_inputs(configure("cpmm.seed=3", "cpmm.noise=0.3"), home)
    assert (located.prepared, located.spaces) == (home / "prepared", home / "spaces")
    assert capsys.readouterr().out == ""
    assert made(home) == []
    data, spaces = open_inputs(located)
    assert spaces.train(2).shape == (120, 64)
    assert torch.equal(spaces.validation(2), data.points("validation")[0].float().half().float())


def test_other_spaces_are_made_once_and_found_again(home, capsys):
    config = configure("spaces.n_spaces=4")
    located = locate_inputs(config, home)
    printed = capsys.readouterr().out
    assert " | making spaces " in printed
    assert "making prepared" not in printed
    assert made(home) == ["spaces"]
    assert located.prepared == home / "prepared"
    assert located.spaces.is_relative_to(home / ".scratch" / "inputs")
    assert len(open_inputs(located)[1]) == 4
    assert not list(located.spaces.parent.rglob(".scratch"))
    before = {path: path.stat().st_mtime_ns for path in located.spaces.rglob("*")}
    assert locate_inputs(config, home) == located
    assert capsys.readouterr().out == ""
    assert {path: path.stat().st_mtime_ns for path in located.spaces.rglob("*")} == before
    assert len(open_inputs(locate_inputs(configure(), home))[1]) == 3  # the pipeline's still there


def test_noise_needs_no_teacher(home):
    shutil.rmtree(home / "teacher")
    located = locate_inputs(configure("spaces=noise", "spaces.n_spaces=3"), home)
    assert made(home) == ["spaces"]
    assert located.spaces.parent.name == f"spaces-{located.fingerprints[1]}"


def test_an_empty_home_gets_everything_from_the_commands_of_the_stages(finished, tmp_path, capfd):
    located = locate_inputs(configure(), tmp_path / "digits")
    assert made(tmp_path / "digits") == ["prepared", "spaces", "teacher"]
    assert located.fingerprints == fingerprint_inputs(configure())
    printed = capfd.readouterr().out
    lines = [line.split(" ")[0] for line in printed.splitlines() if " | " not in line]
    assert lines == ["prepare_data:", "train_teacher:", "build_spaces:"]
    assert printed.count(" | making ") == 3
    assert "train_teacher | step " in printed
    (data, spaces), (expected, others) = (
        open_inputs(located),
        open_inputs(Located(finished / "prepared", finished / "spaces", located.fingerprints)),
    )
    assert all(torch.equal(data.raw[split], expected.raw[split]) for split in data.raw)
    for index in range(3):
        assert torch.equal(spaces.train(index), others.train(index))


@pytest.mark.parametrize("threads", ["2", "null"])
def test_they_are_made_with_the_threads_that_are_asked_for(threads, tmp_path, stand_in):
    stand_in(
        "prepare_data",
        "import torch",
        "before = torch.get_num_threads()",
        "def main(folder, config):",
        "    raise ValueError(f'stop here: {torch.get_num_threads()} threads, {before} before')",
        "stage.main = main",
    )
    with pytest.raises(ChildProcessError, match=r"^prepare_data: stop here: ") as error:
        locate_inputs(configure(f"trainer.threads={threads}"), tmp_path / "digits")
    used, before = (int(word) for word in str(error.value).split() if word.isdigit())
    assert used == (2 if threads == "2" else before)


def test_what_a_stage_finds_at_fault_is_one_line(tmp_path, capfd):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n1,2\n3,word\n")
    config = compose_preset("csv", [f"data.options.path={path}", "cpmm.n_clusters=2"])
    with pytest.raises(ChildProcessError, match=r"^prepare_data: .*word") as error:
        locate_inputs(config, tmp_path / "csv")
    assert len(str(error.value).splitlines()) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("end", "raised", "said", "printed"),
    [
        ("raise RuntimeError('a bug')", ChildProcessError, "exit status 1", "RuntimeError: a bug"),
        ("raise KeyboardInterrupt", KeyboardInterrupt, None, "prepare_data: interrupted"),
        ("os.kill(os.getpid(), 9)", ChildProcessError, "exit status -9", ""),
    ],
)
def test_what_ends_a_stage_ends_the_sweep(end, raised, said, printed, tmp_path, stand_in, capfd):
    stand_in(
        "prepare_data", "import os", "def main(*arguments):", f"    {end}", "stage.main = main"
    )
    with pytest.raises(raised, match=said):
        locate_inputs(configure(), tmp_path / "digits")
    assert printed in capfd.readouterr().err


def test_without_a_curriculum_no_spaces_are_needed(home):
    for name in ("teacher", "spaces"):
        shutil.rmtree(home / name)
    located = locate_inputs(configure("cpmm.curriculum=false", "cpmm.pseudo_label_spaces=0"), home)
    assert located == Located(home / "prepared", None, (fingerprint_inputs(configure())[0], None))
    assert made(home) == []
    assert open_inputs(located)[1] is None


def test_artifacts_of_other_options_are_not_used(home):
    located = locate_inputs(configure("data.split_seed=1"), home)
    assert made(home) == ["prepared", "spaces", "teacher"]
    other, mine = (load_prepared(path) for path in (home / "prepared", located.prepared))
    assert not torch.equal(other.raw["train"], mine.raw["train"])
    assert open_inputs(located)[1].fingerprint == located.fingerprints[1]


@pytest.mark.parametrize(
    ("name", "content", "made_again"),
    [
        ("prepared/prepared.json", "{", ["prepared"]),
        ("prepared/prepared.json", '{"kind": "prepared", "schema": 99}', ["prepared"]),
        ("prepared/prepared.json", '{"kind": "teacher", "schema": 1}', ["prepared"]),
        ("prepared/prepared.json", None, ["prepared"]),
        ("spaces/spaces.json", "{", ["spaces"]),
        ("spaces/spaces.json", None, ["spaces"]),
    ],
)
def test_artifacts_with_damaged_headers_are_made_anew(name, content, made_again, home):
    if content is None:
        (home / name).unlink()
    else:
        (home / name).write_text(content)
    located = locate_inputs(configure(), home)
    assert made(home) == made_again
    data, spaces = open_inputs(located)
    assert len(data.raw["train"]) == 120
    assert spaces.fingerprint == located.fingerprints[1]


@pytest.mark.parametrize("of", ["pipeline", "sweep"])
@pytest.mark.parametrize("name", ["prepared/prepared.safetensors", "spaces/c/1/0/0"])
def test_damaged_contents_do_not_reach_a_trial(name, of, home, tmp_path):
    if of == "sweep":  # in the scratch folder, where DVC restores nothing
        for artifact in ("prepared", "spaces"):
            shutil.rmtree(home / artifact)
    located = locate_inputs(configure(), home)
    path = located.prepared / "prepared.safetensors"
    if name.startswith("spaces"):
        path = located.spaces / "u" / "c" / "1" / "0" / "0"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    def load():
        _, spaces = open_inputs(located)
        return spaces.train(1), spaces.validation(1)

    with pytest.raises(ValueError, match=r"prepared\.safetensors|u/c/1/0/0"):
        load()


def test_damage_that_a_sweep_has_made_can_be_mended_by_the_sweep(home):
    # DVC knows nothing of it: the same command must get on by itself.
    config = configure("data.split_seed=1", "cpmm.curriculum=false", "cpmm.pseudo_label_spaces=0")
    path = locate_inputs(config, home).prepared / "prepared.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    data, _ = open_inputs(locate_inputs(config, home))
    assert len(data.raw["train"]) == 120


def test_inputs_changed_since_they_were_located_are_refused(home):
    located = locate_inputs(configure(), home)
    prepare_data.main(home, configure("data.split_seed=1"))
    with pytest.raises(ValueError, match=r"expected .* made from other options"):
        open_inputs(located)


def test_making_that_was_killed_goes_on(finished, tmp_path, stand_in):
    shutil.copytree(finished, tmp_path / "digits")
    config = configure("spaces.n_spaces=4")
    count = tmp_path / "written"
    stand_in(
        "build_spaces",
        "import os, pathlib",
        f"count, write = pathlib.Path({str(count)!r}), stage._statistics",
        "def killed(*arguments):",
        "    with count.open('a') as file:",
        "        file.write('x')",
        "    if count.read_text() == 'xxx':",
        f"        os.kill(os.getpid(), {int(signal.SIGKILL)})",
        "    return write(*arguments)",
        "stage._statistics = killed",
    )
    with pytest.raises(ChildProcessError, match="build_spaces: "):
        locate_inputs(config, tmp_path / "digits")
    located = locate_inputs(config, tmp_path / "digits")
    assert len(count.read_text()) == 3 + 2  # two of four spaces were kept
    assert len(open_inputs(located)[1]) == 4


def test_the_size_is_that_on_disk(home):
    located = locate_inputs(configure(), home)
    sizes = {name: sum(p.stat().st_size for p in (home / name).rglob("*") if p.is_file())
             for name in ("prepared", "spaces")}  # fmt: skip
    assert size_of(located) == sum(sizes.values())
    assert size_of(Located(home / "prepared", None, (None, None))) == sizes["prepared"]
