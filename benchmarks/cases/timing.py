"""Timing side by side: calls take turns, so that a busy moment of the machine meets them all."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Attributes:
        name: What was timed.
        seconds: Its shortest time; None where there is none.
        figure: The number to look at, such as a ratio; None where there is none.
        unit: What the figure means.
    """

    name: str
    seconds: float | None = None
    figure: float | None = None
    unit: str = ""


def time_in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the shortest of ``repeats`` times of each call, seconds; the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: min(values[1:]) for name, values in times.items()}


def unavailable(peer: str, *modules: str) -> list[Row]:
    """Say that a peer cannot be timed, and why; nothing if its modules can be imported."""
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception as error:  # whatever an import may raise
        return [Row(f"{peer}: not available ({type(error).__name__}: {error})")]
    return []


def require_agreement(
    peer: str, sizes: str, found: torch.Tensor, ours: torch.Tensor, tolerance: float
) -> Row:
    """Compare log-densities in float64 by their largest relative difference.

    Raises:
        FloatingPointError: If it is not below ``tolerance``.
    """
    difference = float(((found - ours) / ours).abs().max())
    if not difference < tolerance:
        raise FloatingPointError(
            f"{peer} and ours differ by {difference:.1e}, relative, in float64: expected less than "
            f"{tolerance}"
        )
    return Row(f"{peer}{sizes} in float64", None, difference, "largest relative difference")


def square_product(size: int, generator: torch.Generator) -> tuple[Callable[[], object], int]:
    """Return a product of two large square float32 matrices, and its floating-point operations."""
    left, right = torch.randn(2, size, size, generator=generator)
    return lambda: left @ right, 2 * size**3
