from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.linalg import expm
from scipy.stats import multivariate_normal
from torch import Tensor, nn
from zuko.transforms import FreeFormJacobianTransform

from cpmm.fields import MLPField
from cpmm.odes import GRADIENTS, Solver
from cpmm.teacher import Flow, flow_matching_loss
from tests.oracles import LinearField, log_abs_det_jacobian

M = 3
TIGHT = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9}


def make_flow(trace: str = "exact", **options) -> Flow:
    torch.manual_seed(0)
    field = MLPField(M, 16, 2, n_frequencies=2)
    return Flow(field, Solver(**(TIGHT | options)), trace).double()


@pytest.fixture
def x(generator) -> Tensor:
    return torch.randn(8, M, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [(TIGHT, 1e-7), ({"method": "rk4", "n_steps": 50}, 1e-7), ({"method": "midpoint"}, 1e-2)],
)
def test_inverse_undoes_the_flow(x, options, tolerance):
    flow = make_flow(**options)
    latent = flow.transform(x, x.new_tensor([1.0]))[0]
    assert bool((latent - x).abs().max() > 0.1)
    torch.testing.assert_close(flow.inverse(latent), x, rtol=tolerance, atol=tolerance)


def test_the_flow_stops_at_positions_in_both_directions(x):
    flow = make_flow()
    positions = torch.linspace(0, 1, 5, dtype=torch.float64)
    there = flow.transform(x, positions)
    back = flow.transform(there[-1], positions.flip(0), start=1.0, end=0.0)
    assert torch.equal(there[0], x)
    torch.testing.assert_close(back.flip(0), there, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [TIGHT, {"method": "rk4", "n_steps": 50}])
def test_log_density_is_that_of_the_full_jacobian(x, generator, options):
    flow, x = make_flow(**options), x[:4]
    latent = flow.transform(x, x.new_tensor([1.0]))[0]
    log_det = log_abs_det_jacobian(
        lambda row: flow.transform(row[None], row.new_tensor([1.0]))[0, 0], x
    )
    expected = multivariate_normal(np.zeros(M)).logpdf(latent.detach().numpy()) + log_det.numpy()
    np.testing.assert_allclose(flow.log_prob(x, generator).detach(), expected, atol=1e-6)


def test_log_density_is_that_of_zuko(x, generator):
    flow = make_flow()
    transform = FreeFormJacobianTransform(
        flow.field, phi=flow.field.parameters(), atol=1e-9, rtol=1e-9
    )
    with torch.no_grad():
        latent, log_det = transform.call_and_ladj(x)
        expected = log_det - 0.5 * (latent.square().sum(1) + M * math.log(2 * math.pi))
        torch.testing.assert_close(flow.log_prob(x, generator), expected, rtol=1e-6, atol=1e-6)


def test_a_linear_field_gives_a_gaussian_and_its_costs(x, generator):
    matrix = 0.7 * torch.randn(M, M, generator=generator, dtype=torch.float64)
    flow = Flow(LinearField(matrix), Solver(**TIGHT))
    log_prob, kinetic, jacobian = (t.detach() for t in flow.log_prob_and_costs(x, generator))
    a = matrix.numpy()
    covariance = expm(-a) @ expm(-a).T
    np.testing.assert_allclose(
        log_prob, multivariate_normal(np.zeros(M), covariance).logpdf(x.numpy()), atol=1e-6
    )
    for i, row in enumerate(x.numpy()):
        path = quad(lambda v, row=row: np.sum((a @ expm(v * a) @ row) ** 2), 0, 1)[0]
        assert float(kinetic[i]) == pytest.approx(path / M, rel=1e-6)
    np.testing.assert_allclose(jacobian, (a**2).sum() / M, rtol=1e-6)


def test_the_density_of_a_flow_integrates_to_one():
    torch.manual_seed(0)
    flow = Flow(MLPField(2, 8, 1), Solver("rk4", n_steps=12)).double()
    axis = torch.linspace(-7, 7, 57, dtype=torch.float64)
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(axis, axis), torch.Generator()).exp()
    # What is left is the discretization of the ODE.
    assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, rel=1e-4)


def test_hutchinsons_estimate_is_unbiased(x, generator):
    n = 2000
    exact = make_flow("exact", method="rk4", n_steps=8)
    estimate = make_flow("hutchinson", method="rk4", n_steps=8)
    with torch.no_grad():
        expected = exact.log_prob_and_costs(x[:2], generator)
        draws = estimate.log_prob_and_costs(x[:2].repeat_interleave(n, 0), generator)
    for name, one, many in zip(("log p", "kinetic", "jacobian"), expected, draws, strict=True):
        by_point = many.reshape(2, n)
        error = by_point.std(1) / math.sqrt(n) + 1e-12
        assert bool(((by_point.mean(1) - one).abs() < 5 * error).all()), name
    assert float(draws[0].reshape(2, n).std(1).min()) > 0.01  # it is an estimate
    assert float(draws[1].reshape(2, n).std(1).max()) < 1e-12  # of what has a trace


