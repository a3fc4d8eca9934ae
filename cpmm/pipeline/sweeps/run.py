"""Plan a sweep, run what has no record yet, publish what it found."""

from __future__ import annotations

from pathlib import Path

import yaml

from cpmm.pipeline.config import Config
from cpmm.pipeline.config.compose import compose_preset, known_sweeps, read_overrides, split_preset
from cpmm.pipeline.config.fingerprints import hash_of
from cpmm.pipeline.config.root import ROOT
from cpmm.pipeline.sweeps import cluster, plan
from cpmm.pipeline.sweeps.archive import CHECKPOINT, Archive
from cpmm.pipeline.sweeps.inputs import Located, locate_inputs, open_inputs, share_all, size_of
from cpmm.pipeline.sweeps.plan import Trial
from cpmm.pipeline.sweeps.publish import publish_sweep
from cpmm.pipeline.sweeps.trial import trial_code

OWN = ("sweep", "ray")  # groups that are the sweep's, not its trials'


def run_sweep(overrides: list[str], only_config: bool = False, only_plan: bool = False) -> None:
    """Plan, run and tabulate a sweep."""
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
    sweep, options = config["sweep"], config["ray"]
    cluster.check_options(options)
    trials = plan.plan_trials(preset, sweep, params, rest, trial_code())
    plan.check_models(trials, sweep, options["workers"])
    if only_plan:
        for trial in trials:
            print(f"{trial.name}\n    {trial.command}")
        return

    home = ROOT / "data" / preset
    archive = Archive(options["storage"] or str(home / ".scratch" / "sweep"))
    located = {trial.inputs: trial for trial in trials}
    located = {
        fingerprints: locate_inputs(trial.config, home) for fingerprints, trial in located.items()
    }
    logs = home / ".scratch" / "ray" / sweep["name"]
    _run(trials, sweep, options, located, archive, logs)
    publish_sweep(trials, sweep, preset, archive, home)


def _run(
    trials: list[Trial],
    sweep: Config,
    options: Config,
    located: dict[tuple[str, str | None], Located],
    archive: Archive,
    logs: Path,
) -> None:
    """Run what the archive has no record of."""
    cluster.prepare_environment(options)
    from cpmm.pipeline.sweeps.driver import recorded_trials

    for trial, record in recorded_trials(trials, sweep, archive):
        if record["status"] == "lost":
            archive.delete_record(trial.fingerprint)
    searched = sweep["search"]["kind"] == "optuna"
    n_trials = sweep["search"]["n_samples"] if searched else len(trials)
    n_done = len(recorded_trials(trials, sweep, archive))
    print(
        f"sweep {sweep['name']} | {_beginning(trials, sweep, archive, n_trials, n_done)}",
        flush=True,
    )
    if n_done >= n_trials:
        return

    from cpmm.pipeline.sweeps.driver import run_trials, suggested_trials
    from cpmm.pipeline.sweeps.progress import Progress

    data, _ = open_inputs(next(iter(located.values())))
    unit, _, _ = data.preprocessing.density_unit
    progress = Progress(
        sweep["name"], {trial.fingerprint: trial.name for trial in trials}, n_trials, n_done, unit
    )
    size = sum(map(size_of, located.values()))
    with cluster.connected(options, size, options["cpus"] * options["workers"]) as line:
        print(f"sweep {sweep['name']} | {line}", flush=True)
        inputs = share_all(located, options)
        if searched:  # what it suggested before and was not ended, from its checkpoints
            suggested = suggested_trials(trials[0], archive)
            begun = [trial for trial in suggested if archive.record(trial.fingerprint) is None]
            as_grid = sweep | {"search": sweep["search"] | {"kind": "grid"}}
            if begun:
                progress.names |= {trial.fingerprint: trial.name for trial in begun}
                run_trials(begun, as_grid, options, inputs, archive, logs, progress)
        if len(recorded_trials(trials, sweep, archive)) < n_trials:
            run_trials(trials, sweep, options, inputs, archive, logs, progress)
    missing = n_trials - len(recorded_trials(trials, sweep, archive))
    if searched and missing > 0:
        suggested = suggested_trials(trials[0], archive)
        if all(archive.record(trial.fingerprint) is not None for trial in suggested):
            print(
                f"sweep {sweep['name']} | {len(suggested)} trials in place of {n_trials}: the search suggested "
                "nothing else; its space has few points, a grid would do",
                flush=True,
            )
            return
    if missing > 0:
        raise ChildProcessError(f"{missing} trials have no record: the same command goes on")


def _beginning(
    trials: list[Trial], sweep: Config, archive: Archive, n_trials: int, n_done: int
) -> str:
    """Say whether the sweep goes on or starts afresh, and note what it consists of."""
    name = f"sweeps/{sweep['name']}-{trials[0].config['name']}.json"
    fingerprint = hash_of(
        sweep["search"], sweep["scheduler"], [trial.fingerprint for trial in trials]
    )
    noted = archive.read_json(name) or {}
    before = noted.get("fingerprint")
    archive.write_json(
        name, {"fingerprint": fingerprint, "trials": [trial.fingerprint for trial in trials]}
    )
    begun = sum(
        archive.record(trial.fingerprint) is None
        and archive.has(f"trials/{trial.fingerprint}/{CHECKPOINT}")
        for trial in trials
    )
    state = f"{n_trials} trials, {n_done} done before, {begun} begun"
    if before == fingerprint:
        return (
            f"same configuration: resuming, {state}" if n_done < n_trials else f"all done: {state}"
        )
    if before is None:
        return f"starting, {state}"
    fingerprints, known = {trial.fingerprint for trial in trials}, set(noted.get("trials", ()))
    if fingerprints != known and fingerprints & known:
        return f"other trials asked for than before, {state}"
    what = "configuration or code changed"
    if n_done or begun:
        return f"{what}: {state} with the same options and code, the rest starts afresh"
    return f"{what}: starting afresh, {state}"


def _is_own(override: str) -> bool:
    key = override.lstrip("+~").split("=", 1)[0]
    return key.split(".")[0].split("@")[0] in OWN
