from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cpmm.factor_analyzers import (
    FactorAnalyzers,
    capacitance_cholesky,
    component_log_prob,
    prepare_density,
    sample_components,
)
from tests.oracles import (
    SubnormalNumbers,
    assert_moments,
    dense_component_log_prob,
    dense_covariance,
    random_factor_analyzers,
)


@given(
    k=st.integers(1, 5),
    m=st.integers(1, 7),
    r=st.integers(1, 7),
    n=st.integers(1, 6),
    offset=st.sampled_from([0.0, -30.0, 1000.0]),
    seed=st.integers(0, 2**31),
)
def test_log_prob_is_that_of_the_dense_gaussian(k, m, r, n, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    fa = random_factor_analyzers(generator, k, m, min(r, m), offset)
    x = offset + 3 * torch.randn(n, m, generator=generator, dtype=torch.float64)
    # The points are centred first, so an offset costs no more than the rounding of x itself.
    np.testing.assert_allclose(
        component_log_prob(x, fa), dense_component_log_prob(x, fa), rtol=1e-9, atol=1e-9
    )


def test_log_prob_passes_gradcheck(generator):
    fa = random_factor_analyzers(generator, 3, 4, 2)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)

    def function(x: Tensor, mean: Tensor, loading: Tensor, log_diagonal: Tensor) -> Tensor:
        return component_log_prob(x, FactorAnalyzers(fa.log_weight, mean, loading, log_diagonal))

    inputs = [t.clone().requires_grad_() for t in (x, fa.mean, fa.loading, fa.log_diagonal)]
    assert torch.autograd.gradcheck(function, inputs)


def test_gradients_take_no_subnormal_numbers_through_the_products(generator):
    fa = random_factor_analyzers(generator, 4, 30, 2)
    x = torch.randn(6, 30, generator=generator)
    share = torch.rand(6, 4, generator=generator)
    share[:, 1:] *= torch.tensor([1e-20, 1e-35, 1e-40])  # posteriors of points far away
    gradients = []
    for dtype in (torch.float32, torch.float64):
        names = ("mean", "loading", "log_diagonal")
        inputs = {name: getattr(fa, name).to(dtype).requires_grad_() for name in names}
        log_prob = component_log_prob(x.to(dtype), replace(fa, **inputs))
        with SubnormalNumbers() as subnormal:
            log_prob.backward(share.to(dtype))
        assert subnormal.operations == []
        gradients.append([value.grad for value in inputs.values()])
    for single, double in zip(*gradients, strict=True):
        # To single precision those of the last two components are none.
        torch.testing.assert_close(single[:2], double[:2].float(), rtol=1e-4, atol=1e-20)
        assert not single[2:].any()
        assert double[2:].any()


def test_batches_that_share_a_preparation_add_up_to_one_call(generator):
    fa = random_factor_analyzers(generator, 3, 4, 2)
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (fa.mean, fa.loading, fa.log_diagonal)]
    density = prepare_density(fa)
    parts = torch.cat([density.component_log_prob(part) for part in x.split(3)])
    whole = component_log_prob(x, fa)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(
        torch.autograd.grad(parts.logsumexp(1).sum(), inputs),
        torch.autograd.grad(whole.logsumexp(1).sum(), inputs),
    )


def test_log_prob_does_not_see_a_rotation_of_the_factors(generator):
    fa = random_factor_analyzers(generator, 3, 5, 3)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    turned = FactorAnalyzers(fa.log_weight, fa.mean, fa.loading @ rotation, fa.log_diagonal)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(component_log_prob(x, turned), component_log_prob(x, fa))


