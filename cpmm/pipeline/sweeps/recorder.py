"""Records of the trials that cannot write their own: stopped early, given up, or silent."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune

from cpmm.pipeline.sweeps.archive import ArchiveError
from cpmm.pipeline.sweeps.reporter import METRIC
from cpmm.pipeline.sweeps.sweep import Sweep

KEPT = ("fingerprint", "epoch", "step", "progress", "train_loss", "validation_loss", METRIC)

KILLED = (  # what Ray says of it is long, and has no remedy
    "its worker was killed, as the kernel does when memory runs out (`dmesg` says so): lower "
    "ray.max_concurrent or cpmm.batch_size"
)


class Stop(tune.Stopper):
    """Ends the whole sweep when the archive is lost."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Look whether a worker reports that it could not read or write."""
        self.reason = self.reason or result.get("archive_error")
        return self.reason is not None

    def stop_all(self) -> bool:
        """Whether to end."""
        return self.reason is not None


class TrialRecorder(tune.Callback):
    """Records what workers cannot: trials stopped early, trials whose workers died or hang."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.stopper = sweep, Stop()
        self.trials = {trial.fingerprint: trial for trial in sweep.trials}
        self.reports: dict[str, list[dict[str, Any]]] = {}
        self.heard: dict[str, float] = {}
        self.suggestions = sweep.suggestions() if sweep.suggests else []

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Note when a trial started, and what Optuna suggested, so that it is found again."""
        self.heard[trial.trial_id] = time.monotonic()
        self.reports[trial.trial_id] = []
        if "fingerprint" not in trial.config and dict(trial.config) not in self.suggestions:
            self.suggestions.append(dict(trial.config))
            name, archive = self.sweep.suggestions_file, self.sweep.archive
            self._guarded(lambda: archive.write_json(name, self.suggestions))

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        """Keep the reports of a trial that may be stopped early."""
        self.heard[trial.trial_id] = time.monotonic()
        if "phase" in result:
            self.reports[trial.trial_id].append({n: result[n] for n in KEPT if n in result})

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Record a trial that its scheduler has stopped."""
        reports = self.reports.get(trial.trial_id)
        early = self.sweep.stops_early and self.stopper.reason is None
        if "status" in (trial.last_result or {}) or not reports or not early:
            return  # it has its own record, or the whole sweep is being ended
        at, by = reports[-1], self.sweep.options["scheduler"]["kind"]
        reason = f"stopped early by {by} after epoch {at['epoch']}"
        record = {"status": "stopped", "step": at["step"], "reason": reason, "reports": reports}
        self._record(trial, record | {METRIC: at.get(METRIC)})

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Record a trial whose workers died more often than ``ray.max_failures`` allows."""
        path = Path(trial.error_file or "")
        text = path.read_text() if path.is_file() else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reasons = [line for line in lines if "Error" in line or "died" in line or "memory" in line]
        reason = (reasons or lines or ["its worker died"])[-1][:300]
        reason = KILLED if "worker process has died" in reason else reason
        step = (trial.last_result or {}).get("step")
        self._record(trial, {"status": "lost", "step": step, "reason": reason})

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        """Kill the worker of a trial that has been silent for ``ray.stall_seconds``."""
        now = time.monotonic()
        for trial in trials:
            silent = now - self.heard.get(trial.trial_id, now)
            if trial.status == "RUNNING" and silent > self.sweep.ray["stall_seconds"]:
                self.heard[trial.trial_id] = now
                actor = trial.temporary_state.ray_actor
                if actor is not None:
                    ray.kill(actor, no_restart=True)

    def _record(self, trial: Any, record: dict[str, Any]) -> None:
        planned = self.trials.get(trial.config.get("fingerprint"))
        planned = planned or self.sweep.suggested_trial(trial.config)
        archive = self.sweep.archive
        if archive.record(planned.fingerprint) is None:
            record |= planned.described
            self._guarded(lambda: archive.save_record(planned.fingerprint, record))

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except ArchiveError as error:
            self.stopper.reason = self.stopper.reason or str(error)
