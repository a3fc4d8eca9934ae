"""A training step of the method, part by part, and what other ways to compute the field change."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import torch

from cases.timing import Row, time_in_turns
from cpmm.factor_analyzers import FactorAnalyzers
from cpmm.fields import VaryingField
from cpmm.odes import Solver
from cpmm.pipeline.config.compose import compose_preset
from cpmm.pipeline.models.flows import make_blocks, make_field
from cpmm.pipeline.models.runtime import seeded
from cpmm.trajectory import StateLayout, Trajectories, pseudotime_grid

PARTS = ("solve", "likelihood", "likelihood backward", "solve backward", "optimizer")
PRESETS = ("mnist", "mnist_cpu_plain", "mnist_cpu")  # the paper's field, a small one, many factors


class Step:
    """One step up the likelihood of random points; remembers the shortest time of each part."""

    def __init__(
        self,
        trajectories: Trajectories,
        x: torch.Tensor,
        n_pseudotimes: int,
        dtype: torch.dtype | None,
        tf32: bool,
    ) -> None:
        self.trajectories, self.x, self.dtype, self.tf32 = trajectories, x, dtype, tf32
        self.optimizer = torch.optim.Adam(trajectories.parameters(), lr=1e-4)
        self.times = pseudotime_grid(n_pseudotimes, x)
        self.seconds = dict.fromkeys(PARTS, float("inf"))

    def __call__(self) -> None:
        """Take the step."""
        device = self.x.device.type

        def now() -> float:
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        torch.backends.cudnn.allow_tf32 = self.tf32  # of convolutions alone, as in training
        clock = [now()]
        with torch.autocast(device, self.dtype) if self.dtype else nullcontext():
            mixture = self.trajectories.mixture(self.times)
            clock.append(now())
            # The same numbers cut off from the ODE: its gradients are then taken apart.
            solved = vars(mixture.components)
            cut = {name: value.detach().requires_grad_() for name, value in solved.items()}
            components = FactorAnalyzers(**cut)
            mixture = type(mixture)(components, mixture.cluster_sizes)
            loss = -mixture.cluster_joint_log_prob(self.x).logsumexp(1).mean() / self.x.shape[1]
        clock.append(now())
        loss.backward()
        clock.append(now())
        torch.autograd.backward(list(solved.values()), [value.grad for value in cut.values()])
        clock.append(now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.append(now())
        for name, start, end in zip(PARTS, clock, clock[1:], strict=False):
            self.seconds[name] = min(self.seconds[name], end - start)


def time_training_step(quick: bool, repeats: int, compiled: bool, device: str) -> list[Row]:
    """Time the steps of presets on random points; ``compiled``: torch.compile of the field too."""
    rows = []
    for preset in PRESETS:
        side = 14 if quick else 28
        generator = torch.Generator().manual_seed(0)
        options = compose_preset(preset, [])["cpmm"]
        layout = StateLayout(side**2, options["n_factors"], options["augmentation"])
        images = SimpleNamespace(n_features=side**2, image_shape=(1, side, side))
        blocks = make_blocks(options["field"], images)
        with seeded(0):
            field = make_field(options["field"], images, layout.n_maps, blocks)
        if options["weight_knots"] is not None:
            field = VaryingField(field, options["weight_knots"])
        initial = 0.1 * torch.randn(options["n_clusters"], layout.size, generator=generator)
        solver = Solver(**options["solver"])
        trajectories = Trajectories(layout, field, initial, solver, blocks=blocks).to(device)
        x = torch.randn(options["batch_size"], layout.n_features, generator=generator).to(device)
        sizes = (
            f"R = {layout.n_factors}, width {options['field']['width']}, {layout.n_maps} maps of"
        )
        steps = f"{options['solver']['n_steps']} steps"
        rows.append(Row(f"{preset}: {sizes} {side} x {side}, {steps}, batch {len(x)}"))
        rows += _time_variants(trajectories, x, options["n_pseudotimes"], repeats, compiled)
    return rows


def _time_variants(
    trajectories: Trajectories, x: torch.Tensor, n_pseudotimes: int, repeats: int, compiled: bool
) -> list[Row]:
    def variant(
        change: Callable[[Trajectories], object],
        dtype: torch.dtype | None = None,
        tf32: bool = False,
    ) -> Step:
        other = deepcopy(trajectories)
        change(other)
        return Step(other, x, n_pseudotimes, dtype, tf32)

    steps = {
        "plain": variant(lambda other: None),
        "bfloat16 autocast": variant(lambda other: None, torch.bfloat16),
    }
    if x.is_cuda:
        steps["tf32 in convolutions"] = variant(lambda other: None, tf32=True)
    if compiled:  # needs a C++ compiler
        steps["torch.compile of the field"] = variant(lambda other: other.field.compile())
    seconds = time_in_turns(steps, repeats)
    whole = seconds["plain"]
    rows = [Row("whole step", whole, 1 / whole, "steps a second")]
    for part, of_part in steps["plain"].seconds.items():
        rows.append(Row(f"  {part}", of_part, 100 * of_part / whole, "% of the step"))
    for name in list(steps)[1:]:
        rows.append(Row(f"step with {name}", seconds[name], seconds[name] / whole, "x plain time"))
    return rows
