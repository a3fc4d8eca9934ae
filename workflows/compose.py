"""Compose the configuration of one preset from conf/ and the overrides in params.yaml."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cpmm.pipeline.artifacts.files import write_text
from cpmm.pipeline.config.compose import compose_preset, missing_ood_files, read_overrides
from cpmm.pipeline.errors import command
from cpmm.pipeline.stage import end_with_dvc


def main() -> None:
    """Write the composed configuration of a preset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", help="a file of conf/preset/, without .yaml")
    parser.add_argument("target", type=Path, help="where to write, data/<preset>/config.yaml")
    arguments = parser.parse_args()
    with command("config", arguments.target):
        import yaml

        end_with_dvc()
        config = compose_preset(arguments.preset, read_overrides(arguments.preset))
        arguments.target.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.target, yaml.safe_dump(config, sort_keys=False))
        print(f"config: wrote {arguments.target}")
        if missing := missing_ood_files(config):
            print(f"config: warning: {missing}", file=sys.stderr)


if __name__ == "__main__":
    main()
