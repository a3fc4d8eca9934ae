"""Trials of a sweep: read from its sealed table, and summarized over the seeds of a row."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from cpmm.pipeline.artifacts.store import sweep_command, verify_sweep
from cpmm.pipeline.config import Config
from cpmm.pipeline.config.fingerprints import fingerprint_trial
from cpmm.pipeline.scores.tables import COSTS, OOD, TEST

FAILED = ("diverged", "failed", "lost")
TEXTS = ("model", "status", "reason", "fingerprint", "note")
NUMBERS = ("steps", *TEST, *COSTS, *OOD)


class OtherConfigurationError(ValueError):
    """Trials are of another configuration than the preset's."""


def over_seeds(trials: pd.DataFrame, scores: Iterable[str]) -> dict[str, Any]:
    """Summarize the trials of a row.

    Returns:
        How many failed and how many were stopped; of the others mean and standard deviation (n - 1)
        of each score, NaN where there is none.
    """
    done = trials[trials["status"] == "finished"]
    row = {
        "n_failed": int(trials["status"].isin(FAILED).sum()),
        "n_stopped": int((trials["status"] == "stopped").sum()),
    }
    for score in scores:
        values = done[score].astype(float)
        row |= {f"{score}_mean": values.mean(), f"{score}_sd": values.std()}
    return row


def read_trials(folder: Path, config: Config) -> pd.DataFrame:
    """Read the trials of a sweep of models, in its order.

    Args:
        folder: ``data/<preset>/sweep/<sweep>``.
        config: The preset's, of which the trials must be, but for the model and the seed.

    Returns:
        Columns model, seed, and all of TEXTS and NUMBERS; NaN and "" where there is nothing.

    Raises:
        FileNotFoundError: If the sweep was not run.
        OtherConfigurationError: If a trial is of another configuration.
        ValueError: If a file of the sweep is damaged.
    """
    verify_sweep(folder)
    path = folder / "trials.csv"
    trials = pd.read_csv(path, dtype=str, keep_default_na=False)
    if "model" not in trials:
        trials["model"] = config["model"]
    columns = list(dict.fromkeys([*trials, *TEXTS, *NUMBERS]))
    trials = trials.reindex(columns=columns, fill_value="")
    trials[[*NUMBERS]] = trials[[*NUMBERS]].replace("", "nan").astype(float)
    trials = trials.astype({"seed": int})
    for index, row in trials.iterrows():
        if row["fingerprint"] != fingerprint_trial(config, row["model"], row["seed"]):
            raise OtherConfigurationError(
                f"{path}: trial {index + 1} ({row['model']}, seed {row['seed']}) is of another "
                f"configuration than {folder.parents[1] / 'config.yaml'}: run the sweep "
                f"{folder.name} of this preset again, with overrides in params.yaml alone: "
                f"{sweep_command(folder)}"
            )
    return trials
