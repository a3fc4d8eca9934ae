"""What every model needs: a device, a seed, and the choice of a variant by name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from cpmm.seeds import seeded_generator

T = TypeVar("T")


def compute_device(trainer: Mapping[str, Any], exact: bool = False) -> str:
    """Where to compute, on a GPU if ``trainer.accelerator`` allows one; and set up how it computes.

    Lightning's own choice would also take devices without float64, which densities need.

    Args:
        trainer: The section ``trainer``.
        exact: For figures that are reported: without TF32, whatever ``trainer.precision`` is.
    """
    # cuBLAS reads it at its first call; Lightning asks for it with ``trainer.deterministic``.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Convolutions only: the expanded square of the log-density needs all its digits.
    torch.backends.cudnn.allow_tf32 = trainer["precision"] == "tf32" and not exact
    torch.set_float32_matmul_precision("highest")
    gpu = trainer["accelerator"] != "cpu" and torch.cuda.is_available()
    return "cuda" if gpu else "cpu"


def choose(name: str, value: str, variants: Mapping[str, T]) -> T:
    """Take the variant called ``value``.

    Raises:
        ValueError: If there is none; names the option and the choices.
    """
    if value not in variants:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(variants)}")
    return variants[value]


@contextmanager
def seeded(*seeds: int) -> Iterator[None]:
    """Draw initial weights, for which torch's modules take no generator, from their own seeds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded_generator(*seeds).initial_seed())
        yield
