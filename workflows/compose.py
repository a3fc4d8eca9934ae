"""Compose the configuration of one preset from conf/ and the overrides in params.yaml."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cpmm.files import write_text
from cpmm.pipeline.config import Config
from cpmm.pipeline.config.compose import compose_preset, missing_ood_files, read_overrides
from cpmm.pipeline.config.fingerprints import fingerprint_prepared
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
        _check_prepared(config, arguments.target.parent)
        arguments.target.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.target, yaml.safe_dump(config, sort_keys=False))
        print(f"config: wrote {arguments.target}")
        if missing := missing_ood_files(config):
            print(f"config: warning: {missing}", file=sys.stderr)


def _check_prepared(config: Config, folder: Path) -> None:
    """Check the configuration against its data, where an earlier run has prepared the same."""
    from cpmm.artifact import load_header

    fingerprint = fingerprint_prepared(config)
    try:
        load_header(folder / "prepared", "prepared", fingerprint)
    except (FileNotFoundError, ValueError):
        return  # prepare_data makes them, and checks it there
    from cpmm.pipeline.artifacts.store import load_prepared
    from cpmm.pipeline.scores.sizes import check_sizes

    check_sizes(config, load_prepared(folder / "prepared", fingerprint), "cpmm", ood=True)


if __name__ == "__main__":
    main()
