"""The sweep's side of Ray Tune: what is run with which search, who watches it, and when it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.logger import TBXLoggerCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cpmm.pipeline.config import Config
from cpmm.pipeline.sweeps import cluster
from cpmm.pipeline.sweeps.archive import Archive, ArchiveError
from cpmm.pipeline.sweeps.plan import Trial, suggested_trial
from cpmm.pipeline.sweeps.progress import Progress
from cpmm.pipeline.sweeps.trial import trial_code
from cpmm.pipeline.sweeps.worker import METRIC, Assignment, train


def run_trials(
    trials: Sequence[Trial],
    sweep: Config,
    options: Config,
    inputs: Mapping[tuple[str, str | None], Any],
    archive: Archive,
    logs: Path,
    progress: Progress,
    trainable: Callable[..., None] = train,
) -> None:
    """Run the trials that the archive has no record of; at the end it has one of each.

    Args:
        trials: All of the sweep; for a searcher, the one that it changes.
        sweep: The section ``sweep``.
        options: The section ``ray``.
        inputs: What trials load, by fingerprints.
        archive: On this node.
        logs: Folder for TensorBoard's files and Tune's own.
        progress: The live table.
        trainable: What a worker runs, from a configuration of Tune and an ``assignment``.

    Raises:
        ArchiveError: If records cannot be written; what is done is kept.
        TimeoutError: If the cluster never offers what a trial needs.
        ValueError: If trials want a GPU and are given none.
    """
    search = _search(trials, sweep, archive)
    asha = sweep["scheduler"]["kind"] == "asha"
    worker = cluster.resources(options)
    cluster.wait_for_resources(worker, options)
    for trial in trials:
        if trial.config["trainer"]["accelerator"] in ("gpu", "cuda") and not worker["GPU"]:
            raise ValueError(
                f"trainer.accelerator is {trial.config['trainer']['accelerator']!r}, but a trial gets no GPU: "
                "set ray.gpus, or trainer.accelerator=auto"
            )
    ddp = options["workers"] > 1
    watch = TrialRecorder(archive, sweep, options["stall_seconds"], trials)
    by_fingerprint = {trial.fingerprint: trial for trial in trials}
    if search["searched"]:
        by_fingerprint = {"template": trials[0]}
    assignment = Assignment(
        sweep["name"],
        by_fingerprint,
        inputs,
        _start_archive(archive.uri),
        options,
        every_epoch=asha or ddp,
    )
    # A trial of several workers asks for them itself, and for a small share of a CPU.
    request = {"cpu": cluster.OUTER_CPU} if ddp else {"cpu": worker["CPU"], "gpu": worker["GPU"]}
    run = tune.with_resources(tune.with_parameters(trainable, assignment=assignment), request)
    at_once = options["max_concurrent"] or (cluster.n_at_once(worker, options) if ddp else None)
    tuner = tune.Tuner(
        run,
        param_space=search["param_space"],
        tune_config=tune.TuneConfig(
            scheduler=_scheduler(sweep["scheduler"], trials[0]),
            search_alg=search["algorithm"],
            num_samples=search["num_samples"],
            # With Ray Train inside, workers are released with their trial's own process.
            reuse_actors=options["reuse_actors"] and not ddp,
            max_concurrent_trials=at_once,
            trial_dirname_creator=lambda trial: trial.config.get("fingerprint", trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(logs),
            failure_config=tune.FailureConfig(max_failures=options["max_failures"]),
            stop=watch.stopper,
            callbacks=[watch, progress, TBXLoggerCallback()],
            verbose=0,
        ),
    )
    # What befalls a trial is told by the progress and the record, without Tune's tracebacks.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with progress:
        tuner.fit()
    if watch.stopper.reason:
        raise ArchiveError(watch.stopper.reason)


def recorded_trials(
    trials: Sequence[Trial], sweep: Config, archive: Archive
) -> list[tuple[Trial, dict[str, Any]]]:
    """Trials of the sweep that have ended, with their records, in the sweep's order.

    A trial whose worker was lost again and again has a record too, but is tried again.
    """
    searched = sweep["search"]["kind"] == "optuna"
    found = suggested_trials(trials[0], archive) if searched else trials
    records = ((trial, archive.record(trial.fingerprint)) for trial in found)
    return [(trial, record) for trial, record in records if record is not None]


def suggested_trials(template: Trial, archive: Archive) -> list[Trial]:
    """Trials that a searcher has suggested so far, in this run of the sweep or an earlier one."""
    suggested = archive.read_json(_index(template)) or []
    return [suggested_trial(template, values, trial_code()) for values in suggested]


class Stop(tune.Stopper):
    """Ends the whole sweep when the archive is lost."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Look for the worker's word that it could not read or write."""
        self.reason = self.reason or result.get("archive_error")
        return self.reason is not None

    def stop_all(self) -> bool:
        """Whether to end."""
        return self.reason is not None


