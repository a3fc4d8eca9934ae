"""Continuously parameterized mixture models (Bender et al., ICML 2023).

A neural ODE moves the joint state of a factor analyzer through pseudotime; its states at G
pseudotimes for C initial states are a hierarchical mixture of C * G factor analyzers, taught
through a curriculum of spaces taken from a continuous normalizing flow, the teacher.

The letters of the paper, used in every formula and shape of this package:

    N  points                   M  features                R  factors of a factor analyzer
    C  clusters (trajectories)  G  pseudotimes             K  components, K = C * G
    J  size of the joint state  L  size of the augmentation
    V  spaces of the curriculum v  position of a space: 1 is latent, 0 is the input
    t  pseudotime in [0, 1]
"""

__version__ = "0.1.0"

_ESTIMATORS = ("CPMM", "MixtureOfFactorAnalyzers")


def __getattr__(name: str) -> type:
    """Import the estimators when they are asked for: they need the extra ``train``."""
    if name not in _ESTIMATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module("cpmm.estimators"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("sklearn", "scipy", "torchdiffeq"):
            raise
        remedy = f"{error.name} is not installed: pip install 'cpmm[train]'"
        raise ModuleNotFoundError(remedy, name=error.name) from None


def __dir__() -> list[str]:
    return sorted([*globals(), *_ESTIMATORS])
