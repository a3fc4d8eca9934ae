from __future__ import annotations

import pytest
import torch

from cpmm.data import SPLITS, DataSplits, split_indices
from cpmm.preprocessing import Augmentation, Preprocessing


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
