from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from cpmm.elementwise import ElementwiseMap
from cpmm.factor_analyzers import FactorAnalyzers
from cpmm.fitted import FittedMixture
from cpmm.mixture import Mixture
from cpmm.preprocessing import Preprocessing


def make_mixture(generator, n_features):
    fa = FactorAnalyzers(
        log_weight=torch.randn(4, generator=generator).double().log_softmax(0),
        mean=torch.randn(4, n_features, generator=generator).double(),
        loading=0.5 * torch.randn(4, n_features, 1, generator=generator).double(),
        log_diagonal=-1 + torch.randn(4, n_features, generator=generator).double(),
    )
    return Mixture(fa, (3, 1))


def save(folder, mixture, pre, shape, **changes):
    m = mixture.n_features
    header = {
        "preprocessing": pre.to_dict(),
        "image_shape": shape,
        "feature_names": [f"x{i}" for i in range(m)],
    }
    kept = {k: v for k, v in (header | changes).items() if v != "absent"}
    mixture.save(folder, kept, pre.tensors)
    return folder


@pytest.fixture
def table(tmp_path, generator):
    """A mixture on a table, shifted and scaled."""
    pre = Preprocessing(None, None, (1.0, -2.0), (0.5, 3.0))
    return FittedMixture.load(save(tmp_path / "table", make_mixture(generator, 2), pre, None))


@pytest.fixture
def whitened(tmp_path, generator):
    """A mixture on a table that is shifted, scaled and whitened."""
    root = torch.tensor([[1.0, 0.3], [0.3, 2.0]], dtype=torch.float64)
    pre = Preprocessing(None, None, (1.0, -2.0), (0.5, 3.0), whitening=root)
    return FittedMixture.load(save(tmp_path / "white", make_mixture(generator, 2), pre, None))


@pytest.fixture
def images(tmp_path, generator):
    pre = Preprocessing(8, 0.05, (0.1,) * 6, (1.5,) * 6)
    return FittedMixture.load(save(tmp_path / "images", make_mixture(generator, 6), pre, (1, 2, 3)))


@pytest.mark.parametrize("kind", ["table", "whitened"])
def test_the_density_of_a_table_is_that_of_the_dense_mixture_in_units_of_the_data(
    kind, request, generator
):
    table = request.getfixturevalue(kind)
    x = 3 * torch.randn(20, 2, generator=generator).double()
    fa, back = table.mixture.components, np.diag([0.5, 3.0])
    if kind == "whitened":
        back = np.linalg.inv([[1.0, 0.3], [0.3, 2.0]]) @ back
    expected = sum(
        math.exp(weight)
        * multivariate_normal(mean @ back + [1.0, -2.0], back.T @ cov @ back).pdf(x)
        for weight, mean, cov in zip(
            fa.log_weight.tolist(), fa.mean.numpy(), fa.covariance().numpy(), strict=True
        )
    )
    got = table.log_prob(x, generator)
    assert torch.allclose(got, torch.from_numpy(np.log(expected)), rtol=1e-12)
    assert torch.equal(table.density(got), -got / 2)
    assert table.unit == "nats per dimension"


def test_the_density_of_images_sums_to_one_over_all_images(tmp_path, generator):
    # Two pixels of four levels: 16 images, the noise averaged over many draws.
    pre = Preprocessing(4, 0.05, (0.3, -0.2), (1.1, 1.1))
    fitted = FittedMixture.load(save(tmp_path, make_mixture(generator, 2), pre, (1, 1, 2)))
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4)).to(torch.uint8)
    draws = fitted.log_prob(grid.repeat(4000, 1), generator).exp().reshape(4000, 16)
    total = draws.sum(1)
    error = float(total.std() / math.sqrt(len(total)))
    # The logit's margin cuts the tails off the cube.
    z, _ = fitted.mixture.sample(200_000, generator)
    x = torch.sigmoid(z * 1.1 + torch.tensor([0.3, -0.2])) / 0.9 - 0.05 / 0.9
    inside = ((x >= 0) & (x <= 1)).all(1).double()
    error = math.hypot(error, float(inside.std()) / math.sqrt(len(inside)))
    assert abs(float(total.mean()) - float(inside.mean())) < 5 * error
    assert fitted.unit == "bits per dimension"


