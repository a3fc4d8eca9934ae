"""One trial trained by several workers: Lightning's DDP through Ray Train, inside Tune."""

from __future__ import annotations

import json
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
    train_here,
    trained_files,
    trial_scratch,
)

# Errors of the trial itself, on whatever worker; a lost peer is a RuntimeError.
TRIAL_ERRORS = (ValueError, TypeError, LookupError, MemoryError, NotImplementedError)


class WorkersLost(RayError):
    """Workers that trained one trial were lost: it is tried again."""


def train_ddp(trial: Trial, assignment: Assignment, scratch: Path) -> dict[str, Any]:
    """Train a trial with ``ray.workers`` workers, and return its record.

    Its files come back through the archive; Ray Train keeps its own small state in ``scratch``.

    Raises:
        WorkersLost: If the workers ended without a record.
    """
    worker, archive = cluster.resources(assignment.options), assignment.archive
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
    call(archive.delete, _outcome_file(trial))
    lost = None
    try:
        trainer.fit()
    except Exception as error:
        lost = error
    record = call(archive.read, _outcome_file(trial))
    if lost and record is None:
        raise WorkersLost(str(lost).splitlines()[0]) from lost
    call(archive.delete, _outcome_file(trial))
    return json.loads(record)


def _work(config: dict[str, Any]) -> None:
    """Train as one of the workers; the first of them keeps checkpoints, scores and saves files."""
    trial, assignment = config["trial"], config["assignment"]
    first = ray.train.get_context().get_world_rank() == 0
    ddp = {"strategy": RayDDPStrategy(), "plugins": [RayLightningEnvironment()], "devices": "auto"}
    with trial_scratch(trial.fingerprint) as scratch:
        try:
            record = train_here(trial, assignment, scratch, ray.train.report, first, ddp=ddp)
        except TRIAL_ERRORS as error:
            _write_outcome(trial, assignment, failure(error))
            raise
        if first and record["status"] == "finished":
            for name, content in trained_files(scratch).items():
                call(assignment.archive.write, f"trials/{trial.fingerprint}/{name}", content)
        # Numbers may break in one worker alone, and the others then only lose their peer.
        if first or record["status"] != "finished":
            _write_outcome(trial, assignment, record)
        if record["status"] != "finished":  # the others wait for this one until they are stopped
            raise FloatingPointError(record["reason"])


def _write_outcome(trial: Trial, assignment: Assignment, record: dict[str, Any]) -> None:
    call(assignment.archive.write, _outcome_file(trial), json.dumps(record).encode())


def _outcome_file(trial: Trial) -> str:
    return f"trials/{trial.fingerprint}/outcome.json"
