"""What a sweep runs: rows from conf/sweep/, a trial for each row and seed, as overrides."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cpmm.pipeline.config import Config
from cpmm.pipeline.config.compose import compose_preset, flatten
from cpmm.pipeline.config.fingerprints import fingerprint_inputs, fingerprint_model, hash_of
from cpmm.pipeline.config.schema import canonical, options_with
from cpmm.pipeline.scores.tables import SCORES, TEST

SECTIONS = ("name", "seeds", "overrides", "parts", "search", "scheduler", "claims")
SEARCHES = ("grid", "random", "optuna")
SCHEDULERS = ("fifo", "asha")
CLAIM = {"claim", "metric", "better", "worse", "paper"}
METRICS = ("validation", *TEST, "failed")  # what claims are about
# What tables call by these names is not an axis.
TAKEN = {
    "part", "row", "n", "n_failed", "n_stopped", "seed", "seeds", "status", "steps", "failed",
    "reason", "command", "fingerprint", "failures", *SCORES,
}  # fmt: skip
NO_DENSITY = ("autoencoder", "kmeans", "vade")  # kinds of conf/baselines/
# Kinds that no trial trains, and why.
NO_TRIAL = {
    "refined": "it starts from the mixture that the pipeline extracts, and a trial has none",
    "groups": "it is of training points, and a trial is scored on test points",
}
DISTRIBUTIONS = ("uniform", "loguniform", "integer", "choice")


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep."""

    preset: str  # whose configuration it starts from
    row: tuple[tuple[str, str], ...]  # values of the sweep's axes, the same for all seeds of a row
    seed: int  # ``cpmm.seed``
    overrides: tuple[str, ...]  # in Hydra's syntax, on the preset's committed configuration
    config: Config  # composed from the preset and the overrides
    fingerprint: str  # of everything that decides the result, code included

    @property
    def inputs(self) -> tuple[str, str | None]:
        """Fingerprints of the data and the spaces it trains on."""
        return fingerprint_inputs(self.config)

    @property
    def described(self) -> dict[str, Any]:
        """What its record says of it."""
        return {"overrides": list(self.overrides), "row": dict(self.row), "seed": self.seed}

    @property
    def label(self) -> str:
        """Values of the row, for people; a number says what it is of."""
        cells = [(name, value) for name, value in self.row if value != "-"]
        return " ".join(f"{n}={v}" if _is_number(v) else v for n, v in cells) or "-"

    @property
    def name(self) -> str:
        """Row and seed, for people."""
        return f"{self.label}, seed {self.seed}"

    @property
    def command(self) -> str:
        """The command that repeats this trial, without Ray."""
        words = [f"preset={self.preset}", *self.overrides]
        return " ".join(["python workflows/trial.py", *map(shlex.quote, words)])


@dataclass(frozen=True)
class _Row:
    """A row of a sweep."""

    part: str  # of the sweep
    axes: Mapping[str, Any]  # its value on each axis, or the value's label
    overrides: tuple[str, ...]  # of its part; completed by :func:`plan_trials`
    values: tuple[str, ...]  # overrides that its values stand for


def plan_trials(
    preset: str, sweep: Config, base: Sequence[str], overrides: Sequence[str], code: str
) -> list[Trial]:
    """Expand a sweep into its trials, row by row and seed by seed.

    Args:
        preset: Name of a file of conf/preset/.
        sweep: The section ``sweep``.
        base: Overrides of the preset, on which the sweep's own come.
        overrides: Of the user, on every trial; they overrule the sweep's own.
        code: Fingerprint of the code that trains.

    Raises:
        ValueError: If the sweep or one of its rows is at fault; names the row.
    """
    check(sweep)
    _forbid_axes(sweep, overrides)
    common = [*base, *flatten(sweep["overrides"] or {})]
    rows = [
        replace(row, overrides=(*common, *row.overrides, *overrides, *row.values))
        for row in _rows(sweep)
    ]
    configs = [_compose_row(preset, sweep, row, common) for row in rows]
    seeds = {part: options.get("seeds", sweep["seeds"]) for part, options in _parts(sweep).items()}
    trials = [
        make_trial(preset, cells, seed, row.overrides, config, code)
        for row, cells, config in zip(rows, _show_rows(rows, configs), configs, strict=True)
        for seed in range(seeds.get(row.part, sweep["seeds"]))
    ]
    _forbid_twins(sweep, trials)
    return trials


