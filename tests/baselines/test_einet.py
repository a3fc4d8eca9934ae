from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import norm
from torch import Tensor

from cpmm.baselines.einet import (
    SMOOTHING,
    EinsumNetwork,
    _sum_products,
    _weights,
    count_parameters,
    group_columns,
    leaf_regions,
    match_sizes,
    usual_depth,
)
from cpmm.pipeline.models.fit import fit
from cpmm.seeds import seeded_generator
from cpmm.training.epochs import EpochData, Rows
from cpmm.training.loss import LossTraining
from tests.oracles import SubnormalNumbers, assert_moments

FLOOR = -6.0
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "precision": "32-true",
    "deterministic": True,
    "checkpoint_every_n_epochs": 1,
}


def make(generator: torch.Generator, **changes) -> EinsumNetwork:
    """A small network with unequal variances and weights, float64."""
    sizes = {"n_features": 5, "image_shape": None, "n_replicas": 2, "depth": 2}
    sizes |= {"n_sums": 2, "n_leaves": 3, "floor": FLOOR} | changes
    model = EinsumNetwork(**sizes, generator=generator).double()
    with torch.no_grad():
        for parameter in (model.raw_log_variance, model.root_logit):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def walk(model: EinsumNetwork, leaf: Callable, multiply: Callable) -> np.ndarray:
    """Go through the circuit node by node; what is mixed are arrays.

    Args:
        model: The network.
        leaf: Value of a feature under a Gaussian, from the feature, its mean and its deviation.
        multiply: Value of a product from those of its factors.
    """
    mean = model.mean.detach().numpy()
    raw = model.raw_log_variance.detach().numpy()
    deviation = np.exp(0.5 * (model.floor + np.logaddexp(0, raw - model.floor)))
    logits = [logit.detach().numpy() for logit in model.logit]

    def components(replica: int, level: int, region: int) -> list[np.ndarray]:
        if level == model.depth:
            features = model.index[replica * 2**level + region].tolist()
            values = []
            for i in range(model.n_leaves):
                gaussians = [(m, mean[replica, m, i], deviation[replica, m, i])
                             for m in features if m < model.n_features]  # fmt: skip
                value = leaf(*gaussians[0])
                for gaussian in gaussians[1:]:
                    value = multiply(value, leaf(*gaussian))
                values.append(value)
            return values
        left, right = (components(replica, level + 1, 2 * region + half) for half in (0, 1))
        products = [multiply(a, b) for a in left for b in right]
        sums = []
        for logit in logits[model.depth - 1 - level][replica * 2**level + region]:
            weight = (1 - SMOOTHING) * softmax(logit) + SMOOTHING / len(products)
            sums.append(sum(w * product for w, product in zip(weight, products, strict=True)))
        return sums

    tops = [top for replica in range(model.n_replicas) for top in components(replica, 0, 0)]
    weight = softmax(model.root_logit.detach().numpy().ravel())
    return sum(w * top for w, top in zip(weight, tops, strict=True))


def slow_log_prob(model: EinsumNetwork, x: Tensor) -> Tensor:
    points = x.double().numpy()
    density = walk(model, lambda m, mean, deviation: norm.pdf(points[:, m], mean, deviation),
                   lambda a, b: a * b)  # fmt: skip
    return torch.from_numpy(np.log(density))


