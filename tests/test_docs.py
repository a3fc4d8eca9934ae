from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
LOG = ROOT / "docs/lab-log.md"  # entries stay as they were written, with the names of their day
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
GALLERY = sorted((ROOT / "docs/gallery").glob("*.md"))
KEPT = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted(set((ROOT / "docs").glob("*.md")) - {LOG}),
    *GALLERY,
]
WIDTH = 100
# Files of ours that a page may name, with a folder before them, and modules that it runs.
FILE = re.compile(
    r"(?<![\w/.<*-])((?:workflows|benchmarks|tests|conf|deploy|cpmm|docs)/[\w./-]*[\w/])(?![\w*<])"
)
MODULE = re.compile(r"python -m (cpmm[\w.]*)")
CHOICE = re.compile(r"\b(preset|sweep|model)=([a-z][a-z0-9_]*)")
EXAMPLES = {"mine"}  # a sweep that the reader writes
GROUPS = {"preset": "preset", "sweep": "sweep", "model": "baselines"}


def each(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def without_code(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def too_wide(page: Path) -> list[str]:
    """Lines of prose above the limit; tables, headings, links and code may be wider."""
    lines = without_code(page).splitlines()
    kept = [line for line in lines if not re.match(r" *\||#|<", line) and "](" not in line]
    return [line for line in kept if len(line) > WIDTH]


def missing_files(text: str) -> list[str]:
    """Files, folders and modules of this repository that a text names and that are not there."""
    modules = [name.replace(".", "/") for name in MODULE.findall(text)]
    found = [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    return found + [
        name
        for name in modules
        if not ((ROOT / f"{name}.py").is_file() or (ROOT / name / "__main__.py").is_file())
    ]


def unknown_choices(text: str) -> list[str]:
    """Presets, sweeps and models that a text names and conf/ does not have."""
    return [
        f"{option}={name}"
        for option, name in CHOICE.findall(text)
        if name not in EXAMPLES | {"cpmm"}
        and not (ROOT / "conf" / GROUPS[option] / f"{name}.yaml").is_file()
    ]


@each([*PAGES, ROOT / "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        found = page.parent / name if name else page
        assert found.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(found), f"{target}: no such heading"


def test_readme_is_short():
    text = README.read_text()
    tables = re.sub(r"\]\([^)]*\)", "]", "\n".join(re.findall(r"^\|.*$", text, re.MULTILINE)))
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 900
    assert len(re.findall(r"\d[\d,.]*", tables)) <= 60, "numbers in tables"


@each(KEPT)
def test_lines_fit_a_screen(page):
    assert not too_wide(page)


@each(KEPT)
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    assert not missing_files(text)
    assert not unknown_choices(text)


def test_pictures_are_small():
    for picture in (ROOT / "docs/images").iterdir():
        assert picture.stat().st_size < 300_000, picture.name


def test_the_checks_see_what_they_are_for(tmp_path):
    page = tmp_path / "page.md"
    wide = "word " * 21
    page.write_text(f"{wide}\n\n| {wide} |\n\n```\n{wide}\n```\n\n# {wide}\n\n[{wide}](x.md)\n")
    assert too_wide(page) == [wide]
    assert missing_files("run `python workflows/gone.py`, `python -m cpmm.gone`, conf/gone/") == [
        "workflows/gone.py",
        "conf/gone/",
        "cpmm/gone",
    ]
    assert not missing_files(
        "`python workflows/trial.py`, `python -m cpmm info`, conf/ood/, a/b.py"
    )
    assert unknown_choices("preset=digits sweep=gone model=vade") == ["sweep=gone"]
