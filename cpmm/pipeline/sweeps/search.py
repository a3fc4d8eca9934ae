"""What Ray Tune is given to try: the trials of a sweep, or Optuna's search; and its scheduler."""

from __future__ import annotations

from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from cpmm.pipeline.sweeps.reporter import METRIC
from cpmm.pipeline.sweeps.sweep import Sweep


def grid_search(sweep: Sweep) -> dict[str, Any]:
    """Make a grid of the trials that are left, for ``tune.Tuner``'s ``param_space``.

    Tune crosses lists, so only the fingerprint is one; row and seed are looked up by it.
    """
    # A scheduler that compares trials is shown those that have ended, too.
    left = sweep.trials if sweep.stops_early else sweep.unfinished()
    trials = {trial.fingerprint: (trial.label, trial.seed) for trial in left}
    return {
        "fingerprint": tune.grid_search(list(trials)),
        "row": tune.sample_from(lambda config: trials[config["fingerprint"]][0]),
        "seed": tune.sample_from(lambda config: trials[config["fingerprint"]][1]),
    }


def optuna_search(sweep: Sweep) -> Any:
    """Make Optuna's search, which is given the results of the trials that have ended."""
    import optuna
    from optuna import distributions as d
    from ray.tune.search.optuna import OptunaSearch

    class Search(OptunaSearch):
        """Passes over reports without a density."""

        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            if METRIC in result:
                super().on_trial_result(trial_id, result)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    make = {
        "uniform": lambda v: d.FloatDistribution(*v),
        "loguniform": lambda v: d.FloatDistribution(*v, log=True),
        "integer": lambda v: d.IntDistribution(*v),
        "choice": d.CategoricalDistribution,
    }
    search = sweep.options["search"]
    space = {
        option: make[kind](values)
        for option, distribution in search["space"].items()
        for kind, values in distribution.items()
    }
    suggestions = sweep.suggestions()
    values = {sweep.suggested_trial(values).fingerprint: values for values in suggestions}
    ended = [
        (values[trial.fingerprint], record[METRIC])
        for trial, record in sweep.results()
        if record["status"] in ("finished", "stopped")
    ]
    points, rewards = map(list, zip(*ended, strict=True)) if ended else (None, None)
    return Search(
        space=space,
        metric=METRIC,
        mode="min",
        # A sampler that started anew from the same seed would draw the same points again.
        seed=search["seed"] + len(suggestions),
        points_to_evaluate=points,
        evaluated_rewards=rewards,
    )


def scheduler(sweep: Sweep) -> Any:
    """Make the scheduler: every trial to its end, or the worse ones stopped early."""
    if not sweep.stops_early:
        return FIFOScheduler()
    from cpmm.pipeline.models.mixtures import make_curriculum

    config, options = sweep.trials[0].config, sweep.options["scheduler"]
    n_spaces = config["spaces"]["n_spaces"] if config["cpmm"]["curriculum"] else 0
    curriculum = make_curriculum(config["cpmm"], n_spaces)
    return ASHAScheduler(
        time_attr="epoch",
        metric=METRIC,
        mode="min",
        # Before the input space is reached there is nothing to compare.
        grace_period=curriculum.n_guided_epochs + options["grace_epochs"],
        max_t=curriculum.n_epochs + 1,
        reduction_factor=options["reduction_factor"],
    )