def slow_moments(model: EinsumNetwork) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance, from means (the first row) and second moments of independent parts."""

    def leaf(m: int, mean: float, deviation: float) -> np.ndarray:
        value = np.zeros((model.n_features + 1, model.n_features))
        value[0, m], value[m + 1, m] = mean, mean**2 + deviation**2
        return value

    def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        value = a + b
        value[1:] += np.outer(a[0], b[0]) + np.outer(b[0], a[0])
        return value

    value = walk(model, leaf, multiply)
    return value[0], value[1:] - np.outer(value[0], value[0])


SHAPES = [
    {"n_features": 1, "depth": 0},
    {"n_features": 4, "depth": 0, "n_replicas": 3},
    {"n_features": 3, "depth": 1},
    {"n_features": 5, "depth": 2},
    {"n_features": 11, "depth": 3, "n_replicas": 1, "n_sums": 3, "n_leaves": 2},
    {"n_features": 12, "image_shape": (1, 3, 4), "depth": 2, "n_replicas": 3},
    {"n_features": 12, "image_shape": (2, 3, 2), "depth": 3, "n_sums": 1, "n_leaves": 1},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_log_prob_is_that_of_the_circuit(shape, generator):
    model = make(generator, **shape)
    x = 2 * torch.randn(6, model.n_features, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(model.log_prob(x).detach(), slow_log_prob(model, x))
    assert model.n_parameters == count_parameters(
        model.n_features, model.n_replicas, model.depth, model.n_sums, model.n_leaves
    )


def test_it_integrates_to_one(generator):
    model = make(generator, n_features=2, depth=1)
    axis = torch.linspace(-20, 20, 401, dtype=torch.float64)
    with torch.no_grad():
        density = model.log_prob(torch.cartesian_prod(axis, axis)).exp()
    assert density.sum().item() * 0.1**2 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[5]])
def test_samples_have_the_moments_of_the_circuit(shape, generator):
    model = make(generator, **shape, batch_size=3000)
    points = model.sample(20_000, generator)
    assert points.shape == (20_000, model.n_features)
    assert_moments(points, *slow_moments(model))


def test_gradients_are_those_of_differences(generator):
    model = make(generator, n_features=6)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    model.loss(x, generator).backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in model.parameters())
    directions = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()
    ]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), directions, strict=True))
    ends = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):  # forward, then as far back
            for parameter, direction in zip(model.parameters(), directions, strict=True):
                parameter.add_(step * direction)
            ends.append(model.loss(x, generator))
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, slope, rtol=1e-6, atol=1e-9)


def test_loss_is_nats_per_dimension(generator):
    model = make(generator)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(model.loss(x, generator), -model.log_prob(x).mean() / 5)


def test_single_precision_is_scored_in_double(generator):
    model = make(generator, n_features=48, depth=4).float()
    x = 3 * torch.randn(9, 48, generator=generator, dtype=torch.float64)
    score = model.log_prob(x)
    assert score.dtype == torch.float64
    torch.testing.assert_close(score, model.double().log_prob(x))
    # Sums of 48 terms of up to 1e3 nats.
    torch.testing.assert_close(model.float().log_prob(x.float()), score.float(), rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.log_prob(x), score)


def test_unlikely_pairs_do_not_underflow(generator):
    model = make(generator, n_features=2, depth=1, n_leaves=2).float()
    with torch.no_grad():
        model.raw_log_variance.fill_(0.0)
        model.mean[:, :, 0], model.mean[:, :, 1] = -20.0, 20.0
        model.logit[0].copy_(torch.tensor([200.0, 0, 0, 0]))  # the pair of likeliest has e^-200
    x = torch.full((1, 2), 20.0)
    assert bool(torch.isfinite(model.log_prob(x)))
    score = model.log_prob(x).detach()
    torch.testing.assert_close(score, slow_log_prob(model.double(), x).float())


@pytest.mark.parametrize("scale", [1, 50])  # 50: the likeliest pair may have the least weight
def test_sums_take_no_subnormal_numbers_and_lose_no_digit(scale, generator):
    value = -120 * torch.rand(4, 6, 50, generator=generator)  # nats, of two regions' halves
    logit = scale * torch.randn(2, 3, 36, generator=generator)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in (value, logit)]
        with SubnormalNumbers() as subnormal:
            sums = _sum_products(inputs[0], _weights(inputs[1]))
            sums.mean().backward()
        assert scale > 1 or subnormal.operations == []  # else the softmax itself has some
        results.append((sums, *(tensor.grad for tensor in inputs)))
    for single, double in zip(*results, strict=True):
        torch.testing.assert_close(single, double.float(), rtol=1e-5, atol=1e-7)


def test_batches_do_not_matter_without_gradients(generator):
    model = make(generator, batch_size=3)
    x = torch.randn(10, 5, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.log_prob(x), model._log_prob(x))


@pytest.mark.parametrize(("n_features", "depth"), [(1, 0), (5, 2), (13, 3), (16, 4)])
@pytest.mark.parametrize("image", [False, True])
def test_every_feature_lies_in_one_region(n_features, depth, image, generator):
    shape = (1, 1, n_features) if image else None
    for replica in range(3):
        regions = leaf_regions(n_features, shape, depth, replica, generator)
        assert regions.shape == (2**depth, -(-n_features // 2**depth))
        assert sorted(regions[regions < n_features].tolist()) == list(range(n_features))
        assert bool(((regions == n_features).sum(1) <= 1).all())


def test_images_are_cut_across_rows_and_columns_in_turn(generator):
    quarters = [{0, 1, 4, 5}, {2, 3, 6, 7}, {8, 9, 12, 13}, {10, 11, 14, 15}]
    for replica, order in enumerate([(0, 1, 2, 3), (0, 2, 1, 3)]):
        regions = leaf_regions(16, (1, 4, 4), 2, replica, generator)
        assert [set(region.tolist()) for region in regions] == [quarters[i] for i in order]
    channels = leaf_regions(8, (2, 2, 2), 2, 0, generator)
    assert [set(region.tolist()) for region in channels] == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]


def test_replicas_of_a_table_are_dealt_anew(generator):
    index = make(generator, n_features=16, depth=2).index
    assert not torch.equal(index[:4], index[4:])


def test_kmeans_finds_separate_groups_in_each_set(generator):
    label = torch.arange(60) % 3
    centres = torch.tensor([[[0.0, 0], [9, 0], [0, 9]], [[5.0, 5], [-5, 5], [5, -5]]])
    points = centres[:, label].mT + 0.1 * torch.randn(2, 2, 60, generator=generator)
    best = torch.full((2,), torch.inf)
    for _ in range(20):  # one start of random points may put two in a group
        group, centre = group_columns(points, 3, generator, 5)
        nearest = centre.gather(1, group.unsqueeze(2).expand(-1, -1, 2)).mT
        best = torch.minimum(best, (points - nearest).square().mean((1, 2)))
    assert bool((best < 0.02).all())


def blobs(generator: torch.Generator, n: int = 600) -> Tensor:
    """Six features, the first three and the last three dependent, in three groups."""
    label = torch.randint(3, (n,), generator=generator)
    centres = torch.tensor([[0.0, 0, 3, 3, -3, 0], [3, -3, 0, 0, 0, 3], [-3, 3, -3, -3, 3, -3]])
    return centres[label] + 0.3 * torch.randn(n, 6, generator=generator)


@pytest.mark.parametrize("shape", [{"depth": 0}, {"depth": 2}, {"image_shape": (1, 2, 3)}])
def test_it_starts_from_data(shape, generator):
    model = make(generator, n_features=6, n_leaves=4, n_sums=3, **shape).float()
    x, held_out = blobs(generator), blobs(generator)
    one = make(generator, n_features=6, n_leaves=1, n_sums=1, **shape).float()
    random = model.loss(held_out).item()
    for each in (model, one):
        each.initialize(x, generator)
    # The product of the features' Gaussians.
    product = norm.logpdf(held_out, x.mean(0), x.std(0, correction=0)).sum(1)
    torch.testing.assert_close(one.log_prob(held_out).detach(), torch.tensor(product).float())
    assert model.loss(held_out).item() < one.loss(held_out).item() - 0.3 < random


def test_it_starts_from_features_that_repeat(generator):
    model = make(generator, n_features=6)
    x = torch.randint(2, (40, 6), generator=generator).double()
    x[:, 0] = 7.5
    model.initialize(x, generator)
    assert bool(torch.isfinite(model.log_prob(x)).all())
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert bool((model.log_variance >= FLOOR).all())


def test_equal_seeds_give_equal_networks():
    def run(seed: int) -> list[Tensor]:
        generator = seeded_generator(seed)
        model = make(generator, n_features=6)
        model.initialize(blobs(generator), generator)
        return [*model.state_dict().values(), model.sample(5, generator)]

    assert all(torch.equal(a, b) for a, b in zip(run(3), run(3), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(run(3), run(4), strict=True))


def test_weights_carry_the_regions(generator):
    first, second = (make(generator, n_features=16) for _ in range(2))
    x = torch.randn(4, 16, generator=generator, dtype=torch.float64)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.log_prob(x), first.log_prob(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("n_parameters", "n_features", "image_shape", "n_replicas", "least"),
    [
        (80_000, 784, (1, 28, 28), 1, 0.97),
        (1_000_000, 784, (1, 28, 28), 2, 0.97),
        (6000, 64, (1, 8, 8), 1, 0.95),
        (3000, 8, None, 4, 0.95),
        (80_000, 2, None, 4, 0.95),
        (50, 1, None, 2, 0.9),
    ],
)
def test_the_size_is_matched(n_parameters, n_features, image_shape, n_replicas, least, generator):
    model = EinsumNetwork.of_size(
        n_parameters, n_features, image_shape, n_replicas, FLOOR, generator
    )
    assert least * n_parameters <= model.n_parameters <= n_parameters
    assert model.depth == usual_depth(n_features)
    if model.depth > 1:
        assert model.n_sums <= 2 * model.n_leaves
        assert model.n_leaves <= 2 * model.n_sums


def test_no_allowed_sizes_come_closer():
    sizes = match_sizes(5000, 10, 2, 3)
    allowed = [
        total
        for k in range(1, 40)
        for i in range(-(-k // 2), 2 * k + 1)
        if (total := count_parameters(10, 2, 3, k, i)) <= 5000
    ]
    assert count_parameters(10, 2, 3, *sizes) == max(allowed)


def test_usual_depths():
    assert [usual_depth(m) for m in (1, 2, 3, 8, 64, 784)] == [0, 1, 1, 2, 4, 6]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_features": 0}, "n_features is 0: expected 1 or more"),
        ({"n_replicas": 0}, "n_replicas is 0"),
        ({"n_sums": 0}, "n_sums is 0"),
        ({"n_leaves": -1}, "n_leaves is -1"),
        ({"depth": -1}, "depth is -1: expected 0 to 2"),
        ({"depth": 3}, "depth is 3: expected 0 to 2, so that each .* of the 5 features"),
        ({"image_shape": (1, 2, 3)}, r"image_shape \(1, 2, 3\) has 6 pixels: expected .* = 5"),
    ],
)
def test_sizes_out_of_range_raise(changes, match, generator):
    with pytest.raises(ValueError, match=match):
        make(generator, **changes)


def test_points_of_another_width_raise(generator):
    model = make(generator)
    for use in (model.log_prob, lambda x: model.initialize(x, generator)):
        for shape in ((3, 4), (5,)):
            with pytest.raises(ValueError, match=r"x must be \(N, 5\), the einsum network has 5"):
                use(torch.zeros(shape))
    with pytest.raises(
        ValueError, match=r"there are 2 points to start from, .* up to 3 components"
    ):
        model.initialize(torch.zeros(2, 5), generator)


def test_too_few_parameters_raise(generator):
    with pytest.raises(ValueError, match="n_parameters is 30: an einsum network with M = 8"):
        EinsumNetwork.of_size(30, 8, None, 2, FLOOR, generator)


def test_it_trains_by_its_loss(generator, tmp_path):
    model = make(generator, n_features=6).float()
    x, held_out = blobs(generator), blobs(generator, 200)
    model.initialize(x, generator)
    before = model.loss(held_out).item()
    module = LossTraining(model, 6, noise=0.0, learning_rate=0.05, n_warmup_epochs=0, seed=0)
    rows = EpochData(
        lambda epoch, draws: Rows(x=x),
        lambda epoch: held_out,
        50,
        seed=0,
        n_rows=lambda epoch: len(x),
    )
    fit("einet", module, rows, TRAINER, tmp_path, gradient_clip=10.0, quiet=True)
    assert model.loss(held_out).item() == pytest.approx(module.best["value"], rel=1e-5)
    assert module.best["value"] < before - 0.05
