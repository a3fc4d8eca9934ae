from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from cpmm.odes import ADAPTIVE, FIXED_STEP, GRADIENTS, Solver
from tests.oracles import LinearField, linear_solution

ORDER = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
TIMES = torch.tensor([0.0, 0.13, 0.5, 0.77, 1.0], dtype=torch.float64)


@pytest.fixture
def matrix(generator) -> Tensor:
    return torch.randn(3, 3, generator=generator, dtype=torch.float64)


@pytest.fixture
def initial(generator) -> Tensor:
    return torch.randn(4, 3, generator=generator, dtype=torch.float64)


def nonlinear(t: Tensor, h: Tensor) -> Tensor:
    """Right-hand side of h(t) = 1 / (1 + t^2), time-dependent and nonlinear."""
    return -2 * t * h**2


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", FIXED_STEP + ADAPTIVE)
def test_a_linear_field_gives_the_matrix_exponential(matrix, initial, method, backwards):
    solver = Solver(method, n_steps=200, interpolation="cubic", rtol=1e-6, atol=1e-6)
    start, end = (1.0, 0.0) if backwards else (0.0, 1.0)
    times = TIMES.flip(0) if backwards else TIMES
    with torch.no_grad():
        states = solver.solve(LinearField(matrix), initial, times, start, end)
    expected = linear_solution(matrix, initial, times, start)
    # The global error of a method of order p is a constant times h^p, the constant of the size of
    # ||A||^(p+1) e^||A||; an adaptive method holds its tolerance in each step only.
    tolerance = 50 * (1 / 200) ** ORDER[method] if method in FIXED_STEP else 2e-5
    torch.testing.assert_close(states, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", FIXED_STEP)
def test_observed_order_of_convergence(method):
    errors = []
    for n_steps in (20, 40, 80):
        one = torch.ones(1, dtype=torch.float64)
        state = Solver(method, n_steps=n_steps).solve(nonlinear, one, one)
        errors.append(float((state - 0.5).abs()))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDER[method], abs=0.25)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_tighter_tolerance_gives_a_smaller_error(method):
    errors = []
    for tolerance in (1e-3, 1e-6):
        solver = Solver(method, rtol=tolerance, atol=tolerance)
        states = solver.solve(nonlinear, torch.ones(1, dtype=torch.float64), TIMES)
        error = float((states[:, 0] - 1 / (1 + TIMES**2)).abs().max())
        assert error < 10 * tolerance
        errors.append(error)
    assert errors[1] < errors[0]


def test_cubic_interpolation_is_more_accurate_than_linear():
    times = torch.linspace(0, 1, 101, dtype=torch.float64)
    error = {}
    for interpolation in ("linear", "cubic"):
        solver = Solver("rk4", n_steps=8, interpolation=interpolation)
        states = solver.solve(nonlinear, torch.ones(1, dtype=torch.float64), times)
        error[interpolation] = float((states[:, 0] - 1 / (1 + times**2)).abs().max())
    # Their errors are h^2 |h''| / 8 and h^4 |h''''| / 384: here 4e-3 and 2e-5.
    assert error["cubic"] < 3e-5
    assert 1e-3 < error["linear"] < 5e-3


@pytest.mark.parametrize(("interpolation", "order"), [("linear", 2), ("cubic", 4)])
@pytest.mark.parametrize("backwards", [False, True])
def test_observed_order_of_interpolation(interpolation, order, backwards):
    start, end = (1.0, 0.0) if backwards else (0.0, 1.0)
    initial = torch.full((1,), 1 / (1 + start**2), dtype=torch.float64)
    errors = []
    for n_steps in (8, 16, 32):
        times = (torch.arange(n_steps, dtype=torch.float64) + 0.5) / n_steps
        times = times.flip(0) if backwards else times
        solver = Solver("rk4", n_steps=n_steps, interpolation=interpolation)
        states = solver.solve(nonlinear, initial, times, start, end)
        errors.append(float((states[:, 0] - 1 / (1 + times**2)).abs().max()))
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.4)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("method", FIXED_STEP)
def test_a_state_does_not_depend_on_the_other_times(matrix, initial, method, interpolation):
    solver = Solver(method, n_steps=5, interpolation=interpolation)
    field = LinearField(matrix)
    together = solver.solve(field, initial, TIMES)
    for i in range(len(TIMES)):
        assert torch.equal(solver.solve(field, initial, TIMES[i : i + 1])[0], together[i])
    shuffled = torch.tensor([3, 0, 0, 2])
    assert torch.equal(solver.solve(field, initial, TIMES[shuffled]), together[shuffled])


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "dopri5"])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_leading_entries_alone_are_those_of_the_whole_state(
    matrix, initial, method, interpolation, start
):
    solver, field = Solver(method, 5, interpolation), LinearField(matrix)
    for after in (TIMES, torch.zeros(2, dtype=torch.float64)):
        times = 1 - after if start else after
        whole = solver.solve(field, initial, times, start, 1 - start)
        part = solver.solve(field, initial, times, start, 1 - start, keep=2)
        assert torch.equal(part, whole[..., :2])


