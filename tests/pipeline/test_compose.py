import hashlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import NEEDED, ROOT
from dvc.utils.hydra import apply_overrides

from cpmm.initialization import GROUPINGS
from cpmm.odes import FIXED_STEP
from cpmm.pipeline.config import compose as config_compose
from cpmm.pipeline.config import schema
from cpmm.pipeline.config.compose import (
    compose_preset,
    flatten,
    missing_ood_files,
    overrides_of,
    read_overrides,
    split_preset,
)
from cpmm.pipeline.config.fingerprints import (
    fingerprint_baseline,
    fingerprint_cpmm,
    fingerprint_prepared,
)
from workflows import compose, prepare_data

PRESETS = sorted(path.stem for path in (ROOT / "conf" / "preset").glob("*.yaml"))


def test_nested_overrides_become_hydra_syntax():
    nested = {
        "teacher": {"field": {"width": 9}},
        "seed": 3,
        "spaces": "noise",
        "a": [1, "b c"],
        "n": None,
    }
    assert list(flatten(nested)) == [
        "teacher.field.width=9", "seed=3", "spaces=noise", "a=[1,'b c']", "n=null",
    ]  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_and_keeps_its_name(preset):
    config = compose_preset(preset, NEEDED.get(preset, []))
    assert config["name"] == preset
    assert yaml.safe_load(yaml.safe_dump(config)) == config


def test_a_file_that_was_edited_is_another_configuration(tmp_path):
    path = tmp_path / "table.csv"
    overrides = [f"data.options.path={path}", "cpmm.n_clusters=3"]
    assert (
        "digests" not in compose_preset("csv", overrides)["data"]
    )  # to be missed where it is read
    fingerprints = set()
    for text in ("a,b\n1,2\n", "a,b\n1,3\n"):
        path.write_text(text)
        config = compose_preset("csv", overrides)
        assert config["data"]["digests"] == {"path": hashlib.sha256(text.encode()).hexdigest()}
        fingerprints.add(fingerprint_prepared(config))
    assert len(fingerprints) == 2
    path.write_text("a,b\n" + "1,2\n3,4\n" * 300)
    with pytest.raises(
        ValueError, match=r"table\.csv \(data\.options\.path\) has changed since .* compose@csv"
    ):
        prepare_data.main(tmp_path, config)
    assert "digests" not in compose_preset("digits", [])["data"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["cpmm.initialization.kind=random"],
            r"pseudo_label_spaces is \d+, .*'random' makes no groups",
        ),
        (["cpmm.weight_knots=90"], "weight_knots is 90: a solver of 4 steps"),
    ],
)
def test_what_options_say_together_is_checked_when_they_are_composed(overrides, said):
    with pytest.raises(ValueError, match=said):
        compose_preset("digits", overrides)


