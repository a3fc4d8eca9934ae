"""Write a sweep's tables, its figure and its best trial's mixture: data/<preset>/sweep/<sweep>."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from cpmm.pipeline.artifacts.files import write_json
from cpmm.pipeline.artifacts.store import load_prepared
from cpmm.pipeline.config import Config
from cpmm.pipeline.stage import publish
from cpmm.pipeline.sweeps import table
from cpmm.pipeline.sweeps.archive import Archive
from cpmm.pipeline.sweeps.inputs import locate_inputs
from cpmm.pipeline.sweeps.plan import Trial

KEPT = ("cpmm", "mixture")  # of the best trial; the weights of a flow or a circuit are large


def publish_sweep(
    trials: list[Trial], sweep: Config, preset: str, archive: Archive, home: Path
) -> None:
    """Write the tables, the figure and the best trial's mixture, and print them."""
    from matplotlib import rc_context
    from rich.console import Console

    from cpmm.pipeline.sweeps.driver import recorded_trials

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
    table.trials_table(results).to_csv(partial / "trials.csv", index=False)
    text = table.markdown(sweep["name"], preset, unit, rows, claims, line)
    (partial / "table.md").write_text(text)
    write_json(
        partial / "table.json",
        {"unit": unit, "rows": json.loads(rows.to_json(orient="records")), "claims": claims},
    )
    with rc_context({"svg.hashsalt": "cpmm"}):
        table.draw(results, rows, unit).savefig(partial / "rows.svg", metadata={"Date": None})
    beside = [f"{out.name}.csv", f"{out.name}.json"]
    rows.drop(columns=["failures"]).to_csv(scratch / beside[0], index=False)
    write_json(scratch / beside[1], table.metrics(sweep["name"], rows, best, unit))
    # All is written: what is left needs no space.
    out.parent.mkdir(exist_ok=True)
    for name in beside:
        os.replace(scratch / name, out.with_name(name))
    publish(scratch, out.name, out)

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table.terminal_table(f"sweep {sweep['name']} of {preset}, {unit}", rows))
    for claim in claims:
        print(
            f"claim: {claim['claim']}: {claim['holds']} ({claim['metric']} {claim['ours']['worse']} -> {claim['ours']['better']})"
        )
    failed = int(rows["n_failed"].sum())
    print(f"sweep: {len(results)} trials, {failed} failed -> {shown}\n{line}")
