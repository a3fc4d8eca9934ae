from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

from cpmm.elementwise import CHUNK, ElementwiseMap, spline, spline_inverse
from cpmm.preprocessing import Preprocessing
from tests.oracles import log_abs_det_jacobian

ALPHA = 1e-6
END = -math.log(ALPHA / (1 - ALPHA))  # of the logit at this margin


def make_map(generator: torch.Generator, n_bins: int = 8, roughness: float = 1.5) -> ElementwiseMap:
    """Any monotone map of the logit's range, as steep and as flat as a fitted one."""

    def steps() -> Tensor:
        step = (roughness * torch.randn(n_bins, generator=generator, dtype=torch.float64)).softmax(
            0
        )
        return torch.nn.functional.pad(step.cumsum(0), (1, 0))

    slope = roughness * torch.randn(n_bins + 1, generator=generator, dtype=torch.float64)
    knot, value = 2 * END * steps() - END, 30 * steps() - 12
    return ElementwiseMap(*(tuple(row.tolist()) for row in (knot, value, slope)))


@pytest.fixture
def rough(generator) -> ElementwiseMap:
    return make_map(generator)


@given(n_bins=st.integers(1, 40), roughness=st.floats(0, 2), seed=st.integers(0, 2**31))
def test_the_inverse_undoes_the_map_over_and_beyond_its_range(n_bins, roughness, seed):
    rough = make_map(torch.Generator().manual_seed(seed), n_bins, roughness)
    inner = torch.linspace(-END, END, 2001, dtype=torch.float64)
    x = torch.cat([inner, inner * 10, torch.tensor(rough.knot, dtype=torch.float64)])
    z, log_slope = rough.forward(x)
    # A rounding error of z counts by the inverse of the slope.
    error = (rough.inverse(z) - x).abs() / (1 + x.abs()) / (1 + torch.exp(-log_slope))
    assert float(error.max()) < 1e-10
    back, _ = rough.forward(rough.inverse(z))
    assert float(((back - z).abs() / (1 + z.abs()) / (1 + log_slope.exp())).max()) < 1e-10


def test_it_increases_and_meets_its_knots(rough):
    x = torch.linspace(-2 * END, 2 * END, 100_001, dtype=torch.float64)
    assert bool((rough.forward(x)[0].diff() > 0).all())
    z, log_slope = rough.forward(torch.tensor(rough.knot, dtype=torch.float64))
    np.testing.assert_allclose(z, rough.value, rtol=1e-12)
    np.testing.assert_allclose(log_slope, rough.log_slope, atol=1e-10)


def test_it_is_linear_beyond_its_range(rough):
    x = torch.tensor([-3 * END, -2 * END, 2 * END, 3 * END], dtype=torch.float64)
    z, log_slope = rough.forward(x)
    np.testing.assert_allclose(log_slope, np.repeat(np.array(rough.log_slope)[[0, -1]], 2))
    np.testing.assert_allclose((z[1] - z[0]) / END, math.exp(rough.log_slope[0]))
    np.testing.assert_allclose((z[3] - z[2]) / END, math.exp(rough.log_slope[-1]))


def test_the_derivative_is_that_of_autograd_and_of_zukos_spline(rough):
    from zuko.transforms import MonotonicRQSTransform

    x = torch.linspace(-1.5 * END, 1.5 * END, 997, dtype=torch.float64, requires_grad=True)
    z, log_slope = rough.forward(x)
    (expected,) = torch.autograd.grad(z.sum(), x)
    np.testing.assert_allclose(log_slope.detach(), expected.log(), atol=1e-9)
    # Zuko's is made of softmaxes of widths and heights between two equal bounds, its end slopes are
    # 1.
    width, height, slope = torch.randn(3, 6, generator=torch.Generator().manual_seed(3)).double()
    other = MonotonicRQSTransform(width, height, slope[:5], bound=END)
    knot, value, derivative = other.horizontal, other.vertical, other.derivatives
    inside = x.detach()[(x > -END) & (x < END)]
    expected, expected_log = other.call_and_ladj(inside)
    got, got_log = spline(inside, knot, value, derivative.log())
    np.testing.assert_allclose(got, expected, atol=1e-9)
    np.testing.assert_allclose(got_log, expected_log, atol=1e-9)
    np.testing.assert_allclose(
        spline_inverse(expected, knot, value, derivative.log()), inside, atol=1e-9
    )


