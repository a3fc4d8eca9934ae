"""Plan a sweep, run the trials that have no record yet, publish what it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cpmm.pipeline.config import Config
from cpmm.pipeline.config.compose import compose_preset, known_sweeps, read_overrides, split_preset
from cpmm.pipeline.config.root import ROOT
from cpmm.pipeline.errors import lacks_memory
from cpmm.pipeline.sweeps import cluster, plan
from cpmm.pipeline.sweeps.inputs import (
    Located,
    find_prepared,
    locate_inputs,
    prepare,
    size_of,
)  # fmt: skip
from cpmm.pipeline.sweeps.sweep import Sweep
from cpmm.pipeline.sweeps.trial import trial_code

if TYPE_CHECKING:
    from cpmm.data import DataSplits

OWN = ("sweep", "ray")  # groups that are the sweep's, not its trials'


def run_sweep(overrides: list[str], only_config: bool = False, only_plan: bool = False) -> None:
    """Plan, run and tabulate a sweep, or print its configuration or its trials instead.

    Overrides are of the preset, of the sweep and of what Ray is asked for, in Hydra's syntax.
    """
    preset, rest = split_preset(overrides)
    for item in rest:
        if item.startswith("sweep=") and item.removeprefix("sweep=") not in known_sweeps():
            raise ValueError(f"unknown {item}: choose one of {', '.join(known_sweeps())}")
    params = read_overrides(preset)
    config = compose_preset(preset, [*params, *rest], "sweep")
    if only_config:
        print(yaml.safe_dump(config, sort_keys=False), end="")
        return

    params, rest = ([item for item in items if not _is_own(item)] for items in (params, rest))
    options, ray = config["sweep"], config["ray"]
    if str(ray["address"]).startswith("ray://"):
        raise ValueError(
            f"ray.address is {ray['address']!r}, a Ray client's: run the sweep on a node of the "
            "cluster, with ray.address=auto"
        )
    trials = plan.plan_trials(preset, options, params, rest, trial_code())
    plan.check_models(trials, options, ray["workers"])
    home = ROOT / "data" / preset
    check_rows(trials, options["name"], lambda config: find_prepared(config, home))
    if only_plan:
        for trial in trials:
            print(f"{trial.name}\n    {trial.command}")
        return

    from cpmm.pipeline.artifacts.store import load_prepared
    from cpmm.pipeline.sweeps.archive import Archive
    from cpmm.pipeline.sweeps.publish import publish_sweep

    check_rows(trials, options["name"], lambda config: prepare(config, home))
    archive = Archive(ray["storage"] or str(home / ".scratch" / "sweep"))
    configs = {trial.inputs: trial.config for trial in trials}
    located = {key: locate_inputs(config, home) for key, config in configs.items()}
    sweep = Sweep(preset, trials, options, ray, archive, home)
    prepared = load_prepared(located[trials[0].inputs].prepared)
    unit, _, _ = prepared.preprocessing.density_unit
    _run(sweep, located, unit)
    publish_sweep(sweep, unit)


def check_rows(
    trials: Sequence[plan.Trial], name: str, locate: Callable[[Config], Path | None]
) -> None:
    """Check that every row of a sweep can be trained on its data, as far as these are there.

    Args:
        trials: Those of the sweep.
        name: Of the sweep.
        locate: Gives the folder of a configuration's data, None where they have not been made.

    Raises:
        ValueError: If one cannot; names the row.
    """
    from cpmm.pipeline.sweeps.trial import read_ood_if_there

    known: dict[str, DataSplits | None] = {}
    told = []
    for trial in {trial.row: trial for trial in trials}.values():
        prepared = trial.inputs[0]
        if prepared not in known:
            folder = locate(trial.config)
            known[prepared] = None if folder is None else _load(folder)
        if (data := known[prepared]) is None:
            continue
        from cpmm.pipeline.scores.sizes import check_sizes

        try:
            check_sizes(trial.config, data)
            if (ood := (prepared, trial.config["evaluation"]["ood"])) not in told:
                told.append(ood)
                read_ood_if_there(trial.config, data)
        except ValueError as error:
            raise ValueError(f"sweep {name}, row {trial.label}: {error}") from error
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):  # such a row fails alone, when its turn comes
                raise


def _load(folder: Path) -> DataSplits:
    from cpmm.pipeline.artifacts.store import load_prepared

    return load_prepared(folder)


def _run(sweep: Sweep, located: Mapping[tuple[str, str | None], Located], unit: str) -> None:
    """Run the trials that the archive has no record of."""
    cluster.prepare_environment(sweep.ray)  # before Ray is imported
    for trial, record in sweep.results():
        if record["status"] == "lost":
            sweep.archive.delete_record(trial.fingerprint)
    n_done = len(sweep.results())
    print(f"sweep {sweep.name} | {_beginning(sweep, n_done)}", flush=True)
    if n_done >= sweep.n_trials:
        return
    from cpmm.pipeline.sweeps.driver import run_trials, share_all
    from cpmm.pipeline.sweeps.progress import Progress

    progress = Progress(sweep, n_done, unit)
    size, n_cpus = sum(map(size_of, located.values())), sweep.ray["cpus"] * sweep.ray["workers"]
    with cluster.connected(sweep.ray, size, n_cpus) as line:
        print(f"sweep {sweep.name} | {line}", flush=True)
        inputs = share_all(located, sweep.ray)
        if sweep.suggests and (begun := sweep.unfinished()):  # go on from their checkpoints
            progress.names |= {trial.fingerprint: trial.name for trial in begun}
            search = sweep.options["search"] | {"kind": "grid"}
            options = sweep.options | {"search": search}
            run_trials(replace(sweep, trials=begun, options=options), inputs, progress)
        if len(sweep.results()) < sweep.n_trials:
            run_trials(sweep, inputs, progress)
    n_done = len(sweep.results())
    missing = sweep.n_trials - n_done
    if missing > 0 and sweep.suggests and not sweep.unfinished():
        print(
            f"sweep {sweep.name} | {n_done} trials in place of {sweep.n_trials}: the search "
            "suggested nothing else; its space has few points, a grid would do",
            flush=True,
        )
    elif missing > 0:
        raise ChildProcessError(f"{missing} trials have no record: the same command goes on")


def _beginning(sweep: Sweep, n_done: int) -> str:
    """Say whether the sweep goes on or starts afresh, and note in the archive what it is of."""
    from cpmm.pipeline.sweeps.archive import CHECKPOINT

    archive, trials = sweep.archive, sweep.trials
    name = f"sweeps/{sweep.name}-{trials[0].config['name']}.json"
    fingerprints = [trial.fingerprint for trial in trials]
    before = archive.read_json(name) or {}
    archive.write_json(name, {"fingerprint": sweep.fingerprint, "trials": fingerprints})
    begun = sum(
        archive.record(trial.fingerprint) is None
        and archive.has(f"trials/{trial.fingerprint}/{CHECKPOINT}")
        for trial in trials
    )
    state = f"{sweep.n_trials} trials, {n_done} done before, {begun} begun"
    if not before.get("fingerprint"):
        return f"starting, {state}"
    if before["fingerprint"] == sweep.fingerprint:
        done = n_done >= sweep.n_trials
        return f"all done: {state}" if done else f"same configuration: resuming, {state}"
    known = set(before.get("trials", ()))
    if set(fingerprints) != known and set(fingerprints) & known:
        return f"other trials asked for than before, {state}"
    if n_done or begun:
        state += " with the same options and code, the rest starts afresh"
    else:
        state = f"starting afresh, {state}"
    return f"configuration or code changed: {state}"


def _is_own(override: str) -> bool:
    return override.lstrip("+~").split("=", 1)[0].split(".")[0].split("@")[0] in OWN
