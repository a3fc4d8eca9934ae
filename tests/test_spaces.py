from __future__ import annotations

import itertools

import numpy as np
import pytest

from cpmm.spaces import Curriculum, space_positions


@pytest.mark.parametrize("n", [2, 3, 51])
def test_positions_go_evenly_from_latent_to_input(n):
    positions = space_positions(n)
    np.testing.assert_allclose(positions, [1 - i / (n - 1) for i in range(n)], atol=1e-15)
    assert (float(positions[0]), float(positions[-1])) == (1.0, 0.0)


def test_fewer_than_two_spaces_raise():
    with pytest.raises(ValueError, match=r"spaces\.n_spaces is 1: expected at least 2"):
        space_positions(1)


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
