"""What a worker of the sweep runs: one trial, from its last checkpoint, told to Tune epoch by epoch."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError
from ray.util.metrics import Gauge

from cpmm.pipeline.sweeps.archive import CHECKPOINT, ArchiveError
from cpmm.pipeline.sweeps.plan import Trial, suggested_trial
from cpmm.pipeline.sweeps.trial import FOLDERS, run_trial, trial_code

ARCHIVE_SECONDS = 300  # for one read or write, before the archive counts as lost
ARCHIVE_PAUSES = (1, 2, 5, 10, 20)  # seconds between tries while its actor starts anew
METRIC = "validation"
GAUGES = {
    "validation_density": "Validation density of the model being trained, bits or nats per dimension.",
    "validation_loss": "Validation loss in the space being trained on, nats per dimension.",
    "train_loss": "Training loss in the space being trained on, nats per dimension.",
    "step": "Gradient steps so far.",
    "progress": "Share of the epochs done.",
}


@dataclass(frozen=True)
class Assignment:
    """What every worker is given.

    Attributes:
        sweep: Its name.
        trials: By fingerprint; a searcher changes the one called "template".
        inputs: By fingerprints of data and spaces: an object with ``load()``.
        archive: Handle of the archive's actor.
        options: The section ``ray``.
        every_epoch: Report every epoch, for a scheduler that compares them.
    """

    sweep: str
    trials: Mapping[str, Trial]
    inputs: Mapping[tuple[str, str | None], Any]
    archive: Any
    options: Mapping[str, Any]
    every_epoch: bool


class GPULost(RayError):
    """A GPU failed, or had no memory left beside other trials: the trial is tried again elsewhere."""


def _is_of_a_gpu(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)


def on_given_device(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keep a trial that is given no GPU off those of the machine, which other trials are given."""
    if ray.get_gpu_ids():
        return dict(config)
    return {**config, "trainer": {**config["trainer"], "accelerator": "cpu"}}


def call(method: Any, *arguments: Any) -> Any:
    """Call the archive, and wait for it.

    Raises:
        ArchiveError: If it says so, or does not answer.
    """
    for pause in ARCHIVE_PAUSES:
        try:
            return ray.get(method.remote(*arguments), timeout=ARCHIVE_SECONDS)
        except GetTimeoutError:
            raise ArchiveError(f"ray.storage did not answer within {ARCHIVE_SECONDS} s") from None
        except (RayActorError, OutOfMemoryError) as error:
            gone = str(error).splitlines()[0]
            time.sleep(pause)  # it starts anew, such as after Ray killed it for another's memory
    raise ArchiveError(f"the archive's actor is gone: {gone}")


def train(config: Mapping[str, Any], assignment: Assignment) -> None:
    """Run one trial in a worker of Tune, from its last checkpoint if it has one."""
    if "fingerprint" in config:
        trial = assignment.trials[config["fingerprint"]]
    else:
        trial = suggested_trial(assignment.trials["template"], config, trial_code())
    archive = assignment.archive
    try:
        record = call(archive.record, trial.fingerprint)
        if record is None:
            record = _train(trial, assignment)
        elif assignment.every_epoch:  # what the scheduler would have seen
            for report in record.get("reports", []):
                tune.report(report)
    except ArchiveError as error:
        said = getattr(error, "cause", None) or error  # Ray wraps it in the actor's traceback
        tune.report({"archive_error": str(said), "fingerprint": trial.fingerprint})
        return
    report = final_report(trial.fingerprint, record)
    if (
        "fingerprint" not in config
    ):  # a searcher must hear something: of a trial that failed, the worst
        report.setdefault(METRIC, float("inf"))
    tune.report(report)


@contextmanager
def trial_scratch(fingerprint: str) -> Iterator[Path]:
    """Make a folder for a trial among the node's temporary files, for as long as it is trained.

    What killed workers left there is removed: their locks went with them.
    """
    root = Path(tempfile.gettempdir())
    for other in root.glob("cpmm-*-tmp*"):
        with suppress(OSError), _locked(other):  # of a living worker, or of another user
            shutil.rmtree(other, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(dir=root, prefix="tmp"))
    with _locked(fresh):  # before it can be taken for a leftover
        scratch = fresh.rename(root / f"cpmm-{fingerprint}-{fresh.name}")
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(held)