def test_a_new_baseline_is_a_file_and_nothing_else(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    file = tmp_path / "conf" / "baselines" / "new.yaml"
    file.write_text("kind: newest\nn_epochs: 3\nsharpness: 0.5\nbits: [1, 2]\nsecret: null\n")
    small = tmp_path / "conf" / "preset" / "rings.yaml"
    small.write_text(small.read_text() + "baselines: {new: {n_epochs: 2}, vade: {n_epochs: 7}}\n")
    monkeypatch.setattr(config_compose, "ROOT", tmp_path)
    composed = compose_preset("rings", ["baselines.new.sharpness=2", "model=new"])
    own = {"kind": "newest", "n_epochs": 2, "sharpness": 2, "bits": [1, 2], "secret": None}
    assert composed["baselines"]["new"] == own
    assert composed["baselines"]["vade"]["n_epochs"] == 7
    for override, said in (
        ("baselines.new.n_epochs=0", "is 0: expected a whole number of at least 1"),
        ("baselines.new.n_epochs=2.5", "is 2.5: expected a whole number of at least 1"),
        ("baselines.new.sharpness=much", "is 'much': expected a number"),
        ("baselines.new.bits=[1,a]", "is [1, 'a']: expected a list of values such as 1"),
        ("baselines.new.secret=1", "is 1: expected None, as in its file"),
        ("baselines.new.kind=vade", "is 'vade': choose one of newest"),
        ("+baselines.new.sharpnes=1", "is 1, but it is no option of conf/"),
        ("~baselines.new.bits", "is missing: it cannot be left out (in conf/ it is [1, 2])"),
    ):
        name = override.lstrip("+~").split("=")[0]
        with pytest.raises(ValueError, match=f"^{re.escape(f'{name} {said}')}"):
            compose_preset("rings", [override])
    file.write_text("n_epochs: 3\n")
    config_compose.option_rules.cache_clear()
    config_compose._compose_plain.cache_clear()
    config_compose._compose_rows.cache_clear()
    with pytest.raises(ValueError, match=r"^conf/baselines/new\.yaml has no kind"):
        compose_preset("rings", [])


def test_a_presets_typo_in_a_row_is_named(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    with (tmp_path / "conf" / "preset" / "rings.yaml").open("a") as file:
        file.write("baselines: {vade: {n_epoch: 2}}\n")
    monkeypatch.setattr(config_compose, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"^baselines\.vade\.n_epoch is 2, but it is no option"):
        compose_preset("rings", [])


def test_the_table_of_options_knows_the_methods_names():
    assert (schema.FIXED_STEP, schema.GROUPINGS) == (FIXED_STEP, GROUPINGS)


def test_an_override_changes_its_value_alone():
    plain, changed = (
        compose_preset("digits", []),
        compose_preset("digits", ["teacher.batch_size=7"]),
    )
    assert changed["teacher"].pop("batch_size") == 7
    plain["teacher"].pop("batch_size")
    assert plain == changed


def test_numbers_are_written_in_one_way():
    whole, real = (
        compose_preset("digits", [f"cpmm.temperature={n}", f"baselines.direct.shrinkages=[{n},1]"])
        for n in ("30", "30.0")
    )
    assert yaml.safe_dump(whole) == yaml.safe_dump(real)
    assert fingerprint_cpmm(whole) == fingerprint_cpmm(real)
    assert fingerprint_baseline(whole, "direct") == fingerprint_baseline(real, "direct")
    assert "temperature: 30.0" in yaml.safe_dump(whole)


def test_a_group_override_swaps_the_group():
    assert compose_preset("digits", ["spaces=noise"])["spaces"]["kind"] == "noise"


@pytest.mark.parametrize(
    ("preset", "override", "named"),
    [
        ("digit", "seed=0", "unknown preset 'digit'"),
        ("digits", "teacher.epocs=9", "epocs"),
        ("digits", "spaces=nose", "nose"),
        ("digits", "cpmm.field.width", "cpmm.field.width"),
    ],
)
def test_a_typo_is_named(preset, override, named):
    with pytest.raises(ValueError, match=r"cannot be composed|unknown preset") as error:
        compose_preset(preset, [override])
    assert named in str(error.value)


def test_the_command_ends_with_one_line(tmp_path):
    command = [sys.executable, ROOT / "workflows" / "compose.py", "digit", tmp_path / "c.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("config: error: unknown preset 'digit': choose one of ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "c.yaml").exists()


def test_a_data_set_to_be_told_apart_is_looked_for_before_anything_runs(
    tmp_path, monkeypatch, capsys
):
    cache = f"evaluation.ood.options.cache={tmp_path / 'none'}"  # of a download that never was
    folder = f"evaluation.ood.options.folder={tmp_path}"

    def missing(*overrides: str) -> str | None:
        return missing_ood_files(compose_preset("fashion_mnist_cpu", [cache, *overrides]))

    assert re.search(r"ood is mnist, and .* is missing .* evaluation\.ood to null", missing(folder))
    assert missing() is not None
    assert missing("evaluation.ood.options.mirror=http://localhost") is None
    assert missing("evaluation.ood=null") is None
    assert missing_ood_files(compose_preset("digits", [])) is None
    options = compose_preset("fashion_mnist_cpu", [])["evaluation"]["ood"]["options"]
    for name in options["files"].values():
        (tmp_path / name.removesuffix(".gz")).touch()
    assert missing(folder) is None

    monkeypatch.setattr(compose, "read_overrides", lambda preset: [cache])
    target = tmp_path / "config.yaml"
    monkeypatch.setattr(sys, "argv", ["compose.py", "fashion_mnist_cpu", str(target)])
    compose.main()
    assert target.is_file()
    assert "config: warning: evaluation.ood is mnist" in capsys.readouterr().err


def test_overrides_named_after_a_preset_are_its_own():
    overrides = {"seed": 3, "csv": {"data": {"options": {"path": "x.csv"}}}}
    assert overrides_of("digits", overrides) == ["seed=3"]
    assert overrides_of("csv", overrides) == ["seed=3", "data.options.path='x.csv'"]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        (
            "cpmm.n_factors=three",
            "cpmm.n_factors is 'three': expected a whole number of at least 1",
        ),
        ("cpmm.curriculum=3", "cpmm.curriculum is 3: expected true or false"),
        ("seed=true", "seed is True: expected a whole number of at least 0"),
        ("spaces.dtype=16", "spaces.dtype is 16: choose one of float32, float16"),
        ("cpmm.field=wide", "cpmm.field"),
    ],
)
def test_a_value_of_another_type_is_named(override, named):
    with pytest.raises(ValueError, match=named):
        compose_preset("digits", [override])


