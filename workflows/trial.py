"""Train and score one trial, as the sweep does many: a preset and overrides, without Ray.

python workflows/trial.py preset=digits cpmm.ode=separate cpmm.seed=1
python workflows/trial.py preset=digits model=vade            a row of conf/baselines/
"""

from __future__ import annotations

import argparse
import errno
import json
import os
from pathlib import Path

from cpmm.pipeline.config import pick
from cpmm.pipeline.errors import command
from cpmm.pipeline.sweeps.trial import FOLDERS, read_ood_if_there, run_trial, summarize, trial_code


def main() -> None:
    """Run one trial from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    of_out = "where record, checkpoint and mixture go; data/<preset>/trial"
    parser.add_argument(
        "overrides", nargs="*", help="in Hydra's syntax; preset=digits if not given"
    )
    parser.add_argument("--out", type=Path, help=of_out)
    arguments = parser.parse_intermixed_args()
    with command("trial", arguments.out):
        _run(arguments.overrides, arguments.out)


def _run(overrides: list[str], out: Path | None) -> None:
    import shutil

    from cpmm.pipeline.artifacts.files import write_json
    from cpmm.pipeline.artifacts.store import load_prepared
    from cpmm.pipeline.config.compose import compose_preset, split_preset
    from cpmm.pipeline.config.root import ROOT
    from cpmm.pipeline.scores.sizes import check_sizes
    from cpmm.pipeline.sweeps.inputs import locate_inputs, open_inputs, prepare
    from cpmm.pipeline.sweeps.plan import make_trial

    preset, overrides = split_preset(overrides)
    config = compose_preset(preset, overrides)
    trial = make_trial(preset, (), config["cpmm"]["seed"], overrides, config, trial_code())
    home = ROOT / "data" / preset
    check_sizes(trial.config, load_prepared(prepare(trial.config, home)))
    data, spaces = open_inputs(locate_inputs(trial.config, home))
    out = out or home / "trial"
    _make_room(out)
    if missing := read_ood_if_there(trial.config, data)[1]:
        raise FileNotFoundError(missing["ood_missing"])
    scratch = home / ".scratch" / f"trial-{trial.fingerprint}"
    scratch.mkdir(parents=True, exist_ok=True)
    record = run_trial(trial.config, data, spaces, trial.fingerprint, scratch)
    for name in FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
        if (scratch / name).is_dir():
            shutil.copytree(scratch / name, out / name)
    write_json(out / "record.json", record)
    shutil.rmtree(scratch)
    print(json.dumps(pick(record, *(k for k in ("validation", "test") if k in record))))
    print(f"trial: {summarize(record, data.preprocessing.density_unit[0])} -> {out}")
    if record["status"] != "finished":
        raise SystemExit(1)


def _make_room(out: Path) -> None:
    """Make the folder of a trial's results; refuse one that holds another's."""
    out.mkdir(parents=True, exist_ok=True)
    held = [name for name in FOLDERS if (out / name).exists()]
    if held and not (out / "record.json").exists():
        raise ValueError(
            f"{out} has a {held[0]} and no record.json of a trial, whose place it would take: "
            "choose another folder with --out"
        )
    if not os.access(out, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(out))


if __name__ == "__main__":
    main()
