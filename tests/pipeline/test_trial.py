"""One trial, without Ray: the same mixture as the pipeline's stages make."""

import json
import os
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, check_last_step, make_inputs, score_mixture, train_trial

from cpmm.artifact import load_header
from cpmm.mixture import Mixture
from cpmm.pipeline import progress
from cpmm.pipeline.config import pick
from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.models.fit import TrainingProgress
from cpmm.pipeline.scores.scorer import Scorer
from cpmm.pipeline.sweeps.inputs import locate_inputs, open_inputs
from cpmm.pipeline.sweeps.trial import explain, peak_memory, run_trial, summarize
from workflows import extract_mixture, train_cpmm, trial

SMALL = [
    *TINY, "data.n_train=150", "spaces.n_spaces=3", "teacher.flow_matching_epochs=1",
    "cpmm.initialization.restarts=1", "cpmm.batch_size=64",
]  # fmt: skip
CHANGED = ["cpmm.seed=3", "cpmm.n_factors=2", "cpmm.entropy_weight=0.1", "mixture.drop_idle=true"]
ALONE = [
    "cpmm.curriculum=false", "cpmm.pseudo_label_spaces=0", "cpmm.initialization.kind=kmeans",
    "cpmm.ode=separate", "cpmm.fine_tune_epochs=4", "cpmm.seed=1",
]  # fmt: skip


COSTS = ("seconds", "seconds_10k", "memory_gb")  # no two runs agree on them


