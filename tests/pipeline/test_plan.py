"""What a sweep expands into; no Ray."""

import math
import shlex
from collections import Counter
from contextlib import nullcontext
from functools import cache

import pandas as pd
import pytest
import yaml
from conftest import ROOT

from cpmm.pipeline.config.code import PACKAGE, code_fingerprint, reached_files
from cpmm.pipeline.config.compose import compose_preset, split_preset
from cpmm.pipeline.sweeps import plan
from cpmm.pipeline.sweeps.archive import Archive
from cpmm.pipeline.sweeps.plan import make_trial, plan_trials, set_option, shorten, suggested_trial
from cpmm.pipeline.sweeps.run import _beginning, _is_own, run_sweep
from cpmm.pipeline.sweeps.sweep import Sweep
from cpmm.pipeline.sweeps.table import check_claims
from cpmm.pipeline.sweeps.trial import trial_code

DEFAULT = yaml.safe_load((ROOT / "conf" / "sweep" / "default.yaml").read_text())
SWEEPS = sorted(
    path.stem
    for path in (ROOT / "conf" / "sweep").glob("*.yaml")
    if path.stem not in {"default", "try"}
)
ALONE = {"cpmm.curriculum": False, "cpmm.pseudo_label_spaces": 0}
PARTS = {
    "alone": {
        "overrides": ALONE,
        "grid": {
            "cpmm.diagonal": ["constant", "variable"],
            "size": {
                "small": {"cpmm.n_factors": 2, "cpmm.augmentation": 0},
                "large": {"cpmm": {"n_factors": 5}},
            },
        },
    },
    "guided": {},
}
SPACE = {
    "cpmm.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "cpmm.n_factors": {"integer": [2, 4]},
    "cpmm.ode": {"choice": ["shared", "separate"]},
    "cpmm.noise": {"uniform": [0.1, 0.3]},
}


def sweep(**changes):
    """The section `sweep` of a sweep of one's own."""
    return {**DEFAULT, "name": "own", "seeds": 1, **changes}


def search(kind, **changes):
    return {**DEFAULT["search"], "kind": kind, "space": SPACE, "n_samples": 3, **changes}


@pytest.fixture(scope="module")
def planned():
    return plan_trials("digits", sweep(seeds=2, parts=PARTS), ["cpmm.n_clusters=7"], [], "code")


@pytest.fixture(scope="module")
def config():
    return compose_preset("digits", [])


def test_trials_are_rows_by_seeds_in_the_order_of_the_file(planned):
    alone = [
        (("part", "alone"), ("diagonal", diagonal), ("size", size))
        for diagonal in ("constant", "variable")
        for size in ("small", "large")
    ]
    guided = (("part", "guided"), ("diagonal", "variable"), ("size", "-"))
    expected = [(row, seed) for row in [*alone, guided] for seed in (0, 1)]
    assert [(trial.row, trial.seed) for trial in planned] == expected
    assert planned[3].name == "alone constant large, seed 1"
    assert planned[8].name == "guided variable, seed 0"
    assert len({trial.fingerprint for trial in planned}) == len(planned)


def test_a_row_has_the_bundles_of_its_axes(planned):
    small, large, guided = planned[0].config, planned[2].config, planned[8].config
    assert [small["cpmm"][name] for name in ("n_factors", "augmentation")] == [2, 0]
    assert [large["cpmm"][name] for name in ("n_factors", "augmentation")] == [5, 1]
    assert not small["cpmm"]["curriculum"]
    assert guided["cpmm"]["curriculum"]
    assert [trial.config["cpmm"]["n_clusters"] for trial in planned] == [7] * 10


def test_a_trial_is_what_its_overrides_compose_to(planned):
    for trial in planned[1::2]:
        assert compose_preset("digits", trial.overrides) == trial.config
        assert trial.config["cpmm"]["seed"] == trial.seed == 1
        assert trial.config["seed"] == 0  # of the data's and the teacher's draws


def test_trials_of_one_part_have_no_part_and_only_inputs_differ_by_what_they_read(planned):
    trials = plan_trials("digits", sweep(parts={"": PARTS["guided"]}, seeds=2), [], [], "code")
    assert [trial.row for trial in trials] == [(), ()]
    assert trials[0].name == "-, seed 0"
    inputs = Counter(trial.inputs for trial in planned)
    assert sorted(inputs.values()) == [2, 8]
    assert {spaces is None for _, spaces in inputs} == {True, False}


