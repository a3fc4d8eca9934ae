from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch import Tensor, nn

from cpmm.fields import Blocks, ConvField, MLPField, SeparateFields, VaryingField
from cpmm.odes import Solver
from cpmm.trajectory import (
    StateLayout,
    Trajectories,
    draw_pseudotimes,
    inverse_soft_floor,
    pseudotime_grid,
    soft_floor,
)
from tests.oracles import LinearField, linear_solution

N_CLUSTERS, N_FEATURES = 3, 4


def make_trajectories(
    layout: StateLayout, generator: torch.Generator, field: nn.Module | None = None, **options
) -> Trajectories:
    torch.manual_seed(0)
    field = field or MLPField(layout.size, 8, 1)
    initial = torch.randn(N_CLUSTERS, layout.size, generator=generator)
    return Trajectories(layout, field, initial, Solver(**options)).double()


@given(
    m=st.integers(1, 6),
    r=st.integers(1, 6),
    augmentation=st.sampled_from([0.0, 0.4, 2.0]),
    learned_weight=st.booleans(),
    floor=st.sampled_from([-20.0, -6.0, 0.0]),
    seed=st.integers(0, 2**31),
)
def test_read_undoes_write(m, r, augmentation, learned_weight, floor, seed):
    layout = StateLayout(m, min(r, m), augmentation, "variable", learned_weight, floor)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)

    mean, loading = normal(m), normal(m, layout.n_factors)
    log_diagonal = floor + 4 * normal(m).exp()
    free = normal(layout.n_maps - layout.n_factors - 2, m)
    state = layout.write(mean, loading, log_diagonal, free)
    assert state.shape == (2, 3, layout.size)
    got = layout.read(state)
    assert torch.equal(got[0], mean)
    assert torch.equal(got[1], loading)
    # torch's softplus drops log1p(e^-x) < 2.1e-9 where x > 20.
    torch.testing.assert_close(got[2], log_diagonal, rtol=1e-12, atol=3e-9)
    weight = free[..., 0, :].mean(-1) if learned_weight else torch.zeros(2, 3, dtype=torch.float64)
    torch.testing.assert_close(got[3], weight)


@pytest.mark.parametrize("learned_weight", [False, True])
@pytest.mark.parametrize(("augmentation", "n_free"), [(0, 0), (1, 1), (4, 4)])
def test_sizes_are_those_of_the_paper(learned_weight, augmentation, n_free):
    layout = StateLayout(N_FEATURES, 2, augmentation, learned_weight=learned_weight)
    joint = 1 + 2 + 1 + learned_weight  # mean, loadings, log d, log pi
    assert layout.n_joint == joint
    assert layout.size == joint * (1 + n_free) * N_FEATURES


@given(st.floats(1e-3, 500.0), st.floats(-50.0, 5.0))
def test_soft_floor_has_an_inverse(above, floor):
    y = torch.tensor(floor + above, dtype=torch.float64)
    x = inverse_soft_floor(y, floor)
    torch.testing.assert_close(soft_floor(x, floor), y, rtol=1e-9, atol=3e-9)


def test_soft_floor_bounds_and_lets_large_values_pass():
    x = torch.linspace(-60, 60, 241, dtype=torch.float64)
    y = soft_floor(x, -6.0)
    assert bool((y >= -6).all())
    assert bool((y.diff() >= 0).all())
    np.testing.assert_allclose(y, np.logaddexp(-6, x.numpy()), atol=3e-9)


@pytest.mark.parametrize("floor", [-6.0, -2.0])
@pytest.mark.parametrize("diagonal", ["constant", "variable"])
def test_diagonal_is_above_its_floor_and_constant_if_asked(generator, diagonal, floor):
    layout = StateLayout(N_FEATURES, 2, 1.0, diagonal, log_diagonal_floor=floor)
    log_diagonal = make_trajectories(layout, generator).mixture(pseudotime_grid(5)).components
    log_diagonal = log_diagonal.log_diagonal.detach()
    assert bool((log_diagonal > floor).all())
    distinct = [len(set(row.tolist())) for row in log_diagonal]
    assert distinct == [1 if diagonal == "constant" else N_FEATURES] * len(distinct)


@pytest.mark.parametrize("learned_weight", [False, True])
def test_weights_sum_to_one_in_each_trajectory(generator, learned_weight):
    layout = StateLayout(N_FEATURES, 1, 1.0, learned_weight=learned_weight)
    trajectories = make_trajectories(layout, generator)
    with torch.no_grad():
        trajectories.cluster_logit.copy_(torch.tensor([0.0, 1.0, -2.0]))
    log_weight = trajectories.mixture(pseudotime_grid(5)).components.log_weight.detach().numpy()
    eta = np.exp([0.0, 1.0, -2.0])
    eta /= eta.sum()
    np.testing.assert_allclose(logsumexp(log_weight.reshape(3, 5), axis=1), np.log(eta))
    uniform = np.allclose(log_weight.reshape(3, 5), np.log(eta / 5)[:, None])
    assert uniform != learned_weight


