from __future__ import annotations

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("cpmm", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("cpmm")


# Files of few tests that take long: a process that comes to one last works alone for minutes.
LONGEST = (
    "test_sweep.py",
    "test_pipeline.py",
    "test_inputs.py",
    "test_fuzz.py",
    "test_registry.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20230723)