def test_names_are_short_unless_two_would_be_the_same():
    options = ["cpmm.initialization.kind", "cpmm.ode", "cpmm.field.width", "teacher.field.width"]
    assert list(shorten(options).values()) == [
        "initialization", "ode", "cpmm.field.width", "teacher.field.width",
    ]  # fmt: skip
    assert shorten(["n_spaces"]) == {"n_spaces": "n_spaces"}


def test_a_row_without_a_group_axis_shows_no_whole_section():
    parts = {"alone": {"overrides": ALONE}, "guided": {"grid": {"spaces": ["noise", "teacher"]}}}
    trials = plan_trials("digits", sweep(parts=parts), [], [], "code")
    assert [trial.label for trial in trials[1:]] == ["guided noise", "guided teacher"]
    assert "{" not in trials[0].label


def test_rows_that_differ_look_different():
    grid = {"cpmm.learning_rate": [1e-3, 1.00001e-3]}  # a table has a line for each label
    trials = plan_trials("digits", sweep(parts={"": {"grid": grid}}), [], [], "code")
    assert len({trial.label for trial in trials}) == 2


def test_a_part_that_is_null_is_left_out():
    parts = {"alone": {"overrides": ALONE}, "guided": None}
    trials = plan_trials("digits", sweep(parts=parts), [], [], "code")
    assert [trial.row for trial in trials] == [()]
    assert not trials[0].config["cpmm"]["curriculum"]


def test_a_part_may_have_its_own_number_of_seeds():
    parts = {"alone": {"overrides": ALONE, "seeds": 1}, "left": None, "guided": {}}
    trials = plan_trials("digits", sweep(parts=parts, seeds=3), [], [], "code")
    seeds = [(dict(trial.row)["part"], trial.seed) for trial in trials]
    assert seeds == [("alone", 0), *(("guided", seed) for seed in range(3))]


def test_a_part_may_be_named_by_a_number():
    parts = {1: {"overrides": ALONE}, 2: {}}
    trials = plan_trials("digits", sweep(parts=parts), [], [], "code")
    assert [trial.name for trial in trials] == ["part=1, seed 0", "part=2, seed 0"]


def test_a_sweep_says_what_is_new_about_it(planned, tmp_path):
    archive, n = Archive(str(tmp_path)), len(planned)

    def said(trials, **changes):
        return _beginning(Sweep("digits", trials, sweep(**changes), {}, archive, tmp_path), 0)

    assert said(planned) == f"starting, {n} trials, 0 done before, 0 begun"
    assert said(planned).startswith("same configuration: resuming")
    assert said(planned[2:]).startswith(f"other trials asked for than before, {n - 2} trials")
    assert said(planned).startswith(f"other trials asked for than before, {n} trials")
    stopped = said(planned, scheduler=DEFAULT["scheduler"] | {"kind": "asha"})
    assert stopped.startswith("configuration or code changed: starting afresh")
    other = plan_trials("digits", sweep(seeds=2, parts=PARTS), ["cpmm.n_clusters=7"], [], "code 2")
    assert said(other).startswith("configuration or code changed: starting afresh")


def test_the_user_overrules_the_sweep_but_not_its_axes():
    parts = {"p": {"overrides": {"cpmm.noise": 0.3}, "grid": {"cpmm.ode": ["shared"]}}}
    of = sweep(overrides={"cpmm.n_factors": 2, "cpmm.batch_size": 9}, parts=parts)
    user = ["cpmm.n_factors=5", "cpmm.noise=0.1"]
    trial = plan_trials("digits", of, ["cpmm.n_clusters=7", "cpmm.batch_size=8"], user, "code")[0]
    chosen = {
        name: trial.config["cpmm"][name]
        for name in ("n_factors", "noise", "batch_size", "n_clusters")
    }
    assert chosen == {"n_factors": 5, "noise": 0.1, "batch_size": 9, "n_clusters": 7}
    assert compose_preset("digits", trial.overrides) == trial.config
    with pytest.raises(ValueError, match=r"cpmm\.ode=separate is one of its axes"):
        plan_trials("digits", of, [], ["cpmm.ode=separate"], "code")


