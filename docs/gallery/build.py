"""Run the pages of the gallery, and write what they print and draw: python docs/gallery/build.py.

A page is Markdown. Its ``python`` and ``sh`` blocks run in order, in one namespace and one folder;
a ``text`` block after one holds what it prints, and the pictures that it links are those it writes.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
BLOCK = re.compile(r"```(python|sh)\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
PICTURE = re.compile(r"!\[[^]]*\]\(([\w-]+\.png)\)")


def run(page: Path, folder: Path) -> str:
    """Run a page in a folder and return its text with what the blocks print now.

    Raises:
        RuntimeError: If a command of the shell fails; what a Python block raises goes on.
    """
    names: dict[str, object] = {"__name__": "__main__"}

    def done(block: re.Match[str]) -> str:
        language, code, _ = block.groups()
        said = _shell(code) if language == "sh" else _python(code, names, page.name)
        shown = f"\n```text\n{said}```\n" if said else ""
        return f"```{language}\n{code}```\n{shown}"

    with contextlib.chdir(folder):
        return BLOCK.sub(done, page.read_text(encoding="utf-8"))


def pages() -> Iterator[Path]:
    """Pages of the gallery that hold code."""
    yield from sorted(set(HERE.glob("*.md")) - {HERE / "README.md"})


def _python(code: str, names: dict[str, object], name: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, name, "exec"), names)
    return said.getvalue()


def _shell(code: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["bash", "-euc", code], capture_output=True, text=True, check=False,
        env=os.environ | {"PATH": path},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{code.strip()}: {done.stderr.strip()}")
    return done.stdout


def main() -> None:
    """Write every page anew."""
    for page in pages():
        with tempfile.TemporaryDirectory() as folder:
            text = run(page, Path(folder))
            for name in PICTURE.findall(text):
                shutil.copy(Path(folder, name), HERE / name)
        page.write_text(text, encoding="utf-8")
        print(page.name)


if __name__ == "__main__":
    main()
