"""The progress of a loop in one line."""

from __future__ import annotations

import sys
import time

EVERY = 15.0  # seconds between two lines where there is no terminal


class ProgressLine:
    """One line that a person can follow: rewritten on a terminal, else printed now and then."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.terminal = sys.stdout.isatty()
        self.every = 0.2 if self.terminal else EVERY
        self.started = self.printed = time.monotonic()

    def is_due(self, since: float = 0.0) -> bool:
        """Whether it is time for another line: after the latest, and after the moment ``since``."""
        return time.monotonic() - max(self.printed, since) >= self.every

    def show(self, *parts: str, last: bool = False) -> None:
        """Print ``name | part | part``; ``last`` ends the line on a terminal, too."""
        self.printed = time.monotonic()
        line = " | ".join([self.name, *parts])
        end = "\n" if last or not self.terminal else "\r"
        print(f"\x1b[2K{line}" if self.terminal else line, end=end, flush=True)

    def pace(self, done: int, n: int, unit: str = "it") -> tuple[str, str]:
        """Say how fast it went since the start, and how long the rest takes, of ``n`` in all."""
        rate = done / max(1e-9, time.monotonic() - self.started)
        left = (n - done) / max(1e-9, rate)
        return f"{rate:.{0 if rate >= 10 else 1}f} {unit}/s", f"eta {duration(left)}"


def duration(seconds: float) -> str:
    """Write a time in minutes, or hours if it is two or more: 6.4m, 2.1h."""
    return f"{seconds / 60:.1f}m" if seconds < 7200 else f"{seconds / 3600:.1f}h"