def test_mixture_reads_the_states_of_its_times(generator):
    layout = StateLayout(N_FEATURES, 2, 0.5, learned_weight=True)
    field = LinearField(0.1 * torch.randn(layout.size, layout.size, generator=generator))
    trajectories = make_trajectories(
        layout, generator, field, method="dopri5", rtol=1e-9, atol=1e-9
    )
    times = pseudotime_grid(6).double()
    mixture = trajectories.mixture(times)
    assert mixture.cluster_sizes == (6,) * N_CLUSTERS
    states = linear_solution(field.matrix, trajectories.initial, times)
    for c in range(N_CLUSTERS):
        weights = states[:, c].reshape(6, layout.n_maps, N_FEATURES)[:, 4].mean(1)
        for j in range(6):
            # The map of row i holds feature by feature: mean, two loadings, log d, log pi.
            maps = states[j, c].reshape(layout.n_maps, N_FEATURES).numpy()
            k = 6 * c + j
            fa = mixture.components
            close = {"rtol": 1e-6, "atol": 1e-6}
            np.testing.assert_allclose(fa.mean[k].detach(), maps[0], **close)
            np.testing.assert_allclose(fa.loading[k].detach(), maps[1:3].T, **close)
            log_diagonal = np.logaddexp(layout.log_diagonal_floor, maps[3])
            np.testing.assert_allclose(fa.log_diagonal[k].detach(), log_diagonal, **close)
            log_weight = weights.log_softmax(0)[j] - math.log(N_CLUSTERS)
            np.testing.assert_allclose(fa.log_weight[k].detach(), log_weight, **close)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_extraction_on_a_grid_equals_the_trajectory(generator, interpolation):
    layout = StateLayout(N_FEATURES, 2, 1.0)
    trajectories = make_trajectories(layout, generator, interpolation=interpolation)
    grid = pseudotime_grid(7)
    mixture = trajectories.mixture(grid)
    states = trajectories.states(grid)
    assert states.shape == (N_CLUSTERS, 7, layout.size)
    for j in range(7):
        alone = trajectories.mixture(grid[j : j + 1]).components
        at_j = torch.arange(N_CLUSTERS) * 7 + j
        assert torch.equal(mixture.components.mean[at_j], alone.mean)
        assert torch.equal(mixture.components.loading[at_j], alone.loading)
        # A vectorized softplus may round the last bit otherwise.
        torch.testing.assert_close(
            mixture.components.log_diagonal[at_j], alone.log_diagonal, rtol=1e-14, atol=1e-14
        )


def test_trajectories_start_at_their_initial_states(generator):
    layout = StateLayout(N_FEATURES, 1, 1.0)
    trajectories = make_trajectories(layout, generator)
    assert torch.equal(trajectories.states(torch.zeros(1))[:, 0], trajectories.initial)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_a_solve_in_another_order_of_the_state_is_the_same(generator, interpolation):
    height, width = 4, 6
    layout, solver = StateLayout(height * width, 1, 1.0), Solver("euler", 5, interpolation)
    initial = torch.randn(N_CLUSTERS, layout.size, generator=generator)
    torch.manual_seed(0)
    squeezing = ConvField((layout.n_maps, height, width), 4, 1, squeeze=2)
    blocks = Blocks(height, width, 2)
    inner = ConvField((4 * layout.n_maps, *blocks.shape), 4, 1)
    inner.load_state_dict(squeezing.state_dict())
    plain = Trajectories(layout, squeezing, initial, solver)
    folded = Trajectories(layout, inner, initial, solver, blocks=blocks)
    grid = pseudotime_grid(7)
    torch.testing.assert_close(folded.states(grid), plain.states(grid))
    x = torch.randn(5, height * width, generator=generator)
    for trajectories in (plain, folded):
        trajectories.mixture(grid).log_prob(x).sum().backward()
    torch.testing.assert_close(folded.initial.grad, plain.initial.grad)
    for one, other in zip(inner.parameters(), squeezing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learned", [False, True])
def test_cluster_weights_are_learned_or_uniform(generator, learned):
    layout = StateLayout(N_FEATURES, 1, 0.0)
    initial = torch.randn(N_CLUSTERS, layout.size, generator=generator)
    trajectories = Trajectories(layout, MLPField(layout.size, 4, 1), initial, Solver(), learned)
    x = torch.randn(5, N_FEATURES, generator=generator)
    trajectories.mixture(pseudotime_grid(3)).log_prob(x).sum().backward()
    assert (trajectories.cluster_logit.grad is not None) == learned
    weight = trajectories.mixture(pseudotime_grid(3)).components.log_weight.exp()
    torch.testing.assert_close(weight.detach(), torch.full((9,), 1 / 9))


def test_a_separate_field_moves_its_own_trajectory_only(generator):
    layout = StateLayout(N_FEATURES, 1, 1.0)
    torch.manual_seed(0)
    field = SeparateFields([MLPField(layout.size, 4, 1) for _ in range(N_CLUSTERS)])
    trajectories = make_trajectories(layout, generator, field)
    for c in range(N_CLUSTERS):
        trajectories.zero_grad()
        trajectories.states(pseudotime_grid(3))[c].square().sum().backward()
        moved = [
            any(p.grad is not None and bool(p.grad.any()) for p in one.parameters())
            for one in field.fields
        ]
        assert moved == [other == c for other in range(N_CLUSTERS)]
        assert trajectories.initial.grad.any(1).tolist() == moved


def test_separate_fields_with_equal_weights_are_a_shared_field(generator):
    layout = StateLayout(N_FEATURES, 1, 1.0)
    shared = MLPField(layout.size, 4, 1).double()
    initial = torch.randn(N_CLUSTERS, layout.size, generator=generator, dtype=torch.float64)
    both = [
        Trajectories(layout, field, initial, Solver()).states(pseudotime_grid(4).double())
        for field in (shared, SeparateFields([shared] * N_CLUSTERS))
    ]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("gradient", ["backpropagation", "checkpoint", "adjoint"])
@pytest.mark.parametrize("separate", [False, True])
def test_weights_that_vary_learn_at_every_knot(gradient, separate, generator):
    layout = StateLayout(N_FEATURES, 1, 1.0)
    torch.manual_seed(0)
    fields = [VaryingField(MLPField(layout.size, 4, 1), 3).double() for _ in range(N_CLUSTERS)]
    field = SeparateFields(fields) if separate else fields[0]
    initial = torch.randn(N_CLUSTERS, layout.size, generator=generator, dtype=torch.float64)
    found = []
    for chosen in (gradient, "backpropagation"):
        field.zero_grad()
        solver = Solver("rk4", 20, gradient=chosen)
        trajectories = Trajectories(layout, field, initial, solver)
        trajectories.states(pseudotime_grid(4).double()).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in field.parameters() if p.requires_grad]))
        assert bool(found[-1].any())
    # The adjoint's own steps, across the kinks at the knots, miss by their error.
    torch.testing.assert_close(*found, rtol=1e-3 if gradient == "adjoint" else 1e-9, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_factors": N_FEATURES + 1}, r"\(R\) is 5: expected 1 <= R <= M = 4"),
        ({"n_factors": 0}, r"\(R\) is 0"),
        ({"diagonal": "full"}, "cpmm.diagonal is 'full'"),
        ({"augmentation": -1.0}, "cpmm.augmentation is -1.0"),
    ],
)
def test_unknown_layouts_raise(options, message):
    with pytest.raises(ValueError, match=message):
        StateLayout(**{"n_features": N_FEATURES, "n_factors": 1} | options)


