"""A planned sweep, and what its archive knows of its trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmm.pipeline.config import Config
from cpmm.pipeline.config.fingerprints import hash_of
from cpmm.pipeline.sweeps.plan import Trial, suggested_trial
from cpmm.pipeline.sweeps.trial import trial_code

if TYPE_CHECKING:
    from cpmm.pipeline.sweeps.archive import Archive


@dataclass(frozen=True)
class Sweep:
    """The trials of a sweep, how they are run, and where their records are."""

    preset: str  # that its trials start from
    trials: Sequence[Trial]  # for a search by Optuna, the one that each suggestion changes
    options: Config  # the section ``sweep``
    ray: Config  # the section ``ray``
    archive: Archive
    home: Path  # ``data/<preset>``

    @property
    def name(self) -> str:
        """Its name, a file of conf/sweep/."""
        return self.options["name"]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of its search and of all its trials, code included."""
        fingerprints = [trial.fingerprint for trial in self.trials]
        return hash_of(self.options["search"], self.options["scheduler"], fingerprints)

    @property
    def suggests(self) -> bool:
        """Whether Optuna suggests the trials while the sweep runs."""
        return self.options["search"]["kind"] == "optuna"

    @property
    def stops_early(self) -> bool:
        """Whether the scheduler compares the trials and stops the worse ones early."""
        return self.options["scheduler"]["kind"] == "asha"

    @property
    def n_trials(self) -> int:
        """Number of trials that it is to have in the end."""
        return self.options["search"]["n_samples"] if self.suggests else len(self.trials)

    @property
    def suggestions_file(self) -> str:
        """Name in the archive of the list of what Optuna has suggested."""
        return f"searches/{self.trials[0].fingerprint}.json"

    def suggestions(self) -> list[dict[str, Any]]:
        """Read what Optuna has suggested so far, in this run of the sweep or an earlier one."""
        return self.archive.read_json(self.suggestions_file) or []

    def suggested_trial(self, values: Mapping[str, Any]) -> Trial:
        """Make the trial of a suggestion."""
        return suggested_trial(self.trials[0], values, trial_code())

    def known_trials(self) -> Sequence[Trial]:
        """List the trials in the sweep's order; of a search by Optuna, those suggested so far."""
        return list(map(self.suggested_trial, self.suggestions())) if self.suggests else self.trials

    def results(self) -> list[tuple[Trial, dict[str, Any]]]:
        """List the trials that have ended, each with its record, in the sweep's order.

        A trial whose worker was lost too often has a record as well, but is tried again.
        """
        trials = self.known_trials()
        return [(t, r) for t in trials if (r := self.archive.record(t.fingerprint)) is not None]

    def unfinished(self) -> list[Trial]:
        """List the known trials that have no record."""
        return [t for t in self.known_trials() if self.archive.record(t.fingerprint) is None]
