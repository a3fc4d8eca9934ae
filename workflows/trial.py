"""Train and score one trial, as the sweep does many: a preset and overrides, without Ray.

python workflows/trial.py preset=digits cpmm.ode=separate cpmm.seed=1
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflows.stage import EXPECTED_ERRORS, Config, code_fingerprint, describe, pick

if TYPE_CHECKING:
    from cpmm.data import DataSplits
    from workflows.store import Spaces

HERE = Path(__file__).resolve().parent
CODE = tuple(HERE / f"{name}.py" for name in ("fit", "models", "score", "trial"))
SCORES = ("density", "accuracy", "nmi", "ari", "purity")


def trial_code() -> str:
    """Fingerprint of the code that decides a trial's result."""
    return code_fingerprint(*CODE)


def run_trial(
    config: Config,
    data: DataSplits,
    spaces: Spaces | None,
    mark: str,
    scratch: Path,
    **options: Any,
) -> dict[str, Any]:
    """Train the CPMM of a configuration and score its mixture.

    Everything is chosen by validation likelihood; the test split is scored once, at the end.

    Args:
        config: The whole composed configuration.
        data: The splits.
        spaces: The curriculum, None without one.
        mark: Fingerprint of the trial.
        scratch: Folder of its own; the trial resumes from a checkpoint there. Afterwards ``cpmm``
            and ``mixture`` lie in it.
        options: Further ones of :func:`workflows.fit.fit`.

    Returns:
        The record of the trial: its status, "finished" or "diverged", its scores or the reason. Of
        several processes that train together, all but the first get a record without scores.
    """
    import torch

    from workflows.fit import fit
    from workflows.models import extract, make_mixture_training, mixture_header
    from workflows.score import Scorer
    from workflows.store import save_model

    torch.set_num_threads(config["trainer"]["threads"] or torch.get_num_threads())
    module, rows = make_mixture_training(config["cpmm"], config["mixture"], data, spaces)
    started = time.monotonic()
    try:
        clip = config["cpmm"]["gradient_clip"]
        fit("trial", module, rows, config["trainer"], scratch, clip, **options)
        seconds = time.monotonic() - started
        best = module.best_summary()
        if module.global_rank:
            return {"status": "finished"}
        model = module.model.cpu()
        save_model(scratch / "cpmm", "cpmm", model, {"fingerprint": mark, "best": best})
        mixture = extract(model, config["mixture"], data)
        header = mixture_header(config, data, mark)
        mixture.save(scratch / "mixture", header, data.preprocessing.tensors)
        mixture = mixture.to(torch.float64)
        with torch.no_grad():
            validation = Scorer(data, "validation").density(mixture.log_prob)["density"]
            test = Scorer(data, "test").mixture(mixture)
        if not all(map(math.isfinite, (validation, test["density"]))):
            raise FloatingPointError("the density of the extracted mixture is not finite")
    except FloatingPointError as error:
        return {"status": "diverged", "step": module.global_step, "reason": str(error)}
    return {
        "status": "finished",
        "validation": validation,
        "test": test,
        "best_epoch": best["epoch"],
        "steps": module.history[-1]["step"],
        "seconds": seconds,
    }


def summarize(record: Mapping[str, Any], unit: str) -> str:
    """Say in one line what came of a trial."""
    if record["status"] != "finished":
        return explain(record)
    test = record["test"]
    line = f"validation {record['validation']:.4f}, test {test['density']:.4f} {unit}"
    if "accuracy" in test:
        line += f", clustering accuracy {100 * test['accuracy']:.1f} %"
    return line


def explain(record: Mapping[str, Any]) -> str:
    """Say in one line why a trial did not finish."""
    at = f" at step {record['step']}" if record.get("step") is not None else ""
    return f"{record['status']}{at}: {record.get('reason', 'no reason recorded')}"


def main() -> None:
    """Run one trial from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", help="in Hydra's syntax; preset=digits if not given"
    )
    parser.add_argument(
        "--out", type=Path, help="where record, checkpoint and mixture go; data/<preset>/trial"
    )
    arguments = parser.parse_intermixed_args()
    try:
        _run(arguments.overrides, arguments.out)
    except EXPECTED_ERRORS as error:
        print(f"trial: error: {describe(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("trial: interrupted; run it again to go on", file=sys.stderr)
        raise SystemExit(130) from None


def _run(overrides: list[str], out: Path | None) -> None:
    import shutil

    from workflows.compose import ROOT, compose_preset, split_preset
    from workflows.store import write_json
    from workflows.sweeps.inputs import locate_inputs, open_inputs
    from workflows.sweeps.plan import make_trial

    preset, overrides = split_preset(overrides)
    config = compose_preset(preset, overrides)
    trial = make_trial(preset, (), config["cpmm"]["seed"], overrides, config, trial_code())
    home = ROOT / "data" / preset
    data, spaces = open_inputs(locate_inputs(trial.config, home))
    scratch = home / ".scratch" / f"trial-{trial.mark}"
    scratch.mkdir(parents=True, exist_ok=True)
    record = run_trial(trial.config, data, spaces, trial.mark, scratch)
    out = out or home / "trial"
    for name in ("cpmm", "mixture"):
        shutil.rmtree(out / name, ignore_errors=True)
        if (scratch / name).is_dir():
            shutil.copytree(scratch / name, out / name)
    write_json(out / "record.json", record)
    shutil.rmtree(scratch)
    print(json.dumps(pick(record, *(k for k in ("validation", "test") if k in record))))
    print(f"trial: {summarize(record, data.preprocessing.density_unit[0])} -> {out}")
    if record["status"] != "finished":
        raise SystemExit(1)


if __name__ == "__main__":
    main()