def make_trial(
    preset: str,
    row: tuple[tuple[str, str], ...],
    seed: int,
    overrides: Sequence[str],
    config: Config,
    code: str,
) -> Trial:
    """Make the trial of a row and a seed from the row's composed configuration.

    Raises:
        ValueError: If it is of a model that no trial trains.
    """
    require_trial(config["model"], config["baselines"])
    config = {**config, "cpmm": {**config["cpmm"], "seed": seed}}
    fingerprint = hash_of("trial", fingerprint_model(config), config["evaluation"]["ood"], code)
    last = {_option(item): item for item in overrides}  # what is overruled says nothing
    kept = [item for item in overrides if last[_option(item)] is item]
    return Trial(preset, row, seed, (*kept, f"cpmm.seed={seed}"), config, fingerprint)


def require_trial(model: str, rows: Mapping[str, Any]) -> None:
    """Refuse a model that no trial trains; ``rows`` are those of conf/baselines/."""
    if why := NO_TRIAL.get(rows.get(model, {}).get("kind", "")):
        raise ValueError(
            f"model is {model!r}, which no trial trains: {why}; its own stage does, "
            f"`python workflows/train_baseline.py data/<preset>/config.yaml {model}`"
        )


def suggested_trial(trial: Trial, values: Mapping[str, Any], code: str) -> Trial:
    """Change a trial as Optuna suggests: ``values`` by their options."""
    config = trial.config
    for option, value in values.items():
        config = set_option(config, option, value)
    config = canonical(config, options_with(config["baselines"]))
    short = shorten(list(values))
    row = tuple((short[option], show(value, 6)) for option, value in values.items())
    kept = [item for item in trial.overrides[:-1] if _option(item) not in values]
    return make_trial(trial.preset, row, trial.seed, [*kept, *flatten(values)], config, code)


def set_option(config: Config, option: str, value: Any) -> Config:
    """Return the configuration with one dotted option changed.

    Raises:
        ValueError: If there is no such option, or it is a whole section.
    """
    head, _, rest = option.partition(".")
    if head not in config or bool(rest) != isinstance(config[head], Mapping):
        raise ValueError(f"sweep.search.space: the configuration has no option {option!r}")
    return {**config, head: set_option(config[head], rest, value) if rest else value}


def check(sweep: Config) -> None:
    """Check a sweep's own options.

    Raises:
        ValueError: If one is unknown or out of range.
    """
    name = sweep.get("name")
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"sweep.name is {name!r}: expected letters, digits, - and _")
    if unknown := sorted(set(sweep) - set(SECTIONS)):
        raise ValueError(f"sweep {name}: unknown {unknown}: choose among {', '.join(SECTIONS)}")
    search, scheduler = sweep["search"], sweep["scheduler"]
    for key, section, known in (("search", search, SEARCHES), ("scheduler", scheduler, SCHEDULERS)):
        if (kind := section["kind"]) not in known:
            raise ValueError(f"sweep.{key}.kind is {kind!r}: choose one of {', '.join(known)}")
    _check_count("seeds", sweep["seeds"])
    _check_count("search.n_samples", search["n_samples"])
    _check_parts(sweep)
    _check_claims(sweep["claims"])
    if search["kind"] == "grid":
        return
    if sweep["parts"] or not search["space"]:
        raise ValueError(f"sweep {name}: a {search['kind']} search has a search.space and no parts")
    for option, distribution in search["space"].items():
        _check_distribution(option, distribution)
    if search["kind"] == "optuna" and sweep["seeds"] > 1:
        raise ValueError("an optuna search trains each suggestion once: set sweep.seeds=1")


def check_models(trials: Sequence[Trial], sweep: Config, n_workers: int) -> None:
    """Check that a sweep's models can be trained, by ``ray.workers`` together, and compared.

    Raises:
        ValueError: If not; names the models.
    """
    search, asha = sweep["search"], sweep["scheduler"]["kind"] == "asha"
    models = {trial.config["model"] for trial in trials}
    rows = trials[0].config["baselines"]
    if search["kind"] == "optuna" and "model" in search["space"]:
        models = set(map(str, search["space"]["model"]["choice"]))
        for model in sorted(models):
            require_trial(model, rows)
    if n_workers > 1 and (others := sorted(models - {"cpmm"})):
        raise ValueError(
            f"ray.workers is {n_workers}, but workers train together cpmm alone, and sweep "
            f"{sweep['name']} has model {', '.join(others)}: set ray.workers=1, or leave it out"
        )
    blind = sorted(m for m in models if m in rows and rows[m]["kind"] in NO_DENSITY)
    if blind and (asha or search["kind"] == "optuna"):
        by = "scheduler.kind is 'asha'" if asha else "search.kind is 'optuna'"
        raise ValueError(
            f"sweep.{by}, which compares trials by validation density, but model "
            f"{', '.join(blind)} has none: leave it out, or set sweep.search.kind to grid or "
            "random and sweep.scheduler.kind=fifo"
        )


