"""The pages of the gallery run, and print what they say they print."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1] / "docs" / "gallery"
spec = importlib.util.spec_from_file_location("gallery_build", HERE / "build.py")
assert spec is not None
assert spec.loader is not None
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

PAGES = list(build.pages())
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
ROOM = 0.03  # last digits of a fit differ from one processor to another, and so do shares


def outputs(text):
    return [said for _, _, said in build.BLOCK.findall(text) if said]


def agree(said, now):
    """Whether two texts have the same words, and numbers that are close."""
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (said, now)]
    same = NUMBER.sub("#", said).split() == NUMBER.sub("#", now).split()
    return same and numbers[0] == pytest.approx(numbers[1], rel=ROOM, abs=ROOM)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_prints_and_draws_what_it_shows(page, tmp_path):
    text = page.read_text()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the best of .* starts", UserWarning)
        now = build.run(page, tmp_path)
    said = list(zip(outputs(text), outputs(now), strict=True))
    assert said
    assert [pair for pair in said if not agree(*pair)] == []
    for name in build.PICTURE.findall(text):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_there_are_six_short_pages_with_small_pictures():
    assert len(PAGES) == 6
    index = (HERE / "README.md").read_text()
    linked = set()
    for page in PAGES:
        text = page.read_text()
        assert f"({page.name})" in index
        assert len(text.splitlines()) <= 75, page.name
        linked |= set(build.PICTURE.findall(text))
    pictures = {picture.name: picture.stat().st_size for picture in HERE.glob("*.png")}
    assert pictures.keys() == linked
    assert max(pictures.values()) < 60_000


def test_texts_agree_but_for_last_digits():
    assert agree("AUROC 0.97 of 12", "AUROC 0.98 of 12")
    assert not agree("AUROC 0.97", "AUROC 0.57")
    assert not agree("AUROC 0.97", "ROC 0.97")
    assert not agree("1 2", "1 2 3")


def test_a_block_that_prints_something_else_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```python\nprint(6 * 7)\n```\n\n```text\n41000\n```\n\nend\n")
    now = build.run(page, tmp_path)
    assert outputs(now) == ["42\n"]
    assert now.replace("42", "41000") == page.read_text()
    page.write_text("```sh\nexit 3\n```\n")
    with pytest.raises(RuntimeError, match="exit 3"):
        build.run(page, tmp_path)
