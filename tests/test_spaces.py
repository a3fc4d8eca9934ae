from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cpmm.odes import Solver
from cpmm.spaces import Curriculum, flow_spaces, noise_spaces, space_positions
from cpmm.teacher import Flow
from tests.oracles import LinearField, assert_moments, linear_solution


@pytest.mark.parametrize("n", [2, 3, 51])
def test_positions_go_evenly_from_latent_to_input(n):
    positions = space_positions(n)
    np.testing.assert_allclose(positions, [1 - i / (n - 1) for i in range(n)], atol=1e-15)
    assert (float(positions[0]), float(positions[-1])) == (1.0, 0.0)


def test_fewer_than_two_spaces_raise():
    with pytest.raises(ValueError, match=r"spaces\.n_spaces is 1: expected at least 2"):
        space_positions(1)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_flow_spaces_are_the_flow_at_each_position(generator, method):
    matrix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    solver = Solver(method, n_steps=100, interpolation="cubic", rtol=1e-8, atol=1e-8)
    positions = space_positions(7)
    spaces = flow_spaces(Flow(LinearField(matrix), solver), x, positions)
    torch.testing.assert_close(spaces, linear_solution(matrix, x, positions), rtol=1e-6, atol=1e-6)
    assert torch.equal(spaces[-1], x)  # the input space is the data, untouched
    assert not spaces.requires_grad


def test_noise_spaces_have_the_marginals_of_flow_matching(generator):
    n = 40_000
    factor = torch.tensor([[2.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    x = 3 + torch.randn(n, 2, generator=generator, dtype=torch.float64) @ factor.T
    noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    positions = space_positions(5)
    spaces = noise_spaces(x, noise, positions)
    assert torch.equal(spaces[0], noise)
    assert torch.equal(spaces[-1], x)
    for v, space in zip(positions.tolist(), spaces, strict=True):
        covariance = (1 - v) ** 2 * (factor @ factor.T).numpy() + v**2 * np.eye(2)
        assert_moments(space, np.full(2, 3 * (1 - v)), covariance)


def test_curriculum_walks_through_the_spaces_once():
    for spaces, each, last in itertools.product(range(4), range(4), range(3)):
        schedule = [space for space in range(spaces) for _ in range(each)] + [None] * last
        if not schedule:
            with pytest.raises(ValueError, match="at least one epoch"):
                Curriculum(spaces, each, last)
            continue
        curriculum = Curriculum(spaces, each, last)
        assert curriculum.n_epochs == len(schedule)
        assert curriculum.n_guided_epochs == len(schedule) - last
        assert [curriculum.space(epoch) for epoch in range(len(schedule))] == schedule


@pytest.mark.parametrize("counts", [(-1, 1, 5), (3, -1, 9), (3, 1, -1)])
def test_negative_counts_raise(counts):
    with pytest.raises(ValueError, match="counts of 0 or more"):
        Curriculum(*counts)