def test_density_integrates_to_one_in_two_dimensions(generator):
    fa = random_factor_analyzers(generator, 3, 2, 1)
    axis = torch.linspace(-25, 25, 1001, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    total = component_log_prob(x, fa).exp().sum(0) * (axis[1] - axis[0]) ** 2
    # The trapezoidal rule converges faster than any power on a smooth, decaying integrand.
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("floor", [-6.0, -2.0])
def test_float32_error_is_bounded_at_image_size(generator, floor):
    k, m, r = 25, 784, 6
    fa = random_factor_analyzers(generator, k, m, r)
    log_diagonal = floor + fa.log_diagonal.abs()
    fa = FactorAnalyzers(fa.log_weight, 3 * fa.mean, fa.loading, log_diagonal)
    x = sample_components(fa, torch.arange(k).repeat(4), generator)
    exact = component_log_prob(x, fa)
    error = (component_log_prob(x.float(), fa.to(torch.float32)) - exact).abs()
    # What the docstring promises: roundoff times ||x - c||^2 / min d, to a factor of 4.
    squared = (x - fa.mean.mean(0)).square().sum(1, keepdim=True)
    bound = torch.finfo(torch.float32).eps * squared / log_diagonal.exp().amin(1)
    assert bool((error < 4 * bound).all())


def test_mixed_precision_leaves_the_density_alone(generator):
    # In bfloat16 the expanded square would be off by whole nats per dimension.
    fa = random_factor_analyzers(generator, 3, 784, 6).to(torch.float32)
    x = sample_components(fa, torch.arange(3), generator)
    density = prepare_density(fa)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = component_log_prob(x, fa)
        shared = density.component_log_prob(x)
    assert torch.equal(mixed, component_log_prob(x, fa))
    assert torch.equal(shared, mixed)


def test_samples_have_the_components_moments(generator):
    fa = random_factor_analyzers(generator, 3, 4, 2)
    index = torch.arange(3).repeat_interleave(20_000)
    points = sample_components(fa, index, generator)
    for k in range(3):
        assert_moments(points[index == k], fa.mean[k].numpy(), dense_covariance(fa)[k])


def test_covariance_is_dense(generator):
    fa = random_factor_analyzers(generator, 3, 4, 2)
    np.testing.assert_allclose(fa.covariance(), dense_covariance(fa), rtol=1e-12)


def test_capacitance_is_factorized(generator):
    fa = random_factor_analyzers(generator, 3, 5, 2)
    cholesky, scaled = capacitance_cholesky(fa)
    for k in range(3):
        precision = np.diag(np.exp(-fa.log_diagonal[k].numpy()))
        loading = fa.loading[k].numpy()
        capacitance = np.eye(2) + loading.T @ precision @ loading
        np.testing.assert_allclose(cholesky[k] @ cholesky[k].T, capacitance, rtol=1e-10)
        np.testing.assert_allclose(scaled[k], loading.T @ precision, rtol=1e-10)


def test_select_normalizes_the_weights_of_what_is_kept(generator):
    fa = random_factor_analyzers(generator, 5, 3, 2)
    index = torch.tensor([3, 0])
    chosen = fa.select(index)
    weight = fa.log_weight.exp()[index]
    torch.testing.assert_close(chosen.log_weight.exp(), weight / weight.sum())
    assert torch.equal(chosen.mean, fa.mean[index])
    assert torch.equal(chosen.loading, fa.loading[index])
    assert torch.equal(chosen.log_diagonal, fa.log_diagonal[index])


def test_to_moves_every_tensor(generator):
    fa = random_factor_analyzers(generator, 2, 3, 1).to(torch.float32)
    assert {t.dtype for t in vars(fa).values()} == {torch.float32}
    assert (fa.n_components, fa.n_features, fa.n_factors) == (2, 3, 1)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("log_weight", (3,)),
        ("mean", (2, 5)),
        ("mean", (4,)),
        ("loading", (2, 4)),
        ("loading", (2, 3, 1)),
        ("log_diagonal", (2, 1)),
    ],
)
def test_shapes_that_disagree_raise(generator, name, shape):
    tensors = vars(random_factor_analyzers(generator, 2, 4, 1))
    with pytest.raises(ValueError, match="must agree on K, M and R: expected"):
        FactorAnalyzers(**{**tensors, name: torch.zeros(shape)})


@pytest.mark.parametrize("shape", [(6, 3), (4,), (2, 3, 4)])
def test_points_of_another_size_raise(generator, shape):
    fa = random_factor_analyzers(generator, 2, 4, 1)
    with pytest.raises(ValueError, match="the mixture has 4 features: got shape"):
        component_log_prob(torch.zeros(shape, dtype=torch.float64), fa)


@pytest.mark.parametrize(
    ("name", "value"),
    [("loading", float("nan")), ("loading", float("inf")), ("log_diagonal", float("nan"))],
)
def test_broken_numbers_raise_and_say_how_many(generator, name, value):
    fa = random_factor_analyzers(generator, 4, 3, 2)
    getattr(fa, name)[1, 2] = value
    with pytest.raises(FloatingPointError, match="1 of 4 capacitance matrices"):
        component_log_prob(torch.zeros(1, 3, dtype=torch.float64), fa)


def test_samples_that_are_not_finite_raise(generator):
    fa = random_factor_analyzers(generator, 3, 2, 1)
    broken = replace(fa, log_diagonal=torch.full_like(fa.log_diagonal, 1e6))
    with pytest.raises(FloatingPointError, match=r"not finite: largest log-variance 1e\+06"):
        sample_components(broken, torch.tensor([0, 1]), generator)
