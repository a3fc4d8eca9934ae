"""Seeded generators: everything random takes one."""

from __future__ import annotations

import numpy as np
import torch


def seeded_generator(*seeds: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator from several integers, such as a seed, a stream and an epoch.

    numpy's ``SeedSequence`` mixes them, so that neighbouring seeds give unrelated streams. It pads
    with zeros; with their number in front, (3,) and (3, 0) differ.
    """
    state = np.random.SeedSequence((len(seeds), *seeds)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