def test_a_missing_value_says_where_to_set_it():
    both = r"overrides\.csv\.data\.options\.path and overrides\.csv\.cpmm\.n_clusters in"
    with pytest.raises(ValueError, match=both):
        compose_preset("csv", [])
    with pytest.raises(
        ValueError,
        match=r"needs a value for cpmm\.n_clusters: write cpmm\.n_clusters=VALUE after trial",
    ):
        compose_preset("csv", ["data.options.path=x.csv"])


@pytest.mark.parametrize(
    "name",
    [
        "data (1).csv", "a=1.csv", "a,1.csv", "\u6570\u636e.csv", "a'b.csv", 'a"b.csv', "a[1].csv",
        "{x}.csv", "#a.csv", "~a.csv", "$(ls).csv", "a\\'b.csv", "!a;&|<>.csv",
    ],
)  # fmt: skip
def test_a_path_that_hydra_refuses_is_given_in_a_form_that_it_takes(name):
    path = f"/no such folder/{name}"
    with pytest.raises(ValueError, match="stands in quotes of its own") as error:
        compose_preset("csv", [f"data.options.path={path}", "cpmm.n_clusters=3"])
    [word] = shlex.split(str(error.value).rpartition("write ")[2])  # as a shell reads it
    assert compose_preset("csv", [word, "cpmm.n_clusters=3"])["data"]["options"]["path"] == path


@pytest.mark.parametrize(
    "name", ["data (1).csv", "a=1,2.csv", "\u6570\u636e[x]{y}.csv", 'a b".csv']
)
def test_quotes_within_quotes_carry_any_path_through_dvc(tmp_path, name):
    params = tmp_path / "params.yaml"
    params.write_text("overrides: {}\n")
    apply_overrides(params, [f"++overrides.csv.data.options.path='/x/{name}'"])
    overrides = [*read_overrides("csv", params), "cpmm.n_clusters=3"]
    assert compose_preset("csv", overrides)["data"]["options"]["path"] == f"/x/{name}"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ("digits", [])),
        (["cpmm.seed=1", "preset=rings", "seed=2"], ("rings", ["cpmm.seed=1", "seed=2"])),
        (["preset=rings", "preset=spiral"], ("spiral", [])),
        (["data.options.path='preset=x'"], ("digits", ["data.options.path='preset=x'"])),
        (["preset=a=b"], ("a=b", [])),
    ],
)
def test_the_preset_is_taken_out_of_a_command_line(words, expected):
    before = list(words)
    assert split_preset(words) == expected
    assert words == before


