from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import vector_to_parameters

from cpmm.fields import (
    ACTIVATIONS,
    Blocks,
    ConvField,
    MLPField,
    SeparateFields,
    TimeFeatures,
    VaryingField,
)

SHAPE = (2, 5, 3)


def make_field(kind: str, **options) -> nn.Module:
    torch.manual_seed(0)
    field = MLPField(30, 8, 2, **options) if kind == "mlp" else ConvField(SHAPE, 8, 2, **options)
    return field.double()


@pytest.fixture
def h(generator) -> torch.Tensor:
    return torch.randn(6, 30, generator=generator, dtype=torch.float64)


def test_time_features_are_sines_and_cosines():
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    features = TimeFeatures(3).double()
    angles = math.pi * np.outer(t, [1, 2, 4])
    expected = np.concatenate([t[:, None], np.sin(angles), np.cos(angles)], 1)
    np.testing.assert_allclose(features(t), expected, atol=1e-6)
    assert features.size == 7
    assert TimeFeatures().size == 1


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("n_frequencies", [0, 2])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_velocities_have_the_states_shape_and_depend_on_time(kind, activation, n_frequencies, h):
    field = make_field(kind, activation=activation, n_frequencies=n_frequencies)
    now, later = (field(torch.tensor(t, dtype=torch.float64), h) for t in (0.1, 0.9))
    assert now.shape == h.shape
    assert now.dtype == h.dtype
    assert bool((now != later).any(1).all())


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_each_state_moves_on_its_own_and_at_its_own_time(kind, h):
    field = make_field(kind)
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    together = field(t, h)
    for i in range(6):
        torch.testing.assert_close(field(t[i], h[i : i + 1])[0], together[i])
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(field(t[order], h[order]), together[order])


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_velocities_pass_gradcheck(kind, h):
    field = make_field(kind)
    t = torch.tensor(0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(field, (t, h[:2].clone().requires_grad_()))


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_the_last_layers_scale_scales_the_velocity(kind, h):
    t = torch.tensor(0.3, dtype=torch.float64)
    whole, small = (make_field(kind, last_layer_scale=scale)(t, h) for scale in (1.0, 0.01))
    torch.testing.assert_close(small, 0.01 * whole)


def test_squeezing_is_a_convolution_over_blocks_of_pixels():
    torch.manual_seed(0)
    field = ConvField((3, 6, 4), 5, 1, squeeze=2).double()
    plain = ConvField((12, 3, 2), 5, 1).double()
    plain.load_state_dict(field.state_dict())
    h = torch.randn(2, 72, dtype=torch.float64)
    t = torch.tensor(0.4, dtype=torch.float64)

    def blocks(
        state: torch.Tensor,
    ) -> torch.Tensor:  # channel, row, column of the block before its place
        image = state.reshape(2, 3, 3, 2, 2, 2)
        return image.permute(0, 1, 3, 5, 2, 4).reshape(2, 72)

    torch.testing.assert_close(blocks(field(t, h)), plain(t, blocks(h)))


def test_blocks_reorder_each_image_of_a_stack_by_itself():
    blocks = Blocks(4, 6, 2)
    h = torch.arange(2 * 3 * 24.0).reshape(2, 72)
    folded = blocks.fold(h)
    assert blocks.shape == (2, 3)
    assert folded[0, :6].tolist() == [0, 2, 4, 12, 14, 16]  # the first pixels of the blocks
    torch.testing.assert_close(folded[:, 24:48], blocks.fold(h[:, 24:48]))
    assert torch.equal(blocks.unfold(folded), h)


@pytest.mark.parametrize("squeeze", [0, 2, 4])
def test_blocks_must_divide_the_image(squeeze):
    with pytest.raises(ValueError, match="divisor of the image's sides, 6 and 9"):
        ConvField((1, 6, 9), 4, 1, squeeze=squeeze)


def test_a_convolution_sees_the_state_in_image_shape():
    # Circular in neither axis: a change at one pixel reaches depth + 1 pixels away, no farther.
    field = ConvField((1, 9, 11), 4, 1).double()
    still = torch.zeros(1, 99, dtype=torch.float64)
    poked = still.clone()
    poked[0, 4 * 11 + 5] = 1
    t = torch.tensor(0.5, dtype=torch.float64)
    changed = (field(t, poked) != field(t, still)).reshape(9, 11)
    expected = torch.zeros(9, 11, dtype=torch.bool)
    expected[2:7, 3:8] = True
    assert torch.equal(changed, expected)


def test_coordinates_break_the_symmetry_of_translation():
    image = torch.zeros(1, 81, dtype=torch.float64)
    t = torch.tensor(0.5, dtype=torch.float64)
    for coordinates in (False, True):
        torch.manual_seed(0)
        field = ConvField((1, 9, 9), 4, 1, coordinates=coordinates).double()
        inner = field(t, image).reshape(9, 9)[2:7, 2:7]  # untouched by the padding
        assert (inner.std() > 1e-3) == coordinates


def test_separate_fields_take_a_row_each(h):
    fields = [make_field("mlp", activation=name) for name in ("sin", "tanh")]
    t = torch.tensor(0.3, dtype=torch.float64)
    got = SeparateFields(fields)(t, h[:2])
    for c in range(2):
        assert torch.equal(got[c : c + 1], fields[c](t, h[c : c + 1]))
    with pytest.raises(ValueError, match="zip"):
        SeparateFields(fields)(t, h)


@pytest.fixture
def varying(generator) -> VaryingField:
    """Three knots at pseudotimes 0, 1/2 and 1, of different weights."""
    field = VaryingField(make_field("conv"), 3)
    with torch.no_grad():
        for parameter in field.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise)
    return field


