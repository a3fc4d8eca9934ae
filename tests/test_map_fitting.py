from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import logit as scipy_logit
from torch import Tensor

from cpmm.elementwise import ElementwiseMap
from cpmm.initialization import kmeans, local_factor_analyzers
from cpmm.map_fitting import LearnedMap, MapOptions, Space, fit_elementwise_map, initial_knots
from cpmm.mixture import Mixture
from cpmm.preprocessing import STANDARDIZATIONS, Preprocessing

ALPHA = 1e-6
SPACE = {"levels": 256, "alpha": ALPHA, "standardize": "shared"}
OPTIONS = MapOptions(
    n_bins=16, n_points=500, n_components=4, n_factors=2, log_diagonal_floor=-6.0, n_steps=120,
    batch_size=100, learning_rate=0.01, map_rate_factor=5.0,
)  # fmt: skip


def mostly_black(n: int, generator: torch.Generator) -> Tensor:
    """Pictures of 12 pixels, of which a bright stroke covers two to four."""
    start = torch.randint(0, 9, (n, 1), generator=generator)
    length = torch.randint(2, 5, (n, 1), generator=generator)
    place = torch.arange(12)
    stroke = (place >= start) & (place < start + length)
    bright = torch.randint(100, 256, (n, 12), generator=generator)
    return torch.where(stroke, bright, 0).to(torch.uint8)


@pytest.fixture(scope="module")
def pictures() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {name: mostly_black(600, generator) for name in ("train", "validation", "test")}


def fitted(pictures, seed=1, listener=None, **changes) -> ElementwiseMap:
    space = {name: changes.pop(name, value) for name, value in SPACE.items()}
    return fit_elementwise_map(
        pictures["train"], pictures["validation"], **space, options=replace(OPTIONS, **changes),
        generator=torch.Generator().manual_seed(seed), listener=listener,
    )  # fmt: skip


def held_out_nats(pictures, learned: ElementwiseMap | None) -> float:
    """Nats per dimension of the test pictures, by local factor analyzers behind the map."""
    generator = torch.Generator().manual_seed(2)
    pre = Preprocessing.fit(pictures["train"], 256, ALPHA, "shared", generator, map=learned)
    z, _ = pre.forward(pre.dequantize(pictures["train"], generator))
    label = kmeans(z, 4, generator)
    mixture = Mixture(local_factor_analyzers(z, label, 4, 2, -6.0), (4,))
    z, log_det = pre.forward(pre.dequantize(pictures["test"], generator))
    return -float((mixture.log_prob(z) + log_det).mean()) / 12


def test_a_fitted_map_makes_unseen_pictures_likelier(pictures):
    rows = []
    learned = fitted(pictures, listener=rows.append)
    # Of the 0.41 nats (0.59 bits) that a Gaussian loses on a black pixel it wins more than half.
    assert held_out_nats(pictures, learned) < held_out_nats(pictures, None) - 0.2
    assert [row["step"] for row in rows] == list(range(6, 121, 6))
    assert rows[-1]["validation"] < rows[0]["validation"]
    assert learned.n_bins == 16
    np.testing.assert_allclose(
        [learned.knot[0], learned.knot[-1]], scipy_logit([ALPHA, 1 - ALPHA]), rtol=1e-6
    )


def test_same_seed_same_map(pictures):
    first, second, other = (fitted(pictures, seed, n_steps=10) for seed in (1, 1, 2))
    assert first == second
    assert first != other


@pytest.mark.parametrize("n_steps", [1, 3, 25])
def test_every_number_of_steps_ends_with_a_check(pictures, n_steps):
    rows = []
    fitted(pictures, listener=rows.append, n_steps=n_steps)
    assert len(rows) == min(20, n_steps)
    assert rows[-1]["step"] == n_steps


@pytest.mark.parametrize("standardize", STANDARDIZATIONS)
def test_the_space_of_the_fit_is_that_of_the_preprocessing(pictures, generator, standardize):
    """Standardization without a pass over the data is that of samples, whatever the map."""
    raw = pictures["train"].repeat(20, 1)
    logit = Preprocessing(256, ALPHA, (0.0,) * 12, (1.0,) * 12)
    learned = LearnedMap(torch.linspace(-13.8155, 13.8155, 9))
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    shift, scale = Space(raw, logit, standardize).affine(learned)
    pre = Preprocessing.fit(raw, 256, ALPHA, standardize, generator, map=learned.freeze())
    scale = scale.detach()
    assert float(((shift.detach() - torch.tensor(pre.shift)) / scale).abs().max()) < 0.03
    assert float((scale / torch.tensor(pre.scale)).log().abs().max()) < 0.03


def test_an_affine_change_of_the_map_changes_nothing(pictures):
    logit = Preprocessing(256, ALPHA, (0.0,) * 12, (1.0,) * 12)
    space = Space(pictures["train"], logit, "shared")
    x = torch.linspace(-13, 13, 60).reshape(5, 12)
    learned = LearnedMap(torch.linspace(-13.8155, 13.8155, 9))
    z, log_det = space.forward(learned, x)
    with torch.no_grad():
        learned.height += math.log(3)
        learned.log_slope += math.log(3)
    wide, wide_log_det = space.forward(learned, x)
    # The narrowest bin is kept apart from the learned heights: not to the last digit.
    torch.testing.assert_close(wide, z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(wide_log_det, log_det, rtol=1e-3, atol=1e-2)


def test_half_of_the_knots_lie_where_pixels_are_not_black(pictures, generator):
    logit = Preprocessing(256, ALPHA, (0.0,) * 12, (1.0,) * 12)
    raw = pictures["train"]
    x = logit.forward(logit.dequantize(raw, generator))[0].float()
    knot = initial_knots(x, raw, logit, 16)
    assert knot.shape == (17,)
    assert bool((knot.diff() > 0).all())
    assert 8 <= int((knot > scipy_logit(1 / 256)).sum()) <= 12
    black = torch.zeros_like(raw)
    x = logit.forward(logit.dequantize(black, generator))[0].float()
    assert bool((initial_knots(x, black, logit, 2).diff() > 0).all())


def test_a_new_map_is_the_identity():
    learned = LearnedMap(torch.tensor([-13.8155, -3.0, 0.0, 2.0, 13.8155]))
    with torch.no_grad():
        z, log_slope = learned(torch.linspace(-13, 13, 50))
    torch.testing.assert_close(z, torch.linspace(-13, 13, 50), rtol=1e-5, atol=1e-4)
    assert float(log_slope.abs().max()) < 1e-4
    assert learned.freeze().n_bins == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"levels": None, "alpha": None},
            r"data\.map\.kind is spline, but the data are real-valued",
        ),
        ({"n_components": 501}, r"data\.map\.n_components is 501: expected at most 500"),
        ({"alpha": 0.5}, r"data\.alpha"),
        ({"alpha": 1e-300}, r"data\.alpha is 1e-300, the logit of a white pixel is inf: raise it"),
    ],
)
def test_options_that_do_not_fit_are_named(pictures, changes, message):
    with pytest.raises(ValueError, match=message):
        fitted(pictures, **changes)


def test_a_fit_that_diverges_says_so(pictures):
    with pytest.raises(FloatingPointError, match=r"diverged \(step \d+/120\): lower data\.map"):
        fitted(pictures, learning_rate=1e9)
