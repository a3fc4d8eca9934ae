"""What every option of conf/ may be: one table, checked as soon as a configuration is composed.

A value out of range ends here, in the first second and by its own name, not in a stage hours later.
Where a real number is expected, 30 becomes 30.0, so that both are one fingerprint; where a whole
number is, 3.0 is refused. What options of CPMM say together, without the data, is checked beside
it; the rest where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cpmm.pipeline.config import pick


@dataclass(frozen=True)
class Rule:
    """What an option may be.

    Attributes:
        expected: For people, such as "expected a whole number of at least 1".
        accepts: Whether a value is allowed.
        canonical: The one way to write an allowed value, for fingerprints.
    """

    expected: str
    accepts: Callable[[Any], bool]
    canonical: Callable[[Any], Any] = lambda value: value


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
    """A number in an interval; a round bracket leaves its end out. It is written with a point."""
    above = "of at least" if ends[0] == "[" else "above"
    below = "at most" if ends[1] == "]" else "below"

    def accepts(value: Any) -> bool:
        if type(value) not in (int, float) or not low <= value <= high:  # NaN is not
            return False
        return (value > low or ends[0] == "[") and (value < high or ends[1] == "]")

    return Rule(
        f"expected a number {above} {low:g} and {below} {high:g}",
        accepts,
        lambda value: float(value) + 0.0,  # -0.0 is 0.0
    )


def count_or_share(least: int) -> Rule:
    """A number of points, or a share of them."""
    share = number(0, 1, "()")
    return Rule(
        f"expected a whole number of at least {least}, or a share between 0 and 1, such as 0.15",
        lambda value: (
            (type(value) is float and share.accepts(value))
            or (type(value) is int and least <= value <= 2**40)
        ),
    )


def choice(*names: str) -> Rule:
    """One of several words."""
    return Rule(
        f"choose one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names
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
    return Rule(
        f"{rule.expected}, or null",
        lambda value: value is None or rule.accepts(value),
        lambda value: None if value is None else rule.canonical(value),
    )


def several(what: str, rule: Rule, least: int = 1, most: int = 1000) -> Rule:
    """A list of values that ``rule`` allows."""

    def accepts(value: Any) -> bool:
        sized = isinstance(value, list) and least <= len(value) <= most
        return sized and all(map(rule.accepts, value))

    return Rule(f"expected a list of {what}", accepts, lambda value: [*map(rule.canonical, value)])


def named(what: str, rule: Rule) -> Rule:
    """A mapping from names to values that ``rule`` allows."""

    def accepts(value: Any) -> bool:
        by_name = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        return by_name and all(map(rule.accepts, value.values()))

    return Rule(f"expected a mapping from names to {what}", accepts)


SEED = whole(0, 2**32 - 1)  # scikit-learn takes no larger ones
COUNT = whole(1)
COUNT_OR_NONE = whole(0)
WEIGHT = number(0)
POSITIVE = number(0, ends="(]")
FLOOR = number(-60, 20)  # its exponential is a float32, and so is the inverse
COLUMN = Rule(  # 2010 is a name, too
    "expected the name of a column, in quotes if it looks like something else",
    lambda value: type(value) is int or text().accepts(value),
    str,
)
ANYTHING = Rule("", lambda value: True)  # checked where it is used: the sweep's in sweeps/plan.py
MAPPING = Rule("expected a mapping", lambda value: isinstance(value, Mapping))


def under(prefix: str, rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rules of a section by their dotted names."""
    return {f"{prefix}.{name}": rule for name, rule in rules.items()}


