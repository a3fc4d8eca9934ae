"""The stage build_spaces: which points it takes, what it says, what it needs, and how it goes on."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, stage_command

from cpmm.data import SPLITS, DataSplits
from cpmm.pipeline import progress
from cpmm.pipeline.artifacts import spaces as store
from cpmm.pipeline.artifacts.spaces import open_spaces
from cpmm.pipeline.artifacts.store import load_model, load_prepared, save_model, save_prepared
from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.config.fingerprints import (
    fingerprint_prepared,
    fingerprint_spaces,
    fingerprint_teacher,
)
from cpmm.pipeline.models import flows
from cpmm.pipeline.models import mixtures as models
from cpmm.preprocessing import Augmentation, Preprocessing
from workflows import build_spaces, prepare_data, train_teacher

SMALL = [*TINY, "data.n_train=120", "spaces.n_spaces=3", "teacher.flow_matching_epochs=1"]


def configure(*overrides):
    return compose_preset("digits", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Data and a teacher, to be copied."""
    folder = tmp_path_factory.mktemp("prepared") / "digits"
    for stage in (prepare_data, train_teacher):
        stage.main(folder, configure())
    return folder


@pytest.fixture
def folder(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "digits")
    return tmp_path / "digits"


def build(folder, *overrides):
    config = configure(*overrides)
    build_spaces.main(folder, config)
    return load_prepared(folder / "prepared"), open_spaces(
        folder / "spaces", fingerprint_spaces(config)
    )


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["teacher", "noise"])
def test_some_points_go_through_every_space(kind, folder):
    data, spaces = build(
        folder, f"spaces.kind={kind}", "spaces.n_train=30", "spaces.n_validation=7", "spaces.n_draws=2",
        "spaces.dtype=float32",
    )  # fmt: skip
    index = spaces.train_index
    assert index.tolist() == sorted(set(index.tolist()))
    assert (len(index), int(index.min()) >= 0, int(index.max()) < 120) == (30, True, True)
    assert spaces.n_train == 60
    for space in range(3):
        assert spaces.train(space).shape == (60, 64)
        assert spaces.validation(space).shape == (7, 64)
    assert torch.equal(spaces.validation(2), data.points("validation")[0][:7].float())
    # Each draw has the points in the order of the index: their grey levels, freshly dequantized.
    levels = data.preprocessing.inverse(spaces.train(2).double()) * data.preprocessing.levels
    expected = data.raw["train"][index].double().repeat(2, 1)
    assert torch.allclose(levels.floor(), expected, atol=1.0, rtol=0)
    assert not torch.equal(levels[:30], levels[30:])


def test_spaces_lie_on_the_paths_of_the_teacher_or_of_noise(folder):
    solver = ["teacher.solver.method=rk4", "teacher.solver.n_steps=8"]
    common = ["spaces.n_spaces=5", "spaces.dtype=float32", "spaces.n_train=40"]
    config = configure(*solver)
    train_teacher.main(folder, config)
    teacher = flows.make_teacher(config["teacher"], load_prepared(folder / "prepared"), 0)
    load_model(folder / "teacher", "teacher", teacher, fingerprint_teacher(config))
    positions = torch.tensor([1, 0.75, 0.5, 0.25, 0])
    _, spaces = build(folder, *common, *solver)
    x = spaces.train(4)
    with torch.no_grad():  # Eq. 8, in one solve
        expected = teacher.transform(x, positions.flip(0)).flip(0)
    torch.testing.assert_close(torch.stack(list(map(spaces.train, range(5)))), expected)

    _, spaces = build(folder, *common, *solver, "spaces.kind=noise")
    noise, x = spaces.train(0), spaces.train(4)
    assert abs(float(noise.mean())) < 0.1
    assert abs(float(noise.std()) - 1) < 0.1
    for space, v in enumerate(positions.tolist()):  # the marginals of flow matching's paths
        torch.testing.assert_close(spaces.train(space), (1 - v) * x + v * noise)


def test_fewer_points_are_among_more_and_follow_the_seed(folder):
    chosen = {}
    for n, seed in ((20, 0), (30, 0), (30, 1)):
        _, spaces = build(folder, "spaces.kind=noise", f"spaces.n_train={n}", f"seed={seed}")
        chosen[n, seed] = set(spaces.train_index.tolist())
    assert chosen[20, 0] < chosen[30, 0]
    assert chosen[30, 0] != chosen[30, 1]


def test_all_points_by_number_are_all_points_by_default(folder):
    data, spaces = build(folder)
    assert spaces.train_index is None
    every = [spaces.train(i) for i in range(3)], [spaces.validation(i) for i in range(3)]
    assert not (folder / "spaces" / "train_index").exists()
    n_validation = len(data.raw["validation"])
    _, same = build(folder, "spaces.n_train=120", f"spaces.n_validation={n_validation}")
    assert torch.equal(same.train_index, torch.arange(120))
    for i in range(3):
        assert torch.equal(same.train(i), every[0][i])
        assert torch.equal(same.validation(i), every[1][i])


