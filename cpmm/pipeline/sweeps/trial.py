"""Train and score one trial: CPMM or a row of conf/baselines/, at one seed."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmm.pipeline.config import Config
from cpmm.pipeline.config.code import code_fingerprint
from cpmm.pipeline.errors import describe

if TYPE_CHECKING:
    from cpmm.data import DataSplits
    from cpmm.pipeline.artifacts.spaces import Spaces
    from cpmm.pipeline.models.fitted import Fitted
    from cpmm.pipeline.scores.ood import OodPoints

FOLDERS = ("cpmm", "mixture", "baseline")  # what a trial leaves


def trial_code() -> str:
    """Fingerprint of the code that decides a trial's result."""
    return code_fingerprint(Path(__file__))


def run_trial(
    config: Config,
    data: DataSplits,
    spaces: Spaces | None,
    fingerprint: str,
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
        fingerprint: Fingerprint of the trial.
        scratch: Folder of its own; the trial resumes from a checkpoint there. Afterwards what is in
            :data:`FOLDERS` lies in it, as far as the model has it.
        alive: Called now and then where no epoch ends for long, such as while a flow is scored.
        options: Further ones of :func:`cpmm.pipeline.models.fit.fit`.

    Returns:
        The record of the trial: its status, "finished" or "diverged", its scores or the reason. Of
        several processes that train together, all but the first get a record without scores.
    """
    import torch

    import cpmm.pipeline.models.baselines  # noqa: F401  takes seconds that are not the training's

    torch.set_num_threads(config["trainer"]["threads"] or torch.get_num_threads())
    ood, missing = read_ood_if_there(config, data)
    progress: dict[str, Any] = {"module": None}
    started = time.monotonic()
    with peak_memory() as memory:
        try:
            fitted = _train(config, data, spaces, fingerprint, scratch, progress, alive, **options)
            if fitted is None:
                return {"status": "finished"}
            seconds = time.monotonic() - started
            if progress["module"] is not None:
                seconds += progress["module"].seconds_before
            record = _score(fitted, config, data, ood) | missing
        except FloatingPointError as error:
            module = progress["module"]
            step = None if module is None else module.global_step
            return {"status": "diverged", "step": step, "reason": str(error)}
    costs = {"seconds": seconds, "memory_gb": memory.get("gb")}
    return {"status": "finished", **record, **fitted.ended, **costs}


def _train(
    config: Config,
    data: DataSplits,
    spaces: Spaces | None,
    fingerprint: str,
    scratch: Path,
    progress: dict[str, Any],
    alive: Callable[[], None],
    **options: Any,
) -> Fitted | None:
    """Train and save the model; None in all processes but the first of several."""
    from cpmm.pipeline.artifacts.store import save_model
    from cpmm.pipeline.models.baselines import ended, train_baseline
    from cpmm.pipeline.models.fit import fit
    from cpmm.pipeline.models.fitted import of_mixture, save_baseline
    from cpmm.pipeline.models.mixtures import make_mixture_training
    from cpmm.pipeline.models.trajectories import extract, mixture_header

    if (name := config["model"]) != "cpmm":
        if options.get("ddp"):
            raise ValueError(f"ray.workers above 1 trains cpmm alone: model is {name!r}")
        fitted = train_baseline(name, config, data, spaces, scratch, progress, alive, **options)
        save_baseline(name, fitted, scratch / "baseline", config, data, fingerprint)
        return fitted
    module, rows = make_mixture_training(config["cpmm"], config["mixture"], data, spaces)
    progress["module"] = module
    clip = config["cpmm"]["gradient_clip"]
    fit("trial", module, rows, config["trainer"], scratch, clip, **options)
    if module.global_rank:
        return None
    model = module.model.cpu()
    header = {"fingerprint": fingerprint, "best": module.best_summary()}
    save_model(scratch / "cpmm", "cpmm", model, header)
    mixture = extract(model, config["mixture"], data)
    header = mixture_header(config, data, fingerprint)
    mixture.save(scratch / "mixture", header, data.preprocessing.tensors)
    return of_mixture(mixture, data, config["cpmm"]["n_clusters"], ended(module))


def read_ood_if_there(config: Config, data: DataSplits) -> tuple[OodPoints | None, dict[str, str]]:
    """Read the other data set if it is asked for and at hand; else, what the record says of it."""
    from cpmm.pipeline.scores.ood import read_ood

    if config["evaluation"]["ood"] is None:
        return None, {}
    try:
        return read_ood(config["evaluation"]["ood"], data), {}
    except (FileNotFoundError, ConnectionError) as error:  # as on a node of a cluster
        return None, {"ood_missing": describe(error)}


def _score(
    fitted: Fitted, config: Config, data: DataSplits, ood: OodPoints | None
) -> dict[str, Any]:
    """Score a trained model, and measure how long densities take."""
    import torch

    from cpmm.pipeline.scores.scorer import Scorer, score_baseline

    validation = None
    if fitted.log_prob is not None:
        score = Scorer(data, "validation", fitted.n_points)
        with torch.no_grad():
            validation = score.density(fitted.log_prob(score.z))["density"]
    score = Scorer(data, "test", fitted.n_points, config["evaluation"]["teacher_points"])
    test = score_baseline(fitted, score, config["cpmm"]["n_clusters"], ood)
    others = {name: test.pop(name) for name in ("seconds_10k",) if name in test}
    for space, end in (("mixture", ""), ("data", "_data")):
        scores = test.get("ood", {}).get(space, {})
        others |= {f"{name}{end}": value for name, value in scores.items()}
    if missing := test.pop("ood", {}).get("missing"):
        others["ood_missing"] = missing
    if fitted.note is not None:
        others["note"] = fitted.note
    return {"validation": validation, "test": test, **others}


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Measure the most memory that this process takes beyond what it has, or a GPU's whole peak.

    Nothing is found on systems that do not measure it.
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
    """Read a field of this process's status, in GiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 2**20


def summarize(record: Mapping[str, Any], unit: str) -> str:
    """Describe the result of a trial in one line."""
    if record["status"] != "finished":
        return explain(record)
    test = record["test"]
    parts = []
    if record["validation"] is not None:
        parts.append(f"validation {record['validation']:.4f}, test {test['density']:.4f} {unit}")
    if "accuracy" in test:
        parts.append(f"clustering accuracy {100 * test['accuracy']:.1f} %")
    if "ood_missing" in record:
        parts.append(f"not scored on another data set: {record['ood_missing']}")
    parts += [record["note"]] if "note" in record else []
    return ", ".join(parts) or "nothing to score it by"


def explain(record: Mapping[str, Any]) -> str:
    """Describe in one line why a trial did not finish."""
    at = f" at step {record['step']}" if record.get("step") is not None else ""
    return f"{record['status']}{at}: {record.get('reason', 'no reason recorded')}"