FIELD = {
    "kind": choice("mlp", "conv"),
    "width": COUNT,
    "depth": whole(1, 100),
    "activation": choice("sin", "tanh", "softplus", "silu"),
    "n_frequencies": whole(0, 24),  # float32 has no digits left for more
    "last_layer_scale": number(),
    "kernel_size": Rule(
        "expected an odd whole number from 1 to 99",
        lambda value: type(value) is int and value in range(1, 100, 2),
    ),
    "coordinates": flag(),
    "squeeze": whole(1, 1000),
}
METHOD = choice(*FIXED_STEP, "dopri5", "adaptive_heun")
TOLERANCES = {"method": METHOD, "rtol": POSITIVE, "atol": POSITIVE, "max_evaluations": COUNT}
SOLVER = TOLERANCES | {
    "n_steps": COUNT,
    "interpolation": choice("linear", "cubic"),
    "gradient": choice("backpropagation", "checkpoint", "adjoint"),
}
STEPS = {  # of training
    "batch_size": COUNT,
    "learning_rate": POSITIVE,
    "n_warmup_epochs": COUNT_OR_NONE,
    "gradient_clip": WEIGHT,
    "n_draws": COUNT,
}
DIRECT = STEPS | {  # of mixtures whose components are trained themselves
    "kmeans_points": or_null(COUNT),
    "kmeans_restarts": COUNT,
    "shrinkages": several("numbers of at least 0", WEIGHT),
    "epochs": COUNT,
    "noise": WEIGHT,
}
FLOW = {  # of continuous normalizing flows
    **STEPS,
    **under("field", FIELD),
    **under("solver", SOLVER),
    "exact_trace_up_to": COUNT_OR_NONE,
    "flow_matching_epochs": COUNT_OR_NONE,
    "likelihood_epochs": COUNT_OR_NONE,
    "kinetic_weight": WEIGHT,
    "jacobian_weight": WEIGHT,
}
FILES = {  # of the sources that read files
    "folder": or_null(text()),
    "mirror": or_null(text()),
    "cache": or_null(text()),
    "files": named("file names", text()),
    "md5": or_null(named("digests, or null,", or_null(text()))),
    "class_names": or_null(several("names, in quotes if they look like numbers", text())),
    "path": text(),
    "label_column": or_null(text()),
    "delimiter": or_null(
        Rule(
            "expected one character, such as ',' or ';', or \\t for a tab, or 'white space'",
            lambda value: (
                isinstance(value, str) and (len(value) == 1 or value in (r"\t", "white space"))
            ),
        )
    ),
    "decimal": or_null(choice(".", ",")),
    "encoding": or_null(text()),
    "header": or_null(choice("names", "none", "skip")),
    "label_path": or_null(text()),
    "levels": whole(1, 256),
    "axes": Rule(
        "expected the letters N, C, H, W, or N, H, W, in the order of the array's axes, such as "
        "NHWC, or null",
        lambda value: (
            value is None
            or (isinstance(value, str) and sorted(value) in (sorted("NCHW"), sorted("NHW")))
        ),
    ),
}

# Options of the rows of conf/baselines/, whatever their kind: a name means the same in all rows. An
# option that is not here takes values of the type that it has in its row's file.
ROWS: dict[str, Rule] = {
    "title": text(),
    "block": text(),
    "paper": or_null(text()),
    **DIRECT,
    **FLOW,
    **under("decoder", pick(FIELD, "kind", "width", "depth", "activation", "n_frequencies")),
    "decoder.n_doublings": whole(0, 10),
    "merge.affinity": choice("overlap", "frechet"),
    "merge.temperature": POSITIVE,
    "merge.neighbour": or_null(COUNT),
    "n_per_cluster": COUNT,
    "em_iterations": COUNT_OR_NONE,
    "shrinkage": WEIGHT,
    "n_epochs": COUNT,
    "n_latent": whole(1, 1000),
    "n_integration_points": COUNT,
    "size_factor": POSITIVE,
    "n_replicas": whole(1, 1000),
    "depth": or_null(whole(0, 30)),
    "hidden": several("whole numbers of at least 1", COUNT, least=0),
    "code_size": COUNT,
    "likelihood": choice("bernoulli", "gaussian"),
    "n_starts": COUNT,
    "autoencoder_epochs": COUNT,
    "covariance": choice("full", "diag"),
    "n_points": or_null(whole(2)),
    "n_iterations": COUNT,
    "tolerance": WEIGHT,
    "added_variances": several("numbers above 0", POSITIVE),
}