class TrialRecorder(tune.Callback):
    """Records what workers cannot: trials stopped early, trials whose workers died or hang.

    Args:
        archive: On this node.
        sweep: The section ``sweep``.
        stall_seconds: A trial silent for so long has its worker killed, and goes on elsewhere.
        trials: Of the sweep.
    """

    def __init__(
        self, archive: Archive, sweep: Config, stall_seconds: float, trials: Sequence[Trial]
    ) -> None:
        self.archive, self.sweep, self.stall_seconds = archive, sweep, stall_seconds
        self.template = trials[0]
        self.trials = {trial.fingerprint: trial for trial in trials}
        self.stopper = Stop()
        self.reports: dict[str, list[dict[str, Any]]] = {}
        self.heard: dict[str, float] = {}
        self.suggested: list[dict[str, Any]] = []
        if sweep["search"]["kind"] == "optuna":
            self.suggested = archive.read_json(_index(self.template)) or []

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Note a searcher's suggestion, so that it is found again, and the time."""
        self.heard[trial.trial_id] = time.monotonic()
        self.reports[trial.trial_id] = []
        if "fingerprint" not in trial.config and dict(trial.config) not in self.suggested:
            self.suggested.append(dict(trial.config))
            self._guarded(lambda: self.archive.write_json(_index(self.template), self.suggested))

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        """Keep the reports of a trial that may be stopped early."""
        self.heard[trial.trial_id] = time.monotonic()
        if "phase" in result:
            names = (
                "fingerprint",
                "epoch",
                "step",
                "progress",
                "train_loss",
                "validation_loss",
                METRIC,
            )
            self.reports[trial.trial_id].append({n: result[n] for n in names if n in result})

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Record a trial that its scheduler has stopped."""
        reports = self.reports.get(trial.trial_id)
        last = trial.last_result or {}
        early = self.sweep["scheduler"]["kind"] != "fifo" and self.stopper.reason is None
        if "status" in last or not reports or not early:
            return  # it has its own record, or the whole sweep is being ended
        at = reports[-1]
        record = {
            "status": "stopped",
            "step": at["step"],
            "reason": f"stopped early by {self.sweep['scheduler']['kind']} after epoch {at['epoch']}",
            METRIC: at.get(METRIC),
            "reports": reports,
        }
        self._record(trial, record)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Record a trial whose workers died more often than ``ray.max_failures`` allows."""
        path = Path(trial.error_file or "")
        text = path.read_text() if path.is_file() else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        said = [line for line in lines if "Error" in line or "died" in line or "memory" in line]
        reason = (said or lines or ["its worker died"])[-1][:300]
        step = (trial.last_result or {}).get("step")
        self._record(trial, {"status": "lost", "step": step, "reason": reason})

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        """Kill the worker of a trial that has been silent for too long."""
        for trial in trials:
            heard = self.heard.get(trial.trial_id)
            if trial.status != "RUNNING" or heard is None:
                continue
            if time.monotonic() - heard > self.stall_seconds:
                self.heard[trial.trial_id] = time.monotonic()
                actor = trial.temporary_state.ray_actor
                if actor is not None:
                    ray.kill(actor, no_restart=True)

    def _record(self, trial: Any, record: dict[str, Any]) -> None:
        known = self._known(trial.config)
        record |= {
            "overrides": list(known.overrides), "row": dict(known.row), "seed": known.seed
        }  # fmt: skip
        if self.archive.record(known.fingerprint) is None:
            self._guarded(lambda: self.archive.save_record(known.fingerprint, record))

    def _known(self, config: Mapping[str, Any]) -> Trial:
        if "fingerprint" in config:
            return self.trials[config["fingerprint"]]
        return suggested_trial(self.template, dict(config), trial_code())

    def _guarded(self, write: Any) -> None:
        try:
            write()
        except ArchiveError as error:
            self.stopper.reason = self.stopper.reason or str(error)


