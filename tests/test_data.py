from __future__ import annotations

import dataclasses

import pytest
import torch

from cpmm import data as data_module
from cpmm.data import SPLITS, DataSplits, split_indices
from cpmm.preprocessing import Augmentation, Preprocessing
from cpmm.views import AffineViews


@pytest.fixture
def splits(generator) -> DataSplits:
    raw = {
        name: torch.randint(0, 16, (n, 6), generator=generator).to(torch.uint8)
        for name, n in zip(SPLITS, (30, 10, 20), strict=True)
    }
    return DataSplits(
        raw=raw,
        label=None,
        preprocessing=Preprocessing.fit(raw["train"], 16, 1e-3, "feature", generator),
        augmentation=Augmentation(flip=True, image_shape=(1, 2, 3)),
        noise_seed=5,
        image_shape=(1, 2, 3),
        feature_names=tuple("abcdef"),
        class_names=(),
    )


@pytest.mark.parametrize("official_test", [0, 25])
def test_splits_share_no_point_and_leave_none_out(official_test):
    split = split_indices(100, None, 15, 10, official_test, seed=0)
    n_test = official_test or 10
    assert {name: len(index) for name, index in split.items()} == {
        "train": 100 - 15 - n_test,
        "validation": 15,
        "test": n_test,
    }
    assert torch.cat(list(split.values())).sort().values.tolist() == list(range(100))
    if official_test:
        assert split["test"].tolist() == list(range(75, 100))
    again = split_indices(100, None, 15, 10, official_test, seed=0)
    assert all(torch.equal(split[name], again[name]) for name in split)
    other = split_indices(100, None, 15, 10, official_test, seed=1)
    assert not torch.equal(split["train"], other["train"])


@pytest.mark.parametrize(
    "counts", [(10, 9, 1), (10, 0, 2), (10, 2, 0), (10, 20, 1), (10, 2, 1), (10, 1, 2)]
)
def test_splits_that_leave_nothing_raise(counts):
    n, n_validation, n_test = counts
    with pytest.raises(ValueError, match="the split leaves"):
        split_indices(n, None, n_validation, n_test, official_test=0, seed=0)


@pytest.mark.parametrize("official_test", [0, 25])
@pytest.mark.parametrize("n_train", [2, 30, 60])
def test_fewer_training_points_leave_the_other_splits_alone(official_test, n_train):
    whole = split_indices(100, None, 15, 10, official_test, seed=0)
    split = split_indices(100, n_train, 15, 10, official_test, seed=0)
    assert torch.equal(split["train"], whole["train"][:n_train])
    for name in ("validation", "test"):
        assert torch.equal(split[name], whole[name])
    n_all = len(whole["train"])
    every = split_indices(100, n_all, 15, 10, official_test, seed=0)
    assert torch.equal(every["train"], whole["train"])


@pytest.mark.parametrize("n_train", [-1, 0, 1, 76, 100])
def test_a_number_of_training_points_that_there_is_not_raises(n_train):
    with pytest.raises(
        ValueError, match=rf"data\.n_train is {n_train}: expected 2 to 75, .* or null"
    ):
        split_indices(100, n_train, 15, 10, official_test=0, seed=0)


def test_a_number_of_training_points_that_is_no_whole_one_raises():
    with pytest.raises(ValueError, match=r"data\.n_train is 30\.0"):
        split_indices(100, 30.0, 15, 10, official_test=0, seed=0)


def test_points_have_one_noise_draw_of_their_split(splits):
    for name in SPLITS:
        z, log_det = splits.points(name)
        again, _ = splits.points(name)
        assert torch.equal(z, again)
        assert z.dtype == log_det.dtype == torch.float64
        x = splits.preprocessing.inverse(z) * 16
        assert torch.equal(x.floor(), splits.raw[name].double())
    first = [(splits.preprocessing.inverse(splits.points(s)[0]) * 16 % 1)[:10] for s in SPLITS]
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first[1], first[2])


def test_draws_are_fresh_augmented_training_points(splits):
    z = splits.draw(3, torch.Generator().manual_seed(1))
    assert z.shape == (90, 6)
    assert z.dtype == torch.float32
    assert torch.equal(z, splits.draw(3, torch.Generator().manual_seed(1)))
    level = (splits.preprocessing.inverse(z.double()) * 16).floor().reshape(3, 30, 2, 3)
    image = splits.raw["train"].double().reshape(30, 2, 3)
    # float32 can round a level up to its upper edge.
    near = {"atol": 1.0, "rtol": 0}
    mirrored = 0
    for draw in level:
        for got, expected in zip(draw, image, strict=True):
            flipped = torch.allclose(got, expected.flip(-1), **near)
            assert flipped or torch.allclose(got, expected, **near)
            mirrored += flipped
    assert 0 < mirrored < 90
    assert len(z.unique(dim=0)) == 90


