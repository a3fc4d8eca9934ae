"""Estimators in scikit-learn's conventions: ``from cpmm import CPMM, MixtureOfFactorAnalyzers``."""

from cpmm.estimators.analyzers import MixtureOfFactorAnalyzers
from cpmm.estimators.trajectories import CPMM

__all__ = ["CPMM", "MixtureOfFactorAnalyzers"]