@pytest.mark.parametrize("path", ["my table; (1).csv", 'it\'s $HOME/a "b",c=d.csv'])
def test_a_command_splits_back_into_its_overrides(path):
    given = {"data.options.path": path}
    (trial,) = plan_trials("csv", sweep(overrides=given), ["cpmm.n_clusters=3"], [], "code")
    words = shlex.split(trial.command)
    assert words[:2] == ["python", "workflows/trial.py"]
    assert split_preset(words[2:]) == ("csv", list(trial.overrides))
    assert compose_preset("csv", trial.overrides) == trial.config
    assert trial.config["data"]["options"]["path"] == path


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"": {"grid": {"cpmm.n_factors": [6, 6]}}}, ["'n_factors=6, seed 0'"]),
        ({"a": {}, "b": {"grid": {"cpmm.ode": ["shared"]}}}, ["'a shared, seed", "'b shared, seed"]),
    ],
)  # fmt: skip
def test_the_same_trial_twice_is_refused(parts, named):
    with pytest.raises(ValueError, match="are the same trial") as error:
        plan_trials("digits", sweep(parts=parts), [], [], "code")
    assert all(name in str(error.value) for name in ["sweep own", *named])


@pytest.mark.parametrize(
    ("grid", "row", "named"),
    [
        ({"cpmm.n_factor": [2]}, "part=p, cpmm.n_factor=2", "n_factor"),
        ({"cpmm.n_factors": [2, "two"]}, "part=p, cpmm.n_factors=two", "cpmm.n_factors is 'two'"),
        ({"cpmm.n_factors": [2, False]}, "part=p, cpmm.n_factors=False", "cpmm.n_factors is False"),
        ({"spaces": ["nose"]}, "part=p, spaces=nose", "nose"),
        ({"cpmm.seed": [3]}, "part=p, cpmm.seed=3", "cpmm.seed=3 cannot be set"),
        ({"size": {"odd": {"cpmm.widht": 3}}}, "part=p, size=odd", "widht"),
    ],
)
def test_a_row_at_fault_is_named(grid, row, named):
    with pytest.raises(ValueError, match=r"^sweep own, row ") as error:
        plan_trials("digits", sweep(parts={"p": {"grid": grid}}), [], [], "code")
    assert f"row {row}: " in str(error.value)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": None}, "sweep.name is None"),
        ({"name": ""}, "sweep.name is ''"),
        ({"name": "../up"}, "sweep.name is '../up'"),
        ({"name": "a b"}, "sweep.name is 'a b'"),
        ({"seed": 3}, r"unknown \['seed'\]: choose among name, seeds"),
        ({"seeds": 0}, "sweep.seeds is 0"),
        ({"seeds": 1.5}, "sweep.seeds is 1.5"),
        ({"parts": {"p": ["cpmm.ode"]}}, "sweep.parts.p: expected overrides, grid and seeds"),
        ({"parts": {"p": {"grid": {}}, "q": 3}}, "sweep.parts.q: expected overrides, grid and seeds"),
        ({"parts": {"p": {"gird": {}}}}, "sweep.parts.p: expected overrides, grid and seeds"),
        ({"parts": {"p": {"seeds": 0}}}, "sweep.parts.p.seeds is 0: expected a whole number"),
        ({"parts": {"p": {"seeds": True}}}, "sweep.parts.p.seeds is True"),
        ({"parts": {"p": {"seeds": None}}}, "sweep.parts.p.seeds is None"),
        ({"parts": {"p": {"grid": {"cpmm.ode": "shared"}}}}, "parts.p.grid.cpmm.ode is 'shared'"),
        ({"parts": {"p": {"grid": {"cpmm.ode": []}}}}, r"parts.p.grid.cpmm.ode is \[\]"),
        ({"search": search("gird")}, "sweep.search.kind is 'gird': choose one of grid, random"),
        ({"scheduler": {"kind": "hyperband"}}, "sweep.scheduler.kind is 'hyperband': choose one"),
        ({"search": search("random"), "parts": PARTS}, "a random search has a search.space and no"),
        ({"search": search("optuna", space={})}, "a optuna search has a search.space and no parts"),
        ({"search": search("random", n_samples=0)}, "n_samples is 0"),
    ],
)  # fmt: skip
def test_a_sweep_at_fault_is_named(changes, named):
    with pytest.raises(ValueError, match=named):
        plan_trials("digits", sweep(**changes), [], [], "code")


