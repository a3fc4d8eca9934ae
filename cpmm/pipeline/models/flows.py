"""From configuration to fields and flows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from cpmm.data import DataSplits
from cpmm.fields import Blocks, ConvField, MLPField
from cpmm.odes import Solver
from cpmm.pipeline.config import pick
from cpmm.pipeline.models.runtime import choose, seeded
from cpmm.teacher import Flow


def make_blocks(config: Mapping[str, Any], data: DataSplits) -> Blocks | None:
    """Order of the state in which a squeezing field of the section ``cpmm.field`` computes."""
    if config["kind"] != "conv" or config["squeeze"] == 1 or data.image_shape is None:
        return None
    return Blocks(*data.image_shape[1:], config["squeeze"])


def make_field(
    config: Mapping[str, Any], data: DataSplits, maps: int, blocks: Blocks | None = None
) -> nn.Module:
    """Build the vector field of a section ``field`` on ``maps`` stacked maps of M features.

    ``blocks`` is the order that states come in, by :func:`make_blocks`; None: that of images.

    Raises:
        ValueError: If the kind is unknown, or a convolution is asked of a table.
    """
    options = pick(config, "width", "depth", "activation", "n_frequencies", "last_layer_scale")

    def mlp() -> nn.Module:
        return MLPField(maps * data.n_features, **options)

    def conv() -> nn.Module:
        if data.image_shape is None:
            raise ValueError("field.kind is 'conv', but the data are no images: choose mlp")
        channels, height, width = data.image_shape
        options.update(pick(config, "kernel_size", "coordinates"))
        if blocks is not None:
            return ConvField((maps * channels * blocks.side**2, *blocks.shape), **options)
        return ConvField((maps * channels, height, width), **options, **pick(config, "squeeze"))

    return choose("field.kind", config["kind"], {"mlp": mlp, "conv": conv})()


def make_teacher(config: Mapping[str, Any], data: DataSplits, seed: int) -> Flow:
    """Build an untrained teacher; the seed draws its weights."""
    with seeded(seed, 10):
        field = make_field(config["field"], data, maps=1)
    trace = "exact" if data.n_features <= config["exact_trace_up_to"] else "hutchinson"
    return Flow(field, Solver(**config["solver"]), trace)