def without_costs(record):
    assert set(COSTS) <= record.keys()
    return {name: value for name, value in record.items() if name not in COSTS}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data, teacher and spaces of the tiny pipeline."""
    return make_inputs(tmp_path_factory.mktemp("home") / "digits", SMALL)


@pytest.fixture
def run(home, tmp_path):
    """Run a trial of the tiny configuration in a scratch folder of its own."""

    def run(*overrides, name="trial", **options):
        return train(home, tmp_path / name, *overrides, **options)

    return run


def train(home, scratch, *overrides, **options):
    """Run a trial of the tiny configuration; return its record and folder."""
    return train_trial(home, scratch, [*SMALL, *overrides], **options)


@pytest.fixture(scope="module", params=[CHANGED, ALONE], ids=["curriculum", "alone"])
def finished(request, home, tmp_path_factory):
    """A trial: its overrides, its record, its folder."""
    scratch = tmp_path_factory.mktemp("finished") / "trial"
    return request.param, *train(home, scratch, *request.param)


def test_a_trial_makes_the_mixture_of_the_stages(finished, home, tmp_path):
    overrides, record, scratch = finished
    config = compose_preset("digits", [*SMALL, *overrides])
    folder = tmp_path / "pipeline"
    for name in ("prepared", "spaces"):
        shutil.copytree(home / name, folder / name)
    for stage in (train_cpmm, extract_mixture):
        stage.main(folder, config)
    for name in ("cpmm", "mixture"):
        ours, theirs = (f / name / f"{name}.safetensors" for f in (scratch, folder))
        assert ours.read_bytes() == theirs.read_bytes()
        assert load_header(scratch / name, name)["fingerprint"] == "fingerprint"
    headers = [json.loads((f / "mixture" / "mixture.json").read_text()) for f in (scratch, folder)]
    own = {"fingerprint": "", "seal": ""}
    assert headers[0] | own == headers[1] | own
    best = json.loads((folder / "cpmm" / "cpmm.json").read_text())["best"]
    assert record["best_epoch"] == best["epoch"]


def test_a_record_holds_the_scores_of_the_mixture(finished, home):
    overrides, record, scratch = finished
    assert record["status"] == "finished"
    config = compose_preset("digits", [*SMALL, *overrides])
    data, _ = open_inputs(locate_inputs(config, home))
    mixture = Mixture.load(scratch / "mixture").to(torch.float64)
    assert record["test"] == score_mixture(mixture, data)
    z, log_det = data.points("validation")
    nats = -(mixture.log_prob(z) + log_det) / data.n_features
    _, factor, offset = data.preprocessing.density_unit
    assert record["validation"] == pytest.approx(float(factor * nats.mean() + offset), rel=1e-12)
    assert record["steps"] == (4 if overrides == ALONE else 5) * 3  # epochs of three batches
    assert min(record["seconds"], record["seconds_10k"]) > 0
    assert 0 <= record["memory_gb"] < 1  # of the training, without torch and the data
    json.dumps(record, allow_nan=False)
    line = summarize(record, "bits per dimension")
    assert line.startswith(f"validation {record['validation']:.4f}, test ")
    assert line.endswith(f"clustering accuracy {100 * record['test']['accuracy']:.1f} %")


def test_the_test_split_has_no_say_in_training(finished, home, tmp_path):
    overrides, record, scratch = finished
    config = compose_preset("digits", [*SMALL, *overrides])
    data, spaces = open_inputs(locate_inputs(config, home))
    data.raw["test"].zero_()
    data.label["test"].zero_()
    other = tmp_path / "other"
    other.mkdir()
    again = run_trial(config, data, spaces, "fingerprint", other, quiet=True)
    assert again["validation"] == record["validation"]
    assert again["test"] != record["test"]
    names = [f / "mixture" / "mixture.safetensors" for f in (scratch, other)]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_another_seed_is_another_result(run):
    records = [run(*ALONE, f"cpmm.seed={seed}", name=f"{seed}")[0] for seed in (8, 9)]
    assert records[0]["validation"] != records[1]["validation"]


@pytest.mark.parametrize("overrides", [[], ALONE], ids=["curriculum", "alone"])
def test_a_trial_that_diverges_says_where_and_why(overrides, run):
    record, scratch = run(*overrides, "cpmm.learning_rate=1e6", "cpmm.gradient_clip=1e9")
    assert record["status"] == "diverged"
    assert record.keys() == {"status", "step", "reason"}
    assert record["step"] >= 1
    assert "lower cpmm.learning_rate" in record["reason"]
    assert f"step {record['step']}" in record["reason"]
    assert explain(record) == f"diverged at step {record['step']}: {record['reason']}"
    assert summarize(record, "nats") == explain(record)
    assert not (scratch / "mixture").exists()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_mixture_without_a_finite_density_diverged(split, run, monkeypatch):
    density = Scorer.density

    def broken(self, log_prob):
        return density(self, log_prob if self.split != split else log_prob * float("nan"))

    monkeypatch.setattr(Scorer, "density", broken)
    record, _ = run(*ALONE)
    assert record["status"] == "diverged"
    assert "density of the trained model is not finite" in record["reason"]
    assert record["step"] == 4 * 3


def test_what_is_no_divergence_is_raised(run):
    with pytest.raises(ValueError, match=r"cpmm\.n_factors \(R\) is 65"):
        run("cpmm.n_factors=65")


class Kill(Exception):
    """Stands for the end of a process."""


def test_resumed_equals_uninterrupted(finished, run):
    overrides, whole, uninterrupted = finished
    seen = []

    def kill(module):
        seen.append(module.current_epoch)
        if len(seen) in (2, 4):
            raise Kill

    for _ in range(2):
        with pytest.raises(Kill):
            run(*overrides, name="killed", listeners=[kill])
    resumed, scratch = run(*overrides, name="killed", listeners=[kill])
    assert seen == sorted(seen)
    assert seen[1] == seen[2] > 0  # the epoch that was cut is done again, not those before
    again, _ = run(*overrides, name="killed")  # killed after the last epoch
    for record in (resumed, again):
        assert without_costs(record) == without_costs(whole)
    for name in ("cpmm", "mixture"):
        for kind in ("safetensors", "json"):
            files = [f / name / f"{name}.{kind}" for f in (uninterrupted, scratch)]
            assert files[0].read_bytes() == files[1].read_bytes()


def test_the_time_of_processes_that_were_cut_counts(run, tmp_path):
    checkpoint = tmp_path / "trial" / "last.ckpt"
    seen = []

    def kill(module):
        seen.append(module.current_epoch)
        if seen == [0]:
            time.sleep(0.2)
        if seen in ([0, 1], [0, 1, 1, 2]):
            raise Kill

    with pytest.raises(Kill):
        run(*ALONE, listeners=[kill])
    state = torch.load(checkpoint, weights_only=True)
    assert state["seconds"] >= 0.2
    torch.save(state | {"seconds": state["seconds"] + 10_000}, checkpoint)
    with pytest.raises(Kill):
        run(*ALONE, listeners=[kill])
    spent = torch.load(checkpoint, weights_only=True)["seconds"]
    assert spent > 10_000.2
    record, _ = run(*ALONE, listeners=[kill])
    assert seen == [0, 1, 1, 2, 2, 3]
    assert spent < record["seconds"] < 20_000


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system tells no peak of memory"
)
def test_memory_is_what_is_taken_beyond_what_is_there():
    held = np.ones(300 * 2**20, np.uint8)
    with peak_memory() as nothing:
        pass
    with peak_memory() as found:
        np.ones(300 * 2**20, np.uint8)  # dropped at once: the peak counts
    assert held.all()
    assert nothing["gb"] < 0.1
    assert found["gb"] == pytest.approx(300 / 1024, abs=0.1)


def test_listeners_hear_every_epoch_and_quiet_is_quiet(run, capsys):
    heard = []
    listeners = [check_last_step, lambda module: heard.append(dict(module.history[-1]))]
    record, _ = run(*ALONE, listeners=listeners)
    assert capsys.readouterr().out == ""
    assert [row["epoch"] for row in heard] == [0, 1, 2, 3]
    assert heard[-1]["step"] == record["steps"]
    assert min(heard, key=lambda row: row["validation"])["epoch"] == record["best_epoch"]
    run(*ALONE, name="loud", quiet=False)
    assert "trial | step 12/12 | fine-tuning" in capsys.readouterr().out


def test_the_steps_to_come_are_known_from_the_first_epoch_on(tmp_path, capsys, monkeypatch):
    """Epochs of a space, of 40 points, are of one batch, those of fine-tuning, of 150, of three."""
    monkeypatch.setattr(progress, "EVERY", 0)
    overrides = [
        "spaces=noise",
        "spaces.n_train=40",
        "cpmm.epochs_per_space=2",
        "cpmm.pseudo_label_spaces=0",
    ]
    overrides.append("cpmm.initialization.kind=gaussian")
    home = make_inputs(tmp_path / "digits", [*SMALL, *overrides])
    capsys.readouterr()
    train(home, tmp_path / "trial", *overrides, quiet=False)
    lines = [line.split(" | ")[1:3] for line in capsys.readouterr().out.splitlines() if "|" in line]
    epochs = dict.fromkeys(f"{step} {phase}" for step, phase in lines)
    assert list(epochs) == [
        *(f"step {step}/12 space {(step + 1) // 2}/3" for step in range(1, 7)),
        *(f"step {step}/12 fine-tuning" for step in range(7, 13)),
    ]


def test_the_steps_within_an_epoch_are_shown(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0)
    shown = TrainingProgress("trial")
    module = SimpleNamespace(
        n_epochs=3,
        n_steps=150,
        describe_phase=lambda: "space 1/2",
        history=[],
        is_last_epoch=False,
    )
    module.current_epoch, module.global_step = 1, 60
    shown.on_train_batch_end(None, module, None, None, 9)
    assert capsys.readouterr().out.startswith("trial | step 60/150 | space 1/2 | ")

    shown.line.every, shown.line.printed = 1e3, -1e9  # an epoch that has only begun
    shown.on_train_epoch_start(None, module)
    shown.on_train_batch_end(None, module, None, None, 9)
    assert capsys.readouterr().out == ""

    shown.line.every = 1e9  # the end of an epoch whose steps were shown is shown, with its losses
    module.global_step, row = 100, {"step": 100, "train": 1.5, "validation": 2.5}
    module.history = [{"step": 50, "train": 3.5}, row]
    shown(module)
    assert capsys.readouterr().out.startswith(
        "trial | step 100/150 | space 1/2 | train 1.5000 val 2.5000"
    )
    shown(module)
    assert capsys.readouterr().out == ""

    shown.line.every, module.current_epoch, module.global_step = 0, 2, 110
    module.describe_phase = lambda: "space 2/2"  # the losses so far are of the space before
    shown.on_train_batch_end(None, module, None, None, 9)
    assert capsys.readouterr().out.startswith(
        "trial | step 110/150 | space 2/2 | train 1.5000 val 2.5000 nats/dim in space 1/2 | "
    )


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["trial.py", *arguments])
    trial.main()


@pytest.fixture
def root(home, tmp_path, monkeypatch):
    """A project whose data are those of the tiny pipeline."""
    shutil.copytree(home, tmp_path / "data" / "digits")
    monkeypatch.setattr("cpmm.pipeline.config.root.ROOT", tmp_path)
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    return tmp_path


def test_the_command_writes_record_and_mixture(finished, root, monkeypatch, capsys):
    overrides, record, scratch = finished
    command(monkeypatch, *SMALL, *overrides)
    out = root / "data" / "digits" / "trial"
    written = json.loads((out / "record.json").read_text())
    assert without_costs(written) == without_costs(record)
    files = [f / "mixture" / "mixture.safetensors" for f in (out, scratch)]
    assert files[0].read_bytes() == files[1].read_bytes()
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-2]) == pick(record, "validation", "test")
    assert lines[-1].startswith("trial: validation ")
    assert lines[-1].endswith(f" -> {out}")
    assert not list((root / "data" / "digits" / ".scratch").glob("trial-*"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cpmm.learning_rate=1e6", "cpmm.gradient_clip=1e9"], "diverged at step"),
        (["cpmm.ode=both"], "trial: error: cpmm.ode is 'both'"),
        (["preset=digit"], "trial: error: unknown preset 'digit'"),
        (["cpmm.odd=1"], "odd"),
    ],
)
def test_the_command_fails_with_one_line(overrides, said, root, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, *SMALL, *overrides)
    assert end.value.code == 1
    printed = "".join(capsys.readouterr())
    assert said in printed
    assert "Traceback" not in printed


def test_a_failed_command_leaves_no_mixture_of_an_earlier_one(root, monkeypatch):
    out = root / "data" / "digits" / "trial"
    command(monkeypatch, *SMALL)
    assert (out / "mixture").is_dir()
    with pytest.raises(SystemExit):
        command(monkeypatch, *SMALL, "cpmm.learning_rate=1e6", "cpmm.gradient_clip=1e9")
    assert json.loads((out / "record.json").read_text())["status"] == "diverged"
    assert not (out / "mixture").exists()


@pytest.fixture
def untrained(monkeypatch):
    """Whatever is trained fails the test."""
    monkeypatch.setattr(trial, "run_trial", lambda *arguments: pytest.fail("it was trained"))


def fail(monkeypatch, capsys, *arguments):
    """Run a command that must fail; return the one line it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, *arguments)
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trial: error: ")
    return line


