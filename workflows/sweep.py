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

from cpmm.pipeline.config.compose import known_presets, known_sweeps
from cpmm.pipeline.config.root import ROOT
from cpmm.pipeline.errors import command
from cpmm.pipeline.stage import end_with_dvc


def main() -> None:
    """Run a sweep from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"sweeps: {', '.join(known_sweeps())}. presets: {', '.join(known_presets())}. "
        "What Ray is asked for: conf/ray/default.yaml.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="in Hydra's syntax, such as sweep.seeds=5")
    parser.add_argument(
        "--cfg", action="store_true", help="print the composed configuration, and end"
    )
    parser.add_argument("--plan", action="store_true", help="print the trials, and end")
    arguments = parser.parse_intermixed_args()
    with command("sweep", ROOT / "data"):
        end_with_dvc()
        from cpmm.pipeline.sweeps.run import run_sweep

        run_sweep(arguments.overrides, arguments.cfg, arguments.plan)


if __name__ == "__main__":
    main()
