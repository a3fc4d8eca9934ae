from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from cpmm.metrics import nats_per_dimension
from cpmm.preprocessing import STANDARDIZATIONS, WHITENING, Augmentation, Preprocessing
from tests.oracles import log_abs_det_jacobian

ALPHA = 1e-6


@pytest.fixture
def grey(generator) -> Tensor:
    """Grey levels of 40 pictures of 6 pixels, both ends included."""
    raw = torch.randint(0, 256, (40, 6), generator=generator).to(torch.uint8)
    raw[0], raw[1] = 0, 255
    return raw


@pytest.fixture
def table(generator) -> Tensor:
    scale = torch.tensor([0.1, 1.0, 100.0], dtype=torch.float64)
    return 5 * scale + scale * torch.randn(500, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("standardize", STANDARDIZATIONS)
@pytest.mark.parametrize("alpha", [1e-6, 0.05])
def test_grey_levels_survive_the_way_there_and_back(grey, generator, standardize, alpha):
    preprocessing = Preprocessing.fit(grey, 256, alpha, standardize, generator)
    x = preprocessing.dequantize(grey, generator)
    z, _ = preprocessing.forward(x)
    assert z.dtype == torch.float64
    torch.testing.assert_close(preprocessing.inverse(z), x, rtol=0, atol=1e-12)
    assert torch.equal((preprocessing.inverse(z) * 256).floor(), grey.double())


@pytest.mark.parametrize("standardize", STANDARDIZATIONS)
def test_real_values_survive_the_way_there_and_back(table, generator, standardize):
    preprocessing = Preprocessing.fit(table, None, None, standardize, generator)
    z, _ = preprocessing.forward(preprocessing.dequantize(table, generator))
    torch.testing.assert_close(preprocessing.inverse(z), table)


def test_the_ends_of_the_unit_interval_stay_finite_and_invert(generator):
    preprocessing = Preprocessing(256, ALPHA, (0.0,), (1.0,))
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    z, log_det = preprocessing.forward(x)
    expected = math.log(ALPHA / (1 - ALPHA))
    np.testing.assert_allclose(z.flatten(), [expected, -expected], rtol=1e-9)
    assert bool(torch.isfinite(log_det).all())
    torch.testing.assert_close(preprocessing.inverse(z), x, rtol=0, atol=1e-15)
    far = torch.tensor([[-1e3], [1e3]], dtype=torch.float64)
    assert torch.equal(preprocessing.inverse(far), x)


@pytest.mark.parametrize("standardize", STANDARDIZATIONS)
@pytest.mark.parametrize("levels", [None, 256])
def test_log_det_is_that_of_autograd(grey, table, generator, levels, standardize):
    raw, alpha = (table, None) if levels is None else (grey, 0.01)
    preprocessing = Preprocessing.fit(raw, levels, alpha, standardize, generator)
    x = preprocessing.dequantize(raw, generator)[:5]
    expected = log_abs_det_jacobian(lambda row: preprocessing.forward(row[None])[0][0], x)
    torch.testing.assert_close(preprocessing.forward(x)[1], expected)


@given(
    levels=st.integers(2, 1024),
    alpha=st.floats(1e-6, 0.4),
    m=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_uniform_data_cost_the_log_of_the_levels(levels, alpha, m, seed):
    generator = torch.Generator().manual_seed(seed)
    preprocessing = Preprocessing(levels, alpha, (0.3,) * m, (2.5,) * m)
    x = torch.rand(4, m, generator=generator, dtype=torch.float64)
    _, log_det = preprocessing.forward(x)
    # The uniform density has log 0 in the units of x, so -log_det in the model's space.
    _, factor, offset = preprocessing.density_unit
    bits = factor * nats_per_dimension(-log_det, log_det, m) + offset
    np.testing.assert_array_equal(bits, math.log2(levels))


def test_density_of_the_data_is_that_of_the_standardized_gaussian(table, generator):
    preprocessing = Preprocessing.fit(table, None, None, "feature", generator)
    z, log_det = preprocessing.forward(table)
    x = table.numpy()
    expected = norm(x.mean(0), x.std(0, ddof=1)).logpdf(x).sum(1)
    np.testing.assert_allclose(norm.logpdf(z).sum(1) + log_det.numpy(), expected, rtol=1e-10)


def test_standardization_is_what_it_says(table, generator):
    x = table.numpy()
    fitted = {
        kind: Preprocessing.fit(table, None, None, kind, generator).forward(table)[0].numpy()
        for kind in STANDARDIZATIONS
    }
    np.testing.assert_array_equal(fitted["none"], x)
    np.testing.assert_allclose(fitted["feature"].mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(fitted["feature"].std(0, ddof=1), 1)
    np.testing.assert_allclose(fitted["shared"].mean(0), 0, atol=1e-9)
    np.testing.assert_allclose((fitted["shared"].std(0, ddof=1) ** 2).mean(), 1)
    ratio = (x - x.mean(0)) / fitted["shared"]
    np.testing.assert_allclose(ratio, ratio[0, 0])  # one scale for all features


def test_dequantization_spreads_each_level_over_its_interval(generator):
    raw = torch.full((50_000, 2), 34)
    x = Preprocessing(256, ALPHA, (0.0,) * 2, (1.0,) * 2).dequantize(raw, generator) * 256
    assert bool(((x >= 34) & (x < 35)).all())
    np.testing.assert_allclose(x.mean(0), 34.5, atol=5 / math.sqrt(12 * 50_000))
    np.testing.assert_allclose(x.var(0), 1 / 12, rtol=0.05)


def test_same_seed_gives_the_same_dequantization(grey):
    preprocessing = Preprocessing(256, ALPHA, (0.0,) * 6, (1.0,) * 6)
    first, second = (
        preprocessing.dequantize(grey, torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("levels", [None, 256])
def test_json_can_hold_it(grey, table, generator, levels):
    raw, alpha = (table, None) if levels is None else (grey, ALPHA)
    preprocessing = Preprocessing.fit(raw, levels, alpha, "feature", generator)
    values = json.loads(json.dumps(preprocessing.to_dict(), allow_nan=False))
    assert Preprocessing.from_dict(values, {}) == preprocessing


def test_whitened_points_have_the_identity_as_covariance_and_can_be_unwhitened(grey, generator):
    whitened, shared = (
        Preprocessing.fit(grey, 256, ALPHA, standardize, torch.Generator().manual_seed(3))
        for standardize in ("whitened", "shared")
    )
    x = whitened.dequantize(grey, torch.Generator().manual_seed(3))
    z, _ = whitened.forward(x)
    torch.testing.assert_close(torch.cov(z.T), torch.eye(6, dtype=torch.float64))
    assert float(z.mean(0).abs().max()) < 1e-12
    torch.testing.assert_close(whitened.unwhiten(z), shared.forward(x)[0])
    assert torch.equal(shared.unwhiten(z), z)


def test_one_standard_normal_behind_the_whitening_is_the_full_gaussian(table, generator):
    pre = Preprocessing.fit(table, None, None, "whitened", generator)
    z, log_det = pre.forward(table)
    gaussian = torch.distributions.MultivariateNormal(table.mean(0), torch.cov(table.T))
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(normal + log_det, gaussian.log_prob(table))


def test_a_whitening_is_kept_as_a_tensor_and_missed(table, generator):
    pre = Preprocessing.fit(table, None, None, "whitened", generator)
    values = json.loads(json.dumps(pre.to_dict(), allow_nan=False))
    again = Preprocessing.from_dict(values, pre.tensors)
    assert torch.equal(again.forward(table)[0], pre.forward(table)[0])
    for tensors, got in (({}, "none"), ({WHITENING: torch.eye(2)}, r"one of shape \(2, 2\)")):
        with pytest.raises(ValueError, match=rf"of shape \(3, 3\): got {got}"):
            Preprocessing.from_dict(values, tensors)


def test_a_singular_covariance_cannot_be_whitened(table, generator):
    for x in (torch.cat([table, table[:, :1] + table[:, 1:2]], 1), table[:3]):
        with pytest.raises(ValueError, match="cannot be whitened: take more training points"):
            Preprocessing.fit(x, None, None, "whitened", generator)


def test_features_without_variance_are_named(table, generator):
    table[:, 1] = 0.1
    names = ("height", "colour", "mass")
    with pytest.raises(ValueError, match=r"1 of 3 features have no variance.*\(colour\): drop"):
        Preprocessing.fit(table, None, None, "none", generator, names)
    with pytest.raises(ValueError, match=r"\(1\)"):
        Preprocessing.fit(table, None, None, "none", generator)
    with pytest.raises(ValueError, match=r"7 of 7 .*\(0, 1, 2, 3, 4, \.\.\.\)"):
        Preprocessing.fit(torch.ones(9, 7), None, None, "none", generator)


def test_pixels_that_are_always_zero_have_the_noises_variance(generator):
    Preprocessing.fit(torch.zeros(9, 7, dtype=torch.uint8), 256, ALPHA, "none", generator)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_raise(table, generator, value):
    table[3, 2] = value
    with pytest.raises(ValueError, match=r"1 of 3 features .*\(mass\)"):
        Preprocessing.fit(table, None, None, "feature", generator, ("height", "colour", "mass"))


@pytest.mark.parametrize("value", [-1, 16, 256])
def test_grey_levels_out_of_range_raise(generator, value):
    raw = torch.randint(0, 16, (20, 3), generator=generator)
    raw[4, 1] = value
    with pytest.raises(ValueError, match=rf"0 to 15: feature 2 of point 5 is {value}"):
        Preprocessing.fit(raw, 16, ALPHA, "none", generator)


@pytest.mark.parametrize("alpha", [None, 0.0, -0.1, 0.5])
def test_a_margin_out_of_range_raises(grey, generator, alpha):
    with pytest.raises(ValueError, match=r"data\.alpha"):
        Preprocessing.fit(grey, 256, alpha, "none", generator)


def test_an_unknown_standardization_raises(grey, generator):
    with pytest.raises(ValueError, match=r"data\.standardize is 'whiten'"):
        Preprocessing.fit(grey, 256, ALPHA, "whiten", generator)


@pytest.mark.parametrize("shape", [(4, 5), (6,)])
def test_points_of_another_size_raise(shape):
    preprocessing = Preprocessing(256, ALPHA, (0.0,) * 6, (1.0,) * 6)
    with pytest.raises(ValueError, match=r"x must be \(N, 6\) for this preprocessing: got"):
        preprocessing.forward(torch.zeros(shape))


def test_no_augmentation_returns_the_same_points(grey, generator):
    assert Augmentation()(grey, torch.ones(6), generator) is grey


def test_noise_is_in_units_of_each_features_deviation(generator):
    table = torch.zeros(20_000, 3, dtype=torch.float64)
    spread = torch.tensor([0.1, 1.0, 100.0], dtype=torch.float64)
    noise = Augmentation(noise=0.05)(table, spread, generator)
    error = 0.05 * spread / math.sqrt(20_000)
    assert bool((noise.mean(0).abs() < 5 * error).all())
    assert bool(((noise.std(0) - 0.05 * spread).abs() < 5 * error / math.sqrt(2)).all())
    assert not table.any()  # the original is left alone


def test_noise_leaves_grey_levels_alone(grey, generator):
    assert torch.equal(Augmentation(noise=0.05)(grey, torch.ones(6), generator), grey)


def images(n: int, channels: int = 2, height: int = 4, width: int = 5) -> np.ndarray:
    return np.arange(n * channels * height * width).reshape(n, channels, height, width)


def test_flips_mirror_half_of_the_images(generator):
    image = images(4000)
    raw = torch.from_numpy(image).flatten(1)
    got = Augmentation(flip=True, image_shape=(2, 4, 5))(raw, torch.ones(40), generator)
    got = got.reshape(image.shape).numpy()
    same = (got == image).all((1, 2, 3))
    mirrored = (got == image[..., ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / math.sqrt(4000)


@pytest.mark.parametrize("d", [1, 2])
def test_translations_are_uniform_shifts_of_the_padded_image(d, generator):
    n = 5000
    image = images(n)
    raw = torch.from_numpy(image).flatten(1)
    got = Augmentation(translate=d, image_shape=(2, 4, 5))(raw, torch.ones(40), generator)
    got = got.reshape(image.shape).numpy()
    padded = np.pad(image, ((0, 0), (0, 0), (d, d), (d, d)), mode="edge")
    share = 1 / (2 * d + 1) ** 2
    found = np.zeros(n, dtype=int)
    for row in range(2 * d + 1):
        for column in range(2 * d + 1):
            shifted = padded[:, :, row : row + 4, column : column + 5]
            hit = (got == shifted).all((1, 2, 3))
            assert abs(hit.mean() - share) < 5 * math.sqrt(share * (1 - share) / n)
            found += hit
    assert (found == 1).all()


@pytest.mark.parametrize("options", [{"noise": -0.1}, {"translate": -1}])
def test_negative_augmentation_raises(options):
    with pytest.raises(ValueError, match="must be 0 or more"):
        Augmentation(**options)


@pytest.mark.parametrize("options", [{"translate": 1}, {"flip": True}])
def test_augmentation_of_images_on_a_table_raises(options):
    with pytest.raises(ValueError, match="need images, this data set is a table"):
        Augmentation(**options)


def test_tiny_values_vary_and_one_value_does_not():
    raw = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    raw *= torch.tensor([1e-13, 1.0])
    fitted = Preprocessing.fit(raw, None, None, "feature", torch.Generator())
    z, log_det = fitted.forward(raw)
    torch.testing.assert_close(z.std(0), torch.ones(2, dtype=torch.float64))
    assert float(log_det[0]) == pytest.approx(-raw.std(0).log().sum().item())
    for value in (7.0, 1e-13, 0.1):
        raw[:, 0] = value
        with pytest.raises(ValueError, match="1 of 2 features have no variance"):
            Preprocessing.fit(raw, None, None, "feature", torch.Generator())
