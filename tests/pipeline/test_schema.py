import math
import re

import pytest
from conftest import NEEDED, ROOT

from cpmm.elementwise import MAPS
from cpmm.fields import ACTIVATIONS
from cpmm.initialization import INITIALIZATIONS
from cpmm.odes import ADAPTIVE, FIXED_STEP, GRADIENTS
from cpmm.pipeline.artifacts.sources import SOURCES
from cpmm.pipeline.config.compose import (
    compose_preset,
    known_presets,
    known_sweeps,
    option_rules,
)
from cpmm.pipeline.config.schema import ANYTHING, ROWS, canonical, leaves
from cpmm.pipeline.models.fit import PRECISIONS
from cpmm.pipeline.models.mixtures import SPACES
from cpmm.preprocessing import STANDARDIZATIONS
from cpmm.trajectory import DIAGONALS

OPTIONS = option_rules()


def nested(name, value):
    """A configuration of one option."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def composed():
    """Every preset with every sweep, as often as is needed to see each file of conf/."""
    for preset in known_presets():
        yield compose_preset(preset, NEEDED.get(preset, []), "sweep")
    for sweep in known_sweeps():
        yield compose_preset("digits", [f"sweep={sweep}"], "sweep")
    for group in ("teacher", "spaces", "cpmm", "mixture", "evaluation", "trainer", "ray"):
        for path in (ROOT / "conf" / group).glob("[!b]*.yaml"):  # base.yaml is no choice
            yield compose_preset("rings", [f"{group}={path.stem}"], "sweep")
    for path in (ROOT / "conf" / "ood").glob("*.yaml"):
        options = [item.replace("data", "evaluation.ood") for item in NEEDED.get(path.stem, [])]
        yield compose_preset("rings", [f"ood@evaluation.ood={path.stem}", *options], "sweep")


def test_the_table_holds_every_option_of_conf_and_no_other():
    found = {name for config in composed() for name, _ in leaves(config)}
    assert found == set(OPTIONS)
    assert set(ROWS) <= {name.split(".", 2)[2] for name in found if name.startswith("baselines.")}


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("data.source", SOURCES),
        ("data.standardize", STANDARDIZATIONS),
        ("data.map.kind", MAPS),
        ("teacher.field.activation", ACTIVATIONS),
        ("cpmm.solver.method", FIXED_STEP + ADAPTIVE),
        ("teacher.solver.gradient", GRADIENTS),
        ("cpmm.diagonal", DIAGONALS),
        ("cpmm.initialization.kind", INITIALIZATIONS),
        ("spaces.kind", SPACES),
        ("trainer.precision", PRECISIONS),
    ],
)
def test_choices_are_those_of_the_code(option, known):
    assert OPTIONS[option].expected == f"choose one of {', '.join(known)}"
    assert all(map(OPTIONS[option].accepts, known))


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        ("cpmm.batch_size", [1, 10**6],
         [0, -1, 10**6 + 1, 3.0, 2.5, True, None, "3", [3], math.nan]),
        ("cpmm.noise", [0, 0.5, 3],
         [-1e-9, 1e10, math.inf, math.nan, 10**400, False, None, "0.5", {}]),
        ("cpmm.learning_rate", [1e-300, 1], [0, 0.0, -1]),
        ("data.alpha", [None, 0.01], [0, 0.5, math.nan, "null"]),
        ("data.options.gap_width", [0, 359.9], [360, -0.1]),
        ("data.options.gaps", [[1, 2.5]], [[1], [1, 2, 3], [1, "2"], 60, None]),
        ("data.options.path", ["x.csv", "größe", "a\nb"], ["", " ", "a\0b", "\ud800", 3, None]),
        ("data.options.label_path", [None, "x"], ["", 0]),
        ("data.options.md5", [None, {}, {"a": None}, {"a": "0f"}], [{"a": 3}, {1: "a"}, "0f", []]),
        ("data.options.class_names", [["a"], None], [[], ["a", 1], "ab"]),
        ("data.options.axes", ["NHWC", "HWN", None], ["NH", "nhwc", "NHWCC", 3, ["N", "H", "W"]]),
        ("cpmm.field.kernel_size", [1, 3], [0, 2, -1, 3.0, True, 101]),
        ("cpmm.curriculum", [True, False], [0, 1, "true", None]),
        ("trainer.threads", [None, 1], [0, 10**6, True]),
        ("evaluation.discretizations", [[3], [3, 5]], [[], [0], [2.5], 3]),
        ("trainer.devices", [1], [0, 2, True, 1.0, "auto"]),  # each would run the whole stage
        ("seed", [0, 2**32 - 1], [-1, 2**32, 1.0]),
        ("evaluation.ood", [None], ["mnist", "", 0, False, [], ["mnist"]]),
        ("evaluation.teacher_points", [None, 2], [0, 1, -1, 2.0, "all"]),
        ("baselines.direct.kmeans_points", [None, 1], [0, True]),
        ("name", ["digits", "my-own_2"], ["", "../up", "a b", None, 3]),
        ("spaces.kind", ["noise"], ["Noise", "", None, ["noise"], 3]),
    ],
)  # fmt: skip
def test_what_an_option_may_be(option, good, bad):
    assert [value for value in good if not OPTIONS[option].accepts(value)] == []
    assert [value for value in bad if OPTIONS[option].accepts(value)] == []


def test_30_and_30_point_0_are_one_fingerprint():
    config = compose_preset("mnist", ["ood@evaluation.ood=mnist"], "sweep")
    found = dict(leaves(config))
    numbers = {
        name: rule
        for name, rule in OPTIONS.items()
        if rule is not ANYTHING and any(rule.accepts(v) and rule.accepts(v + 0.0) for v in (0, 7))
    }
    assert {"cpmm.temperature", "cpmm.noise", "baselines.einet_large.size_factor"} <= set(numbers)
    for name, rule in numbers.items():
        for value in (v for v in (0, 1, 7, 30) if rule.accepts(v)):
            texts = {repr(canonical(nested(name, v), OPTIONS)) for v in (value, float(value))}
            assert len(texts) == 1, name
    assert canonical(nested("cpmm.noise", -0.0), OPTIONS) == {"cpmm": {"noise": 0.0}}
    assert "-" not in repr(canonical(nested("cpmm.noise", -0.0), OPTIONS))
    lists = nested("baselines.direct.shrinkages", [5, 20.0])
    assert repr(canonical(lists, OPTIONS)).endswith("[5.0, 20.0]}}}")
    kinds = {name: type(value) for name, value in found.items() if name in numbers}
    assert set(kinds.values()) <= {float, type(None)}
    assert canonical(config, OPTIONS) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cpmm.batch_size=0", "cpmm.batch_size is 0: expected a whole number of at least 1 and at"),
        ("seed=-1", "seed is -1: expected a whole number of at least 0"),
        ("data.alpha=0.5", "data.alpha is 0.5: expected a number above 0 and below 0.5, or null"),
        ("cpmm.ode=both", "cpmm.ode is 'both': choose one of shared, separate"),
        ("+cpmm.n_cluster=3", "cpmm.n_cluster is 3, but it is no option of conf/"),
        ("cpmm.field=null", "cpmm.field is None, but it is a section, not a value"),
        (
            "evaluation.ood=mnist",
            "evaluation.ood is 'mnist': choose a file of conf/ood/, such as ood@",
        ),
        (
            "+evaluation.ood={source: digits}",
            "evaluation.ood.source is 'digits': choose one of idx",
        ),
        ("+evaluation.ood={alpha: 1}", "evaluation.ood.alpha is 1, but it is no option of conf/"),
        ("~cpmm.noise", "cpmm.noise is missing: it cannot be left out (in conf/ it is 0.1)"),
        ("data.source=[" + "1," * 500 + "1]", "data.source is [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1"),
    ],
)
def test_what_came_is_said_beside_what_was_expected(override, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        compose_preset("digits", [override])
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    "override", ["preset=rings", "~preset", "hydra.run.dir=x", "hydra/job_logging=none"]
)
def test_what_would_change_another_preset_or_nothing_is_refused(override):
    with pytest.raises(ValueError, match=re.escape(repr(override)) + " cannot be an override"):
        compose_preset("digits", [override])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("cpmm=null", "cpmm=null"),
        ("cpmm=[[mlp]]", "cpmm=[[mlp]]"),
        ("seed=" + "9" * 5000, "seed=9999"),
        ("seed=" + "[" * 3000 + "]" * 3000, "seed=[[["),
    ],
)
def test_what_hydra_says_without_a_name_is_given_one(override, named):
    with pytest.raises(ValueError, match="cannot be composed") as error:
        compose_preset("digits", [override])
    assert named in str(error.value)
    assert len(str(error.value)) < 800