@pytest.mark.parametrize("kind", ["random", "optuna"])
@pytest.mark.parametrize(
    "distribution",
    [
        "uniform", [0, 1], {}, {"normal": [0, 1]}, {"uniform": [0, 1], "choice": [1]},
        {"uniform": [1]}, {"uniform": [2, 1]}, {"uniform": ["a", "b"]}, {"uniform": 3},
        {"loguniform": [0, 1]}, {"choice": []}, {"choice": "ab"}, {"integer": [1.5, 3]},
    ],
)  # fmt: skip
def test_a_bad_distribution_is_named(kind, distribution):
    space = {"cpmm.noise": distribution}
    with pytest.raises(ValueError, match=r"^sweep\.search\.space\.cpmm\.noise"):
        plan.check(sweep(search=search(kind, space=space)))


@pytest.mark.parametrize("kind", ["random", "optuna"])
@pytest.mark.parametrize(
    ("option", "choice"), [("cpmm.lerning_rate", [0.1, 0.2]), ("cpmm.n_factors", ["two", "three"])]
)
def test_a_search_over_what_cannot_be_is_refused_before_anything_runs(kind, option, choice):
    space = {option: {"choice": choice}}
    with pytest.raises(ValueError, match=option.rpartition(".")[2]):
        plan_trials("digits", sweep(search=search(kind, space=space)), [], [], "code")


@pytest.mark.parametrize(
    ("models", "n_workers", "changes", "said"),
    [
        (["cpmm"], 2, {}, None),
        (["cpmm", "matched", "vade"], 1, {}, None),
        (["cpmm", "matched", "einet_matched"], 2, {},
         r"ray\.workers is 2, .* sweep own has model einet_matched, matched: set ray\.workers=1"),
        (["cpmm", "matched"], 1, {"scheduler": {"kind": "asha"}}, None),
        *((["cpmm", model], 1, {"scheduler": {"kind": "asha"}},
           rf"sweep\.scheduler\.kind is 'asha', .* model {model} has none: leave it out")
          for model in plan.NO_DENSITY),
        (["kmeans"], 1, {"search": search("random")}, None),
        (["kmeans"], 1, {"search": search("optuna")},
         r"sweep\.search\.kind is 'optuna', .* model kmeans has none: leave it out"),
        (["cpmm"], 1,
         {"search": search("optuna", space={"model": {"choice": ["cpmm", "vade", "matched"]}})},
         r"sweep\.search\.kind is 'optuna', .* model vade has none"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_trained_or_compared_are_refused(
    models, n_workers, changes, said, config
):
    trials = [make_trial("digits", (), 0, [], {**config, "model": m}, "code") for m in models]
    with nullcontext() if said is None else pytest.raises(ValueError, match=f"^{said}"):
        plan.check_models(trials, sweep(**changes), n_workers)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sweep=seeds", "model=matched", "ray.workers=2"], r"ray\.workers is 2"),
        (["sweep=optuna", "model=vade"], r"sweep\.scheduler\.kind is 'asha'"),
        (["sweep=optuna", "sweep.scheduler.kind=fifo", "model=vade"], r"search\.kind is 'optuna'"),
    ],
)
def test_a_sweep_of_models_that_cannot_be_is_refused_when_it_is_planned(overrides, said):
    with pytest.raises(ValueError, match=said):
        run_sweep(overrides, only_plan=True)


def test_a_random_search_is_decided_by_its_seed():
    def plan_seed(seed, n_samples=1):
        of = search("random", seed=seed, n_samples=n_samples)
        return plan_trials("digits", sweep(search=of), [], [], "code")

    (first,) = plan_seed(0)
    again, second = plan_seed(0, 2)  # more samples keep the trials there are
    (other,) = plan_seed(1)
    assert again == first
    assert len({first.fingerprint, second.fingerprint, other.fingerprint}) == 3
    assert compose_preset("digits", first.overrides) == first.config
    assert [name for name, _ in first.row] == ["learning_rate", "n_factors", "ode", "noise"]


def test_draws_follow_their_distributions():
    values = [row.axes for row in plan._rows(sweep(search=search("random", n_samples=2000)))]
    rate, factors, ode, noise = ([value[option] for value in values] for option in SPACE)
    assert 1e-4 <= min(rate) < max(rate) <= 1e-2
    # The share below the geometric middle is that of a fair coin: five deviations.
    assert sum(r < 1e-3 for r in rate) / 2000 == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(2000))
    assert Counter(factors).keys() == {2, 3, 4}
    assert min(Counter(factors).values()) > 2000 / 3 - 5 * math.sqrt(2000 * 2 / 9)
    assert set(ode) == {"shared", "separate"}
    assert 0.1 <= min(noise) < 0.11
    assert 0.29 < max(noise) <= 0.3


