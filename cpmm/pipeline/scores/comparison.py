"""Two rows of a table compared by the means of their seeds."""

from __future__ import annotations

from typing import NamedTuple

from cpmm.pipeline.scores.tables import SCORES

LEVEL = 0.05  # of the test, two-sided


class Seeds(NamedTuple):
    """A score of the seeds of a row: mean, standard deviation (n - 1) and number."""

    mean: float
    sd: float
    n: int


class Comparison(NamedTuple):
    """How a row compares with another one.

    Attributes:
        gain: By how much its mean is better, below 0 if it is worse.
        pvalue: Of Welch's t-test; None if one of the two has a single seed.
        verdict: "better", "worse", "level" if the test tells no difference, or "single" if there
            is no test.
    """

    gain: float
    pvalue: float | None
    verdict: str


def compare_rows(score: str, row: Seeds, other: Seeds) -> Comparison:
    """Compare a row with another one by Welch's t-test, which takes few seeds for what they are.

    Args:
        score: Of :data:`SCORES`; says which way is better.
        row: That is better or worse.
        other: Than this one.
    """
    from scipy.stats import ttest_ind_from_stats

    gain = float(SCORES[score].gain(row.mean, other.mean))
    if min(row.n, other.n) < 2:
        return Comparison(gain, None, "single")
    pvalue = float(ttest_ind_from_stats(*row, *other, equal_var=False).pvalue)
    if pvalue < LEVEL:
        return Comparison(gain, pvalue, "better" if gain > 0 else "worse")
    return Comparison(gain, pvalue, "level")