def test_the_points_that_go_through_the_spaces_are_in_their_fingerprint():
    config = configure()
    assert config["spaces"]["n_train"] is config["spaces"]["n_validation"] is None
    assert fingerprint_spaces(configure("spaces.n_train=30")) != fingerprint_spaces(config)


@pytest.mark.parametrize(
    ("option", "value", "n"), [("n_train", 121, 120), ("n_train", 1, 120), ("n_validation", 10**6, None)]
)  # fmt: skip
def test_a_number_of_points_that_there_is_not_is_named(option, value, n, folder, run_stage):
    config = configure()
    config["spaces"][option] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    n = n or len(load_prepared(folder / "prepared").raw["validation"])
    status, _, errors = run_stage("build_spaces", folder)
    assert status == 1
    assert f"spaces.{option} is {value}: expected 2 to {n}, the" in errors
    assert errors.count("\n") == 1


def test_an_edited_choice_of_points_is_refused(folder):
    build(folder, "spaces.kind=noise", "spaces.n_train=30")
    path = folder / "spaces" / "train_index" / "c" / "0"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="train_index/c/0 is damaged"):
        open_spaces(folder / "spaces")


@pytest.mark.parametrize("kind", ["kmeans", "analyzers"])
def test_trajectories_are_told_the_groups_of_the_points_in_the_spaces(kind, folder):
    overrides = [
        "spaces.n_train=60", "spaces.n_draws=3", f"cpmm.initialization.kind={kind}", "cpmm.pseudo_label_spaces=1",
        "cpmm.n_clusters=3",
    ]  # fmt: skip
    data, spaces = build(folder, *overrides)
    config = configure(*overrides)
    module, rows = models.make_mixture_training(config["cpmm"], config["mixture"], data, spaces)
    drawn = rows.rows(0, torch.Generator())
    x, group = drawn.tensors["x"], drawn.tensors["group"]
    assert torch.equal(x, spaces.train(0))
    assert group.shape == (180,)
    assert torch.equal(group[:60], group[60:120])
    assert torch.equal(group[:60], group[120:])
    assert group.unique().tolist() == [0, 1, 2]
    expected = models.make_groups(config["cpmm"], data, spaces.train_index)
    assert torch.equal(group[:60], expected)
    # In the input space each point lies with its group: those of other points would lie anywhere.
    points, label = spaces.train(2), group
    means = torch.stack([points[label == c].mean(0) for c in range(3)])
    within = (points - means[label]).square().sum()
    mixed = label.roll(1)
    others = torch.stack([points[mixed == c].mean(0) for c in range(3)])
    assert within < 0.95 * (points - others[mixed]).square().sum()
    assert torch.isfinite(module.model.initial).all()


def test_groups_of_all_points_that_the_spaces_miss_are_named(folder):
    """Where fine-tuning tells the groups too, they are those of all training points."""
    overrides = [
        "cpmm.initialization.kind=kmeans", "cpmm.pseudo_label_spaces=1", "cpmm.pseudo_label_weight=0.1", "cpmm.n_clusters=20",
    ]  # fmt: skip
    config = configure(*overrides, "spaces.n_train=25")
    with pytest.raises(
        ValueError, match=r"\d+ of 20 groups .* the 25 in the spaces: raise spaces\.n_train"
    ):
        models.make_mixture_training(
            config["cpmm"], config["mixture"], *build(folder, *overrides, "spaces.n_train=25")
        )
    enough = [*overrides, "spaces.n_train=118"]
    config = configure(*enough)
    data, spaces = build(folder, *enough)
    _, rows = models.make_mixture_training(config["cpmm"], config["mixture"], data, spaces)
    of_all = models.make_groups(config["cpmm"], data)
    assert torch.equal(rows.rows(0, torch.Generator()).tensors["group"], of_all[spaces.train_index])


def lines_of(capsys):
    return [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("build_spaces")
    ]