OPTIONS: dict[str, Rule] = {
    "name": word(),
    "seed": SEED,
    # data
    "data.source": choice("digits", "rings", "spiral", "idx", "csv", "npy"),
    "data.n_train": or_null(whole(2, 2**40)),
    "data.n_validation": count_or_share(2),
    "data.n_test": count_or_share(0),
    "data.split_seed": SEED,
    "data.noise_seed": SEED,
    "data.alpha": or_null(number(0, 0.5, "()")),
    "data.standardize": choice("none", "shared", "feature", "whitened"),
    "data.map.kind": choice("none", "spline"),
    "data.map.n_bins": whole(2, 1000),
    "data.map.n_points": whole(2),
    "data.map.n_components": COUNT,
    "data.map.n_factors": COUNT,
    "data.map.log_diagonal_floor": FLOOR,
    "data.map.n_steps": COUNT,
    "data.map.batch_size": COUNT,
    "data.map.learning_rate": POSITIVE,
    "data.map.map_rate_factor": POSITIVE,
    "data.augmentation.noise": WEIGHT,
    "data.augmentation.translate": whole(0, 10_000),
    "data.augmentation.flip": flag(),
    # data: options of tables written as text
    "data.columns": or_null(several("names of columns", COLUMN, least=1, most=MANY)),
    "data.drop": several("names of columns", COLUMN, least=0, most=MANY),
    "data.missing": choice("refuse", "drop", "impute"),
    "data.constant": choice("refuse", "drop"),
    "data.text": choice("refuse", "drop", "one_hot"),
    # data: options of the sources
    "data.options.n": whole(1, 100_000_000),
    "data.options.seed": SEED,
    "data.options.radius": POSITIVE,
    "data.options.ratio": number(1, ends="(]"),
    "data.options.thickness": WEIGHT,
    "data.options.gaps": several("2 angles in degrees", number(), 2, 2),
    "data.options.gap_width": number(0, 360, "[)"),
    "data.options.arms": whole(1, 10_000),
    "data.options.start": number(0, 1, "()"),
    "data.options.twist": number(),
    "data.options.noise": WEIGHT,
    "data.options.outlier_fraction": number(0, 1, "[)"),
    **under("data.options", FILES),
    # teacher
    **under("teacher", FLOW),
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
    "cpmm.n_factors": or_null(COUNT),
    "cpmm.augmentation": number(0, 100),
    "cpmm.diagonal": choice("variable", "constant"),
    "cpmm.learned_weight": flag(),
    "cpmm.learned_cluster_weight": flag(),
    "cpmm.log_diagonal_floor": FLOOR,
    "cpmm.ode": choice("shared", "separate"),
    **under("cpmm.field", FIELD),
    **under("cpmm.solver", SOLVER),
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
    "cpmm.n_draws": or_null(COUNT),
    "cpmm.patience": or_null(COUNT),
    "cpmm.weight_knots": or_null(whole(2, 1000)),
    "cpmm.n_points": or_null(COUNT),
    "cpmm.n_pseudotimes": COUNT,
    "cpmm.pseudotimes": choice("grid", "uniform", "stratified"),
    "cpmm.noise": WEIGHT,
    "cpmm.entropy_weight": number(),
    "cpmm.path_weight": WEIGHT,
    "cpmm.consistency_weight": WEIGHT,
    "cpmm.temperature": POSITIVE,
    "cpmm.seed": SEED,
    "cpmm.batch_size": COUNT,
    "cpmm.learning_rate": POSITIVE,
    "cpmm.initial_rate_factor": WEIGHT,
    "cpmm.n_warmup_epochs": COUNT_OR_NONE,
    "cpmm.gradient_clip": WEIGHT,  # 0: none
    # mixture
    "mixture.n_pseudotimes": COUNT,
    "mixture.drop_idle": flag(),
    # evaluation
    "evaluation.batch_size": COUNT,
    "evaluation.discretizations": several("whole numbers of at least 1", COUNT),
    **under("evaluation.teacher_solver", TOLERANCES),
    "evaluation.teacher_points": or_null(whole(2)),  # a standard error takes two
    "evaluation.ood": Rule(
        "choose a file of conf/ood/, such as ood@evaluation.ood=mnist, or null",
        lambda value: value is None,
    ),
    "evaluation.ood.name": word(),
    "evaluation.ood.source": choice("idx", "csv", "npy"),
    **under("evaluation.ood.options", FILES),
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

OF_TABLES = tuple(f"data.{name}" for name in ("columns", "drop", "missing", "constant", "text"))
SECTIONS = {option.rpartition(".")[0] for option in OPTIONS}


def like(value: Any) -> Rule:
    """What an option of a row may be that has no rule: of the type that its file gives it."""
    if isinstance(value, bool):
        return flag()
    if isinstance(value, int):
        return whole(-MANY)
    if isinstance(value, float):
        return number()
    if isinstance(value, str):
        return text()
    if isinstance(value, list) and value:
        first = next((item for item in value if isinstance(item, float)), value[0])
        return several(f"values such as {show(first)}", like(first), least=0)
    return Rule(f"expected {show(value)}, as in its file", lambda other: other == value)


def options_with(rows: Mapping[str, Any]) -> dict[str, Rule]:
    """Every option that there is, those of ``rows`` as the files of conf/baselines/ have them.

    Raises:
        ValueError: If a file names no kind.
    """
    options = OPTIONS | {"model": choice("cpmm", *rows)}
    for row, section in rows.items():
        if not isinstance(section, Mapping) or not isinstance(section.get("kind"), str):
            raise ValueError(
                f"conf/baselines/{row}.yaml has no kind: name a function of the registry"
            )
        rules = {name: ROWS.get(name) or like(value) for name, value in leaves(section)}
        options |= under(f"baselines.{row}", rules | {"kind": choice(section["kind"])})
    return options


def check_options(
    config: Mapping[str, Any], plain: Mapping[str, Any], options: Mapping[str, Rule]
) -> None:
    """Check every option of a composed configuration; what ``plain`` has must be there.

    Raises:
        ValueError: If an option is missing, unknown or out of range; names it.
    """
    found = dict(leaves(config))
    sections = {name.rpartition(".")[0] for name in options}
    for name in sorted(found, key=lambda name: name.count(".")):  # cpmm.seed is seed, by default
        value = found[name]
        if name not in options:
            what = "a section, not a value" if name in sections else "no option of conf/"
            raise ValueError(f"{name} is {show(value)}, but it is {what}: leave it out")
        if not options[name].accepts(value):
            raise ValueError(f"{name} is {show(value)}: {options[name].expected}")
    source = found.get("data.source")
    if source != "csv" and (alone := [name for name in OF_TABLES if name in found]):
        raise ValueError(
            f"{alone[0]} is of tables that are written as text, and data.source is {source}: leave "
            "it out"
        )
    for name, value in leaves(plain):
        if name in OF_TABLES and source != "csv":
            continue
        # Which options a source has, its function in cpmm/pipeline/artifacts/sources.py says.
        if name not in found and not name.startswith(("data.options.", "evaluation.ood")):
            shown = show(value)
            raise ValueError(f"{name} is missing: it cannot be left out (in conf/ it is {shown})")


def canonical(
    config: Mapping[str, Any], options: Mapping[str, Rule], prefix: str = ""
) -> dict[str, Any]:
    """Write each checked value in one way, so that 30 and 30.0 have one fingerprint."""
    written = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and (name not in options or name in SECTIONS):
            written[key] = canonical(value, options, f"{name}.")
        else:
            written[key] = options[name].canonical(value) if name in options else value
    return written


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
            f"cpmm.pseudo_label_spaces is {cpmm['pseudo_label_spaces']}, "
            f"cpmm.pseudo_label_weight {cpmm['pseudo_label_weight']}, but "
            f"cpmm.initialization.kind {kind!r} makes no groups: choose one of "
            f"{', '.join(GROUPINGS)}, or set both to 0"
        )
    n_knots = cpmm["weight_knots"]
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