@pytest.fixture(scope="module")
def template():
    given = ["cpmm.learning_rate=0.5", "spaces=noise", "cpmm.n_clusters=7"]
    (trial,) = plan_trials("digits", sweep(search=search("optuna")), given, [], "code")
    return trial


def test_a_suggestion_is_the_trial_that_its_overrides_compose_to(template):
    before = yaml.safe_dump(template.config)
    values = {
        "cpmm.learning_rate": 1.2345678901234567e-05,
        "cpmm.n_factors": 3,
        "cpmm.ode": "separate",
        "cpmm.path_weight": 0,  # composed, 0.0
        "cpmm.initialization.mean_scale": 1e-300,
        "mixture.drop_idle": True,
    }
    trial = suggested_trial(template, values, "code")
    composed = compose_preset("digits", trial.overrides)
    assert composed == trial.config
    assert composed["cpmm"]["learning_rate"] == values["cpmm.learning_rate"]
    assert composed["cpmm"]["n_clusters"] == 7
    again = make_trial("digits", trial.row, trial.seed, trial.overrides[:-1], composed, "code")
    assert again == trial
    assert trial.row[:2] == (("learning_rate", "1.23457e-05"), ("n_factors", "3"))
    assert trial.fingerprint != template.fingerprint
    assert yaml.safe_dump(template.config) == before
    assert (
        suggested_trial(template, values | {"cpmm.n_factors": 4}, "code").fingerprint
        != trial.fingerprint
    )


@pytest.mark.parametrize("option", ["cpm.noise", "cpmm.nois", "cpmm.noise.level", "spaces"])
def test_a_suggestion_of_what_is_no_option_raises(option, config):
    with pytest.raises(ValueError, match=rf"sweep\.search\.space.*'?{option.split('.')[-1]}"):
        set_option(config, option, "noise")


def fingerprint(config, code="code", seed=0):
    return make_trial("digits", (), seed, [], config, code).fingerprint


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("cpmm.noise", 0.2), ("cpmm.field.width", 17), ("mixture.n_pseudotimes", 9),
        ("mixture.drop_idle", True), ("trainer.precision", "64-true"), ("data.split_seed", 1),
        ("data.n_train", 100), ("data.n_test", 300), ("spaces.n_draws", 2), ("teacher.batch_size", 7),
        ("seed", 1),
    ],
)  # fmt: skip
def test_a_fingerprint_changes_with_what_decides_the_result(option, value, config):
    assert fingerprint(set_option(config, option, value)) != fingerprint(config)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("trainer.checkpoint_every_n_epochs", 5), ("trainer.threads", 2),
        ("trainer.accelerator", "cpu"), ("baselines.direct.epochs", 3), ("cpmm.seed", 9),
    ],
)  # fmt: skip
def test_a_fingerprint_does_not_change_with_what_does_not(option, value, config):
    assert fingerprint(set_option(config, option, value)) == fingerprint(config)


def test_a_fingerprint_changes_with_seed_and_code_and_without_curriculum_not_with_the_teacher(
    config,
):
    assert (
        len({fingerprint(config), fingerprint(config, seed=1), fingerprint(config, code="other")})
        == 3
    )
    alone = set_option(config, "cpmm.curriculum", False)
    for option, value in (("teacher.batch_size", 7), ("spaces.n_spaces", 9), ("seed", 1)):
        assert fingerprint(set_option(alone, option, value)) == fingerprint(alone)
    assert fingerprint(set_option(alone, "data.split_seed", 1)) != fingerprint(alone)