@pytest.mark.parametrize("shape", [(0, 48), (3, 47), (48,)])
def test_initial_states_of_another_shape_raise(shape):
    layout = StateLayout(N_FEATURES, 2, 2.0)
    assert layout.size == 48
    with pytest.raises(ValueError, match=r"must be \(C, 48\) with C >= 1: got"):
        Trajectories(layout, MLPField(48, 4, 1), torch.zeros(shape), Solver())


@pytest.mark.parametrize("n", [1, 2, 25])
@pytest.mark.parametrize("kind", ["grid", "uniform", "stratified"])
def test_pseudotimes_ascend_inside_the_unit_interval(kind, n, generator):
    times = draw_pseudotimes(kind, n, generator)
    assert times.shape == (n,)
    assert bool(((times >= 0) & (times <= 1)).all())
    assert bool((times.diff() >= 0).all())


def test_pseudotimes_are_distributed_as_they_say(generator):
    n, draws = 4, 4000
    times = torch.stack([draw_pseudotimes("stratified", n, generator) for _ in range(draws)])
    assert bool(((times * n).floor() == torch.arange(n)).all())
    error = 1 / n / math.sqrt(12 * draws)
    middle = (torch.arange(n) + 0.5) / n
    assert bool(((times.mean(0) - middle).abs() < 5 * error).all())
    times = torch.stack([draw_pseudotimes("uniform", n, generator) for _ in range(draws)])
    # Order statistic j of n uniform draws is Beta(j, n + 1 - j).
    j = torch.arange(1, n + 1)
    deviation = (j * (n + 1 - j) / ((n + 1) ** 2 * (n + 2))).sqrt()
    assert bool(((times.mean(0) - j / (n + 1)).abs() < 5 * deviation / math.sqrt(draws)).all())
    np.testing.assert_allclose(draw_pseudotimes("grid", 5, generator), [0, 0.25, 0.5, 0.75, 1])


def test_a_grid_has_the_precision_of_its_model():
    grid = pseudotime_grid(11, torch.zeros(1, dtype=torch.float64))
    np.testing.assert_allclose(grid, np.linspace(0, 1, 11), rtol=1e-15)


@pytest.mark.parametrize("kind", ["grid", "uniform", "stratified"])
def test_no_pseudotimes_raise(kind, generator):
    with pytest.raises(ValueError, match=r"pseudotimes \(G\) must be at least 1: got 0"):
        draw_pseudotimes(kind, 0, generator)


def test_unknown_pseudotimes_raise(generator):
    with pytest.raises(ValueError, match=r"cpmm\.pseudotimes is 'sobol'"):
        draw_pseudotimes("sobol", 3, generator)