def test_the_seed_of_training_is_that_of_all_unless_it_is_set():
    for overrides, seeds in (
        ([], (0, 0)),
        (["seed=4"], (4, 4)),
        (["cpmm.seed=3"], (0, 3)),
        (["seed=4", "cpmm.seed=3"], (4, 3)),
        (["cpmm.seed=3", "seed=4"], (4, 3)),
    ):
        config = compose_preset("digits", overrides)
        assert (config["seed"], config["cpmm"]["seed"]) == seeds
    with pytest.raises(ValueError, match=r"cpmm\.seed is 'one': expected a whole number"):
        compose_preset("digits", ["cpmm.seed=one"])


def test_a_sweep_is_composed_with_the_configuration_of_its_trials():
    config = compose_preset("digits", ["sweep=random", "cpmm.noise=0.3", "ray.gpus=0.5"], "sweep")
    sweep, ray = config.pop("sweep"), config.pop("ray")
    assert config == compose_preset("digits", ["cpmm.noise=0.3"])
    assert (sweep["name"], sweep["seeds"], sweep["search"]["kind"]) == ("random", 1, "random")
    assert ray["gpus"] == 0.5
    assert compose_preset("digits", [], "sweep")["sweep"]["name"] == "table2"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sweep=nose", "nose"),
        ("sweep=default", "sweep.name"),
        ("ray.workers=three", "ray.workers is 'three': expected a whole number"),
        ("sweep.sedes=3", "sedes"),
        ("ray.cpus=many", "ray.cpus is 'many': expected a number of at least 0.01"),
        ("ray.reuse_actors=1", "ray.reuse_actors is 1: expected true or false"),
        ("ray.cpu=2", "ray.cpu"),
    ],
)
def test_a_typo_in_the_sweeps_options_is_named(override, named):
    with pytest.raises(ValueError, match=named):
        compose_preset("digits", [override], "sweep")


def test_trials_know_nothing_of_the_sweep():
    for override in ("sweep=table2", "ray.cpus=2"):
        with pytest.raises(ValueError, match="cannot be composed"):
            compose_preset("digits", [override])


@pytest.mark.parametrize(
    "text", ["a b", "it's", 'a "b", c=[1]', "a\\b", "a\\'b", "1e3", "null", "true", "größe"]
)
def test_text_comes_through_hydra_as_it_is(text):
    (override,) = flatten({"data.options.path": text})
    config = compose_preset("csv", [override, "cpmm.n_clusters=3"])
    assert config["data"]["options"]["path"] == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "params.yaml is None: expected presets and overrides"),
        ("[digits]", "expected presets and overrides"),
        ("overrides: []", "overrides in params.yaml is []: expected a mapping"),
        ("overrides: text", "overrides in params.yaml is 'text': expected a mapping"),
        ("overrides: {rings: 3}", "overrides.rings in params.yaml is 3: expected a mapping"),
        ("overrides: {3: 4}", "3 is not the name of an option"),
        ("overrides: {seed=3: 4}", "'seed=3' is not the name of an option"),
        (
            "overrides: {cpmm: {seed: 2026-01-01}}",
            "cpmm.seed is datetime.date(2026, 1, 1): expected",
        ),
        ("overrides: {seed: [{a: 1}]}", "seed is [{'a': 1}]: expected a number, text"),
        ("overrides: {seed: 2026-99-99}", "params.yaml is not YAML: month must be in 1..12"),
        ("overrides: {seed: 1", "params.yaml is not YAML: while parsing a flow mapping"),
        ("overrides: &a {seed: *a}", "overrides in params.yaml contain themselves"),
        ("overrides: {seed: &a [*a]}", "overrides in params.yaml contain themselves"),
    ],
)
def test_params_that_cannot_be_overrides_are_named(tmp_path, text, message):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_overrides("digits", path)
    assert "\n" not in str(error.value)


def test_params_are_read_as_they_are_written(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("overrides: {seed: 3, cpmm: {}, csv: {data.options: {path: größe.csv}}}")
    assert read_overrides("csv", path) == ["seed=3", "cpmm={}", "data.options.path='größe.csv'"]
    path.write_text("presets: [digits]")
    assert read_overrides("digits", path) == []
