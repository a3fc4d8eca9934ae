"""Train and score one trial, as the sweep does many: a preset and overrides, without Ray.

python workflows/trial.py preset=digits cpmm.ode=separate cpmm.seed=1
python workflows/trial.py preset=digits model=vade            a row of conf/baselines/
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import gc
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflows.stage import EXPECTED_ERRORS, Config, code_fingerprint, describe, pick
from workflows.stage import explain as explain_error

if TYPE_CHECKING:
    from cpmm.data import DataSplits
    from workflows.baselines import Fitted
    from workflows.outside import Outside
    from workflows.store import Spaces

HERE = Path(__file__).resolve().parent
CODE = tuple(
    HERE / f"{name}.py"
    for name in ("baselines", "fit", "models", "outside", "rivals", "score", "sources", "trial")
)
FOLDERS = ("cpmm", "mixture", "baseline")  # what a trial leaves
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
    alive: Callable[[], None] = lambda: None,
    **options: Any,
) -> dict[str, Any]:
    """Train the model of a configuration, CPMM or a row of conf/baselines/, and score it.

    Everything is chosen by validation likelihood; the test split is scored once, at the end.

    Args:
        config: The whole composed configuration.
        data: The splits.
        spaces: The curriculum, None without one.
        mark: Fingerprint of the trial.
        scratch: Folder of its own; the trial resumes from a checkpoint there. Afterwards what is in
            :data:`FOLDERS` lies in it, as far as the model has it.
        alive: Called now and then where no epoch ends for long, such as while a flow is scored.
        options: Further ones of :func:`workflows.fit.fit`.

    Returns:
        The record of the trial: its status, "finished" or "diverged", its scores or the reason. Of
        several processes that train together, all but the first get a record without scores.
    """
    import torch

    import workflows.baselines  # noqa: F401  a second or two, that are not of the training

    torch.set_num_threads(config["trainer"]["threads"] or torch.get_num_threads())
    train = _train_cpmm if config["model"] == "cpmm" else partial(_train_baseline, alive=alive)
    outside, missing = _outside(config, data)
    progress: dict[str, Any] = {"module": None}
    started = time.monotonic()
    with peak_memory() as memory:
        try:
            fitted = train(config, data, spaces, mark, scratch, progress, **options)
            if fitted is None:
                return {"status": "finished"}
            seconds = time.monotonic() - started
            if progress["module"] is not None:
                seconds += progress["module"].seconds_before
            record = _score(fitted, config, data, outside) | missing
        except FloatingPointError as error:
            module = progress["module"]
            step = None if module is None else module.global_step
            return {"status": "diverged", "step": step, "reason": str(error)}
    return {
        "status": "finished", **record, **fitted.ended, "seconds": seconds, "memory_gb": memory.get("gb")
    }  # fmt: skip


def _train_cpmm(
    config: Config,
    data: DataSplits,
    spaces: Spaces | None,
    mark: str,
    scratch: Path,
    progress: dict[str, Any],
    **options: Any,
) -> Fitted | None:
    from workflows.baselines import as_fitted, ended
    from workflows.fit import fit
    from workflows.models import extract, make_mixture_training, mixture_header
    from workflows.store import save_model

    module, rows = make_mixture_training(config["cpmm"], config["mixture"], data, spaces)
    progress["module"] = module
    fit(
        "trial",
        module,
        rows,
        config["trainer"],
        scratch,
        config["cpmm"]["gradient_clip"],
        **options,
    )
    if module.global_rank:
        return None
    model = module.model.cpu()
    header = {"fingerprint": mark, "best": module.best_summary()}
    save_model(scratch / "cpmm", "cpmm", model, header)
    mixture = extract(model, config["mixture"], data)
    mixture.save(
        scratch / "mixture", mixture_header(config, data, mark), data.preprocessing.tensors
    )
    return as_fitted(mixture, data, ended(module))


def _train_baseline(
    config: Config,
    data: DataSplits,
    spaces: Spaces | None,
    mark: str,
    scratch: Path,
    progress: dict[str, Any],
    alive: Callable[[], None],
    **options: Any,
) -> Fitted:
    from workflows.baselines import save_baseline, train_baseline

    if options.get("together"):
        raise ValueError(f"ray.workers above 1 trains cpmm alone: model is {config['model']!r}")
    fitted = train_baseline(
        config["model"], config, data, spaces, scratch, progress, alive, **options
    )
    save_baseline(config["model"], fitted, scratch / "baseline", config, data, mark)
    return fitted


def _outside(config: Config, data: DataSplits) -> tuple[Outside | None, dict[str, str]]:
    """The other data set if it is asked for and at hand, and what the record says if it is not."""
    from workflows.outside import read_outside

    if config["evaluation"]["ood"] is None:
        return None, {}
    try:
        return read_outside(config["evaluation"]["ood"], data), {}
    except (FileNotFoundError, ConnectionError) as error:  # as on a node of a cluster
        return None, {"ood_missing": describe(error)}


def _score(
    fitted: Fitted, config: Config, data: DataSplits, outside: Outside | None
) -> dict[str, Any]:
    """Scores of a trained model, and how long densities take."""
    import torch

    from workflows.baselines import score_baseline
    from workflows.score import Scorer

    validation = None
    if fitted.log_prob is not None:
        score = Scorer(data, "validation", fitted.n_points)
        with torch.no_grad():
            validation = score.density(fitted.log_prob(score.z))["density"]
        if not math.isfinite(validation):
            raise FloatingPointError("the density of the trained model is not finite")
    score = Scorer(data, "test", fitted.n_points, config["evaluation"]["teacher_points"])
    test = score_baseline(fitted, score, config["cpmm"]["n_clusters"], outside)
    others = {name: test.pop(name) for name in ("seconds_10k",) if name in test}
    for space, end in (("mixture", ""), ("data", "_data")):
        told = test.get("ood", {}).get(space, {})
        others |= {f"{name}{end}": told[name] for name in ("auroc", "aupr") if told}
    test.pop("ood", None)
    return {"validation": validation, "test": test, **others}


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Measure the most memory that this process takes beyond what it has, or a GPU's whole peak.

    Nothing is found where Linux does not tell.
    """
    import torch

    found: dict[str, float] = {}
    try:  # a worker may have had other trials before
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        before = None
    if torch.cuda.is_initialized():  # else nothing of this process is on a GPU
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield found
    if torch.cuda.is_initialized() and torch.cuda.max_memory_allocated():
        found["gb"] = torch.cuda.max_memory_allocated() / 2**30
    elif before is not None:
        found["gb"] = _resident("VmHWM") - before


