"""One trial trained by several workers: Lightning's DDP through Ray Train, inside a trial of Tune."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from cpmm.pipeline.sweeps import cluster
from cpmm.pipeline.sweeps.plan import Trial
from cpmm.pipeline.sweeps.trial import FOLDERS, run_trial
from cpmm.pipeline.sweeps.worker import (
    Assignment,
    Reporter,
    call,
    failure,
    on_given_device,
    prepare,
    trial_scratch,
)

# Of the trial itself, whoever runs it; a lost peer is a RuntimeError.
OWN_ERRORS = (ValueError, TypeError, LookupError, MemoryError, NotImplementedError)


def train_ddp(trial: Trial, assignment: Assignment, scratch: Path) -> dict[str, Any]:
    """Train a trial with ``ray.workers`` workers; its files come back through the archive.

    Args:
        trial: What is trained.
        assignment: Of the sweep.
        scratch: Where Ray Train keeps its own small state.

    Returns:
        The record of the trial.
    """
    worker = cluster.resources(assignment.options)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"trial": trial, "assignment": assignment},
        scaling_config=ScalingConfig(
            num_workers=assignment.options["workers"],
            use_gpu=worker["GPU"] > 0,
            resources_per_worker={
                "CPU": worker["CPU"] - cluster.OUTER_CPU,
                **({"GPU": worker["GPU"]} if worker["GPU"] else {}),
            },
        ),
        run_config=RunConfig(
            name=trial.fingerprint,
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=0),  # Tune starts the trial again
            callbacks=[TuneReportCallback()],
        ),
    )
    call(assignment.archive.delete, _outcome(trial))
    try:
        trainer.fit()
    except Exception as error:
        record = call(assignment.archive.read, _outcome(trial))
        if record is None:  # no word of the workers' own: one of them was lost
            raise WorkersLost(str(error).splitlines()[0]) from error
    else:
        record = call(assignment.archive.read, _outcome(trial))
    call(assignment.archive.delete, _outcome(trial))
    return json.loads(record)


class WorkersLost(RayError):
    """Workers that trained together were lost: the trial is tried again."""


def _work(config: dict[str, Any]) -> None:
    """Train as one of the workers; the first of them tells, keeps and scores."""
    trial, assignment = config["trial"], config["assignment"]
    first = ray.train.get_context().get_world_rank() == 0
    with trial_scratch(trial.fingerprint) as scratch, _told(trial, assignment):
        reporter: Reporter = prepare(trial, assignment, scratch, ray.train.report)
        reporter.keep = first
        ddp = {
            "strategy": RayDDPStrategy(),
            "plugins": [RayLightningEnvironment()],
            "devices": "auto",
        }
        record = run_trial(
            on_given_device(trial.config), *reporter.inputs, trial.fingerprint, scratch,
            listeners=[reporter], quiet=True, ddp=ddp,
        )  # fmt: skip
        if first and record["status"] == "finished":
            for name in FOLDERS:
                for path in sorted((scratch / name).glob("*")):
                    target = f"trials/{trial.fingerprint}/{path.relative_to(scratch)}"
                    call(assignment.archive.write, target, path.read_bytes())
        # Numbers may break in one worker alone, and the others then only lose their peer.
        if first or record["status"] != "finished":
            _leave(trial, assignment, record | {"reports": reporter.reports})
        if record["status"] != "finished":  # the others wait for this one until they are stopped
            raise FloatingPointError(record["reason"])


@contextmanager
def _told(trial: Trial, assignment: Assignment) -> Iterator[None]:
    """Leave word of an error that is the trial's own."""
    try:
        yield
    except OWN_ERRORS as error:
        _leave(trial, assignment, failure(error))
        raise


def _leave(trial: Trial, assignment: Assignment, record: dict[str, Any]) -> None:
    call(assignment.archive.write, _outcome(trial), json.dumps(record).encode())


def _outcome(trial: Trial) -> str:
    return f"trials/{trial.fingerprint}/outcome.json"
