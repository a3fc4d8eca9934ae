"""Solving an ODE at given times, on torchdiffeq (Eq. 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchdiffeq import odeint, odeint_adjoint

FIXED_STEP = ("euler", "midpoint", "heun2", "heun3", "rk4")
# Not dopri8, bosh3 and fehlberg2: torchdiffeq 0.2.5 interpolates to the times asked for, and there
# they miss a linear field's solution by 2e-4 to 7e-4 at tolerance 1e-6 (dopri5: 2e-6).
ADAPTIVE = ("dopri5", "adaptive_heun")
EVALUATIONS = {"dopri5": 6, "adaptive_heun": 1}  # of the field, in a step
GRADIENTS = ("backpropagation", "checkpoint", "adjoint")


@dataclass(frozen=True)
class Solver:
    """How to solve an ODE.

    Attributes:
        method: One of :data:`FIXED_STEP` or :data:`ADAPTIVE`, names of torchdiffeq.
        n_steps: Steps over a unit of time of a fixed-step method. The solution is interpolated from
            this coarse grid to the times asked for (dense output), so that its cost does not
            depend on their number.
        interpolation: Dense output of a fixed-step method, "linear" or "cubic" (Hermite).
        rtol: Relative tolerance of an adaptive method.
        atol: Absolute tolerance of an adaptive method.
        gradient: "backpropagation" keeps every activation; "checkpoint" recomputes those of each
            call of the field; "adjoint" solves the adjoint ODE backwards, in constant memory.
        max_evaluations: Of the field, in one solve of an adaptive method, forwards or backwards;
            backpropagation keeps them all in memory.
        name: Of the section of the configuration, for messages.
    """

    method: str = "midpoint"
    n_steps: int = 12
    interpolation: str = "linear"
    rtol: float = 1e-5
    atol: float = 1e-5
    gradient: str = "backpropagation"
    max_evaluations: int = 1000
    name: str = "solver"

    def __post_init__(self) -> None:
        """Raise ValueError if an option is unknown or out of range."""
        for name, value, known in (
            ("method", self.method, FIXED_STEP + ADAPTIVE),
            ("interpolation", self.interpolation, ("linear", "cubic")),
            ("gradient", self.gradient, GRADIENTS),
        ):
            if value not in known:
                raise ValueError(f"solver.{name} is {value!r}: choose one of {', '.join(known)}")
        if min(self.n_steps, self.max_evaluations) < 1 or min(self.rtol, self.atol) <= 0:
            raise ValueError(
                "a solver needs n_steps and max_evaluations of at least 1 and positive tolerances: "
                f"got n_steps {self.n_steps}, max_evaluations {self.max_evaluations}, "
                f"rtol {self.rtol}, atol {self.atol}"
            )

    def solve(
        self,
        field: Callable[[Tensor, Tensor], Tensor],
        initial: Tensor,
        times: Tensor,
        start: float = 0.0,
        end: float = 1.0,
        keep: int | None = None,
    ) -> Tensor:
        """Integrate from ``start`` to ``end`` and return the states at ``times``.

        Args:
            field: ``field(t, h)`` gives dh/dt; an ``nn.Module`` for the adjoint method.
            initial: State at ``start``, any shape S.
            times: Between ``start`` and ``end``, in the order of integration, (T,).
            start: Where ``initial`` stands; ``start > end`` integrates backwards.
            end: Where a fixed-step grid ends, so that the solution at a time does not depend on
                which other times are asked for.
            keep: Leading entries of the last dimension that are returned; None: all.

        Returns:
            (T, *S), of the last dimension what is kept.

        Raises:
            ValueError: If ``times`` leave the interval.
            FloatingPointError: If an adaptive solver needs more evaluations than it may have, its
                step underflows, or a state is not finite.
        """
        low, high = min(start, end), max(start, end)
        if not bool(((times >= low - 1e-6) & (times <= high + 1e-6)).all()):
            raise ValueError(f"times must lie in [{low}, {high}]: got {times.tolist()}")
        if start == end:
            return initial[..., :keep].expand(len(times), *initial[..., :keep].shape)
        if self.method in FIXED_STEP:
            n = max(1, round(self.n_steps * (high - low)))
            knots = torch.linspace(start, end, n + 1, dtype=times.dtype, device=times.device)
            states = self._integrate(field, initial, knots)
            return self._interpolate(field, states, knots, times, keep)
        sign = 1.0 if end >= start else -1.0
        knots, index = torch.unique(
            torch.cat([times.new_tensor([start]), times]) * sign, return_inverse=True
        )
        if len(knots) == 1:
            return initial[..., :keep].expand(len(times), *initial[..., :keep].shape)
        return self._integrate(field, initial, knots * sign)[..., :keep][index[1:]]

    def _integrate(self, field: Callable, initial: Tensor, knots: Tensor) -> Tensor:
        if self.gradient == "checkpoint" and torch.is_grad_enabled():
            field = partial(checkpoint, field, use_reentrant=False)
        if self.method in FIXED_STEP and self.gradient != "adjoint" and torch.is_grad_enabled():
            # torchdiffeq writes each state into one tensor of all, and the gradient of each write
            # goes through all of that tensor: a fifth of a training step. So only the ends are
            # asked for.
            steps = _Remembered(field)
            grid = {"grid_constructor": lambda *_: knots}
            end = odeint(steps, initial, knots[[0, -1]], method=self.method, options=grid)[-1]
            return torch.stack([*steps.states, end])
        integrate = odeint_adjoint if self.gradient == "adjoint" else odeint
        watched = _Watched(field, self) if self.method in ADAPTIVE else field
        return integrate(
            watched, initial, knots, rtol=self.rtol, atol=self.atol, method=self.method
        )

    def _interpolate(
        self, field: Callable, states: Tensor, knots: Tensor, times: Tensor, keep: int | None
    ) -> Tensor:
        width = knots[1] - knots[0]
        position = (times - knots[0]) / width
        left = position.floor().long().clamp(0, len(knots) - 2)
        s = (position - left).reshape(-1, *[1] * (states.ndim - 1)).to(states)
        kept = states[..., :keep]
        below, above = kept.index_select(0, left), kept.index_select(0, left + 1)
        if self.interpolation == "linear":
            return torch.lerp(below, above, s)
        slopes = torch.stack([field(t, h) for t, h in zip(knots, states, strict=True)])
        slopes = slopes[..., :keep] * width
        return (
            (1 + 2 * s) * (1 - s) ** 2 * below
            + s * (1 - s) ** 2 * slopes.index_select(0, left)
            + s**2 * (3 - 2 * s) * above
            + s**2 * (s - 1) * slopes.index_select(0, left + 1)
        )


class _Remembered(nn.Module):
    """A field that remembers the states before each step; torchdiffeq calls it back with them."""

    def __init__(self, field: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.field = field
        self.states: list[Tensor] = []

    def callback_step(self, t: Tensor, h: Tensor, step: Tensor) -> None:
        self.states.append(h)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.field(t, h)


class _Watched(nn.Module):
    """A field whose adaptive solve ends in time; torchdiffeq calls back before each step."""

    def __init__(self, field: Callable[[Tensor, Tensor], Tensor], solver: Solver) -> None:
        super().__init__()
        self.field = field
        self.callback_step, self.callback_step_adjoint = _Watch(solver), _Watch(solver)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return self.field(t, h)


class _Watch:
    """Counts steps, and raises FloatingPointError where the next one leads nowhere."""

    def __init__(self, solver: Solver) -> None:
        self.solver, self.n_steps = solver, 0

    def __call__(self, t: Tensor, h: Tensor | Sequence[Tensor], step: Tensor) -> None:
        solver, more = self.solver, ""
        t, step = t.detach(), step.detach()
        limit = f"{solver.name}.max_evaluations"
        if not all(bool(torch.isfinite(part).all()) for part in ([h] if torch.is_tensor(h) else h)):
            why = "its state is not finite"
        elif bool(t + step == t):
            why = "its step has vanished"
        elif (self.n_steps + 1) * EVALUATIONS[solver.method] > solver.max_evaluations:
            why, more = f"{limit} ({solver.max_evaluations}) allows no more", f"raise {limit}, "
        else:
            self.n_steps += 1
            return
        name = solver.name
        raise FloatingPointError(
            f"the {solver.method} solver gave up at time {float(t):.4g} after {self.n_steps} "
            f"steps, the next of {float(step):.2g}: {why}; the field has diverged or become stiff: "
            f"lower the learning rate, {more}loosen {name}.rtol and {name}.atol (now "
            f"{solver.rtol:g} and {solver.atol:g}), or set {name}.method=midpoint"
        )