def _resident(field: str) -> float:
    """A field of this process's status in GiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 2**20


def summarize(record: Mapping[str, Any], unit: str) -> str:
    """Say in one line what came of a trial."""
    if record["status"] != "finished":
        return explain(record)
    test = record["test"]
    parts = []
    if record["validation"] is not None:
        parts.append(f"validation {record['validation']:.4f}, test {test['density']:.4f} {unit}")
    if "accuracy" in test:
        parts.append(f"clustering accuracy {100 * test['accuracy']:.1f} %")
    if "ood_missing" in record:
        parts.append(f"not told from another data set: {record['ood_missing']}")
    return ", ".join(parts) or "nothing to score it by"


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
    except Exception as error:
        if (said := explain_error(error)) is None:
            raise
        print(f"trial: error: {said}", file=sys.stderr)
        raise SystemExit(1) from None


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
    out = out or home / "trial"
    _make_room(out)
    if missing := _outside(trial.config, data)[1]:
        raise FileNotFoundError(missing["ood_missing"])
    scratch = home / ".scratch" / f"trial-{trial.mark}"
    scratch.mkdir(parents=True, exist_ok=True)
    record = run_trial(trial.config, data, spaces, trial.mark, scratch)
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
            f"{out} has a {held[0]} and no record.json of a trial, whose place it would take: choose another "
            "folder with --out"
        )
    if not os.access(out, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(out))


if __name__ == "__main__":
    main()
