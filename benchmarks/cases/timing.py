"""Timing side by side: the calls take turns, so that a busy moment of the machine meets all of them."""

from __future__ import annotations

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
    """Return the shortest of ``repeats`` times of each call, in seconds, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    return {name: min(values[1:]) for name, values in times.items()}


def square_product(size: int, generator: torch.Generator) -> tuple[Callable[[], object], int]:
    """Return a product of two large square float32 matrices, and its floating-point operations."""
    left, right = torch.randn(2, size, size, generator=generator)
    return lambda: left @ right, 2 * size**3
