"""Names of any script in figures: fonts that have their letters, or a way to write them without."""

from __future__ import annotations

import warnings
from contextlib import suppress
from functools import lru_cache

from matplotlib import get_data_path
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text


def drawable(name: object, longest: int = 60) -> str:
    r"""Write a name on one line, cut where it is long, with letters that some font here has.

    Others become escapes such as ``\u6570``, after a warning that says which font to install.
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in str(name)).split()) or '""'
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    lost = [c for c in text if not c.isascii() and families(c) is None]
    if lost:
        warnings.warn(
            f"no font here has {''.join(dict.fromkeys(lost))[:20]!a} of the name {text!a}: "
            "figures show such letters as escapes; install Noto fonts, for Chinese, Japanese and "
            "Korean fonts-noto-cjk",
            stacklevel=2,
        )
    return "".join(c.encode("unicode_escape").decode() if c in lost else c for c in text)


def choose_fonts(figure: Figure) -> Figure:
    """Give each text of a figure the fonts that have its letters."""
    for text in figure.findobj(Text):
        found = [families(c) for c in dict.fromkeys(text.get_text()) if not c.isascii()]
        if more := [name for name in dict.fromkeys(found) if name]:
            text.set_fontfamily([*text.get_fontfamily(), *more])
    return figure


@lru_cache(maxsize=10_000)
def families(letter: str) -> str | None:
    """The first family of fonts that has a letter, "" the default one; None: there is none."""
    if ord(letter) in _letters(findfont(FontProperties())):
        return ""
    bundled = get_data_path()  # of mathematics, with letters at places of their own
    for font in sorted(fontManager.ttflist, key=lambda font: (font.name, font.fname)):
        plain = font.style == "normal" and str(font.weight) in ("400", "normal", "regular", "book")
        last = "lastresort" in font.name.lower().replace(" ", "")
        usable = plain and not last and not font.fname.startswith(bundled)
        if usable and ord(letter) in _letters(font.fname):
            return font.name
    return None


@lru_cache(maxsize=1000)
def _letters(path: str) -> frozenset[int]:
    with suppress(OSError, RuntimeError):  # a font that matplotlib cannot draw with
        font = FT2Font(path)
        if font.scalable:
            return frozenset(font.get_charmap())
    return frozenset()