def _check_count(name: str, value: Any) -> None:
    if not _is_whole(value) or value < 1:
        raise ValueError(f"sweep.{name} is {value!r}: expected a whole number of at least 1")


def _check_parts(sweep: Config) -> None:
    for part, options in _parts(sweep).items():
        if not isinstance(options, Mapping) or set(options) - {"overrides", "grid", "seeds"}:
            raise ValueError(
                f"sweep.parts.{part}: expected overrides, grid and seeds, got {options!r}"
            )
        if "seeds" in options:
            _check_count(f"parts.{part}.seeds", options["seeds"])
        for axis, values in (options.get("grid") or {}).items():
            if not isinstance(values, list | Mapping) or not values:
                raise ValueError(
                    f"sweep.parts.{part}.grid.{axis} is {values!r}: expected a list of values, or "
                    "a mapping from labels to overrides"
                )


def _check_claims(claims: Sequence[Any]) -> None:
    for claim in claims:
        if not isinstance(claim, Mapping) or set(claim) != CLAIM:
            raise ValueError(f"sweep.claims: expected {', '.join(sorted(CLAIM))}, got {claim!r}")
        if claim["metric"] not in METRICS:
            raise ValueError(
                f"sweep.claims: metric is {claim['metric']!r}: choose one of {', '.join(METRICS)}"
            )


def shorten(options: Sequence[str]) -> dict[str, str]:
    """Call each option by its last name, or by its whole name where two would be the same."""
    short = {option: option.removesuffix(".kind").rsplit(".", 1)[-1] for option in options}
    names = list(short.values())
    long = {option: f"config.{option}" if option in TAKEN else option for option in options}
    return {
        option: name if names.count(name) == 1 and name not in TAKEN else long[option]
        for option, name in short.items()
    }


def show(value: Any, digits: int = 4) -> str:
    """Write a value for a table."""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _rows(sweep: Config) -> Iterator[_Row]:
    """List the rows of a sweep, in the order of its file."""
    if sweep["search"]["kind"] == "optuna":
        yield _Row("", {}, (), ())
    elif sweep["search"]["kind"] == "random":
        yield from _random_rows(sweep["search"])
    else:
        for part, options in (_parts(sweep) or {"": {}}).items():
            overrides = tuple(flatten(options.get("overrides") or {}))
            axes = [list(_axis(name, v)) for name, v in (options.get("grid") or {}).items()]
            for point in itertools.product(*axes):
                labels = {name: label for name, label, _ in point}
                values = itertools.chain.from_iterable(values for _, _, values in point)
                yield _Row(part, labels, overrides, tuple(values))


def _random_rows(search: Config) -> Iterator[_Row]:
    """Draw the rows of a random search; a small space has fewer than are asked for."""
    generator = np.random.default_rng(search["seed"])
    known: list[dict[str, Any]] = []
    for _ in range(100 * search["n_samples"]):
        axes = {name: _draw(d, generator) for name, d in search["space"].items()}
        if axes not in known:
            known.append(axes)
            yield _Row("", axes, (), tuple(flatten(axes)))
        if len(known) == search["n_samples"]:
            return


def _compose_row(preset: str, sweep: Config, row: _Row, common: Sequence[str]) -> Config:
    """Compose a row's configuration, and check what Optuna may suggest.

    Raises:
        ValueError: If it cannot be composed; names the row.
    """
    try:
        config = compose_preset(preset, row.overrides)
        _forbid_seed(row.overrides)
        if sweep["search"]["kind"] == "optuna":
            for corner in _corners(sweep["search"]["space"]):
                compose_preset(preset, [*common, *flatten(corner)])
    except ValueError as error:
        words = {"part": row.part} if row.part else {}
        named = ", ".join(f"{k}={v}" for k, v in (words | row.axes).items()) or "1"
        raise ValueError(f"sweep {sweep['name']}, row {named}: {error}") from error
    return config