def test_hutchinsons_estimate_repeats_with_its_seed(x):
    flow = make_flow("hutchinson")
    first, second, other = (flow.log_prob(x, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_hutchinsons_estimate_calls_the_field_once_for_each_velocity(x):
    flow = make_flow("hutchinson", method="euler", n_steps=5)
    calls = []
    flow.field.register_forward_hook(lambda *_: calls.append(None))
    flow.log_prob(x, torch.Generator())
    assert len(calls) == 5


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_the_likelihood_match_finite_differences(x, trace, gradient):
    # 1e-3 for the adjoint: its backward solve has errors of its own, of h^4.
    flow = make_flow(trace, method="rk4", n_steps=20, gradient=gradient)

    def loss() -> Tensor:
        parts = flow.log_prob_and_costs(x, torch.Generator().manual_seed(0))
        return sum(part.mean() for part in parts)

    loss().backward()
    with torch.no_grad():
        for weight in (flow.field.layers[0].weight, flow.field.layers[-1].bias):
            step, index = 1e-5, (0,) * weight.ndim
            weight[index] += step
            above = float(loss())
            weight[index] -= 2 * step
            below = float(loss())
            weight[index] += step
            difference = (above - below) / (2 * step)
            assert float(weight.grad[index]) == pytest.approx(difference, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_log_density_needs_no_gradients(x, trace, mode):
    flow = make_flow(trace)
    expected = flow.log_prob(x, torch.Generator().manual_seed(0)).detach()
    with mode():
        got = flow.log_prob(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


class GaussianVelocity(nn.Module):
    """The best velocity for data N(0, s^2): E[e - x | (1 - v) x + v e = u], plus perturbations."""

    def __init__(self, deviation: float, gain: float = 1.0, drift: float = 0.0) -> None:
        super().__init__()
        self.variance, self.gain, self.drift = deviation**2, gain, drift

    def slope(self, v):
        return (v - (1 - v) * self.variance) / ((1 - v) ** 2 * self.variance + v**2)

    def forward(self, v: Tensor, u: Tensor) -> Tensor:
        return self.gain * self.slope(v)[:, None] * u + self.drift


@pytest.mark.parametrize("deviation", [0.5, 2.0])
def test_flow_matching_is_minimized_by_the_closed_form_velocity(deviation, generator):
    n = 100_000
    x = deviation * torch.randn(n, 1, generator=generator, dtype=torch.float64)

    def loss(**changes: float) -> float:
        field = GaussianVelocity(deviation, **changes)
        return flow_matching_loss(field, x, torch.Generator().manual_seed(101)).item()

    best = GaussianVelocity(deviation)
    variance = deviation**2

    def left_over(v: float) -> float:  # Var(e - x | u)
        return 1 + variance - best.slope(v) ** 2 * ((1 - v) ** 2 * variance + v**2)

    # Squares of a Gaussian: a standard error of about sqrt(3) times the mean over sqrt(n).
    assert loss() == pytest.approx(quad(left_over, 0, 1)[0], rel=5 * math.sqrt(3 / n))
    for changes in ({"gain": 0.9}, {"gain": 1.1}, {"drift": 0.1}, {"drift": -0.1}):
        assert loss(**changes) > loss()
    # A constant error adds its square.
    assert loss(drift=0.5) - loss() == pytest.approx(0.25, abs=0.02)


def test_flow_matching_averages_over_points_and_features(x):
    class Zero(nn.Module):
        def forward(self, v: Tensor, u: Tensor) -> Tensor:
            assert v.shape == (len(u),)
            return torch.zeros_like(u)

    zeros = torch.zeros(20_000, 4, dtype=torch.float64)
    loss = flow_matching_loss(Zero(), zeros, torch.Generator().manual_seed(0))
    assert float(loss) == pytest.approx(1, abs=5 * math.sqrt(2 / 80_000))


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_broken_weights_raise(x, generator, method):
    flow = make_flow(method=method)
    with torch.no_grad():
        flow.field.layers[0].weight[0, 0] = float("nan")
    for call in (
        lambda: flow.log_prob(x, generator),
        lambda: flow.transform(x, x.new_tensor([1.0])),
        lambda: flow.inverse(x),
    ):
        with pytest.raises(FloatingPointError):
            call()


def test_an_unknown_trace_raises():
    with pytest.raises(ValueError, match=r"teacher\.trace is 'guess'"):
        make_flow("guess")