@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
def test_the_state_at_the_start_is_the_initial_one(matrix, initial, method):
    field = LinearField(matrix)
    zeros = torch.zeros(2, dtype=torch.float64)
    assert torch.equal(Solver(method).solve(field, initial, zeros), initial.expand(2, 4, 3))
    for start, end in ((0.0, 1.0), (1.0, 0.0)):
        states = Solver(method).solve(field, initial, zeros + start, start, end)
        assert torch.equal(states, initial.expand(2, 4, 3))


@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_times_may_repeat_and_come_in_any_order(matrix, initial, method):
    times = TIMES[torch.tensor([3, 0, 3, 1])]
    solver = Solver(method, rtol=1e-6, atol=1e-6)
    states = solver.solve(LinearField(matrix), initial, times)
    expected = linear_solution(matrix, initial, times)
    torch.testing.assert_close(states.detach(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
def test_a_solver_that_goes_there_and_back_arrives_where_it_started(matrix, initial, method):
    solver = Solver(method, n_steps=200, rtol=1e-8, atol=1e-8)
    field = LinearField(matrix)
    there = solver.solve(field, initial, torch.ones(1, dtype=torch.float64))[0]
    back = solver.solve(field, there, torch.zeros(1, dtype=torch.float64), 1.0, 0.0)[0]
    torch.testing.assert_close(back, initial, rtol=1e-3, atol=1e-3)


class TimeDependent(nn.Module):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return torch.sin(h @ self.matrix.T + t)


def gradients(solver: Solver, matrix: Tensor, initial: Tensor) -> list[Tensor]:
    field, start = TimeDependent(matrix), initial.clone().requires_grad_()
    solver.solve(field, start, TIMES).square().sum().backward()
    return [start.grad, field.matrix.grad]


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5"])
@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_gradients_match_finite_differences(matrix, initial, method, interpolation):
    solver = Solver(method, n_steps=6, interpolation=interpolation, rtol=1e-9, atol=1e-9)

    def function(start: Tensor, weight: Tensor) -> Tensor:
        return solver.solve(lambda t, h: torch.sin(h @ weight.T + t), start, TIMES)

    inputs = [initial[:1].clone().requires_grad_(), matrix.clone().requires_grad_()]
    assert torch.autograd.gradcheck(function, inputs, atol=1e-6)


@pytest.mark.parametrize("method", ["midpoint", "rk4", "dopri5"])
def test_checkpoints_change_no_gradient(matrix, initial, method):
    plain = gradients(Solver(method), matrix, initial)
    recomputed = gradients(Solver(method, gradient="checkpoint"), matrix, initial)
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("method", "tolerance"), [("rk4", 1e-6), ("midpoint", 1e-3), ("dopri5", 1e-6)]
)
def test_the_adjoint_gradient_agrees(matrix, initial, method, tolerance):
    options = {"n_steps": 60, "interpolation": "cubic", "rtol": 1e-9, "atol": 1e-9}
    plain = gradients(Solver(method, **options), matrix, initial)
    adjoint = gradients(Solver(method, **options, gradient="adjoint"), matrix, initial)
    # Backwards in time the adjoint ODE has discretization errors of its own, of the method's order.
    for a, b in zip(plain, adjoint, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_reach_the_times(matrix, initial, gradient):
    times = TIMES[1:4].clone().requires_grad_()
    solver = Solver("rk4", n_steps=50, interpolation="cubic", gradient=gradient)
    states = solver.solve(LinearField(matrix), initial, times)
    states.sum().backward()
    expected = (linear_solution(matrix, initial, TIMES[1:4]) @ matrix.T).sum((1, 2))
    torch.testing.assert_close(times.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("time", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0)])
def test_times_outside_raise(matrix, initial, method, time, start, end):
    times = torch.tensor([time, 0.5], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"times must lie in \[0.0, 1.0\]: got"):
        Solver(method).solve(LinearField(matrix), initial, times, start, end)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "rk5"},
        {"interpolation": "spline"},
        {"gradient": "none"},
        {"n_steps": 0},
        {"rtol": 0.0},
        {"atol": -1.0},
        {"max_evaluations": 0},
    ],
)
def test_unknown_options_raise_and_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Solver(**options)


