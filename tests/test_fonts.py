import io
from types import SimpleNamespace

import numpy as np
import pytest

from cpmm import figures, fonts

NAMES = ["été", "كلب", "$a_b$ 5 $", "a\nb\t\x00c", "", "x" * 500, "\\frac{", "<b>&"]  # fmt: skip


def draw(names):
    """Every figure with names in it; a missing glyph is a warning, and warnings are errors."""
    n = len(names)
    drawn = [
        figures.plot_confusion(np.eye(n, dtype=int), names, np.arange(n)),
        figures.plot_trajectory_means(np.random.default_rng(0).normal(size=(n, 3, 4)), None, names),
        figures.plot_trajectory_means(np.zeros((n, 3, 16)), (1, 4, 4), names),
        figures.plot_sweep(names, np.arange(n), {"density": np.arange(n) + 1.0}, [1] * n),
        figures.plot_costs(
            names, names, np.arange(n) + 1.0, np.zeros(n), {"s": np.arange(n) + 1.0}, "bits"
        ),
    ]
    for figure in drawn:
        figure.savefig(io.BytesIO(), dpi=30)
    return drawn


def test_any_name_can_be_drawn():
    draw(NAMES)


def test_letters_that_no_font_has_become_escapes_with_a_warning(monkeypatch):
    monkeypatch.setattr(fonts, "fontManager", SimpleNamespace(ttflist=[]))
    fonts.families.cache_clear()
    with pytest.warns(UserWarning, match="install Noto fonts"):
        drawn = draw(["数据", "\U0001f99c", "ok"])
    fonts.families.cache_clear()
    shown = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert shown == [r"\u6570\u636e", r"\U0001f99c", "ok"]


def test_a_text_gets_the_font_that_has_its_letters(monkeypatch):
    monkeypatch.setattr(fonts, "families", lambda letter: "DejaVu Serif" if letter == "数" else "")
    figure = figures.plot_confusion(np.eye(2), ["数", "é"])
    label, plain = figure.axes[0].get_yticklabels()
    assert label.get_fontfamily() == ["sans-serif", "DejaVu Serif"]
    assert plain.get_fontfamily() == ["sans-serif"]
