"""The teacher: a continuous normalizing flow from data at v = 0 to a Gaussian at v = 1 (Eq. 8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cpmm.odes import Solver

TRACES = ("exact", "hutchinson")


class Flow(nn.Module):
    """A single-scale CNF.

    Args:
        field: ``field(v, u)`` gives du/dv for u of shape (N, M).
        solver: How the ODE is solved; its tolerance belongs beside every figure.
        trace: "exact", M Jacobian-vector products, for small M; "hutchinson", one product with a
            random sign vector, unbiased.

    Raises:
        ValueError: If ``trace`` is unknown.
    """

    def __init__(self, field: nn.Module, solver: Solver, trace: str = "exact") -> None:
        super().__init__()
        if trace not in TRACES:
            raise ValueError(f"teacher.trace is {trace!r}: choose one of {TRACES}")
        self.field, self.solver, self.trace = field, solver, trace

    def transform(
        self, x: Tensor, positions: Tensor, start: float = 0.0, end: float = 1.0
    ) -> Tensor:
        """Carry points from position ``start`` towards ``end``.

        Args:
            x: Points at ``start``, (N, M).
            positions: Positions v to stop at, in the order of integration, (V,).
            start: 0 for data, 1 for latent points.
            end: The other end.

        Returns:
            u_v(x) at each position, (V, N, M).

        Raises:
            FloatingPointError: If a point leaves the range of floating-point numbers.
        """
        u = self.solver.solve(self.field, x, positions, start, end)
        return self._finite(u, "the flow's points")

    def inverse(self, u: Tensor) -> Tensor:
        """Carry latent points, (N, M), back to the input space."""
        return self.transform(u, u.new_tensor([0.0]), start=1.0, end=0.0)[0]

    def log_prob(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Log-density of points in the input space (Eq. 8), nats, (N,)."""
        return self.log_prob_and_costs(x, generator)[0]

    def log_prob_and_costs(
        self, x: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Log-density with the kinetic and Jacobian costs of the paths (RNODE).

        .. math::
            \log p(x) = \log N(u_1; 0, I)
            + \int_0^1 \operatorname{tr} \frac{\partial g}{\partial u} dv

        Args:
            x: Points in the input space, (N, M).
            generator: Source of Hutchinson's sign vectors, on the device of ``x``.

        Returns:
            Log-density, nats, (N,); :math:`\int \|g\|^2 dv / M` and, of the products that estimate
            the trace, :math:`\int \|J \epsilon\|^2 dv / M`, each (N,).
        """
        n, m = x.shape
        probe = None
        if self.trace == "hutchinson":
            probe = torch.randint(0, 2, (n, m), generator=generator, device=x.device).to(x) * 2 - 1
        dynamics = _WithTrace(self.field, probe)
        start = torch.cat([x, x.new_zeros(n, 3)], 1)
        end = self.solver.solve(dynamics, start, x.new_tensor([1.0]))[0]
        end = self._finite(end, "the flow's points or traces")
        u, (trace, kinetic, jacobian) = end[:, :m], end[:, m:].unbind(1)
        log_normal = -0.5 * (u.square().sum(1) + m * math.log(2 * math.pi))
        return log_normal + trace, kinetic / m, jacobian / m

    def _finite(self, value: Tensor, name: str) -> Tensor:
        bad = ~torch.isfinite(value)
        if bool(bad.any()):
            raise FloatingPointError(
                f"{int(bad.sum())} of {bad.numel()} values of {name} are not finite: the teacher "
                "has diverged; lower teacher.learning_rate, or raise the solver's steps"
            )
        return value


class _WithTrace(nn.Module):
    """The field on u, and the rates of change of the trace and of the two costs."""

    def __init__(self, field: nn.Module, probe: Tensor | None) -> None:
        super().__init__()
        self.field, self.probe = field, probe

    def forward(self, v: Tensor, h: Tensor) -> Tensor:
        u = h[:, :-3]

        def velocity(points: Tensor) -> Tensor:
            return self.field(v, points)

        def product(direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            g, jvp = torch.func.jvp(velocity, (u,), (direction.expand_as(u),))[:2]
            return g, (jvp * direction).sum(1), jvp.square().sum(1)

        if self.probe is not None:
            g, trace, jacobian = product(self.probe)  # both from one call of the field
        else:
            directions = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
            trace, jacobian = torch.func.vmap(lambda direction: product(direction)[1:])(directions)
            g, trace, jacobian = velocity(u), trace.sum(0), jacobian.sum(0)
        return torch.cat([g, torch.stack([trace, g.square().sum(1), jacobian], 1)], 1)


def flow_matching_loss(field: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    r"""Flow matching with independent coupling on the straight paths from data to noise.

    .. math:: E \|g((1 - v) x + v e, v) - (e - x)\|^2 / M, \quad e \sim N(0, I), v \sim U(0, 1)

    Args:
        field: ``field(v, u)``.
        x: Points in the input space, (N, M).
        generator: On the device of ``x``.

    Returns:
        A scalar.
    """
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    v = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
    u = torch.lerp(x, noise, v[:, None])
    return (field(v, u) - (noise - x)).square().mean()