def _show_rows(
    rows: Sequence[_Row], configs: Sequence[Config]
) -> list[tuple[tuple[str, str], ...]]:
    """Write the values of every row on all axes; a row without an axis has its option's value."""
    axes = list(dict.fromkeys(name for row in rows for name in row.axes))
    short = shorten(axes)
    several = len({row.part for row in rows}) > 1
    cells = []
    for row, config in zip(rows, configs, strict=True):
        values = {short[n]: row.axes[n] if n in row.axes else _configured(config, n) for n in axes}
        cells.append(({"part": row.part} if several else {}) | values)
    shown = [tuple((name, show(value)) for name, value in row.items()) for row in cells]
    if len(set(shown)) < len(shown):  # values that differ in a later digit
        return [tuple((name, str(value)) for name, value in row.items()) for row in cells]
    return shown


def _parts(sweep: Config) -> dict[str, Any]:
    """The parts that are not left out."""
    return {name: part for name, part in sweep["parts"].items() if part is not None}


def _axis(name: str, values: list | Mapping[str, Any]) -> Iterator[tuple[str, Any, list[str]]]:
    bundles = values.items() if isinstance(values, Mapping) else ((v, {name: v}) for v in values)
    for label, overrides in bundles:
        yield name, label, list(flatten(overrides))


def _configured(config: Any, option: str) -> Any:
    """Return the value of a dotted option, "-" if there is none or it is a whole section."""
    for part in option.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return "-" if config is None or isinstance(config, Mapping) else config


def _corners(space: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Suggestions at both ends of every distribution."""
    for end in (0, -1):
        yield {option: next(iter(values.values()))[end] for option, values in space.items()}


def _forbid_axes(sweep: Config, overrides: Sequence[str]) -> None:
    swept = set(sweep["search"]["space"] or {})
    for part in _parts(sweep).values():
        swept |= set(part.get("grid") or {})
    for item in overrides:
        if _option(item.lstrip("+")) in swept:
            raise ValueError(
                f"sweep {sweep['name']}: {item} is one of its axes: leave it out, or change "
                "the sweep"
            )


def _forbid_seed(overrides: Sequence[str]) -> None:
    for item in overrides:
        if _option(item.lstrip("+")) == "cpmm.seed":
            raise ValueError(
                f"{item} cannot be set: a sweep gives its trials seeds 0, 1, ... (sweep.seeds)"
            )


def _forbid_twins(sweep: Config, trials: Sequence[Trial]) -> None:
    known: dict[str, Trial] = {}
    for trial in trials:
        twin = known.setdefault(trial.fingerprint, trial)
        if twin is not trial:
            raise ValueError(
                f"sweep {sweep['name']}: {twin.name!r} and {trial.name!r} are the same trial: "
                "take one of them out"
            )


def _option(override: str) -> str:
    return override.partition("=")[0]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _draw(distribution: Mapping[str, Any], generator: np.random.Generator) -> Any:
    ((kind, values),) = distribution.items()
    if kind == "choice":
        return values[int(generator.integers(len(values)))]
    low, high = values
    if kind == "integer":
        return int(generator.integers(low, high + 1))
    if kind == "uniform":
        return float(generator.uniform(low, high))
    return float(math.exp(generator.uniform(math.log(low), math.log(high))))


def _check_distribution(option: str, distribution: Any) -> None:
    kinds = list(distribution) if isinstance(distribution, Mapping) else []
    if len(kinds) != 1 or kinds[0] not in DISTRIBUTIONS:
        raise ValueError(
            f"sweep.search.space.{option} is {distribution!r}: expected one of "
            f"{', '.join(DISTRIBUTIONS)} with its values"
        )
    kind, values = kinds[0], distribution[kinds[0]]
    allowed = _is_whole if kind == "integer" else lambda v: isinstance(v, int | float)
    numbers = isinstance(values, list) and all(map(allowed, values))
    if kind == "choice":
        good, expected = isinstance(values, list) and bool(values), "a list of values"
    else:
        good = numbers and len(values) == 2 and values[0] < values[1]
        good = good and (kind != "loguniform" or values[0] > 0)
        expected = "two numbers [low, high], low first, whole for integer"
    if not good:
        raise ValueError(f"sweep.search.space.{option}.{kind} is {values!r}: expected {expected}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
