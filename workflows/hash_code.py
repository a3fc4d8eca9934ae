"""Write which code every stage reaches by its imports, with hashes: data/code.yaml."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpmm.files import write_text
from cpmm.pipeline.config.code import SCRIPTS, code_digests, code_fingerprint
from cpmm.pipeline.errors import command


def main() -> None:
    """Write an entry for each script of workflows/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, help="where to write, data/code.yaml")
    target = parser.parse_args().target
    with command("hash_code", target):
        import yaml

        stages = {
            path.stem: {"hash": code_fingerprint(path), "files": code_digests(path)}
            for path in sorted(SCRIPTS.glob("*.py"))
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, yaml.safe_dump(stages, sort_keys=False))
        print(f"hash_code: {len(stages)} scripts -> {target}")


if __name__ == "__main__":
    main()
