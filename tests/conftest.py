from __future__ import annotations

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("cpmm", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("cpmm")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20230723)
