"""What a worker says while it trains a trial: reports for Tune, gauges, checkpoints, its failure."""

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
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError
from ray.util.metrics import Gauge

from cpmm.pipeline.artifacts.files import is_checkpoint
from cpmm.pipeline.sweeps.archive import CHECKPOINT, ArchiveError
from cpmm.pipeline.sweeps.plan import Trial
from cpmm.pipeline.sweeps.trial import FOLDERS

ARCHIVE_SECONDS = 300  # for one read or write, before the archive counts as lost
ARCHIVE_PAUSES = (1, 2, 5, 10, 20)  # seconds between tries while its actor starts anew
METRIC = "validation"
GAUGES = {
    "validation_density": "Validation density of the model so far, bits or nats per dimension.",
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
        trials: By fingerprint; for a search by Optuna, the one to change, called "template".
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


def is_of_a_gpu(error: Exception) -> bool:
    """Whether a GPU is at fault, not the trial."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)


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
    reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    lines = "".join(traceback.format_exception(error))
    return {"status": "failed", "reason": reason, "traceback": lines[-4000:]}


def prepare(
    trial: Trial,
    assignment: Assignment,
    scratch: Path,
    report: Callable[[dict], None],
    keep: bool = True,
) -> Reporter:
    """Fetch the inputs and the last checkpoint of a trial; the arguments are the reporter's."""
    checkpoint = call(assignment.archive.read, f"trials/{trial.fingerprint}/{CHECKPOINT}")
    if checkpoint is not None:
        (scratch / CHECKPOINT).write_bytes(checkpoint)
    inputs = assignment.inputs[trial.inputs].load()
    return Reporter(trial, assignment, scratch, inputs, report, keep)


class Reporter:
    """After each epoch, report to Tune and Prometheus; now and then, keep the checkpoint.

    Args:
        trial: What is trained.
        assignment: Of the sweep.
        scratch: Where Lightning leaves ``last.ckpt``.
        inputs: Data and spaces.
        report: Sends a report to Tune.
        keep: Whether this process sends checkpoints: of those that train one trial, one does.
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
        self.reported = self.kept = time.monotonic()
        data = inputs[0]
        _, factor, offset = data.preprocessing.density_unit
        volume = float(data.points("validation")[1].mean()) / data.n_features
        self.to_density = lambda nats: factor * (nats - volume) + offset

    def __call__(self, module: Any) -> None:
        """Report the epoch that has just ended."""
        options, now = self.assignment.options, time.monotonic()
        row = self._describe(module)
        if not self.reports and module.current_epoch:  # resumed: what came before
            self.reports = [self._describe(module, past) for past in module.history[:-1]]
        self.reports.append(row)
        last = module.current_epoch + 1 == module.n_epochs
        if self.keep and now - self.kept >= options["checkpoint_seconds"] and not last:
            self._keep_checkpoint()
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

    def _keep_checkpoint(self) -> None:
        path = self.scratch / CHECKPOINT
        if is_checkpoint(path):
            name = f"trials/{self.trial.fingerprint}/{CHECKPOINT}"
            call(self.assignment.archive.write, name, path.read_bytes())

    def _set_gauges(self, row: Mapping[str, Any]) -> None:
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
