"""Time the mixture's log-density beside its peers, in one run, as ratios.

    python benchmarks/log_density.py

The peer does the same work, MixtureSameFamily over LowRankMultivariateNormal, on the same points. It
forms (points, components, features), which takes gigabytes; ours is timed on 2048 points beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.distributions import Categorical, LowRankMultivariateNormal, MixtureSameFamily

from cpmm.factor_analyzers import FactorAnalyzers
from cpmm.mixture import Mixture


def time_calls(function: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=784)
    parser.add_argument("--components", type=int, default=250)
    parser.add_argument("--factors", type=int, default=6)
    parser.add_argument("--points", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    sizes = parser.parse_args()
    m, k, r = sizes.features, sizes.components, sizes.factors
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    fa = FactorAnalyzers(
        normal(k).log_softmax(0), normal(k, m), 0.3 * normal(k, m, r), normal(k, m).clamp(-2, 2)
    )
    x = normal(sizes.points, m)
    ours64 = Mixture(fa, (k,))
    peer64 = MixtureSameFamily(
        Categorical(logits=fa.log_weight),
        LowRankMultivariateNormal(fa.mean, fa.loading, fa.log_diagonal.exp()),
    )
    with torch.no_grad():
        expected = peer64.log_prob(x)
        difference = ((ours64.log_prob(x) - expected) / expected).abs().max()
        fa32 = fa.to(torch.float32)
        ours = Mixture(fa32, (k,))
        peer = MixtureSameFamily(
            Categorical(logits=fa32.log_weight),
            LowRankMultivariateNormal(fa32.mean, fa32.loading, fa32.log_diagonal.exp()),
        )
        few = x.float()
        many = few.repeat(max(1, 2048 // len(few)), 1)
        seconds_peer = time_calls(lambda: peer.log_prob(few), sizes.repeats)
        seconds_ours = time_calls(lambda: ours.log_prob(few), sizes.repeats)
        seconds_many = time_calls(lambda: ours.log_prob(many), sizes.repeats)
    print(
        f"{m} features x {k} components x {r} factors, {torch.get_num_threads()} threads, float32"
    )
    print(f"largest relative difference in float64: {difference:.1e}")
    print(f"torch MixtureSameFamily, {len(few)} points: {1e3 * seconds_peer:.1f} ms")
    print(
        f"ours, {len(few)} points: {1e3 * seconds_ours:.1f} ms, {seconds_peer / seconds_ours:.0f} x"
    )
    per_point = seconds_peer / len(few) / (seconds_many / len(many))
    print(f"ours, {len(many)} points: {1e3 * seconds_many:.1f} ms, {per_point:.0f} x by the point")


if __name__ == "__main__":
    main()