def test_points_are_drawn_part_by_part_as_at_once(splits, monkeypatch):
    whole = splits.draw(2, torch.Generator().manual_seed(1))
    monkeypatch.setattr(data_module, "PART", 7)
    # A part's last elements may go through another branch of the logarithm, to the last bit.
    torch.testing.assert_close(
        splits.draw(2, torch.Generator().manual_seed(1)), whole, rtol=1e-6, atol=1e-6
    )


def test_draws_of_some_training_points(splits):
    index = torch.tensor([4, 29, 0, 4])
    z = splits.draw(2, torch.Generator().manual_seed(1), index)
    alone = dataclasses.replace(splits, raw=splits.raw | {"train": splits.raw["train"][index]})
    assert torch.equal(z, alone.draw(2, torch.Generator().manual_seed(1)))
    everything = splits.draw(2, torch.Generator().manual_seed(1), torch.arange(30))
    assert torch.equal(everything, splits.draw(2, torch.Generator().manual_seed(1)))


def test_noise_on_some_points_of_a_table_is_in_units_of_all(generator):
    raw = {name: torch.randn(40, 2, generator=generator).double() for name in SPLITS}
    raw["train"][0] = torch.tensor([1e3, -1e3])
    table = DataSplits(
        raw, None, Preprocessing.fit(raw["train"], None, None, "none", generator),
        Augmentation(noise=0.1), 0, None, ("a", "b"), (),
    )  # fmt: skip
    index = torch.arange(1, 40)
    moved = table.draw(50, torch.Generator().manual_seed(1), index).reshape(50, 39, 2)
    deviation = (moved - raw["train"][index].float()).std(0).mean(0)
    expected = 0.1 * raw["train"].std(0).float()
    torch.testing.assert_close(deviation, expected, rtol=0.1, atol=0)


def test_views_are_fresh_dequantized_training_points(splits):
    """Not flipped, though the draws are."""
    still = AffineViews(image_shape=(1, 2, 3))
    z = splits.draw_views(still, torch.Generator().manual_seed(1))
    assert (z.shape, z.dtype) == ((30, 6), torch.float32)
    level = (splits.preprocessing.inverse(z.double()) * 16).floor()
    assert torch.allclose(level, splits.raw["train"].double(), atol=1.0, rtol=0)
    assert torch.equal(z, splits.draw_views(still, torch.Generator().manual_seed(1)))
    assert not torch.equal(z, splits.draw_views(still, torch.Generator().manual_seed(2)))
    moving = AffineViews(rotate=40, translate=1, image_shape=(1, 2, 3))
    index = torch.tensor([3, 3, 3, 3])
    some = splits.draw_views(moving, torch.Generator().manual_seed(1), index)
    assert some.shape == (4, 6)
    assert torch.isfinite(some).all()
    assert len(some.unique(dim=0)) == 4


@pytest.mark.parametrize(
    ("n", "sizes"),
    [
        (100, (50, 25, 25)), (150, (90, 30, 30)), (178, (118, 30, 30)), (410, (286, 62, 62)),
        (1000, (700, 150, 150)), (10**6, (980_000, 10_000, 10_000)),
    ],
)  # fmt: skip
def test_shares_fit_the_table(n, sizes):
    split = split_indices(n, None, 0.15, 0.15, official_test=0, seed=0)
    assert tuple(len(split[name]) for name in SPLITS) == sizes
    same = split_indices(n, None, *sizes[1:], official_test=0, seed=0)
    assert all(torch.equal(split[name], same[name]) for name in SPLITS)


def test_tables_too_small_for_shares_say_what_to_set():
    with pytest.raises(ValueError, match=r"set data\.n_validation to 12 and data\.n_test to 12"):
        split_indices(60, None, 0.15, 0.15, official_test=0, seed=0)
    split_indices(60, None, 12, 12, official_test=0, seed=0)
    with pytest.raises(ValueError, match="5 points are too few"):
        split_indices(5, None, 0.15, 0.15, official_test=0, seed=0)


def test_a_split_is_described():
    said = data_module.describe_split(410, None, 0.15, 20, 0)
    assert said == "410 points: 328 train, 62 validation (15 %, 30 to 10,000), 20 test"
    said = data_module.describe_split(100, 30, 10, 0, 25)
    assert said == (
        "100 points: 30 train (data.n_train), 10 validation, 25 test (the data set's own)"
    )
