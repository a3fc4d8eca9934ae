"""A training step of our einsum network beside SPFlow's of the same architecture and weights.

SPFlow deals features to regions at random; here it gets ours, so that densities can be compared.
"""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

from cases.timing import Row, require_agreement, time_in_turns, unavailable
from cpmm.baselines.einet import SMOOTHING, EinsumNetwork

MODULES = ("spflow.modules.einsum", "spflow.modules.leaves", "spflow.zoo.einet")
SIDES, SIZES, BATCH = (8, 28), (80_000, 1_600_000), 200
FAR = 10
TOLERANCE = 1e-10  # largest relative difference of log-densities in float64
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Step:
    """One step of Adam up the likelihood of points by a network, ours or SPFlow's."""

    def __init__(self, network: nn.Module) -> None:
        self.log_prob = getattr(network, "log_prob", None) or network.log_likelihood
        self.optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

    def __call__(self, x: Tensor) -> None:
        """Take the step."""
        (-self.log_prob(x).mean() / x.shape[1]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def time_einsum_network(quick: bool, repeats: int) -> list[Row]:
    """Compare densities first, then times and memory; without SPFlow, ours alone."""
    rows = unavailable("SPFlow Einet", *MODULES)
    peer = not rows
    for side in SIDES[:1] if quick else SIDES:
        for n_parameters in SIZES[:1] if quick else SIZES:
            rows += _compare(side, n_parameters, repeats, peer, memory=not quick)
    return rows


def make_network(side: int, n_parameters: int) -> EinsumNetwork:
    """Make our network of images of side x side pixels, one replica, at random."""
    shape, generator = (1, side, side), torch.Generator().manual_seed(0)
    return EinsumNetwork.of_size(n_parameters, side**2, shape, 1, -20.0, generator)


@torch.no_grad()
def copy_to_spflow(ours: EinsumNetwork) -> nn.Module:
    """Build SPFlow's network with the regions and the weights of ours, which has one replica."""
    from spflow.modules.einsum import EinsumLayer
    from spflow.modules.leaves import Normal
    from spflow.zoo.einet import Einet

    m, n_leaves = ours.n_features, ours.n_leaves
    loc, scale = ours.mean[0].clone(), (0.5 * ours.log_variance[0]).exp()
    leaves = Normal(
        range(m), n_leaves, loc=loc.unsqueeze(2), scale=scale.unsqueeze(2),
        validate_args=False,  # which takes time
    )  # fmt: skip
    theirs = Einet(
        [leaves], num_sums=ours.n_sums, num_leaves=n_leaves, depth=ours.depth,
        num_repetitions=1, layer_type="einsum",
    ).to(ours.mean)  # fmt: skip
    # Which region has a feature, (M, regions, 1); SPFlow draws samples by buffers of their own.
    region = torch.zeros(len(ours.index), m + 1).scatter_(1, ours.index, 1)[:, :m].T.unsqueeze(2)
    theirs.factorize.indices.copy_(region)
    theirs.factorize.sampling_indices.copy_(region)
    theirs.factorize.sampling_feature_owners.copy_(region.argmax(1))
    layers = [module for module in theirs.modules() if isinstance(module, EinsumLayer)]
    for layer, logit in zip(reversed(layers), ours.logit, strict=True):
        weight = (1 - SMOOTHING) * logit.softmax(-1) + SMOOTHING / logit.shape[-1]
        layer.logits.copy_(weight.log().view_as(layer.logits))
    return theirs


def _compare(side: int, n_parameters: int, repeats: int, peer: bool, memory: bool) -> list[Row]:
    ours = make_network(side, n_parameters)
    sizes = f"{ours.n_parameters} parameters, {ours.n_sums} sums, {ours.n_leaves} leaves"
    rows = [Row(f"{side**2} features, depth {ours.depth}, {sizes}, batch {BATCH}, float32")]
    x = torch.randn(BATCH, side**2, generator=torch.Generator().manual_seed(1))
    if peer:
        with torch.no_grad():
            ours, wide = ours.double(), x.double()
            found = copy_to_spflow(ours).log_likelihood(wide).flatten()
            rows.append(
                require_agreement("SPFlow Einet", "", found, ours.log_prob(wide), TOLERANCE)
            )
    step = Step(ours.float())
    # As images are to leaves of few pixels: differences of hundreds of nats, subnormal numbers.
    far = f"ours, points {FAR} times as far"
    calls = {"ours": lambda: step(x), far: lambda: step(FAR * x)}
    if peer:
        theirs = Step(copy_to_spflow(ours))
        calls["SPFlow Einet"] = lambda: theirs(x)
    seconds = time_in_turns(calls, repeats)
    rows.append(Row("ours, a step", seconds["ours"], 1 / seconds["ours"], "steps a second"))
    for name in list(calls)[1:]:
        ratio = seconds[name] / seconds["ours"]
        rows.append(Row(f"{name}, a step", seconds[name], ratio, "x our time"))
    if peer and memory and CLEAR.exists():
        peaks = []
        for which in ("ours", "theirs"):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a process of its own
                peaks.append(pool.submit(_measure_memory, which, side, n_parameters).result())
        rows.append(Row("ours, memory of a step", None, peaks[0] / 1e6, "MB"))
        rows.append(Row("SPFlow Einet, memory of a step", None, peaks[1] / peaks[0], "x ours"))
    return rows


def _measure_memory(which: str, side: int, n_parameters: int) -> int:
    """Bytes that steps take at their peak, above the network, its gradients and Adam's averages."""
    network: nn.Module = make_network(side, n_parameters)
    step = Step(network if which == "ours" else copy_to_spflow(network))
    x = torch.randn(BATCH, side**2, generator=torch.Generator().manual_seed(1))
    step(x[:2])
    CLEAR.write_text("5")  # the peak so far is forgotten
    before = _resident("VmRSS")
    for _ in range(3):
        step(x)
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())[1])