def test_gradients_reach_every_parameter(generator):
    rough = make_map(generator, 4, 0.5)
    rows = (rough.knot, rough.value, rough.log_slope)
    parameters = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in rows]
    x = torch.linspace(-1.2 * END, 1.2 * END, 23, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(spline, (x, *parameters))


@pytest.mark.parametrize("n_bins", [1, 7])
def test_the_identity_changes_nothing(n_bins):
    same = ElementwiseMap.identity(-END, END, n_bins)
    x = torch.linspace(-2 * END, 2 * END, 1001, dtype=torch.float64)
    z, log_slope = same.forward(x)
    np.testing.assert_allclose(z, x, rtol=0, atol=1e-13)
    np.testing.assert_allclose(log_slope, 0, atol=1e-13)
    np.testing.assert_allclose(same.inverse(x), x, rtol=0, atol=1e-13)


def test_the_identity_behind_the_logit_is_the_plain_logit(generator):
    plain = Preprocessing(256, ALPHA, (0.3, -0.2), (1.1, 2.0))
    same = Preprocessing(256, ALPHA, (0.3, -0.2), (1.1, 2.0), ElementwiseMap.identity(-END, END, 5))
    x = torch.rand(100, 2, generator=generator, dtype=torch.float64)
    for got, expected in zip(same.forward(x), plain.forward(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_float32_follows_float64(rough):
    x = torch.linspace(-END, END, 10_001, dtype=torch.float64)
    z, log_slope = rough.forward(x)
    single, single_slope = rough.forward(x.float())
    assert single.dtype == torch.float32
    # A bin a hundredth as wide as its ends are large loses two of seven digits.
    assert float(((single - z).abs() / (1 + log_slope.exp())).max()) < 1e-4
    assert float((single_slope - log_slope).abs().median()) < 1e-5


def test_parts_are_put_together_again(rough, generator):
    x = END * torch.randn(CHUNK + 1, 3, generator=generator, dtype=torch.float64)
    z, log_slope = rough.forward(x)
    for rows in (slice(0, 5), slice(-5, None)):
        assert torch.equal(z[rows], rough.forward(x[rows])[0])
        assert torch.equal(log_slope[rows], rough.forward(x[rows])[1])
    assert torch.equal(rough.inverse(z)[-5:], rough.inverse(z[-5:]))


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize(("levels", "mapped"), [(None, False), (256, False), (256, True)])
def test_points_alone_are_those_that_come_with_a_log_det(
    rough, generator, levels, mapped, whitened
):
    whitening = torch.randn(3, 3, generator=generator, dtype=torch.float64) if whitened else None
    alpha = None if levels is None else ALPHA
    pre = Preprocessing(
        levels,
        alpha,
        (1.0, 2.0, 3.0),
        (0.5, 2.0, 4.0),
        rough if mapped else None,
        whitening,
    )
    x = torch.rand(50, 3, generator=generator, dtype=torch.float64)
    x[0] = torch.tensor([0.0, 1.0, 0.5])
    assert torch.equal(pre.transform(x), pre.forward(x)[0])
    with pytest.raises(ValueError, match=r"x must be \(N, 3\) for this preprocessing"):
        pre.transform(x[:, :2])


def test_log_det_behind_logit_and_scale_is_that_of_autograd(rough, generator):
    pre = Preprocessing(256, ALPHA, (1.0, 2.0, 3.0), (0.5, 2.0, 4.0), rough)
    x = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    x[0, 0], x[1, 1] = 1e-5, 1 - 1e-5
    expected = log_abs_det_jacobian(lambda row: pre.forward(row[None])[0][0], x)
    torch.testing.assert_close(pre.forward(x)[1], expected, rtol=1e-8, atol=1e-8)


def test_the_density_of_a_pixel_integrates_to_one(generator):
    pre = Preprocessing(256, ALPHA, (1.0,), (2.0,), make_map(generator, 6, 0.7))
    low, high = pre.forward(torch.tensor([[0.0], [1.0]], dtype=torch.float64))[0].flatten().tolist()
    law = norm((low + high) / 2, (high - low) / 8)

    def density(logit: float) -> float:  # over the logit, where nothing is steep
        s = 1 / (1 + math.exp(-logit))
        x = (s - ALPHA) / (1 - 2 * ALPHA)
        z, log_det = pre.forward(torch.tensor([[x]], dtype=torch.float64))
        return law.pdf(float(z)) * math.exp(float(log_det)) * s * (1 - s) / (1 - 2 * ALPHA)

    edges = [knot for knot in pre.map.knot if abs(knot) < END - 1e-9]
    total, _ = quad(density, -END, END, points=edges, limit=400, epsabs=1e-8)
    assert abs(total - (law.cdf(high) - law.cdf(low))) < 1e-6


def test_grey_levels_survive_the_way_there_and_back(rough, generator):
    raw = torch.randint(0, 256, (200, 4), generator=generator).to(torch.uint8)
    raw[0], raw[1] = 0, 255
    pre = Preprocessing.fit(raw, 256, ALPHA, "shared", generator, map=rough)
    x = pre.dequantize(raw, generator)
    x[2], x[3] = 0, 1
    z, _ = pre.forward(x)
    torch.testing.assert_close(pre.inverse(z), x, rtol=0, atol=1e-10)
    np.testing.assert_allclose(pre.forward(pre.dequantize(raw, generator))[0].mean(0), 0, atol=0.1)
    far = torch.full((1, 4), 1e6, dtype=torch.float64)
    assert bool((pre.inverse(far) == 1).all())
    assert bool((pre.inverse(-far) == 0).all())


def test_json_can_hold_it(rough):
    values = json.loads(json.dumps(rough.to_dict(), allow_nan=False))
    assert ElementwiseMap.from_dict(values) == rough
    pre = Preprocessing(256, ALPHA, (0.0,), (1.0,), rough)
    values = json.loads(json.dumps(pre.to_dict(), allow_nan=False))
    assert Preprocessing.from_dict(values, {}) == pre
    values["map"] = None
    assert Preprocessing.from_dict(values, {}).map is None
    del values["map"]  # as written before there were maps
    assert Preprocessing.from_dict(values, {}).map is None


def test_the_description_says_what_comes_before_the_model(rough):
    plain = Preprocessing(256, ALPHA, (0.0,), (1.0,))
    mapped = Preprocessing(256, ALPHA, (0.0,), (1.0,), rough)
    for pre in (plain, mapped):
        assert "logit(a + (1 - 2a) x) with x = (k + u)/256, a = 1e-06" in pre.description
    assert "spline of 8 bins" in mapped.description
    assert "spline" not in plain.description
    assert "logit" not in Preprocessing(None, None, (0.0,), (1.0,)).description


@pytest.mark.parametrize(
    ("knot", "value", "log_slope", "message"),
    [
        ((0, 1), (0, 1), (0,), "as many values and slopes: got 2, 2, 1"),
        ((0,), (0,), (0,), "two or more knots"),
        ((0, 0), (0, 1), (0, 0), "must increase: its knots"),
        ((0, 1), (1, 0), (0, 0), "must increase: its values"),
        ((0, math.nan), (0, 1), (0, 0), "must increase: its knots"),
        ((0, 1), (0, 1), (0, math.nan), "logs below 80"),
        ((0, 1), (0, 1), (0, 100), "logs below 80"),
    ],
)
def test_what_is_no_monotone_map_raises(knot, value, log_slope, message):
    with pytest.raises(ValueError, match=message):
        ElementwiseMap(knot, value, log_slope)


def test_real_values_take_no_map(rough):
    with pytest.raises(
        ValueError, match=r"real-valued data take no elementwise map.*data\.map\.kind"
    ):
        Preprocessing(None, None, (0.0,), (1.0,), rough)
