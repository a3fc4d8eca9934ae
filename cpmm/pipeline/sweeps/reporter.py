"""What a worker reports while it trains a trial, the checkpoints it keeps, how it may fail."""

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
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError
from ray.util.metrics import Gauge

from cpmm.pipeline.artifacts.files import is_checkpoint
from cpmm.pipeline.errors import user_message
from cpmm.pipeline.sweeps.archive import CHECKPOINT, ArchiveError
from cpmm.pipeline.sweeps.plan import Trial
from cpmm.pipeline.sweeps.trial import FOLDERS, run_trial

if TYPE_CHECKING:
    from cpmm.data import DataSplits

ARCHIVE_SECONDS = 300  # for one read or write, before the archive counts as lost
ARCHIVE_PAUSES = (1, 2, 5, 10, 20)  # seconds between tries while its actor starts anew
METRIC = "validation"
TAGS = ("sweep", "row", "seed")
GAUGES = {
    "validation_density": "Validation density of the model so far, bits or nats per dimension.",
    "validation_loss": "Validation loss in the space being trained on, nats per dimension.",
    "train_loss": "Training loss in the space being trained on, nats per dimension.",
    "step": "Gradient steps so far.",
    "progress": "Share of the epochs done.",
}


@dataclass(frozen=True)
class Assignment:
    """What every worker is given."""

    sweep: str  # its name
    trials: Mapping[str, Trial]  # by fingerprint; Optuna's changes one, called "template"
    inputs: Mapping[tuple[str, str | None], Any]  # by fingerprints: objects with ``load()``
    archive: Any  # handle of the archive's actor
    options: Mapping[str, Any]  # the section ``ray``
    every_epoch: bool  # report every epoch, for a scheduler that compares them


def on_given_device(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keep a trial that is given no GPU off those of the machine, which other trials are given."""
    if ray.get_gpu_ids():
        return dict(config)
    return {**config, "trainer": {**config["trainer"], "accelerator": "cpu"}}


def call(method: Any, *arguments: Any) -> Any:
    """Call a method of the archive's actor, and wait for its answer.

    Raises:
        ArchiveError: If the archive raises it, or does not answer.
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


def trained_files(scratch: Path) -> dict[str, bytes]:
    """Read the files that a trial leaves in its scratch folder, by their names in the archive."""
    return {
        str(path.relative_to(scratch)): path.read_bytes()
        for name in FOLDERS
        for path in sorted((scratch / name).rglob("*"))
        if path.is_file()
    }


def failure(error: BaseException) -> dict[str, Any]:
    """Record of a trial that raised, with the traceback for whoever mends it."""
    said = user_message(error) if isinstance(error, Exception) else None
    reason = f"{type(error).__name__}: {said or error}".strip().splitlines()[0]
    lines = "".join(traceback.format_exception(error))
    return {"status": "failed", "reason": reason, "traceback": lines[-4000:]}


def train_here(
    trial: Trial,
    assignment: Assignment,
    scratch: Path,
    report: Callable[[dict], None],
    keep: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Train a trial in this process from its last checkpoint; its record has the reports, too.

    The arguments are those of :class:`Reporter`, and further ones of :func:`run_trial`.
    """
    checkpoint = call(assignment.archive.read, f"trials/{trial.fingerprint}/{CHECKPOINT}")
    if checkpoint is not None:
        (scratch / CHECKPOINT).write_bytes(checkpoint)
    inputs = assignment.inputs[trial.inputs].load()
    reporter = Reporter(trial, assignment, scratch, inputs[0], report, keep)
    record = run_trial(
        on_given_device(trial.config), *inputs, trial.fingerprint, scratch, reporter.alive,
        listeners=[reporter], quiet=True, **options,
    )  # fmt: skip
    return record | {"reports": reporter.reports}


class Reporter:
    """After each epoch, report to Tune and Prometheus; now and then, keep the checkpoint.

    Lightning leaves it in ``scratch``; of several processes that train one trial, one is to keep.
    """

    def __init__(
        self,
        trial: Trial,
        assignment: Assignment,
        scratch: Path,
        data: DataSplits,
        report: Callable[[dict], None],
        keep: bool = True,
    ) -> None:
        self.trial, self.assignment, self.scratch = trial, assignment, scratch
        self.report, self.keep = report, keep
        self.reports: list[dict[str, Any]] = []
        self.reported = self.kept = time.monotonic()
        _, factor, offset = data.preprocessing.density_unit
        volume = float(data.points("validation")[1].mean()) / data.n_features
        self.to_density = lambda nats: factor * (nats - volume) + offset

    def __call__(self, module: Any) -> None:
        """Report the epoch that has just ended."""
        options, now = self.assignment.options, time.monotonic()
        if not self.reports:  # if it was resumed, with what came before
            self.reports = [self._describe(module, past) for past in module.history[:-1]]
        row = self._describe(module, module.history[-1])
        self.reports.append(row)
        last = module.is_last_epoch
        if self.keep and now - self.kept >= options["checkpoint_seconds"] and not last:
            if is_checkpoint(path := self.scratch / CHECKPOINT):
                name = f"trials/{self.trial.fingerprint}/{CHECKPOINT}"
                call(self.assignment.archive.write, name, path.read_bytes())
            self.kept = time.monotonic()
        if self.assignment.every_epoch or now - self.reported >= options["report_seconds"]:
            self.reported = now
            self.report(row | {"phase": module.describe_phase(), "n_steps": module.n_steps})
            self._set_gauges(row)

    def alive(self) -> None:
        """Report now and then that the trial is at work, where no epoch ends for long."""
        now = time.monotonic()
        if now - self.reported >= self.assignment.options["report_seconds"]:
            self.reported = now
            self.report({"fingerprint": self.trial.fingerprint, "alive": True})

    def _describe(self, module: Any, row: Mapping[str, Any]) -> dict[str, Any]:
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

    def _set_gauges(self, row: Mapping[str, Any]) -> None:
        tags = (self.assignment.sweep, self.trial.label, str(self.trial.seed))
        for name in GAUGES:
            value = row.get(METRIC if name == "validation_density" else name)
            if value is not None:
                _gauge(name).set(value, dict(zip(TAGS, tags, strict=True)))


@lru_cache
def _gauge(name: str) -> Gauge:
    return Gauge(f"cpmm_{name}", GAUGES[name], tag_keys=TAGS)
