"""From configuration to fields and flows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from cpmm.data import DataSplits
from cpmm.fields import Blocks, ConvField, MLPField
from cpmm.odes import Solver
from cpmm.pipeline.config import pick
from cpmm.pipeline.models.runtime import choose, seeded
from cpmm.pipeline.progress import ProgressLine
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


def make_teacher(
    config: Mapping[str, Any], data: DataSplits, seed: int, name: str = "teacher"
) -> Flow:
    """Build an untrained teacher of the section ``name``; the seed draws its weights."""
    with seeded(seed, 10):
        field = make_field(config["field"], data, maps=1)
    trace = "exact" if data.n_features <= config["exact_trace_up_to"] else "hutchinson"
    return Flow(field, Solver(**config["solver"], name=f"{name}.solver"), trace)


def flow_log_prob(
    flow: Flow,
    z: Tensor,
    generator: Generator,
    batch_size: int,
    title: str | None = None,
    what: str = "points",
    alive: Callable[[], None] = lambda: None,
) -> Tensor:
    """Log-density of points by a flow, batch by batch, with one progress line.

    Args:
        flow: With the solver that it is scored by.
        z: (N, M).
        generator: Of Hutchinson's vectors, on the flow's device.
        batch_size: Points of a batch.
        title: How the progress line begins; None prints none.
        what: The points, for the progress line.
        alive: Called with every evaluation of the field.

    Returns:
        Nats, (N,), float64, on the CPU.
    """
    n, done, n_calls = len(z), 0, 0
    line = ProgressLine(title or "")

    def count(*_: object) -> None:
        nonlocal n_calls
        n_calls += 1
        alive()

    hook = flow.field.register_forward_hook(count)
    log_prob = []
    for i, batch in enumerate(z.float().split(batch_size), 1):
        log_prob.append(flow.log_prob(batch.to(generator.device), generator).double().cpu())
        done += len(batch)
        if title is not None and (done == n or line.is_due()):
            calls = f"{math.ceil(n_calls / i)} calls of the field a batch"
            _, eta = line.pace(done, n)
            line.show(f"{done}/{n} {what}", calls, eta, last=done == n)
    hook.remove()
    return torch.cat(log_prob)
