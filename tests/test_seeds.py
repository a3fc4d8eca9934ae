from __future__ import annotations

import itertools

import torch

from cpmm.seeds import seeded_generator


def test_same_seeds_give_the_same_draws():
    first, second = (torch.rand(5, generator=seeded_generator(3, 1, 4)) for _ in range(2))
    assert torch.equal(first, second)


def test_different_seeds_give_different_streams():
    # Of every length, zeros at the end too: numpy's SeedSequence alone cannot tell [3] from [3, 0].
    seeds = [s for n in (1, 2, 3) for s in itertools.product(range(6), repeat=n)]
    states = {seeded_generator(*s).initial_seed() for s in seeds}
    assert len(states) == len(seeds)


def test_neighbouring_seeds_are_uncorrelated():
    draws = torch.stack([torch.randn(20_000, generator=seeded_generator(0, e)) for e in range(4)])
    correlation = torch.corrcoef(draws) - torch.eye(4)
    assert float(correlation.abs().max()) < 5 / 20_000**0.5
