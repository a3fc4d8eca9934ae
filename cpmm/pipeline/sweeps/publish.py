"""Write a sweep's tables, its figure and its best trial's mixture: data/<preset>/sweep/<sweep>."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cpmm.pipeline.artifacts.files import write_json
from cpmm.pipeline.artifacts.store import seal_sweep
from cpmm.pipeline.stage import publish
from cpmm.pipeline.sweeps import table
from cpmm.pipeline.sweeps.sweep import Sweep

KEPT = ("cpmm", "mixture")  # of the best trial; the weights of a flow or a circuit are large


def publish_sweep(sweep: Sweep, unit: str) -> None:
    """Write the tables, the figure and the best trial's mixture, seal them, print the tables."""
    results = sweep.results()
    rows = table.rows_table(results)
    claims = table.check_claims(rows, sweep.options["claims"])
    best = table.best_trial(results)
    out = sweep.home / "sweep" / sweep.name
    scratch = sweep.home / ".scratch" / f"sweep-{out.name}"
    shutil.rmtree(scratch, ignore_errors=True)
    partial = scratch / out.name
    partial.mkdir(parents=True)
    if best is not None:
        for name in KEPT:
            sweep.archive.fetch(f"trials/{best[0].fingerprint}/{name}", partial / name)
    shown = Path("data") / sweep.preset / "sweep" / sweep.name
    kept = [name for name in KEPT if (partial / name).is_dir()]
    line = table.best_line(best, unit, shown, kept)
    text = table.markdown(sweep.name, sweep.preset, unit, rows, claims, line)
    table.write_tables(partial, results, rows, claims, unit, text)
    beside = [scratch / f"{out.name}.csv", scratch / f"{out.name}.json"]
    rows.drop(columns=["failures"]).to_csv(beside[0], index=False)
    write_json(beside[1], table.metrics(sweep.name, rows, best, unit))
    seal_sweep(partial, sweep.fingerprint, beside)
    # All is written: what is left needs no space.
    out.parent.mkdir(exist_ok=True)
    for path in beside:
        os.replace(path, out.with_name(path.name))
    publish(scratch, out.name, out)
    table.print_tables(f"sweep {sweep.name} of {sweep.preset}, {unit}", rows, claims)
    failed = int(rows["n_failed"].sum())
    print(f"sweep: {len(results)} trials, {failed} failed -> {shown}\n{line}")
