from __future__ import annotations

import pytest
import torch

from cpmm.direct import DirectMixture
from cpmm.mixture import Mixture
from tests.oracles import random_factor_analyzers, torch_mixture


def test_it_starts_where_it_is_told(generator):
    fa = random_factor_analyzers(generator, 4, 3, 2)
    mixture = DirectMixture(fa, -20.0).mixture()
    for name, value in vars(fa).items():
        torch.testing.assert_close(getattr(mixture.components, name).detach(), value)
    assert mixture.cluster_sizes == (1, 1, 1, 1)
    assert DirectMixture(fa, -20.0, (3, 1)).mixture().cluster_sizes == (3, 1)


def test_every_parameter_learns_and_the_start_is_left_alone(generator):
    fa = random_factor_analyzers(generator, 4, 3, 2)
    before = {name: value.clone() for name, value in vars(fa).items()}
    model = DirectMixture(fa, -20.0)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = -model.mixture(torch.zeros(1)).log_prob(x).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(bool(p.grad.any()) for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in vars(fa).items())
    mixture: Mixture = model.mixture()
    torch.testing.assert_close(mixture.log_prob(x), torch_mixture(mixture.components).log_prob(x))


def test_the_diagonal_stays_above_its_floor(generator):
    fa = random_factor_analyzers(generator, 2, 3, 1)
    fa.log_diagonal.fill_(-5.9)
    model = DirectMixture(fa, -6.0)
    with torch.no_grad():
        model.raw_diagonal -= 50
    assert bool((model.mixture().components.log_diagonal >= -6).all())


def test_a_start_below_the_floor_raises(generator):
    fa = random_factor_analyzers(generator, 2, 3, 1)
    fa.log_diagonal[1, 2] = -6.5
    with pytest.raises(ValueError, match="above the floor of -6"):
        DirectMixture(fa, -6.0)