def _start_archive(uri: str) -> Any:
    """Start the archive's actor on this node; it starts anew if it dies, and writes are repeatable."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Archive)
    return remote.options(scheduling_strategy=here).remote(uri, create=False)


def _search(trials: Sequence[Trial], sweep: Config, archive: Archive) -> dict[str, Any]:
    """What Tune is to sample: the trials themselves, or a searcher's suggestions."""
    if sweep["search"]["kind"] != "optuna":
        asha = sweep["scheduler"]["kind"] == "asha"
        # A scheduler that compares trials is shown those that have ended, too.
        left = [trial for trial in trials if asha or archive.record(trial.fingerprint) is None]
        fingerprints = [
            {"fingerprint": trial.fingerprint, "row": trial.label, "seed": trial.seed}
            for trial in left
        ]
        return {
            "param_space": _choices(fingerprints), "algorithm": None, "num_samples": 1, "searched": False,
        }  # fmt: skip
    known = [
        (trial, record)
        for trial, record in recorded_trials(trials, sweep, archive)
        if record["status"] in ("finished", "stopped")
    ]
    values = archive.read_json(_index(trials[0])) or []
    by_fingerprint = {suggested_trial(trials[0], v, trial_code()).fingerprint: v for v in values}
    return {
        "param_space": {},
        "algorithm": _optuna(
            sweep["search"],
            # A sampler that started anew from the same seed would draw the same points again.
            sweep["search"]["seed"] + len(values),
            [by_fingerprint[t.fingerprint] for t, _ in known],
            [r[METRIC] for _, r in known],
        ),
        "num_samples": sweep["search"]["n_samples"] - len(recorded_trials(trials, sweep, archive)),
        "searched": True,
    }


def _choices(fingerprints: list[dict[str, Any]]) -> dict[str, Any]:
    """A grid over whole assignments: Tune crosses lists, so each name looks its value up."""
    by_fingerprint = {item["fingerprint"]: item for item in fingerprints}
    return {
        "fingerprint": tune.grid_search(list(by_fingerprint)),
        "row": tune.sample_from(lambda config: by_fingerprint[config["fingerprint"]]["row"]),
        "seed": tune.sample_from(lambda config: by_fingerprint[config["fingerprint"]]["seed"]),
    }


def _scheduler(options: Config, trial: Trial) -> Any:
    if options["kind"] == "fifo":
        return FIFOScheduler()
    from cpmm.pipeline.models.mixtures import make_curriculum

    cpmm = trial.config["cpmm"]
    n_spaces = trial.config["spaces"]["n_spaces"] if cpmm["curriculum"] else 0
    curriculum = make_curriculum(cpmm, n_spaces)
    return ASHAScheduler(
        time_attr="epoch",
        metric=METRIC,
        mode="min",
        # Before the input space is reached there is nothing to compare.
        grace_period=curriculum.n_guided_epochs + options["grace_epochs"],
        max_t=curriculum.n_epochs + 1,
        reduction_factor=options["reduction_factor"],
    )


def _optuna(search: Config, seed: int, points: list[dict[str, Any]], values: list[float]) -> Any:
    import optuna
    from optuna import distributions as d
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    make = {
        "uniform": lambda v: d.FloatDistribution(*v),
        "loguniform": lambda v: d.FloatDistribution(*v, log=True),
        "integer": lambda v: d.IntDistribution(*v),
        "choice": d.CategoricalDistribution,
    }
    space = {
        option: make[kind](values)
        for option, distribution in search["space"].items()
        for kind, values in distribution.items()
    }

    class Search(OptunaSearch):
        """Passes over reports without a density."""

        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            if METRIC in result:
                super().on_trial_result(trial_id, result)

    known = {"points_to_evaluate": points, "evaluated_rewards": values} if points else {}
    return Search(space=space, metric=METRIC, mode="min", seed=seed, **known)


def _index(template: Trial) -> str:
    """File of the archive that lists what a searcher has suggested."""
    return f"searches/{template.fingerprint}.json"