def test_batch_by_batch_gives_what_all_at_once_gives(images):
    raw = torch.arange(50 * 6).reshape(50, 6) % 8
    whole = images.log_prob(raw, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    parts = torch.cat([images.log_prob(part, generator) for part in raw.split(7)])
    assert torch.allclose(whole, parts, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int64", "float16"])
def test_numbers_of_every_type_have_the_same_density(images, table, dtype):
    raw = torch.arange(18).reshape(3, 6) % 8
    of_type = raw.to(getattr(torch, dtype))
    for fitted, x, y in ((images, raw, of_type), (table, raw[:, :2], of_type[:, :2])):
        one, two = (fitted.log_prob(z, torch.Generator().manual_seed(3)) for z in (x, y))
        assert torch.equal(one, two)


def test_samples_are_data(images, table, generator):
    x, cluster = images.sample(5000, generator)
    assert x.dtype == torch.uint8
    assert set(x.unique().tolist()) == set(range(8))
    assert set(cluster.tolist()) == {0, 1}
    assert bool(torch.isfinite(images.log_prob(x, generator)).all())
    x, _ = table.sample(20_000, generator)
    fa = table.mixture.components
    mean = (fa.log_weight.exp() @ fa.mean) * torch.tensor([0.5, 3.0]) + torch.tensor([1.0, -2.0])
    assert bool(((x.mean(0) - mean).abs() < 5 * x.std(0) / math.sqrt(len(x))).all())


def test_responsibilities_are_bayes_rule(table, generator):
    x, _ = table.sample(10, generator)
    joint = table.mixture.cluster_joint_log_prob(table.transform(x, generator)[0])
    expected = joint.exp() / joint.exp().sum(1, keepdim=True)
    assert torch.allclose(table.cluster_responsibilities(x, generator), expected)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (torch.zeros(3, 5), r"6 features.*got shape \(3, 5\)"),
        (torch.zeros(6), r"got shape \(6,\)"),
        (torch.zeros(0, 6), "no points"),
        (torch.full((2, 6), 0.5), "'x0' of point 1 is 0.5: expected a whole grey level of 0 to 7"),
        (torch.tensor([[0, 0, 0, 0, 0, float("nan")]]), "'x5' of point 1 is nan"),
        (torch.full((2, 6), 8), "grey levels must be 0 to 7"),
        (torch.full((2, 6), -1), "grey levels must be 0 to 7"),
        (torch.full((2, 6), 300, dtype=torch.uint16), "grey levels must be 0 to 7"),
        (torch.full((2, 6), 1j), "points must be real: got torch.complex64"),
    ],
)
def test_points_that_do_not_fit_are_named(images, raw, message):
    with pytest.raises(ValueError, match=message):
        images.log_prob(raw, torch.Generator())


@pytest.mark.parametrize(
    "changes", [{"preprocessing": "absent"}, {"preprocessing": 3}, {"feature_names": ["a"]}]
)
def test_a_mixture_without_a_fitting_preprocessing_raises(tmp_path, generator, changes):
    pre = Preprocessing(None, None, (0.0, 0.0), (1.0, 1.0))
    folder = save(tmp_path, make_mixture(generator, 2), pre, None, **changes)
    with pytest.raises(ValueError, match="preprocessing"):
        FittedMixture.load(folder)


def test_points_out_of_all_range_are_named_and_not_scored(table):
    raw = torch.tensor([[0.0, 0.0], [1e200, 0.0]], dtype=torch.float64)
    for method in (table.log_prob, table.cluster_responsibilities):
        with pytest.raises(ValueError, match=r"point 2 is too far .* 1e\+200"):
            method(raw, torch.Generator())


WITHOUT = """
import sys

for name in sys.argv[2:]:
    sys.modules[name] = None  # its import fails
import torch

from cpmm import artifact, data, elementwise, factor_analyzers, mixture, preprocessing, views
from cpmm.fitted import FittedMixture

fitted = FittedMixture.load(sys.argv[1])
generator = torch.Generator().manual_seed(0)
x, _ = fitted.sample(5, generator)
assert fitted.density(fitted.log_prob(x, generator)).shape == (5,)
assert fitted.cluster_responsibilities(x, generator).shape == (5, 2)
assert fitted.mixture.predict(fitted.transform(x, generator)[0]).shape == (5,)
"""
NOT_NEEDED = [
    "dvc", "hydra", "jinja2", "matplotlib", "omegaconf", "optuna", "pandas", "psutil",
    "pytorch_lightning", "ray", "rich", "scipy", "sklearn", "torchdiffeq", "yaml", "zarr",
]  # fmt: skip


def test_a_fitted_mixture_needs_torch_numpy_and_safetensors_alone(tmp_path, generator):
    knots = ElementwiseMap((-3.0, 3.0), (-2.0, 4.0), (0.1, 0.2))
    pre = Preprocessing(8, 0.05, (0.1,) * 6, (1.5,) * 6, knots)
    save(tmp_path, make_mixture(generator, 6), pre, (1, 2, 3))
    subprocess.run([sys.executable, "-c", WITHOUT, tmp_path, *NOT_NEEDED], check=True)


def test_importing_the_package_and_reading_a_header_take_no_torch():
    script = "import sys, cpmm.artifact; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
