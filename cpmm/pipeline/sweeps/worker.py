"""What a worker of Tune runs: one trial, from its last checkpoint to its record in the archive."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import RayError

from cpmm.pipeline.sweeps.archive import ArchiveError
from cpmm.pipeline.sweeps.plan import Trial, suggested_trial
from cpmm.pipeline.sweeps.reporter import (
    METRIC,
    Assignment,
    call,
    failure,
    train_here,
    trained_files,
    trial_scratch,
)
from cpmm.pipeline.sweeps.trial import trial_code


class GPULost(RayError):
    """A GPU failed, or had no memory left beside other trials: the trial is tried again."""


def train(config: Mapping[str, Any], assignment: Assignment) -> None:
    """Run one trial in a worker of Tune, from its last checkpoint if it has one."""
    suggested = "fingerprint" not in config
    if suggested:
        trial = suggested_trial(assignment.trials["template"], config, trial_code())
    else:
        trial = assignment.trials[config["fingerprint"]]
    try:
        record = call(assignment.archive.record, trial.fingerprint)
        if record is None:
            record = _train(trial, assignment)
        elif assignment.every_epoch:  # what the scheduler would have seen
            for report in record.get("reports", []):
                tune.report(report)
    except ArchiveError as error:
        reason = getattr(error, "cause", None) or error  # Ray wraps it in the actor's traceback
        tune.report({"archive_error": str(reason), "fingerprint": trial.fingerprint})
        return
    report = final_report(trial.fingerprint, record)
    if suggested:  # Optuna must get a value: of a trial that failed, the worst
        report.setdefault(METRIC, float("inf"))
    tune.report(report)


def final_report(fingerprint: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Make the last report to Tune, on a trial that has ended."""
    value = record.get("validation")
    report = {"fingerprint": fingerprint, "status": record["status"], "progress": 1.0}
    last = (record.get("reports") or [{}])[-1]
    report |= {"epoch": last.get("epoch", 0), "step": last.get("step", 0)}
    report |= {"reason": record["reason"]} if record.get("reason") else {}
    return report if value is None else report | {METRIC: value}


def _train(trial: Trial, assignment: Assignment) -> dict[str, Any]:
    """Train a trial and save its record.

    Raises:
        ArchiveError: If the archive cannot be read or written.
        RayError: If the cluster lost a worker or a GPU: Tune tries the trial again.
    """
    began = time.time()
    with trial_scratch(trial.fingerprint) as scratch:
        try:
            if assignment.options["workers"] == 1:
                record = train_here(trial, assignment, scratch, tune.report)
            else:
                from cpmm.pipeline.sweeps.ddp import train_ddp

                record = train_ddp(trial, assignment, scratch)
        except (ArchiveError, RayError):
            raise
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            raise GPULost(f"{type(error).__name__}: {error}") from error
        except Exception as error:
            record = failure(error)
        node = ray.get_runtime_context().get_node_id()
        worker = {"node": node, "began": began, "ended": time.time()}
        record |= trial.described | {"worker": worker}
        files = trained_files(scratch)
        call(assignment.archive.save_record, trial.fingerprint, record, files)
    return record
