"""What every option of conf/ may be: one table, checked as soon as a configuration is composed.

A value out of range ends here, in the first second and by its own name, not in a stage hours later. Whole
numbers are written without a point: 3.0 is refused where 3 is meant, as it would be another fingerprint
of the same configuration. What options of CPMM say together, without the data, is checked beside it; the
rest where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What an option may be.

    Attributes:
        expected: For people, such as "expected a whole number of at least 1".
        accepts: Whether a value is allowed.
    """

    expected: str
    accepts: Callable[[Any], bool]


FIXED_STEP = ("euler", "midpoint", "heun2", "heun3", "rk4")  # as in cpmm/odes.py, which needs torch
GROUPINGS = ("kmeans", "analyzers", "linkage", "neighbours")  # as in cpmm/initialization.py
MANY = 1_000_000  # of anything that is counted; a slip of the keyboard ends here
LARGEST = 1e9  # of anything that is measured


def whole(low: int, high: int = MANY) -> Rule:
    """A whole number."""
    return Rule(
        f"expected a whole number of at least {low} and at most {high}",
        lambda value: type(value) is int and low <= value <= high,
    )


def number(low: float = -LARGEST, high: float = LARGEST, ends: str = "[]") -> Rule:
    """A number in an interval; a round bracket leaves its end out."""
    above = "of at least" if ends[0] == "[" else "above"
    below = "at most" if ends[1] == "]" else "below"

    def accepts(value: Any) -> bool:
        if type(value) not in (int, float) or not low <= value <= high:  # NaN is not
            return False
        return (value > low or ends[0] == "[") and (value < high or ends[1] == "]")

    return Rule(f"expected a number {above} {low:g} and {below} {high:g}", accepts)


def choice(*names: str) -> Rule:
    """One of several words."""
    return Rule(
        f"choose one of {', '.join(names)}",
        lambda value: isinstance(value, str) and value in names,
    )


