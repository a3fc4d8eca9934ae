"""Train and score one trial, as the sweep does many: a preset and overrides, without Ray.

python workflows/trial.py preset=digits cpmm.ode=separate cpmm.seed=1
python workflows/trial.py preset=digits model=vade            a row of conf/baselines/
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflows.stage import EXPECTED_ERRORS, Config, code_fingerprint, describe, pick

if TYPE_CHECKING:
    from cpmm.data import DataSplits
    from workflows.baselines import Fitted
    from workflows.score import Scorer
    from workflows.store import Spaces

HERE = Path(__file__).resolve().parent
CODE = tuple(
    HERE / f"{name}.py"
    for name in ("baselines", "fit", "models", "outside", "rivals", "score", "trial")
)
FOLDERS = ("cpmm", "mixture", "baseline")  # what a trial leaves
TIMED = 2000  # points whose densities are timed
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
    """Train the model of a configuration, CPMM or a row of conf/baselines/, and score it.

    Everything is chosen by validation likelihood; the test split is scored once, at the end.

    Args:
        config: The whole composed configuration.
        data: The splits.
        spaces: The curriculum, None without one.
        mark: Fingerprint of the trial.
        scratch: Folder of its own; the trial resumes from a checkpoint there. Afterwards what is in
            :data:`FOLDERS` lies in it, as far as the model has it.
        options: Further ones of :func:`workflows.fit.fit`.

    Returns:
        The record of the trial: its status, "finished" or "diverged", its scores or the reason. Of
        several processes that train together, all but the first get a record without scores.
    """
    import torch

    import workflows.baselines  # noqa: F401  a second or two, that are not of the training

    torch.set_num_threads(config["trainer"]["threads"] or torch.get_num_threads())
    train = _train_cpmm if config["model"] == "cpmm" else _train_baseline
    progress: dict[str, Any] = {"module": None}
    started = time.monotonic()
    with peak_memory() as memory:
        try:
            fitted = train(config, data, spaces, mark, scratch, progress, **options)
            if fitted is None:
                return {"status": "finished"}
            seconds = time.monotonic() - started
            record = _score(fitted, config, data)
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
    **options: Any,
) -> Fitted:
    from workflows.baselines import save_baseline, train_baseline

    if options.get("together"):
        raise ValueError(f"ray.workers above 1 trains cpmm alone: model is {config['model']!r}")
    fitted = train_baseline(config["model"], config, data, spaces, scratch, progress, **options)
    save_baseline(config["model"], fitted, scratch / "baseline", config, data, mark)
    return fitted


def _score(fitted: Fitted, config: Config, data: DataSplits) -> dict[str, Any]:
    """Scores of a trained model, and how long densities take."""
    import torch

    from workflows.baselines import score_baseline
    from workflows.score import Scorer

    validation = None
    test_score = Scorer(data, "test", fitted.n_points)
    with torch.no_grad():
        if fitted.log_prob is not None:
            score = Scorer(data, "validation", fitted.n_points)
            validation = score.density(fitted.log_prob)["density"]
        test = score_baseline(fitted, test_score, "test", config["cpmm"]["n_clusters"])
        found = [value for value in (validation, test.get("density")) if value is not None]
        if not all(map(math.isfinite, found)):
            raise FloatingPointError("the density of the trained model is not finite")
        costs = {}
        if fitted.log_prob is not None:
            points = test_score.z[:TIMED]
            started = time.perf_counter()
            fitted.log_prob(points)
            costs["seconds_10k"] = (time.perf_counter() - started) * 10_000 / len(points)
            costs |= _tell_apart(fitted, test_score, config, data)
    return {"validation": validation, "test": test, **costs}


def _tell_apart(
    fitted: Fitted, score: Scorer, config: Config, data: DataSplits
) -> dict[str, float | str]:
    """How well densities tell the test points from another data set, where that is at hand."""
    from workflows.outside import read_outside

    if config["evaluation"]["ood"] is None:
        return {}
    try:
        outside = read_outside(config["evaluation"]["ood"], data)
        found = (fitted.log_prob(z[: fitted.n_points]) for z in (score.z, outside.z))
        told = outside.scores(score, *found)
    except EXPECTED_ERRORS as error:  # a node of a cluster may have no such files
        return {"ood_missing": describe(error)}
    named = {"": told["mixture"], "_data": told["data"]}
    return {f"{name}{end}": told[name] for end, told in named.items() for name in ("auroc", "aupr")}


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Measure the most memory that this process has, or the GPU's; empty where Linux does not tell."""
    import torch

    found: dict[str, float] = {}
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # a worker may have had other trials before
    except OSError:
        status = None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield found
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        found["gb"] = torch.cuda.max_memory_allocated() / 2**30
    elif status is not None and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        found["gb"] = int(peak[1]) / 2**20


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


if __name__ == "__main__":
    main()
