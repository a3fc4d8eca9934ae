from __future__ import annotations

import pytest
import torch
from conftest import TINY
from sklearn.datasets import load_digits

from cpmm.data import DataSplits
from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.models import mixtures as models
from cpmm.pipeline.models import runtime
from cpmm.preprocessing import Augmentation, Preprocessing

N = 150
ALONE = ["cpmm.curriculum=false", "cpmm.pseudo_label_spaces=0"]


@pytest.fixture(scope="module")
def data():
    raw = torch.from_numpy(load_digits().data).to(torch.uint8)
    label = torch.from_numpy(load_digits().target)
    bounds = {"train": slice(0, N), "validation": slice(N, N + 30), "test": slice(N + 30, N + 60)}
    return DataSplits(
        raw={split: raw[part] for split, part in bounds.items()},
        label={split: label[part] for split, part in bounds.items()},
        preprocessing=Preprocessing(17, 0.01, (0.0,) * 64, (1.0,) * 64),
        augmentation=Augmentation(),
        noise_seed=0,
        image_shape=(1, 8, 8),
        feature_names=tuple(map(str, range(64))),
        class_names=tuple("0123456789"),
    )


def fine_tuning_rows(data, *overrides, epoch=0, preset="digits"):
    config = compose_preset(preset, [*TINY, *ALONE, *overrides])
    _, epochs = models.make_mixture_training(config["cpmm"], config["mixture"], data, None)
    rows = epochs.rows(epoch, torch.Generator().manual_seed(epoch))
    assert len(rows) == epochs.n_rows(epoch)
    return config, rows.tensors


def levels(data, x):
    """The grey levels that points were drawn from."""
    return (17 * data.preprocessing.inverse(x.double())).floor().to(torch.uint8)


@pytest.mark.parametrize("n_draws", [1, 2])
def test_an_epoch_of_fine_tuning_is_of_as_many_points_as_asked_for(n_draws, data):
    overrides = ["cpmm.n_points=20", f"cpmm.n_draws={n_draws}", "cpmm.initialization.kind=gaussian"]
    _, first = fine_tuning_rows(data, *overrides)
    _, second = fine_tuning_rows(data, *overrides, epoch=1)
    assert first.keys() == {"x"}
    for rows in (first, second):
        assert rows["x"].shape == (20 * n_draws, 64)
        drawn = levels(data, rows["x"])
        assert len(torch.unique(drawn, dim=0)) == 20  # each as often, at each draw
        assert bool((drawn[:, None] == data.raw["train"]).all(2).any(1).all())
    assert not torch.equal(levels(data, first["x"]), levels(data, second["x"]))


def test_groups_and_views_lie_beside_their_points(data):
    config, rows = fine_tuning_rows(
        data, "cpmm.n_points=40", "cpmm.n_draws=2", "cpmm.pseudo_label_weight=0.1", "cpmm.n_clusters=3",
        "cpmm.consistency_weight=0.1", "cpmm.views={rotate:0,shear:0,scale:0,translate:0}",
    )  # fmt: skip
    assert {len(tensor) for tensor in rows.values()} == {80}
    assert torch.equal(levels(data, rows["x"]), levels(data, rows["view"]))  # of no change at all
    assert not torch.equal(rows["x"], rows["view"])  # with noise of its own
    group = models.make_groups(config["cpmm"], data)
    same = (levels(data, rows["x"])[:, None] == data.raw["train"]).all(2)
    assert torch.equal(rows["group"], group[same.float().argmax(1)])


def test_neighbours_group_all_images_or_some(data):
    overrides = [
        "cpmm.initialization.kind=neighbours", "cpmm.initialization.n_points=80", "cpmm.n_clusters=4",
        "cpmm.initialization.n_views=2",
    ]  # fmt: skip
    config = compose_preset("digits", [*TINY, *overrides])
    group = models.make_groups(config["cpmm"], data)
    assert group.shape == (N,)
    assert group.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(group, models.make_groups(config["cpmm"], data))
    index = torch.arange(0, N, 2)
    assert models.make_groups(config["cpmm"], data, index).shape == (75,)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cpmm.n_points=151"], "cpmm.n_points is 151: expected at most 150"),
        (
            ["cpmm.pseudo_label_weight=1", "cpmm.initialization.kind=random"],
            "'random' makes no groups",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(overrides, message, data):
    with pytest.raises(ValueError, match=message):
        fine_tuning_rows(data, *overrides)


@pytest.mark.parametrize(
    "override", ["cpmm.initialization.kind=neighbours", "cpmm.consistency_weight=1"]
)
def test_a_table_has_no_views(override, data):
    from dataclasses import replace

    table = replace(data, image_shape=None)
    with pytest.raises(ValueError, match="views need images"):
        fine_tuning_rows(
            table, "cpmm.initialization.kind=gaussian", override, "cpmm.n_factors=1",
            "cpmm.field.kind=mlp",
        )  # fmt: skip


@pytest.mark.parametrize("ode", ["shared", "separate"])
def test_weights_vary_with_as_many_knots_as_asked_for(ode, data):
    sizes = []
    for knots in ("null", "2", "3"):
        overrides = [*TINY, f"cpmm.ode={ode}", f"cpmm.weight_knots={knots}"]
        config = compose_preset("digits", overrides)["cpmm"]
        field = models.make_trajectories(config, data).field
        sizes.append(sum(parameter.numel() for parameter in field.parameters()))
    assert sizes[1:] == [2 * sizes[0], 3 * sizes[0]]


def test_more_knots_than_steps_are_refused(data):
    overrides = [*TINY, "cpmm.solver.method=euler", "cpmm.solver.n_steps=4"]
    config = compose_preset("digits", [*overrides, "cpmm.weight_knots=5"])["cpmm"]
    models.make_trajectories(config, data)
    with pytest.raises(ValueError, match="weight_knots is 6: a solver of 4 steps has no use"):
        models.make_trajectories(config | {"weight_knots": 6}, data)


@pytest.mark.parametrize("precision", ["32-true", "tf32"])
@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cpu"])
def test_what_lightning_does_not_compute_goes_to_the_same_device(
    accelerator, precision, monkeypatch
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision != "tf32")
    trainer = {"accelerator": accelerator, "precision": precision}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    wanted = "cpu" if accelerator == "cpu" else "cuda"
    assert runtime.compute_device(trainer) == wanted
    assert torch.backends.cudnn.allow_tf32 is (precision == "tf32")
    assert runtime.compute_device(trainer, exact=True) == wanted
    assert torch.backends.cudnn.allow_tf32 is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.compute_device(trainer) == "cpu"
