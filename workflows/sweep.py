"""Sweep over trials on Ray Tune: data/<preset>/sweep/<sweep>, a table with error bars.

    python workflows/sweep.py                              Table 2 of the paper, on digits
    python workflows/sweep.py sweep=ablation sweep.seeds=1
    python workflows/sweep.py preset=mnist data.options.folder=/my/mnist ray.gpus=0.25
    python workflows/sweep.py ray.address=auto             on a running cluster (docs/cluster.md)

A sweep is a file of conf/sweep/; every option of conf/ can be overridden in Hydra's syntax. The same
command goes on where it was killed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cpmm.pipeline.config import Config
from cpmm.pipeline.config.root import ROOT
from cpmm.pipeline.errors import EXPECTED_ERRORS, describe
from cpmm.pipeline.stage import end_with_dvc, publish

if TYPE_CHECKING:
    from cpmm.pipeline.sweeps.archive import Archive
    from cpmm.pipeline.sweeps.inputs import Located
    from cpmm.pipeline.sweeps.plan import Trial

OWN = ("sweep", "ray")  # groups that are the sweep's, not its trials'
KEPT = ("cpmm", "mixture")  # of the best trial; the weights of a flow or a circuit are large


def main() -> None:
    """Run a sweep from the command line."""
    presets = sorted(p.stem for p in (ROOT / "conf" / "preset").glob("*.yaml"))
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"sweeps: {', '.join(known_sweeps())}. presets: {', '.join(presets)}. What Ray is "
        "asked for: "
        "conf/ray/default.yaml.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="in Hydra's syntax, such as sweep.seeds=5")
    parser.add_argument(
        "--cfg", action="store_true", help="print the composed configuration, and end"
    )
    parser.add_argument("--plan", action="store_true", help="print the trials, and end")
    arguments = parser.parse_intermixed_args()
    end_with_dvc()
    try:
        run_sweep(arguments.overrides, arguments.cfg, arguments.plan)
    except EXPECTED_ERRORS as error:
        print(f"sweep: error: {describe(error, ROOT / 'data')}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("sweep: interrupted; the same command goes on", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def known_sweeps() -> list[str]:
    """Names of the files in ``conf/sweep/``, but for the one that all start from."""
    paths = (ROOT / "conf" / "sweep").glob("*.yaml")
    return sorted(path.stem for path in paths if path.stem != "default")


def run_sweep(overrides: list[str], only_config: bool = False, only_plan: bool = False) -> None:
    """Plan, run and tabulate a sweep."""
    import yaml

    from cpmm.pipeline.config.compose import compose_preset, read_overrides, split_preset

    preset, rest = split_preset(overrides)
    for item in rest:
        if item.startswith("sweep=") and item.removeprefix("sweep=") not in known_sweeps():
            raise ValueError(f"unknown {item}: choose one of {', '.join(known_sweeps())}")
    params = read_overrides(preset)
    config = compose_preset(preset, [*params, *rest], "sweep")
    if only_config:
        print(yaml.safe_dump(config, sort_keys=False), end="")
        return

    from cpmm.pipeline.sweeps import cluster, plan
    from cpmm.pipeline.sweeps.trial import trial_code

    params, rest = ([item for item in items if not _is_own(item)] for items in (params, rest))
    sweep, options = config["sweep"], config["ray"]
    cluster.check_options(options)
    trials = plan.plan_trials(preset, sweep, params, rest, trial_code())
    plan.check_models(trials, sweep, options["workers"])
    if only_plan:
        for trial in trials:
            print(f"{trial.name}\n    {trial.command}")
        return

    from cpmm.pipeline.sweeps.archive import Archive
    from cpmm.pipeline.sweeps.inputs import locate_inputs

    home = ROOT / "data" / preset
    archive = Archive(options["storage"] or str(home / ".scratch" / "sweep"))
    located = {trial.inputs: trial for trial in trials}
    located = {
        fingerprints: locate_inputs(trial.config, home) for fingerprints, trial in located.items()
    }
    logs = home / ".scratch" / "ray" / sweep["name"]
    _run(trials, sweep, options, located, archive, logs)
    _publish(trials, sweep, preset, archive, home)


def _run(
    trials: list[Trial],
    sweep: Config,
    options: Config,
    located: dict[tuple[str, str | None], Located],
    archive: Archive,
    logs: Path,
) -> None:
    """Run what the archive has no record of."""
    from cpmm.pipeline.sweeps import cluster

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
    from cpmm.pipeline.sweeps.inputs import open_inputs, share_all, size_of
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
                f"sweep {sweep['name']} | {len(suggested)} trials in place of {n_trials}: the "
                "search suggested "
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
    from cpmm.pipeline.sweeps.archive import CHECKPOINT
    from cpmm.pipeline.sweeps.plan import fingerprint_sweep

    name = f"sweeps/{sweep['name']}-{trials[0].config['name']}.json"
    fingerprint = fingerprint_sweep(sweep, trials)
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


def _publish(trials: list[Trial], sweep: Config, preset: str, archive: Archive, home: Path) -> None:
    """Write the tables, the figure and the best trial's mixture, seal and print them."""
    import shutil

    from cpmm.pipeline.artifacts.store import load_prepared, seal_sweep, write_json
    from cpmm.pipeline.sweeps import plan, table
    from cpmm.pipeline.sweeps.driver import recorded_trials
    from cpmm.pipeline.sweeps.inputs import locate_inputs

    data = load_prepared(locate_inputs(trials[0].config, home).prepared)
    unit, _, _ = data.preprocessing.density_unit
    results = recorded_trials(trials, sweep, archive)
    rows = table.rows_table(results)
    claims = table.check_claims(rows, sweep["claims"])
    best = table.best_trial(results)
    out = home / "sweep" / sweep["name"]
    scratch = home / ".scratch" / f"sweep-{out.name}"
    shutil.rmtree(scratch, ignore_errors=True)
    partial = scratch / out.name
    partial.mkdir(parents=True)
    if best is not None:
        for name in KEPT:
            archive.fetch(f"trials/{best[0].fingerprint}/{name}", partial / name)
    shown = Path("data") / preset / "sweep" / sweep["name"]
    kept = [name for name in KEPT if (partial / name).is_dir()]
    line = table.best_line(best, unit, shown, kept)
    text = table.markdown(sweep["name"], preset, unit, rows, claims, line)
    table.write_tables(partial, results, rows, claims, unit, text)
    beside = [scratch / f"{out.name}.csv", scratch / f"{out.name}.json"]
    rows.drop(columns=["failures"]).to_csv(beside[0], index=False)
    write_json(beside[1], table.metrics(sweep["name"], rows, best, unit))
    seal_sweep(partial, plan.fingerprint_sweep(sweep, trials), beside)
    # All is written: what is left needs no space.
    out.parent.mkdir(exist_ok=True)
    for path in beside:
        os.replace(path, out.with_name(path.name))
    publish(scratch, out.name, out)
    table.print_tables(f"sweep {sweep['name']} of {preset}, {unit}", rows, claims)
    failed = int(rows["n_failed"].sum())
    print(f"sweep: {len(results)} trials, {failed} failed -> {shown}\n{line}")


def _is_own(override: str) -> bool:
    key = override.lstrip("+~").split("=", 1)[0]
    return key.split(".")[0].split("@")[0] in OWN


if __name__ == "__main__":
    main()