def test_the_code_of_a_trial_is_that_of_training_and_scoring():
    trial = code_fingerprint(PACKAGE / "pipeline" / "sweeps" / "trial.py")
    assert trial_code() == trial
    reached = set(reached_files(PACKAGE / "pipeline" / "sweeps" / "trial.py"))
    needed = {"models/fit.py", "models/baselines.py", "models/mixtures.py", "scores/scorer.py"}
    assert {f"cpmm/pipeline/{name}" for name in needed} | {"cpmm/factor_analyzers.py"} <= reached
    assert not {name for name in reached if name.startswith("workflows/")}


@pytest.mark.parametrize(
    ("override", "own"),
    [
        ("sweep=random", True), ("sweep.seeds=5", True), ("+sweep.parts.p={}", True),
        ("~sweep.claims", True), ("ray.gpus=0.5", True), ("ray.address=auto", True),
        ("spaces=noise", False), ("cpmm.n_factors=3", False), ("+data.options.sweep=1", False),
        ("data.options.path='ray.csv'", False),
    ],
)  # fmt: skip
def test_options_of_the_sweep_are_not_its_trials(override, own):
    assert _is_own(override) == own


@cache
def committed(name):
    """A sweep of conf/, and its trials for digits; of a random one not all samples."""
    section = compose_preset("digits", [f"sweep={name}", "sweep.search.n_samples=2"], "sweep")
    section = section["sweep"]
    return section, plan_trials("digits", section, [], [], "code")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "ablation" else []) for n in SWEEPS],
)
def test_every_sweep_of_conf_plans(name):
    section, trials = committed(name)
    rows = list(dict.fromkeys(trial.row for trial in trials))
    parts = [part for part in section["parts"].values() if part]
    grids = [[len(values) for values in part.get("grid", {}).values()] for part in parts]
    n_rows = {"grid": sum(map(math.prod, grids)) or 1, "random": 2, "optuna": 1}
    assert section["name"] == name
    assert len(rows) == n_rows[section["search"]["kind"]]
    seeds = [part.get("seeds", section["seeds"]) for part in parts] or [section["seeds"]]
    sizes = [math.prod(grid) for grid in grids] or [len(rows)]
    assert len(trials) == sum(map(math.prod, zip(sizes, seeds, strict=True)))
    assert len({trial.label for trial in trials}) == len(rows)


@pytest.mark.parametrize(
    ("name", "preset"),
    [("table2", "mnist_cpu_plain"), ("table2_small", "mnist"), ("images", "mnist_cpu"), ("optuna", "mnist")],
)  # fmt: skip
def test_sweeps_fit_presets_of_images_too(name, preset):
    section = compose_preset(preset, [f"sweep={name}"], "sweep")["sweep"]
    for trial in plan_trials(preset, section | {"seeds": 1}, [], [], "code"):
        cpmm = trial.config["cpmm"]
        labelled = cpmm["pseudo_label_spaces"] or cpmm["pseudo_label_weight"]
        grouped = cpmm["initialization"]["kind"] in ("analyzers", "neighbours")
        assert bool(labelled) == (grouped and name != "optuna")


def test_the_ablation_plans_at_the_end_of_each_axis():
    section = compose_preset("digits", ["sweep=ablation"], "sweep")["sweep"]
    for part in section["parts"].values():
        for axis, values in part["grid"].items():
            last = list(values)[-1]
            part["grid"][axis] = {last: values[last]} if isinstance(values, dict) else [last]
    trials = plan_trials("digits", section | {"seeds": 1}, [], [], "code")
    assert [[value for _, value in trial.row] for trial in trials] == [
        ["no curriculum", "4", "0.1", "separate", "-", "-"],
        ["curriculum", "4", "0.1", "separate", "teacher", "51"],
    ]


@pytest.mark.parametrize("name", [name for name in SWEEPS if name != "ablation"])
def test_every_claim_is_about_two_rows_of_its_sweep(name):
    section, trials = committed(name)
    rows = pd.DataFrame(
        [{**dict(row), "n": 1, "n_failed": 0, "n_stopped": 0} for row in {t.row: 0 for t in trials}]
    )
    for score in ("density", "accuracy"):
        rows[[f"{score}_mean", f"{score}_sd"]] = 0.5
    checked = check_claims(rows, section["claims"])
    assert [claim["claim"] for claim in checked] == [c["claim"] for c in section["claims"]]
