from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from cpmm.views import PART, AffineViews, warp_images

SHAPE = (1, 12, 15)
WHOLE = {"rotate": 15, "shear": 10, "scale": 0.1, "translate": 2}


def images(n, generator, shape=SHAPE, levels=256):
    return torch.randint(0, levels, (n, math.prod(shape)), generator=generator).to(torch.uint8)


def warp(raw, shape=SHAPE, rotate=0.0, shear=0.0, scale=0.0, translate=(0.0, 0.0)):
    n = len(raw)
    amounts = (torch.full((n,), float(value)) for value in (rotate, shear, scale))
    return warp_images(raw, shape, *amounts, torch.tensor(translate).float().expand(n, 2))


def dense_warp(image, rotate, shear, scale, translate):
    """scipy's, in rows and columns, from the forward map in words: shear, rotate, resize, shift."""
    angle, slope = np.deg2rad(rotate), np.tan(np.deg2rad(shear))
    along_rows = np.array([[1, slope], [0, 1]])  # of (x, y)
    anticlockwise = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    forward = (1 + scale) * anticlockwise @ along_rows
    swap = np.array([[0, 1], [1, 0]])
    back = swap @ np.linalg.inv(forward) @ swap  # of (row, column)
    centre = (np.array(image.shape) - 1) / 2
    offset = centre - back @ (centre + np.array(translate)[::-1])
    return ndimage.affine_transform(image, back, offset, order=1, mode="grid-constant", cval=0)


@pytest.mark.parametrize("shape", [SHAPE, (3, 8, 8), (1, 1, 5)])
def test_no_amount_no_change(shape, generator):
    raw = images(50, generator, shape)
    assert torch.equal(AffineViews(image_shape=shape)(raw, generator), raw)


@pytest.mark.parametrize(
    "amounts",
    [
        (30, 0, 0, (0, 0)),
        (-75, 0, 0, (0, 0)),
        (0, 20, 0, (0, 0)),
        (0, 0, 0.3, (0, 0)),
        (0, 0, 0, (1.25, -3.5)),
        (-12, 8, -0.2, (2.4, 1.1)),
    ],
)
def test_a_known_change_is_that_of_scipy(amounts, generator):
    raw = images(5, generator)
    got = warp(raw, SHAPE, *amounts).reshape(-1, *SHAPE[1:]).numpy()
    for view, image in zip(got, raw.reshape(-1, *SHAPE[1:]).double().numpy(), strict=True):
        # Half a level is the rounding; the positions are float32.
        np.testing.assert_allclose(view, dense_warp(image, *amounts), atol=0.5 + 1e-2)


def test_what_can_be_seen_without_a_formula(generator):
    raw = images(3, generator, (2, 9, 9))
    image = raw.reshape(3, 2, 9, 9).numpy()
    for turns in (1, 2, 3):
        got = warp(raw, (2, 9, 9), rotate=90 * turns).reshape(image.shape)
        np.testing.assert_array_equal(got, np.rot90(image, turns, axes=(2, 3)))  # anticlockwise
    got = warp(raw, (2, 9, 9), translate=(2, -1)).reshape(image.shape).numpy()
    np.testing.assert_array_equal(got[:, :, :8, 2:], image[:, :, 1:, :7])  # right and up
    assert not got[:, :, 8].any()
    assert not got[..., :2].any()
    flat = torch.full((1, 81), 200, dtype=torch.uint8)
    grown = warp(flat, (1, 9, 9), scale=0.5)
    assert torch.equal(grown, flat)  # nothing comes from outside
    assert (warp(flat, (1, 9, 9), scale=-0.5) > 0).sum() < 36


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_views_keep_type_and_range_and_are_the_generator_s(dtype, generator):
    raw = images(PART + 7, generator, (1, 5, 5), levels=17).to(dtype)
    views = AffineViews(**WHOLE, image_shape=(1, 5, 5))
    got = views(raw, torch.Generator().manual_seed(1))
    assert (got.dtype, got.shape) == (raw.dtype, raw.shape)
    assert 0 <= int(got.min()) < int(got.max()) <= 16
    assert torch.equal(got, views(raw, torch.Generator().manual_seed(1)))
    assert not torch.equal(got, views(raw, torch.Generator().manual_seed(2)))
    same = views(raw[:1].expand(100, -1), generator)
    assert len(same.unique(dim=0)) > 90  # each image has amounts of its own


def test_amounts_reach_from_one_end_to_the_other(generator):
    """A bright pixel shifted by up to 3 pixels lands everywhere within 3, and nowhere else."""
    raw = torch.zeros(4000, 15, 15, dtype=torch.uint8)
    raw[:, 7, 7] = 255
    views = AffineViews(translate=3, image_shape=(1, 15, 15))
    weight = views(raw.flatten(1), generator).reshape(-1, 15, 15).double().numpy()
    place = np.arange(15) - 7
    for axis in (1, 2):
        shift = (weight.sum(3 - axis) * place).sum(1) / weight.sum((1, 2))
        assert np.abs(shift).max() <= 3 + 0.02  # whole levels
        standard_error = np.sqrt(3 / 4000)
        assert abs(shift.mean()) < 5 * standard_error
        assert np.histogram(shift, 6, (-3, 3))[0].min() > 500  # of 667


@pytest.mark.parametrize("name", ["rotate", "shear", "scale", "translate"])
@pytest.mark.parametrize("value", [-0.1, 200, math.nan, math.inf])
def test_an_amount_out_of_range_raises(name, value):
    if (name, value) == ("translate", 200):
        value = 1e7
    with pytest.raises(ValueError, match=rf"views\.{name} is {value}: expected 0 to"):
        AffineViews(**{name: value}, image_shape=SHAPE)


def test_tables_and_other_images_raise(generator):
    with pytest.raises(ValueError, match="views need images, this data set is a table"):
        AffineViews(rotate=3)
    views = AffineViews(**WHOLE, image_shape=SHAPE)
    with pytest.raises(ValueError, match="whole grey levels: got float32, real values of a table"):
        views(images(2, generator).float(), generator)
    with pytest.raises(
        ValueError, match=r"1 x 12 x 15 images need \(N, 180\): got shape \(2, 64\)"
    ):
        views(images(2, generator, (1, 8, 8)), generator)
