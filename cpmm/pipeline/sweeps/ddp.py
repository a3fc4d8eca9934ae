"""One trial trained by several workers: Lightning's DDP through Ray Train, inside a trial of Tune."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from cpmm.pipeline.sweeps import cluster
from cpmm.pipeline.sweeps.plan import Trial
from cpmm.pipeline.sweeps.reporter import (
    Assignment,
    call,
    failure,
    on_given_device,
    prepare,
    trained_files,
    trial_scratch,
)
from cpmm.pipeline.sweeps.trial import run_trial

# Errors of the trial itself, on whatever worker; a lost peer is a RuntimeError.
TRIAL_ERRORS = (ValueError, TypeError, LookupError, MemoryError, NotImplementedError)


class WorkersLost(RayError):
    """Workers that trained one trial were lost: it is tried again."""


def train_ddp(trial: Trial, assignment: Assignment, scratch: Path) -> dict[str, Any]:
    """Train a trial with ``ray.workers`` workers; its files come back through the archive.

    Args:
        trial: What is trained.
        assignment: Of the sweep.
        scratch: Where Ray Train keeps its own small state.

    Returns:
        The record of the trial.

    Raises:
        WorkersLost: If the workers ended without a record.
    """
    worker = cluster.resources(assignment.options)
    each = {"CPU": worker["CPU"] - cluster.OUTER_CPU}
    trainer = TorchTrainer(
        _work,
        train_loop_config={"trial": trial, "assignment": assignment},
        scaling_config=ScalingConfig(
            num_workers=assignment.options["workers"],
            use_gpu=worker["GPU"] > 0,
            resources_per_worker=each | ({"GPU": worker["GPU"]} if worker["GPU"] else {}),
        ),
        run_config=RunConfig(
            name=trial.fingerprint,
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=0),  # Tune starts the trial again
            callbacks=[TuneReportCallback()],
        ),
    )
    call(assignment.archive.delete, _outcome_file(trial))
    try:
        trainer.fit()
    except Exception as error:
        record = call(assignment.archive.read, _outcome_file(trial))
        if record is None:
            raise WorkersLost(str(error).splitlines()[0]) from error
    else:
        record = call(assignment.archive.read, _outcome_file(trial))
    call(assignment.archive.delete, _outcome_file(trial))
    return json.loads(record)


def _work(config: dict[str, Any]) -> None:
    """Train as one of the workers; the first of them keeps checkpoints, scores and saves files."""
    trial, assignment = config["trial"], config["assignment"]
    first = ray.train.get_context().get_world_rank() == 0
    ddp = {"strategy": RayDDPStrategy(), "plugins": [RayLightningEnvironment()], "devices": "auto"}
    with trial_scratch(trial.fingerprint) as scratch, _failures_written(trial, assignment):
        reporter = prepare(trial, assignment, scratch, ray.train.report, keep=first)
        record = run_trial(
            on_given_device(trial.config), *reporter.inputs, trial.fingerprint, scratch,
            listeners=[reporter], quiet=True, ddp=ddp,
        )  # fmt: skip
        if first and record["status"] == "finished":
            for name, content in trained_files(scratch).items():
                call(assignment.archive.write, f"trials/{trial.fingerprint}/{name}", content)
        # Numbers may break in one worker alone, and the others then only lose their peer.
        if first or record["status"] != "finished":
            _write_outcome(trial, assignment, record | {"reports": reporter.reports})
        if record["status"] != "finished":  # the others wait for this one until they are stopped
            raise FloatingPointError(record["reason"])


@contextmanager
def _failures_written(trial: Trial, assignment: Assignment) -> Iterator[None]:
    """Write the record of an error that is the trial's own, for :func:`train_ddp` to find."""
    try:
        yield
    except TRIAL_ERRORS as error:
        _write_outcome(trial, assignment, failure(error))
        raise


def _write_outcome(trial: Trial, assignment: Assignment, record: dict[str, Any]) -> None:
    call(assignment.archive.write, _outcome_file(trial), json.dumps(record).encode())


def _outcome_file(trial: Trial) -> str:
    return f"trials/{trial.fingerprint}/outcome.json"