def final_report(fingerprint: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """What Tune hears of a trial that has ended."""
    value = record.get("validation")
    report = {"fingerprint": fingerprint, "status": record["status"], "progress": 1.0}
    report |= {"reason": record["reason"]} if record.get("reason") else {}
    last = (record.get("reports") or [{}])[-1]
    report |= {"epoch": last.get("epoch", 0), "step": last.get("step", 0)}
    return report if value is None else report | {METRIC: value}


def _train(trial: Trial, assignment: Assignment) -> dict[str, Any]:
    began = time.time()
    with trial_scratch(trial.fingerprint) as scratch:
        try:
            if assignment.options["workers"] == 1:
                record = _train_alone(trial, assignment, scratch, tune.report)
            else:
                from cpmm.pipeline.sweeps.ddp import train_ddp

                record = train_ddp(trial, assignment, scratch)
        except (ArchiveError, RayError):
            raise  # the cluster's doing, not the trial's: it is tried again
        except Exception as error:
            if _is_of_a_gpu(error):
                raise GPULost(f"{type(error).__name__}: {error}") from error
            record = failure(error)
        record["overrides"] = list(trial.overrides)
        record["row"], record["seed"] = dict(trial.row), trial.seed
        node = ray.get_runtime_context().get_node_id()
        record["worker"] = {"node": node, "began": began, "ended": time.time()}
        files = {
            str(path.relative_to(scratch)): path.read_bytes()
            for name in FOLDERS
            for path in sorted((scratch / name).rglob("*"))
            if path.is_file()
        }
        call(assignment.archive.save_record, trial.fingerprint, record, files)
    return record


def _train_alone(
    trial: Trial, assignment: Assignment, scratch: Path, report: Callable[[dict], None]
) -> dict[str, Any]:
    """Train in this process."""
    reporter = prepare(trial, assignment, scratch, report)
    record = run_trial(
        on_given_device(trial.config),
        *reporter.inputs,
        trial.fingerprint,
        scratch,
        reporter.alive,
        listeners=[reporter],
        quiet=True,
    )
    return record | {"reports": reporter.reports}


def prepare(
    trial: Trial, assignment: Assignment, scratch: Path, report: Callable[[dict], None]
) -> Reporter:
    """Fetch the inputs and the last checkpoint of a trial."""
    checkpoint = call(assignment.archive.read, f"trials/{trial.fingerprint}/{CHECKPOINT}")
    if checkpoint is not None:
        (scratch / CHECKPOINT).write_bytes(checkpoint)
    inputs = assignment.inputs[trial.inputs].load()
    return Reporter(trial, assignment, scratch, inputs, report)


class Reporter:
    """After each epoch: tell Tune and Prometheus how the trial goes, now and then keep its checkpoint.

    Args:
        trial: What is trained.
        assignment: Of the sweep.
        scratch: Where Lightning leaves ``last.ckpt``.
        inputs: Data and spaces.
        report: Takes what Tune is to know.
        keep: Whether this process sends checkpoints, one of those that train together.
    """

    def __init__(
        self,
        trial: Trial,
        assignment: Assignment,
        scratch: Path,
        inputs: tuple[Any, Any],
        report: Callable[[dict], None],
        keep: bool = True,
    ) -> None:

        self.trial, self.assignment, self.scratch = trial, assignment, scratch
        self.inputs, self.report, self.keep = inputs, report, keep
        self.reports: list[dict[str, Any]] = []
        self.told = self.kept = time.monotonic()
        data = inputs[0]
        _, factor, offset = data.preprocessing.density_unit
        volume = float(data.points("validation")[1].mean()) / data.n_features
        self.to_density = lambda nats: factor * (nats - volume) + offset

    def __call__(self, module: Any) -> None:
        """Take in an epoch."""
        options, now = self.assignment.options, time.monotonic()
        row = self._describe(module)
        if not self.reports and module.current_epoch:  # resumed: what came before
            self.reports = [self._describe(module, past) for past in module.history[:-1]]
        self.reports.append(row)
        last = module.current_epoch + 1 == module.n_epochs
        if self.keep and now - self.kept >= options["checkpoint_seconds"] and not last:
            self._keep()
            self.kept = time.monotonic()
        if self.assignment.every_epoch or now - self.told >= options["report_seconds"]:
            self.told = now
            self.report(row | {"phase": module.describe_phase(), "n_steps": module.n_steps})
            self._gauge(row)

    def alive(self) -> None:
        """Tell Tune now and then that the trial is at work, where no epoch ends for long."""
        now = time.monotonic()
        if now - self.told >= self.assignment.options["report_seconds"]:
            self.told = now
            self.report({"fingerprint": self.trial.fingerprint, "alive": True})

    def _describe(self, module: Any, row: Mapping[str, Any] | None = None) -> dict[str, Any]:
        row = module.history[-1] if row is None else row
        loss = row.get("validation", float("inf"))
        described = {
            "fingerprint": self.trial.fingerprint,
            "epoch": row["epoch"] + 1,
            "step": row["step"],
            "progress": (row["epoch"] + 1) / module.n_epochs,
            "train_loss": row["train"],
            "validation_loss": loss,
        }
        if not module.measures_density(row["epoch"]):
            return described
        return described | {METRIC: self.to_density(loss)}

    def _keep(self) -> None:
        from cpmm.pipeline.artifacts.files import is_checkpoint

        path = self.scratch / CHECKPOINT
        if is_checkpoint(path):
            name = f"trials/{self.trial.fingerprint}/{CHECKPOINT}"
            call(self.assignment.archive.write, name, path.read_bytes())

    def _gauge(self, row: Mapping[str, Any]) -> None:
        tags = {
            "sweep": self.assignment.sweep, "row": self.trial.label, "seed": str(self.trial.seed)
        }  # fmt: skip
        values = row | ({"validation_density": row[METRIC]} if METRIC in row else {})
        for name, gauge in _gauges().items():
            if name in values:
                gauge.set(values[name], tags)


@lru_cache
def _gauges() -> dict[str, Gauge]:
    return {
        name: Gauge(f"cpmm_{name}", text, tag_keys=("sweep", "row", "seed"))
        for name, text in GAUGES.items()
    }


def failure(error: BaseException) -> dict[str, Any]:
    """Record of a trial that raised, with the traceback for whoever mends it."""
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    lines = "".join(traceback.format_exception(error))
    return {"status": "failed", "reason": reason, "traceback": lines[-4000:]}