def with_weights(vector):
    field = make_field("conv")
    vector_to_parameters(vector.detach(), field.parameters())
    return field


def test_weights_that_vary_start_as_one_field(h):
    field = make_field("conv")
    for t in torch.linspace(0, 1, 7, dtype=torch.float64):
        torch.testing.assert_close(VaryingField(field, 4)(t, h), field(t, h))


def test_at_a_knot_the_weights_are_its_own(varying, h):
    for k, t in enumerate(torch.tensor([0, 0.5, 1], dtype=torch.float64)):
        torch.testing.assert_close(varying(t, h), with_weights(varying.knots[k])(t, h))


def test_between_knots_the_weights_are_on_a_line(varying, h):
    t = torch.tensor(0.85, dtype=torch.float64)
    between = with_weights(0.3 * varying.knots[1] + 0.7 * varying.knots[2])
    torch.testing.assert_close(varying(t, h), between(t, h))


def test_a_time_teaches_the_knots_beside_it(varying, h):
    varying(torch.tensor(0.1, dtype=torch.float64), h).square().sum().backward()
    taught = [knot.grad is not None and bool(knot.grad.any()) for knot in varying.knots]
    assert taught == [True, True, False]


def test_sets_of_weights_are_all_that_there_is_to_learn_and_to_save(varying):
    n_weights = sum(p.numel() for p in make_field("conv").parameters())
    assert {name: len(p) for name, p in varying.named_parameters()} == {
        f"knots.{k}": n_weights for k in range(3)
    }
    assert varying.state_dict().keys() == dict(varying.named_parameters()).keys()
    field = make_field("conv")
    other = VaryingField(field, 3)
    assert list(field.parameters())  # the given one keeps its own
    other.load_state_dict(varying.state_dict())
    for ours, theirs in zip(other.knots, varying.knots, strict=True):
        assert torch.equal(ours, theirs)


def test_weights_that_vary_pass_gradcheck(varying, h):
    t = torch.tensor(0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(varying, (t, h[:2].clone().requires_grad_()))


def test_weights_that_vary_take_one_time_for_all_states(varying, h):
    with pytest.raises(ValueError, match=r"those of one time: got times of shape \(6,\)"):
        varying(torch.linspace(0, 1, 6, dtype=torch.float64), h)
    with pytest.raises(ValueError, match="n_knots >= 2: got 1"):
        VaryingField(make_field("mlp"), 1)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_unknown_activations_raise(kind):
    with pytest.raises(ValueError, match="unknown activation 'relu6': choose one of"):
        make_field(kind, activation="relu6")


@pytest.mark.parametrize(("width", "depth"), [(0, 1), (4, 0)])
def test_empty_networks_raise(width, depth):
    for build in (lambda: MLPField(3, width, depth), lambda: ConvField(SHAPE, width, depth)):
        with pytest.raises(ValueError, match="depth >= 1 and width >= 1"):
            build()


def test_an_even_kernel_raises():
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        ConvField(SHAPE, 4, 1, kernel_size=4)
