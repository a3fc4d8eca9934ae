import sys

import pytest

from cpmm.pipeline import progress
from cpmm.pipeline.progress import ProgressLine, duration


def test_lines_are_printed_now_and_then(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    line = ProgressLine("stage")
    for step in range(1, 41):
        clock[0] += 1
        if step == 40 or line.is_due():
            line.show(f"step {step}/40", *line.pace(step, 40), last=step == 40)
    assert capsys.readouterr().out.splitlines() == [
        "stage | step 15/40 | 1.0 it/s | eta 0.4m",
        "stage | step 30/40 | 1.0 it/s | eta 0.2m",
        "stage | step 40/40 | 1.0 it/s | eta 0.0m",
    ]
    clock[0] += 20
    assert line.is_due()
    assert not line.is_due(since=clock[0] - 1)


def test_on_a_terminal_the_line_is_rewritten_and_ended(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    line = ProgressLine("stage")
    line.show("1/2")
    line.show("2/2", last=True)
    assert capsys.readouterr().out == "\x1b[2Kstage | 1/2\r\x1b[2Kstage | 2/2\n"


def test_the_pace_counts_what_was_done_since_the_start(monkeypatch):
    line = ProgressLine("stage")
    monkeypatch.setattr(progress.time, "monotonic", lambda: line.started + 10)
    assert line.pace(410, 820, "rows") == ("41 rows/s", "eta 0.2m")
    assert line.pace(5, 7205) == ("0.5 it/s", "eta 4.0h")


@pytest.mark.parametrize(("seconds", "said"), [(384, "6.4m"), (7199, "120.0m"), (7560, "2.1h")])
def test_durations_are_minutes_or_hours(seconds, said):
    assert duration(seconds) == said