@pytest.mark.usefixtures("untrained")
def test_the_command_takes_the_place_of_trials_only(root, monkeypatch, capsys):
    out = root / "kept"
    (out / "mixture").mkdir(parents=True)
    (out / "mixture" / "mixture.json").write_text("another's")
    line = fail(monkeypatch, capsys, *SMALL, "--out", str(out))
    assert f"{out} has a mixture and no record.json of a trial" in line
    assert line.endswith("choose another folder with --out")
    assert [path.name for path in out.rglob("*")] == ["mixture", "mixture.json"]
    assert (out / "mixture" / "mixture.json").read_text() == "another's"


@pytest.mark.usefixtures("untrained")
def test_the_command_misses_another_data_set_before_it_trains(root, monkeypatch, capsys):
    path = root / "nowhere.npy"
    line = fail(
        monkeypatch, capsys, *SMALL, "ood@evaluation.ood=npy",
        f"evaluation.ood.options.path={path}", "evaluation.ood.options.levels=17",
        "evaluation.ood.name=other",
    )  # fmt: skip
    assert str(path) in line
    assert "evaluation.ood=null" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_command_wants_no_gpu_where_there_is_none(root, monkeypatch, capsys):
    line = fail(monkeypatch, capsys, *SMALL, *ALONE, "trainer.accelerator=gpu")
    assert line.endswith("Set trainer.accelerator and trainer.devices to what this machine has.")
    assert not (root / "data" / "digits" / "trial" / "record.json").exists()
