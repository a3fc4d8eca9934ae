from __future__ import annotations

import numpy as np
import pytest
import torch

from cpmm.neighbours import _nearest, neighbour_groups
from cpmm.views import AffineViews

SHAPE = (1, 8, 8)


def bars(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Vertical and horizontal bars at any place: only knowing shifts makes two groups of them."""
    image = torch.zeros(n, 8, 8, dtype=torch.uint8)
    kind = torch.arange(n) % 2
    place = torch.randint(2, 6, (n,), generator=generator)
    for i in range(n):
        if kind[i]:
            image[i, place[i], 1:7] = 200
        else:
            image[i, 1:7, place[i]] = 200
    noise = torch.randint(0, 20, image.shape, generator=generator, dtype=torch.uint8)
    return (image + noise).flatten(1), kind


def test_nearest_views_are_those_of_an_exhaustive_search(generator):
    points = torch.randn(40, 3, generator=generator)
    seen = [torch.randn(25, 3, generator=generator) for _ in range(4)]
    distance = np.stack([((points[:, None] - view) ** 2).sum(2) for view in seen]).min(0)
    assert np.array_equal(_nearest(points, seen, 5), np.argsort(distance, 1)[:, :5])


@pytest.mark.parametrize("n_points", [120, 1000])
def test_shifted_images_are_in_one_group(n_points, generator):
    raw, kind = bars(300, generator)
    group = neighbour_groups(
        raw, AffineViews(translate=2, image_shape=SHAPE), 2, generator, n_points, 20, 10
    )
    assert group.shape == (300,)
    agreement = float((group == kind).float().mean())
    assert max(agreement, 1 - agreement) > 0.97


def test_groups_depend_on_the_generator_alone(generator):
    raw, _ = bars(60, generator)
    views = AffineViews(translate=2, rotate=5, image_shape=SHAPE)
    first, second, third = (
        neighbour_groups(raw, views, 3, torch.Generator().manual_seed(seed), 50, 3, 4)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize(("n", "n_groups", "n_neighbours"), [(10, 2, 10), (10, 10, 3)])
def test_a_graph_too_small_is_refused(n, n_groups, n_neighbours, generator):
    raw, _ = bars(n, generator)
    with pytest.raises(ValueError, match="10 images is too small"):
        neighbour_groups(
            raw, AffineViews(image_shape=SHAPE), n_groups, generator, n_neighbours=n_neighbours
        )