@pytest.mark.parametrize(
    "field", [lambda t, h: h**2, lambda t, h: h * float("nan")], ids=["explodes", "nan"]
)
def test_an_adaptive_solver_that_gives_up_says_so(field):
    initial = torch.full((1,), 2.0, dtype=torch.float64)  # 1 / (1/2 - t) explodes at t = 1/2
    with pytest.raises(
        FloatingPointError, match=r"dopri5 solver gave up at time 0.*method=midpoint"
    ):
        Solver("dopri5").solve(field, initial, TIMES)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(("method", "each"), [("dopri5", 6), ("adaptive_heun", 1)])
def test_a_stiff_solve_ends_at_its_limit(method, each, gradient):
    field, n_calls = torch.nn.Linear(2, 2, bias=False), 0
    with torch.no_grad():
        field.weight.copy_(torch.tensor([[-1e4, 0.0], [0.0, -1.0]]))

    def count(*_):
        nonlocal n_calls
        n_calls += 1

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = field

        def forward(self, t, h):
            count()
            return self.linear(h)

    solver = Solver(method, gradient=gradient, max_evaluations=60, name="teacher.solver")
    match = rf"time [\d.e-]+ after {60 // each} steps, .*teacher.solver.max_evaluations \(60\)"
    with pytest.raises(FloatingPointError, match=match):
        solver.solve(Field(), torch.ones(3, 2), torch.ones(1))
    assert 60 <= n_calls <= 62  # two choose the first step


def test_the_limit_holds_on_the_way_back():
    class Field(torch.nn.Module):  # mild itself, but not its gradient
        def __init__(self):
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, t, h):
            return self.rate * torch.where(h > 2, torch.sin(1e4 * h), torch.ones_like(h))

    solver = Solver("dopri5", gradient="adjoint", max_evaluations=60, rtol=1e-3, atol=1e-1)
    end = solver.solve(Field(), torch.full((1, 1), 2.1), torch.ones(1))
    with pytest.raises(FloatingPointError, match="solver gave up at time"):
        end.sum().backward()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", FIXED_STEP)
def test_states_and_gradients_of_fixed_steps_are_torchdiffeqs_own(
    matrix, initial, method, backwards
):
    knots = torch.linspace(*((1, 0) if backwards else (0, 1)), 5, dtype=torch.float64)
    weight = torch.arange(1.0, 6.0, dtype=torch.float64)[:, None, None]
    found = []
    for solve in (
        lambda field, h: Solver(method, 4).solve(
            field, h, knots, float(knots[0]), float(knots[-1])
        ),
        lambda field, h: odeint(field, h, knots, method=method),
    ):
        field, start = LinearField(matrix), initial.clone().requires_grad_()
        states = solve(field, start)
        (weight * states).square().sum().backward()
        found.append((states.detach(), field.matrix.grad, start.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", FIXED_STEP + ADAPTIVE)
def test_an_interval_of_no_length_leaves_the_initial_state(matrix, initial, method):
    times = torch.full((3,), 0.5, dtype=torch.float64)
    states = Solver(method).solve(LinearField(matrix), initial, times, 0.5, 0.5)
    assert torch.equal(states, initial.expand(3, *initial.shape))
