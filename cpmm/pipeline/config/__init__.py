"""The configuration: what its options may be, how it is composed, what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = dict[str, Any]


def pick(config: Mapping[str, Any], *names: str) -> Config:
    """Take entries of a mapping, for keyword arguments named as in conf/."""
    return {name: config[name] for name in names}