def test_costs_are_told_before_and_progress_within_a_space(folder, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    build(folder, "spaces.batch_size=50", "spaces.n_train=90", "spaces.n_validation=40")
    first, *others = lines_of(capsys)
    estimate = re.fullmatch(
        r"build_spaces \| 3 spaces of 130 rows and 64 features, (.*) MB in (\d+) files, "
        r"about \d+\.\dm to go -> .*spaces",
        first,
    )
    on_disk = [path.stat().st_size for path in (folder / "spaces").rglob("*") if path.is_file()]
    assert int(estimate[2]) == len(on_disk)
    assert float(estimate[1]) == pytest.approx(sum(on_disk) / 1e6, abs=0.05 + 0.01)
    got = [re.fullmatch(r"(.*) \| \d+ rows/s \| eta \d+\.\dm", line)[1] for line in others]
    assert got == [
        f"build_spaces | space {space}/3 | row {row}/130"
        for space in (2, 3)
        for row in (50, 100, 130)
    ]  # the first space written is the input, which needs no teacher
    assert others[-1].endswith("eta 0.0m")


def test_noise_tells_its_progress_too(folder, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    build(folder, "spaces.kind=noise")
    first, *others = lines_of(capsys)
    assert "to go" not in first
    assert [re.search(r"space \d/3", line)[0] for line in others] == [
        "space 1/3", "space 2/3", "space 3/3"
    ]  # fmt: skip


def test_a_disk_that_is_too_small_is_told_before(folder, capsys, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    build(folder)
    assert "but only 0.0 MB are free there" in lines_of(capsys)[0]


MOMENTS = ("write_space", "save_file", "seal_folder")


@pytest.mark.parametrize("kind", ["teacher", "noise"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("after", [False, True])
def test_no_more_than_two_spaces_are_lost(kind, moment, after, folder, capsys, monkeypatch):
    """Interrupted before or after each step of writing the third space, while the fourth is computed."""
    if (kind, moment) == ("noise", "save_file"):
        pytest.skip("noise keeps no points to go on from")
    overrides = [f"spaces.kind={kind}", "spaces.n_spaces=5", "spaces.n_train=40"]
    build(folder, *overrides)
    whole = files(folder / "spaces")
    capsys.readouterr()
    written = []
    real = {name: getattr(store, name) for name in MOMENTS}

    def interrupted(*arguments):
        written.append(arguments)
        done = real[moment](*arguments) if after or len(written) < 3 else None
        if len(written) == 3:
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patched:
        patched.setattr(store, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(folder, *overrides)
    capsys.readouterr()
    computed, carried = [], []
    monkeypatch.setattr(
        store, "write_space", lambda *a: (computed.append(a), real["write_space"](*a))[1]
    )
    carry = build_spaces._carry

    def carry_and_note(*arguments, **options):
        if not options:  # else the estimate of the time
            carried.append(arguments[2:4])
        return carry(*arguments, **options)

    monkeypatch.setattr(build_spaces, "_carry", carry_and_note)
    build(folder, *overrides)
    done = 3 if after and moment == "seal_folder" else 2
    assert f"build_spaces | resuming after space {done}/5" in lines_of(capsys)
    assert len(computed) == 5 - done
    ways = [(0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)][done - 1 :]
    assert carried == ([] if kind == "noise" else ways)
    assert files(folder / "spaces") == whole


@pytest.mark.parametrize("damage", ["shard", "state", "note"])
def test_unfinished_work_that_is_damaged_is_done_again(damage, folder, capsys, monkeypatch):
    build(folder)
    whole = files(folder / "spaces")
    real = build_spaces._statistics
    n_spaces = []

    def interrupted(*arguments):
        n_spaces.append(arguments)
        if len(n_spaces) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(build_spaces, "_statistics", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(folder)
    (scratch,) = (folder / ".scratch").glob("build_spaces-*")
    assert len(list(scratch.glob("state-*"))) == 1
    path = {
        "shard": scratch / "spaces" / "u" / "c" / "2" / "0" / "0",
        "state": scratch / "state-2.safetensors",
        "note": scratch / "progress.json",
    }[damage]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    build(folder)
    assert "resuming" not in capsys.readouterr().out
    assert files(folder / "spaces") == whole


def test_what_is_written_is_hashed_once(folder, monkeypatch):
    """Gigabytes at the paper's scale: a note after each space must not read all that came before."""
    read = []
    digest = store.file_digest

    def noted(path):
        read.append(path)
        return digest(path)

    for module in ("cpmm.pipeline.artifacts.spaces", "cpmm.artifact"):
        monkeypatch.setattr(f"{module}.file_digest", noted)
    build_spaces.main(folder, configure("spaces.n_spaces=6"))
    shards = [path for path in read if "u/c/" in path.as_posix()]
    assert len(shards) == len(set(shards)) == 6


def keep_all(states, full_at, kept, failure=None):
    """Keep states, of which one cannot be, and check as a batch does; perhaps fail afterwards."""

    def keep(state):
        if state == full_at:
            raise OSError("the disk is full")
        kept.append(state)

    with build_spaces._Keeper(keep) as keeper:
        for state in states:
            keeper.check()
            keeper.put(state)
        keeper._thread.submit(int).result()
        if failure is None:
            keeper.check()
        else:
            raise failure


@pytest.mark.parametrize("full_at", [0, 1, 2])
def test_a_space_that_cannot_be_kept_is_an_error(full_at):
    kept = []
    with pytest.raises(OSError, match="the disk is full"):
        keep_all(range(3), full_at, kept)
    assert kept == list(range(full_at))


def test_all_spaces_are_kept_in_their_order():
    kept = []
    keep_all(range(9), None, kept)
    assert kept == list(range(9))


def test_of_two_errors_the_other_is_noted_on_that_of_the_way():
    with pytest.raises(RuntimeError, match="out of memory") as raised:
        keep_all(range(3), 2, [], RuntimeError("out of memory"))
    assert raised.value.__notes__ == ["and the space before could not be kept: the disk is full"]


# At the paper's scale.

N_TRAIN, N_VALIDATION, M = 50_000, 10_000, 784
MEASURE = """
import resource, sys
from cpmm.pipeline.stage import run_stage
from workflows.build_spaces import main
try:
    run_stage(main, "")
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


# The preset's teacher but for what costs time alone: its activations are as large.
QUICK = [
    "teacher.field.kernel_size=1", "teacher.field.depth=1", "teacher.solver.method=euler",
    "teacher.solver.n_steps=1", "spaces.n_spaces=4",  # one is noted, one written, one computed
]  # fmt: skip


def write_config(folder, *overrides):
    common = ["trainer.threads=1", "trainer.accelerator=cpu", "data.options.folder=."]
    config = compose_preset("mnist", [*common, *overrides])
    assert (config["spaces"]["dtype"], config["teacher"]["field"]["width"]) == ("float16", 64)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return config


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Grey levels of the size of MNIST, at random, prepared for three spaces of noise."""
    folder = tmp_path_factory.mktemp("large") / "mnist"
    folder.mkdir()
    config = write_config(folder, "spaces.kind=noise", "spaces.n_spaces=3")
    generator = torch.Generator().manual_seed(0)
    sizes = dict(zip(SPLITS, (N_TRAIN, N_VALIDATION, 10), strict=True))
    raw = {
        split: torch.randint(0, 256, (n, M), generator=generator).to(torch.uint8)
        for split, n in sizes.items()
    }
    alpha = config["data"]["alpha"]
    data = DataSplits(
        raw, None, Preprocessing.fit(raw["train"][:100], 256, alpha, "none", generator),
        Augmentation(image_shape=(1, 28, 28)), 0, (1, 28, 28), tuple(map(str, range(M))), (),
    )  # fmt: skip
    save_prepared(folder / "prepared", data, fingerprint_prepared(config))
    return folder


def measure(folder):
    command = [sys.executable, "-c", MEASURE, str(folder / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, int(re.search(r"^peak (\d+)$", done.stdout, re.MULTILINE)[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["noise", "teacher"])
def test_sixty_thousand_images_fit_a_laptop(kind, large, tmp_path):
    folder = tmp_path / "mnist"
    shutil.copytree(large, folder)
    if kind == "teacher":
        config = write_config(folder, *QUICK)
        teacher = flows.make_teacher(config["teacher"], load_prepared(folder / "prepared"), 0)
        header = {"fingerprint": fingerprint_teacher(config)}
        save_model(folder / "teacher", "teacher", teacher, header)
    printed, peak = measure(folder)
    spaces = open_spaces(folder / "spaces")
    shards = [path for path in (folder / "spaces" / "u" / "c").rglob("*") if path.is_file()]
    others = [p for p in (folder / "spaces").rglob("*") if p.is_file() and p not in shards]
    size = 51 * np.mean([path.stat().st_size for path in shards])
    size += sum(path.stat().st_size for path in others)
    print(
        f"\n{printed}\npeak {peak / 1e9:.2f} GB, with 51 spaces {51 + len(others)} files of {size / 1e9:.2f} GB"
    )
    assert peak < 4e9
    assert 51 * len(shards) / len(spaces) + len(others) <= 100
    assert size < 5e9
    assert spaces.train(0).shape == (N_TRAIN, M)
    assert spaces.validation(0).shape == (N_VALIDATION, M)
    assert spaces.train(len(spaces) - 1).abs().max() < 20  # the logit's margin


@pytest.mark.slow
def test_sixty_thousand_images_killed_and_resumed(large, tmp_path):
    folder, killed = tmp_path / "mnist", tmp_path / "killed"
    for copy in (folder, killed):
        shutil.copytree(large, copy)
    measure(folder)
    process = subprocess.Popen(stage_command("build_spaces", killed), stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(killed.glob(".scratch/*/progress.json")):
        pass
    assert process.poll() is None, "the stage ended before it could be killed"
    process.kill()
    process.wait()
    printed, _ = measure(killed)
    assert re.search(r"resuming after space [12]/3", printed)
    assert files(killed / "spaces") == files(folder / "spaces")
