"""Two synthetic sets in the plane (section 5.1, Figure 3), drawn from our own constants.

The paper describes its sets in words and gives no constants but the 10 % between the two radii; the
other default values here are ours, chosen by eye after Figure 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rings(
    n: int,
    generator: np.random.Generator,
    radius: float = 1.0,
    ratio: float = 1.1,
    thickness: float = 0.012,
    gaps: Sequence[float] = (60.0, 240.0),
    gap_width: float = 50.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw two concentric circles, each broken by a gap.

    Half of the points lie on either ring, evenly along its arc, in random order. At the default
    values a point lies 4 standard deviations from the circle halfway between the rings, so that a
    few in 100,000 lie on the wrong side of it.

    Args:
        n: Points, N.
        generator: Source of the randomness.
        radius: Radius of the inner circle.
        ratio: Outer radius over inner radius; 1.1 in the paper.
        thickness: Standard deviation of the distance from the circle, in units of ``radius``; the
            same for both rings.
        gaps: Where the gap of the inner and of the outer ring is centred, in degrees
            anticlockwise from the first axis.
        gap_width: Angle that is missing from each circle, in degrees.

    Returns:
        Points (N, 2), float64, and rings (N,), int64: 0 inner, 1 outer.

    Raises:
        ValueError: If an argument is out of range.
    """
    _require_count("n", n)
    if radius <= 0 or ratio <= 1 or thickness < 0:
        raise ValueError(
            "rings need radius > 0, ratio > 1 and thickness >= 0: "
            f"got radius {radius}, ratio {ratio}, thickness {thickness}"
        )
    if len(gaps) != 2 or not 0 <= gap_width < 360:
        raise ValueError(
            "rings need the centres of 2 gaps and a gap_width in [0, 360) degrees: "
            f"got gaps {tuple(gaps)}, gap_width {gap_width}"
        )
    label = generator.permutation(np.arange(n) % 2)
    angle = np.take(gaps, label) + generator.uniform(gap_width / 2, 360 - gap_width / 2, n)
    distance = radius * (np.where(label, ratio, 1.0) + thickness * generator.standard_normal(n))
    return _polar(distance, np.deg2rad(angle)), label


def spiral(
    n: int,
    generator: np.random.Generator,
    arms: int = 5,
    start: float = 0.15,
    twist: float = 120.0,
    noise: float = 0.025,
    outlier_fraction: float = 0.02,
) -> tuple[np.ndarray, np.ndarray]:
    r"""Draw a spiral of several arms, with a few outliers between them.

    Arm a runs from radius ``start`` to radius 1, through the points whose polar coordinates are

    .. math:: r = s + (1 - s) u, \quad \theta = 2 \pi a / \mathrm{arms} + \mathrm{twist}\, u,
        \quad u \in [0, 1].

    Points are uniform in u, equally many on every arm, in random order. Outliers lie halfway
    between two arms, at u >= 0.4, where the arms are well apart; they get label -1 and are meant
    to be left out of clustering scores.

    Args:
        n: Points, N, outliers included.
        generator: Source of the randomness.
        arms: Number of arms; 5 in the paper.
        start: Radius at which the arms begin, in (0, 1).
        twist: Angle by which an arm turns on its way out, in degrees.
        noise: Standard deviation of the Gaussian noise of each coordinate.
        outlier_fraction: Share of the points that lie between the arms, in [0, 1).

    Returns:
        Points (N, 2), float64, and arms (N,), int64: 0 to ``arms`` - 1, or -1 for an outlier.

    Raises:
        ValueError: If an argument is out of range.
    """
    _require_count("n", n)
    _require_count("arms", arms)
    if not 0 < start < 1 or noise < 0 or not 0 <= outlier_fraction < 1:
        raise ValueError(
            "a spiral needs start in (0, 1), noise >= 0 and outlier_fraction in [0, 1): "
            f"got start {start}, noise {noise}, outlier_fraction {outlier_fraction}"
        )
    i = generator.permutation(n)
    arm = i % arms
    outlier = i < round(outlier_fraction * n)
    u = generator.uniform(np.where(outlier, 0.4, 0.0), 1.0)
    angle = 2 * np.pi * (arm + 0.5 * outlier) / arms + np.deg2rad(twist) * u
    x = _polar(start + (1 - start) * u, angle) + noise * generator.standard_normal((n, 2))
    return x, np.where(outlier, -1, arm)


def _polar(distance: np.ndarray, angle: np.ndarray) -> np.ndarray:
    return np.stack([distance * np.cos(angle), distance * np.sin(angle)], axis=1)  # (N, 2)


def _require_count(name: str, value: int) -> None:
    if not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} is {value!r}: expected a whole number of at least 1")