def text() -> Rule:
    """Text that is not empty and that a file can hold."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            return False
        return not any("\ud800" <= character <= "\udfff" for character in value)

    return Rule("expected text, in quotes if it looks like a number", accepts)


def word() -> Rule:
    """Text that is safe in a file name."""
    return Rule(
        "expected letters, digits, - and _",
        lambda value: isinstance(value, str) and value.replace("_", "").replace("-", "").isalnum(),
    )


def flag() -> Rule:
    """A switch."""
    return Rule("expected true or false", lambda value: isinstance(value, bool))


def or_null(rule: Rule) -> Rule:
    """What ``rule`` allows, or null."""
    return Rule(f"{rule.expected}, or null", lambda value: value is None or rule.accepts(value))


def several(what: str, rule: Rule, least: int = 1, most: int = 1000) -> Rule:
    """A list of values that ``rule`` allows."""
    return Rule(
        f"expected a list of {what}",
        lambda value: (
            isinstance(value, list)
            and least <= len(value) <= most
            and all(map(rule.accepts, value))
        ),
    )


def named(what: str, rule: Rule) -> Rule:
    """A mapping from names to values that ``rule`` allows."""
    return Rule(
        f"expected a mapping from names to {what}",
        lambda value: (
            isinstance(value, Mapping)
            and all(isinstance(key, str) for key in value)
            and all(map(rule.accepts, value.values()))
        ),
    )


SEED = whole(0, 2**32 - 1)  # scikit-learn takes no larger ones
COUNT = whole(1)
COUNT_OR_NONE = whole(0)
WEIGHT = number(0)
ANYTHING = Rule("", lambda value: True)  # checked where it is used: the sweep's in sweeps/plan.py
MAPPING = Rule("expected a mapping", lambda value: isinstance(value, Mapping))


def _field(prefix: str) -> dict[str, Rule]:
    return {
        f"{prefix}.kind": choice("mlp", "conv"),
        f"{prefix}.width": COUNT,
        f"{prefix}.depth": whole(1, 100),
        f"{prefix}.activation": choice("sin", "tanh", "softplus", "silu"),
        f"{prefix}.n_frequencies": whole(0, 24),  # float32 has no digits left for more
        f"{prefix}.last_layer_scale": number(),
        f"{prefix}.kernel_size": Rule(
            "expected an odd whole number from 1 to 99",
            lambda value: type(value) is int and value in range(1, 100, 2),
        ),
        f"{prefix}.coordinates": flag(),
        f"{prefix}.squeeze": whole(1, 1000),
    }


def _solver(prefix: str, *left_out: str) -> dict[str, Rule]:
    rules = {
        "method": choice(*FIXED_STEP, "dopri5", "adaptive_heun"),
        "n_steps": COUNT,
        "interpolation": choice("linear", "cubic"),
        "rtol": number(0, ends="(]"),
        "atol": number(0, ends="(]"),
        "gradient": choice("backpropagation", "checkpoint", "adjoint"),
    }
    return {f"{prefix}.{name}": rule for name, rule in rules.items() if name not in left_out}


def _refined(prefix: str) -> dict[str, Rule]:
    """Options of the training of free components."""
    rules = {
        "epochs": COUNT,
        "n_draws": COUNT,
        "batch_size": COUNT,
        "learning_rate": number(0, ends="(]"),
        "n_warmup_epochs": COUNT_OR_NONE,
        "gradient_clip": WEIGHT,
        "noise": WEIGHT,
    }
    return {f"{prefix}.{name}": rule for name, rule in rules.items()}


def _direct(prefix: str) -> dict[str, Rule]:
    """Options of directly optimized mixtures."""
    rules = {
        "n_per_cluster": COUNT,
        "em_iterations": COUNT_OR_NONE,
        "kmeans_points": or_null(COUNT),
        "kmeans_restarts": COUNT,
        "shrinkages": several("numbers of at least 0", WEIGHT),
    }
    return _refined(prefix) | {f"{prefix}.{name}": rule for name, rule in rules.items()}


def _flow(prefix: str) -> dict[str, Rule]:
    """Options of a continuous normalizing flow."""
    rules = {
        "exact_trace_up_to": COUNT_OR_NONE,
        "flow_matching_epochs": COUNT_OR_NONE,
        "likelihood_epochs": COUNT_OR_NONE,
        "kinetic_weight": WEIGHT,
        "jacobian_weight": WEIGHT,
        "n_draws": COUNT,
        "batch_size": COUNT,
        "learning_rate": number(0, ends="(]"),
        "n_warmup_epochs": COUNT_OR_NONE,
        "gradient_clip": WEIGHT,  # 0: none
    }
    own = {f"{prefix}.{name}": rule for name, rule in rules.items()}
    return _field(f"{prefix}.field") | _solver(f"{prefix}.solver") | own


def _baseline(row: str, kind: str) -> dict[str, Rule]:
    """Options of a row of conf/baselines/ by its kind."""
    prefix = f"baselines.{row}"
    merge = {
        "merge.affinity": choice("overlap", "frechet"),
        "merge.temperature": number(0, ends="(]"),
        "merge.neighbour": or_null(COUNT),
    }
    steps = {
        "batch_size": COUNT,
        "learning_rate": number(0, ends="(]"),
        "n_warmup_epochs": COUNT_OR_NONE,
        "gradient_clip": WEIGHT,
        "noise": WEIGHT,
    }
    training = steps | {"n_epochs": COUNT, "n_draws": COUNT}
    codes = steps | {
        "hidden": several("whole numbers of at least 1", COUNT, least=0),
        "code_size": COUNT,
        "likelihood": choice("bernoulli", "gaussian"),
        "n_starts": COUNT,
        "autoencoder_epochs": COUNT,
    }
    apart = Rule("expected null: the rows spectral_... merge", lambda value: value is None)
    rules: dict[str, dict[str, Rule]] = {
        "direct": {"merge": apart},
        "merged": merge,
        "refined": {},
        "curriculum": {"shrinkage": WEIGHT, "gradient_clip": WEIGHT},
        "continuous": {
            "n_latent": whole(1, 1000),
            "n_points": COUNT,
            "decoder.kind": choice("mlp", "conv"),
            "decoder.width": COUNT,
            "decoder.depth": whole(1, 100),
            "decoder.n_doublings": whole(0, 10),
            "decoder.activation": choice("sin", "tanh", "softplus", "silu"),
            "decoder.n_frequencies": whole(0, 24),
            **merge,
            **training,
        },
        "einet": {
            "size_factor": number(0, ends="(]"),
            "n_replicas": whole(1, 1000),
            "depth": or_null(whole(0, 30)),
            **training,
        },
        "flow": {},
        "autoencoder": codes,
        "vade": codes | {"n_epochs": COUNT},
        "gaussian": {"n_draws": COUNT},
        "sklearn": {
            "covariance": choice("full", "diag"),
            "n_points": or_null(whole(2)),
            "n_iterations": COUNT,
            "tolerance": WEIGHT,
            "added_variances": several("numbers above 0", number(0, ends="(]")),
        },
        "kmeans": {"n_starts": COUNT},
        "groups": {},
    }
    named = {f"{prefix}.{name}": rule for name, rule in rules[kind].items()}
    shared = {"direct": _direct, "merged": _direct, "refined": _refined, "flow": _flow}.get(kind)
    own = {} if shared is None else shared(prefix)
    said = {"merged": "direct"}.get(kind, kind)
    return {f"{prefix}.kind": choice(said), **named, **own}


# Rows of conf/baselines/ and which options they have.
BASELINES = {
    "direct": "direct",
    "refined": "refined",
    "matched": "direct",
    "spectral_overlap": "merged",
    "spectral_frechet": "merged",
    "curriculum": "curriculum",
    "continuous": "continuous",
    "einet_matched": "einet",
    "einet_large": "einet",
    "cnf_mlp": "flow",
    "cnf_conv": "flow",
    "autoencoder": "autoencoder",
    "vade": "vade",
    "gaussian": "gaussian",
    "gmm_full": "sklearn",
    "gmm_diagonal": "sklearn",
    "kmeans": "kmeans",
    "groups": "groups",
}


def _files(prefix: str) -> dict[str, Rule]:
    """Options of the sources that read files."""
    rules = {
        "folder": or_null(text()),
        "mirror": or_null(text()),
        "cache": or_null(text()),
        "files": named("file names", text()),
        "md5": or_null(named("digests, or null,", or_null(text()))),
        "class_names": several("names, in quotes if they look like numbers", text()),
        "path": text(),
        "label_column": or_null(text()),
        "delimiter": Rule(
            "expected one character, such as ',' or ';', or \\t for a tab",
            lambda value: isinstance(value, str) and (len(value) == 1 or value == r"\t"),
        ),
        "label_path": or_null(text()),
        "levels": whole(1, 256),
    }
    return {f"{prefix}.{name}": rule for name, rule in rules.items()}


OPTIONS: dict[str, Rule] = {
    "name": word(),
    "seed": SEED,
    "model": choice("cpmm", *BASELINES),
    # data
    "data.source": choice("digits", "rings", "spiral", "idx", "csv", "npy"),
    "data.n_train": or_null(whole(2, 2**40)),
    "data.n_validation": whole(2, 2**40),
    "data.n_test": whole(0, 2**40),
    "data.split_seed": SEED,
    "data.noise_seed": SEED,
    "data.alpha": or_null(number(0, 0.5, "()")),
    "data.standardize": choice("none", "shared", "feature", "whitened"),
    "data.map.kind": choice("none", "spline"),
    "data.map.n_bins": whole(2, 1000),
    "data.map.n_points": whole(2),
    "data.map.n_components": COUNT,
    "data.map.n_factors": COUNT,
    "data.map.log_diagonal_floor": number(-60, 20),
    "data.map.n_steps": COUNT,
    "data.map.batch_size": COUNT,
    "data.map.learning_rate": number(0, ends="(]"),
    "data.map.map_rate_factor": number(0, ends="(]"),
    "data.augmentation.noise": WEIGHT,
    "data.augmentation.translate": whole(0, 10_000),
    "data.augmentation.flip": flag(),
    # data: options of the sources
    "data.options.n": whole(1, 100_000_000),
    "data.options.seed": SEED,
    "data.options.radius": number(0, ends="(]"),
    "data.options.ratio": number(1, ends="(]"),
    "data.options.thickness": WEIGHT,
    "data.options.gaps": several("2 angles in degrees", number(), 2, 2),
    "data.options.gap_width": number(0, 360, "[)"),
    "data.options.arms": whole(1, 10_000),
    "data.options.start": number(0, 1, "()"),
    "data.options.twist": number(),
    "data.options.noise": WEIGHT,
    "data.options.outlier_fraction": number(0, 1, "[)"),
    **_files("data.options"),
    # teacher
    **_flow("teacher"),
    # spaces
    "spaces.kind": choice("teacher", "noise"),
    "spaces.n_spaces": whole(2, 10_000),
    "spaces.n_draws": COUNT,
    "spaces.n_train": or_null(whole(2, 2**40)),
    "spaces.n_validation": or_null(whole(2, 2**40)),
    "spaces.batch_size": COUNT,
    "spaces.dtype": choice("float32", "float16"),
    "spaces.chunk_rows": COUNT,
    # cpmm
    "cpmm.n_clusters": COUNT,
    "cpmm.n_factors": COUNT,
    "cpmm.augmentation": number(0, 100),
    "cpmm.diagonal": choice("variable", "constant"),
    "cpmm.learned_weight": flag(),
    "cpmm.learned_cluster_weight": flag(),
    "cpmm.log_diagonal_floor": number(
        -60, 20
    ),  # its exponential is a float32, and so is the inverse
    "cpmm.ode": choice("shared", "separate"),
    **_field("cpmm.field"),
    **_solver("cpmm.solver"),
    "cpmm.initialization.kind": choice("gaussian", "random", *GROUPINGS),
    "cpmm.initialization.mean_scale": WEIGHT,
    "cpmm.initialization.loading_scale": WEIGHT,
    "cpmm.initialization.free_scale": WEIGHT,
    "cpmm.initialization.restarts": COUNT,
    "cpmm.initialization.outlier_share": number(0, 1, "[)"),
    "cpmm.initialization.n_points": COUNT,
    "cpmm.initialization.n_views": COUNT_OR_NONE,
    "cpmm.initialization.n_neighbours": COUNT,
    "cpmm.views.rotate": number(0, 180),
    "cpmm.views.shear": number(0, 89),
    "cpmm.views.scale": number(0, 0.99),
    "cpmm.views.translate": number(0, 1e6),
    "cpmm.pseudo_label_spaces": COUNT_OR_NONE,
    "cpmm.pseudo_label_weight": WEIGHT,
    "cpmm.curriculum": flag(),
    "cpmm.epochs_per_space": COUNT_OR_NONE,
    "cpmm.fine_tune_epochs": COUNT_OR_NONE,
    "cpmm.n_draws": COUNT,
    "cpmm.weight_knots": or_null(whole(2, 1000)),
    "cpmm.n_points": or_null(COUNT),
    "cpmm.n_pseudotimes": COUNT,
    "cpmm.pseudotimes": choice("grid", "uniform", "stratified"),
    "cpmm.noise": WEIGHT,
    "cpmm.entropy_weight": number(),
    "cpmm.path_weight": WEIGHT,
    "cpmm.consistency_weight": WEIGHT,
    "cpmm.temperature": number(0, ends="(]"),
    "cpmm.seed": SEED,
    "cpmm.batch_size": COUNT,
    "cpmm.learning_rate": number(0, ends="(]"),
    "cpmm.initial_rate_factor": WEIGHT,
    "cpmm.n_warmup_epochs": COUNT_OR_NONE,
    "cpmm.gradient_clip": WEIGHT,  # 0: none
    # mixture
    "mixture.n_pseudotimes": COUNT,
    "mixture.drop_idle": flag(),
    # evaluation
    "evaluation.batch_size": COUNT,
    "evaluation.discretizations": several("whole numbers of at least 1", COUNT),
    **_solver("evaluation.teacher_solver", "n_steps", "interpolation", "gradient"),
    "evaluation.teacher_points": or_null(whole(2)),  # a standard error takes two
    "evaluation.ood": Rule(
        "choose a file of conf/ood/, such as ood@evaluation.ood=mnist, or null",
        lambda value: value is None,
    ),
    "evaluation.ood.name": word(),
    "evaluation.ood.source": choice("idx", "csv", "npy"),
    **_files("evaluation.ood.options"),
    # baselines
    **{
        name: rule for row, kind in BASELINES.items() for name, rule in _baseline(row, kind).items()
    },
    # trainer
    "trainer.accelerator": choice("auto", "cpu", "gpu"),
    "trainer.devices": Rule(
        "expected 1: several devices train a model together in a sweep alone, see ray.workers",
        lambda value: type(value) is int and value == 1,
    ),
    "trainer.precision": choice("32-true", "tf32", "bf16-mixed", "64-true"),
    "trainer.deterministic": flag(),
    "trainer.threads": or_null(whole(1, 1024)),
    "trainer.checkpoint_every_n_epochs": COUNT,
    # sweep
    "sweep.name": ANYTHING,
    "sweep.seeds": ANYTHING,
    "sweep.overrides": or_null(MAPPING),
    "sweep.parts": MAPPING,
    "sweep.search.kind": ANYTHING,
    "sweep.search.n_samples": ANYTHING,
    "sweep.search.space": MAPPING,
    "sweep.search.seed": SEED,
    "sweep.scheduler.kind": ANYTHING,
    "sweep.scheduler.grace_epochs": COUNT,
    "sweep.scheduler.reduction_factor": number(1, ends="(]"),
    "sweep.claims": several("claims", MAPPING, least=0),
    # ray
    "ray.address": or_null(text()),
    "ray.cpus": number(0.01),
    "ray.gpus": or_null(WEIGHT),
    "ray.workers": COUNT,
    "ray.max_concurrent": or_null(COUNT),
    "ray.reuse_actors": flag(),
    "ray.max_failures": COUNT_OR_NONE,
    "ray.storage": or_null(text()),
    "ray.inputs": choice("driver", "remote"),
    "ray.cache": text(),
    "ray.checkpoint_seconds": WEIGHT,
    "ray.report_seconds": WEIGHT,
    "ray.connect_seconds": number(1),
    "ray.resources_seconds": WEIGHT,
    "ray.stall_seconds": number(1),
    "ray.object_store_gb": or_null(number(0.1)),
    "ray.dashboard": flag(),
}

SECTIONS = {option.rpartition(".")[0] for option in OPTIONS}


def check_options(config: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """Check every option of a composed configuration.

    Args:
        config: The configuration, with overrides.
        plain: The same without, for what must be there.

    Raises:
        ValueError: If an option is missing, unknown or out of range; names it.
    """
    found = dict(leaves(config))
    for name in sorted(found, key=lambda name: name.count(".")):  # cpmm.seed is seed, by default
        value = found[name]
        if name not in OPTIONS:
            what = "a section, not a value" if name in SECTIONS else "no option of conf/"
            raise ValueError(f"{name} is {show(value)}, but it is {what}: leave it out")
        if not OPTIONS[name].accepts(value):
            raise ValueError(f"{name} is {show(value)}: {OPTIONS[name].expected}")
    for name, value in leaves(plain):
        # Which options a source has, its function in workflows/sources.py says.
        if name not in found and not name.startswith(("data.options.", "evaluation.ood")):
            raise ValueError(
                f"{name} is missing: it cannot be left out (in conf/ it is {show(value)})"
            )


def check_cpmm(cpmm: Mapping[str, Any]) -> None:
    """Check what options of the section ``cpmm`` say together.

    Raises:
        ValueError: If groups are told that nothing makes, or weights have more knots than steps.
    """
    kind, kinds = cpmm["initialization"]["kind"], OPTIONS["cpmm.initialization.kind"]
    if not kinds.accepts(kind):
        raise ValueError(f"cpmm.initialization.kind is {show(kind)}: {kinds.expected}")
    if (cpmm["pseudo_label_spaces"] or cpmm["pseudo_label_weight"]) and kind not in GROUPINGS:
        raise ValueError(
            f"cpmm.pseudo_label_spaces is {cpmm['pseudo_label_spaces']}, cpmm.pseudo_label_weight {cpmm['pseudo_label_weight']}, but "
            f"cpmm.initialization.kind {kind!r} makes no groups: choose one of {', '.join(GROUPINGS)}, or set "
            "both to 0"
        )
    n_knots = cpmm.get(
        "weight_knots"
    )  # one of fingerprints.LATER: an earlier configuration has none
    method, n_steps = cpmm["solver"]["method"], cpmm["solver"]["n_steps"]
    if n_knots is not None and method in FIXED_STEP and n_knots > n_steps + 1:
        raise ValueError(
            f"cpmm.weight_knots is {n_knots}: a solver of {n_steps} steps has no use for more than "
            f"{n_steps + 1}; lower it, or raise cpmm.solver.n_steps"
        )


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give dotted name and value of every option; the table decides where a section ends."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and (name not in OPTIONS or name in SECTIONS):
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def show(value: Any, width: int = 80) -> str:
    """Write a value for a message, cut where it is long."""
    try:
        written = repr(value)
    except ValueError:  # Python refuses to write a number of thousands of digits
        return "a number of thousands of digits"
    return written if len(written) <= width else f"{written[:width]}..."
