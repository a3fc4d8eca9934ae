"""Time the package beside its peers and the machine, in one run, as ratios.

    python benchmarks/speed.py                # all parts, a few minutes
    python benchmarks/speed.py density --quick

Times are the shortest of several, taken in turns, so that the ratios hold on a busy machine.
Results are compared before times are. pomegranate and SPFlow, peers, come with
`pip install -e '.[benchmarks]'`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from cpmm.pipeline.config import pick
from cpmm.pipeline.errors import command

PARTS = ("density", "step", "einsum", "reading", "writing")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"some of {', '.join(PARTS)}; all")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: that it runs, not figures"
    )
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the field")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose among {', '.join(PARTS)}")
    if arguments.repeats < 1:
        parser.error(f"--repeats is {arguments.repeats}: expected 1 or more")

    with command("speed", resumes=False):
        time_parts(arguments)


def time_parts(arguments: argparse.Namespace) -> None:
    """Time what is asked for, and print it."""
    import torch
    from cases.einsum_network import time_einsum_network
    from cases.log_density import time_log_density
    from cases.spaces import time_reading, time_writing
    from cases.training_step import time_training_step

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no CUDA device here")
    options = (arguments.quick, arguments.repeats)
    parts = {
        "density": lambda: time_log_density(*options),
        "step": lambda: time_training_step(*options, arguments.compile, arguments.device),
        "einsum": lambda: time_einsum_network(*options),
        "reading": lambda: time_reading(*options),
        "writing": lambda: time_writing(*options),
    }
    figures = {}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    for part in arguments.parts or PARTS:
        rows = parts[part]()
        figures[part] = [asdict(row) for row in rows]
        for row in rows:
            milliseconds = "" if row.seconds is None else f"{1e3 * row.seconds:10.2f} ms"
            figure = "" if row.figure is None else f"{row.figure:10.4g} {row.unit}"
            print(f"{part} | {row.name:60}{milliseconds:13}{figure}".rstrip(), flush=True)
    if arguments.json:
        settings = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        options = pick(vars(arguments), "quick", "repeats", "compile", "device")
        text = json.dumps(settings | options | {"parts": figures}, indent=2)
        arguments.json.write_text(text + "\n")
        print(f"speed: {len(figures)} parts -> {arguments.json}")


if __name__ == "__main__":
    main()
