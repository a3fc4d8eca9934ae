"""Runs the trials of a sweep with Ray Tune."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import tune
from ray.tune.logger import TBXLoggerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cpmm.pipeline.sweeps import cluster
from cpmm.pipeline.sweeps.archive import Archive, ArchiveError
from cpmm.pipeline.sweeps.inputs import Located
from cpmm.pipeline.sweeps.progress import Progress
from cpmm.pipeline.sweeps.recorder import TrialRecorder
from cpmm.pipeline.sweeps.reporter import Assignment
from cpmm.pipeline.sweeps.search import grid_search, optuna_search, scheduler
from cpmm.pipeline.sweeps.shared import share
from cpmm.pipeline.sweeps.sweep import Sweep
from cpmm.pipeline.sweeps.worker import train

Inputs = Mapping[tuple[str, str | None], Any]  # what trials load, by fingerprints


def share_all(located: Mapping[tuple[str, str | None], Located], options: Mapping) -> Inputs:
    """Share every input of a sweep in the way that ``ray.inputs`` names."""
    if options["inputs"] == "driver":
        return {fingerprints: share(item) for fingerprints, item in located.items()}
    from cpmm.pipeline.sweeps.remote import push

    # What DVC does not version, such as the spaces of an ablation, still travels from here.
    return {
        fingerprints: push(item, options["cache"]) or share(item)
        for fingerprints, item in located.items()
    }


def run_trials(
    sweep: Sweep, inputs: Inputs, progress: Progress, trainable: Callable[..., None] = train
) -> None:
    """Run the trials that the archive has no record of; at the end it has one of each.

    A worker runs ``trainable`` with a configuration of Tune and an ``assignment``.

    Raises:
        ArchiveError: If records cannot be written; what is done is kept.
        TimeoutError: If the cluster never offers what a trial needs.
        ValueError: If trials want a GPU and are given none.
    """
    worker = cluster.resources(sweep.ray)
    cluster.wait_for_resources(worker, sweep.ray)
    _check_accelerators(sweep, worker)
    recorder = TrialRecorder(sweep)
    logs = sweep.home / ".scratch" / "ray" / sweep.name
    tuner = tune.Tuner(
        _with_resources(trainable, sweep, inputs, worker),
        param_space={} if sweep.suggests else grid_search(sweep),
        tune_config=_tune_config(sweep, worker),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(logs),
            failure_config=tune.FailureConfig(max_failures=sweep.ray["max_failures"]),
            stop=recorder.stopper,
            callbacks=[recorder, progress, TBXLoggerCallback()],
            verbose=0,
        ),
    )
    # The progress and the records say why a trial ended: Tune's tracebacks are not needed.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with progress:
        tuner.fit()
    if recorder.stopper.reason:
        raise ArchiveError(recorder.stopper.reason)


def _check_accelerators(sweep: Sweep, worker: Mapping[str, float]) -> None:
    for trial in sweep.trials:
        accelerator = trial.config["trainer"]["accelerator"]
        if accelerator in ("gpu", "cuda") and not worker["GPU"]:
            raise ValueError(
                f"trainer.accelerator is {accelerator!r}, but a trial gets no GPU: "
                "set ray.gpus, or trainer.accelerator=auto"
            )


def _with_resources(
    trainable: Callable[..., None], sweep: Sweep, inputs: Inputs, worker: Mapping[str, float]
) -> Any:
    """Give what a worker runs its assignment, and tell Tune which CPUs and GPUs it needs."""
    trials = {trial.fingerprint: trial for trial in sweep.trials}
    ddp = sweep.ray["workers"] > 1
    assignment = Assignment(
        sweep.name,
        {"template": sweep.trials[0]} if sweep.suggests else trials,
        inputs,
        _start_archive(sweep.archive.uri),
        sweep.ray,
        every_epoch=sweep.stops_early or ddp,
    )
    # A trial of several workers asks for them itself, and for a small share of a CPU.
    request = {"cpu": cluster.OUTER_CPU} if ddp else {"cpu": worker["CPU"], "gpu": worker["GPU"]}
    return tune.with_resources(tune.with_parameters(trainable, assignment=assignment), request)


def _tune_config(sweep: Sweep, worker: Mapping[str, float]) -> tune.TuneConfig:
    """Say which trials Tune starts, how many, and which it stops early."""
    options, ddp = sweep.ray, sweep.ray["workers"] > 1
    at_once = options["max_concurrent"] or (cluster.n_at_once(worker, options) if ddp else None)
    return tune.TuneConfig(
        scheduler=scheduler(sweep),
        search_alg=optuna_search(sweep) if sweep.suggests else None,
        num_samples=sweep.n_trials - len(sweep.results()) if sweep.suggests else 1,
        # With Ray Train inside, workers are released with their trial's own process.
        reuse_actors=options["reuse_actors"] and not ddp,
        max_concurrent_trials=at_once,
        trial_dirname_creator=lambda trial: trial.config.get("fingerprint", trial.trial_id),
    )


def _start_archive(uri: str) -> Any:
    """Start the archive's actor here; it starts anew if it dies, and writes can be repeated."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Archive)
    return remote.options(scheduling_strategy=here).remote(uri, create=False)
